"""What a file says about itself: how it was made, how near it is, and a fingerprint of its weights."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import onnx

from pn_compiler.base.versions import versions


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What a file says about itself, besides versions and weights.

    Attributes:
        doc: a sentence or two for people.
        about: key, without ``pn_compiler.``, -> text.
    """

    doc: str = ""
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)


def describe(proto: onnx.ModelProto, description: Description, staged: Path | None) -> None:
    """Writes `description`, versions and the fingerprint of the weights into `proto`.

    Nothing of it depends on when or where the file is made.

    Args:
        staged: where the file will first lie, with its weights beside it; None if they are in `proto`.
    """
    installed = versions()
    proto.producer_name, proto.producer_version = "pn_compiler", installed["pn-compiler"]
    proto.doc_string = description.doc
    about = {
        **description.about,
        "versions": json.dumps(installed),
        "weights_sha256": weights_digest(proto, staged),
    }
    onnx.helper.set_model_props(proto, {f"pn_compiler.{key}": text for key, text in about.items() if text})


def weights_digest(proto: onnx.ModelProto, staged: Path | None = None) -> str:
    """sha256 over the initializers of the graph, by name: name, type, sizes and values of each."""
    digest = hashlib.sha256()
    folder = "" if staged is None else str(staged.parent)
    for tensor in sorted(proto.graph.initializer, key=lambda tensor: str(tensor.name)):
        digest.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)}:".encode())
        digest.update(onnx.numpy_helper.to_array(tensor, base_dir=folder).tobytes())
    return digest.hexdigest()
