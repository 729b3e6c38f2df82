"""Tensors that take long to compute, cached between runs in the user's cache folder."""

import hashlib
import io
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import glyphs
from pn_compiler.base.files import write_atomically

Tensors = dict[str, Tensor]


def cached(kind: str, name: str, source: str, make: Callable[[], Tensors]) -> Tensors:
    """Returns the result of `make`, computed once for each `source`.

    Args:
        kind: folder of the cache, such as "networks".
        name: beginning of the file's name.
        source: all that the result depends on: code and settings. Another source is another file.
        make: called if there is no such file. If it is interrupted, nothing is left behind.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = glyphs.cache_folder().parent / kind / f"{name.replace(' ', '_')}-{digest}.pt"
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(made, content)
        write_atomically(path, content.getvalue())
    stored: Tensors = torch.load(path, weights_only=True)
    return stored
