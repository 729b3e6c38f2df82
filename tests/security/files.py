"""Small good files, and how to spoil them. A hostile one would create ``canary`` in the current folder."""

import dataclasses
import functools
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.testing import randomize_batch_norms

CANARY = "touch canary"
COMPILE = ("-o", "out.onnx")
LOADS = ""  # what is expected of a good file
ONE_IMAGE = ("--input-shape", "1,3,8,8")


@dataclasses.dataclass(frozen=True)
class Case:
    """A file and what becomes of it.

    Attributes:
        name: of the file.
        content: of the file, or what makes it at a path.
        expected: what the one line of the error matches; `LOADS` if there is none.
        options: of the command.
        task: the same; without running the network, or with.
    """

    name: str
    content: bytes | Callable[[Path], Any]
    expected: str
    options: tuple[str, ...] = ONE_IMAGE
    task: tuple[str, ...] = ("--dry-run",)

    def arguments(self) -> tuple[str, ...]:
        return (self.name, *self.task, *self.options)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomize_batch_norms(net).eval()


def large_network() -> nn.Sequential:
    """With more weights than stay in an ONNX file beside which there is another."""
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()


def saved(value: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **options)
    return content.getvalue()


def changed(change: Callable[[Any], Any]) -> bytes:
    """The network after `change`, which may put anything into its state."""
    net = network()
    change(net)
    return saved(net)


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(contents: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


def pickled(data: bytes) -> bytes:
    """A file of torch.save with this pickle."""
    return packed({"m/data.pkl": data, "m/version": b"3\n", "m/byteorder": b"little"})


def called(name: str, argument: str = CANARY) -> bytes:
    """A pickle that calls the function with the dotted `name`."""
    module, _, attribute = name.rpartition(".")
    text = argument.encode()
    return (
        b"\x80\x02c"
        + f"{module}\n{attribute}\n".encode()
        + b"X"
        + len(text).to_bytes(4, "little")
        + text
        + b"\x85R."
    )


class Twins(nn.Module):
    """Two inputs, one of them in a dictionary; a buffer, a constant and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.ones(1))
        self.scale = torch.arange(4.0)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.bn(self.conv(x + more["a"])) + self.shift
        return y, {"sum": y.flatten(2).sum(-1) * self.scale, "flat": y.reshape(y.shape[0], -1)}


@functools.cache
def program(*, twins: bool = False) -> bytes:
    batch, x = torch.export.Dim("batch", min=2), torch.randn(2, 3, 8, 8)
    model: nn.Module = Twins().eval() if twins else network()
    inputs: tuple[Any, ...] = (x, {"a": x + 1}) if twins else (x,)
    shapes: tuple[Any, ...] = ({0: batch}, {"a": {0: batch}}) if twins else ({0: batch},)
    content = io.BytesIO()
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=shapes), content)
    return content.getvalue()


@functools.cache
def _program_entries(twins: bool) -> dict[str, bytes]:
    return {name.partition("/")[2]: content for name, content in entries(program(twins=twins)).items()}


def reprogrammed(change: Callable[[dict[str, Any]], Any], *, twins: bool = False) -> bytes:
    """The exported program after `change` of its entries, those of JSON parsed."""
    contents: dict[str, Any] = {}
    for name, content in _program_entries(twins).items():
        contents[name] = json.loads(content) if name.endswith(".json") else content
    change(contents)
    packing = {
        f"p/{name}": content if isinstance(content, bytes) else json.dumps(content).encode()
        for name, content in contents.items()
    }
    return packed(packing)
