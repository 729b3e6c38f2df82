"""What `benchmarks.latency` compares: one network, exported in several ways."""

import dataclasses
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pn_compiler
from benchmarks.networks import UNet
from pn_compiler.export import DEFAULT_OPSET
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

#: makes a file of the network with a name, for images of a size in batches of a size
Variant = Callable[[str, int, int], bytes]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = UNet(classes=11) if name == "unet" else zoo.torchvision().models.get_model(name, weights=None)
    return randomize_batch_norms(network).eval()


def batch_norm(name: str, pixels: int, batch: int = 1) -> bytes:
    """As torch exports it; onnxruntime folds the normalization when it loads the file."""
    return _plain_export(build(name), image(name, pixels, batch), DEFAULT_OPSET)


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """What `torch.onnx.export` makes of the converted network, without any rewrite of ours.

    Attributes:
        proxy: with proxy normalization, computed from its parameters in each run; else normalizers alone.
        opset_version: of the file.
    """

    proxy: bool
    opset_version: int = DEFAULT_OPSET

    def __call__(self, name: str, pixels: int, batch: int = 1) -> bytes:
        shape = image(name, pixels, batch)
        converted = pn_compiler.transform(build(name), shape, proxy=self.proxy, warm_start="none")
        return _plain_export(converted.eval(), shape, self.opset_version)


def _plain_export(network: nn.Module, shape: Tensor, opset_version: int) -> bytes:
    program = torch.onnx.export(network, (shape,), dynamo=True, opset_version=opset_version, verbose=False)
    assert program is not None
    content = io.BytesIO()
    program.save(content)
    return content.getvalue()


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """What pn_compiler makes of it, for any batch size.

    Attributes:
        options: of `pn_compiler.transform`.
        export: options of `pn_compiler.export_onnx`.
    """

    options: Mapping[str, Any]
    export: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, pixels: int, batch: int = 1) -> bytes:
        shape = image(name, pixels)
        return _exported(pn_compiler.transform(build(name), shape, **self.options), shape, self.export)


def _exported(network: nn.Module, shape: Tensor, options: Mapping[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        pn_compiler.export_onnx(network, path, shape, **options)  # verified, too
        return path.read_bytes()


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """All statistics constant, for any batch size; options as for `Compiled`."""

    options: Mapping[str, Any]
    export: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, pixels: int, batch: int = 1) -> bytes:
        converted = pn_compiler.transform(build(name), **self.options)
        samples = image(name, 64, batch=4)  # what the constants are does not matter
        frozen, report = pn_compiler.freeze_statistics(converted, samples)
        assert report.frozen == len(report.sites)
        return _exported(frozen, image(name, pixels), self.export)


def image(name: str, pixels: int, batch: int = 2) -> Tensor:
    """An input of the network with that name."""
    channels = 1 if name == "unet" else 3
    return torch.randn(batch, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))


#: what is compared; the first is what the others are measured by
MODES: dict[str, dict[str, Variant]] = {
    "exact": {
        "BatchNorm": batch_norm,
        "normalizer, plain export": Plain(proxy=False),
        "the same, opset 24": Plain(proxy=False, opset_version=24),
        "normalizer + PN, plain export": Plain(proxy=True),
        "pn_compiler, PN everywhere": Compiled({"warm_start": "none"}),
        "pn_compiler, after a warm start": Compiled({}),
        "ort-cpu, PN everywhere": Compiled({"warm_start": "none"}, {"target": "ort-cpu"}),
        "ort-cpu, after a warm start": Compiled({}, {"target": "ort-cpu"}),
        "openvino, after a warm start": Compiled({}, {"target": "openvino"}),
        "cuda, after a warm start": Compiled({}, {"target": "cuda"}),
        "cuda, float16": Compiled({}, {"target": "cuda", "dtype": "float16"}),
        "tensorrt, after a warm start": Compiled({}, {"target": "tensorrt"}),
    },
    "static": {
        "BatchNorm": batch_norm,
        "warm start": Frozen({}),
        "PN everywhere": Frozen({"warm_start": "none"}),
        "PN everywhere, reference padding": Frozen({"warm_start": "none", "proxy_padding": "output"}),
    },
}

#: variants that are timed in one runtime only
RUNTIME_OF = {
    "ort-cpu, PN everywhere": "onnxruntime",
    "ort-cpu, after a warm start": "onnxruntime",
    "openvino, after a warm start": "OpenVINO",
    "cuda, after a warm start": "CUDA",
    "cuda, float16": "CUDA",
    "tensorrt, after a warm start": "TensorRT",
}

#: what the name of a variant stands for, for a reader of a plot
DESCRIPTIONS = {
    "BatchNorm": "BatchNorm, folded into the convolutions",
    "normalizer, plain export": "LayerNorm without proxy normalization, as torch.onnx writes it",
    "the same, opset 24": "the same in opset 24",
    "normalizer + PN, plain export": "LayerNorm + proxy normalization, as torch.onnx writes it",
    "pn_compiler, PN everywhere": "compiled for any runtime, proxy normalization at every activation",
    "pn_compiler, after a warm start": "compiled for any runtime, from a trained network",
    "ort-cpu, PN everywhere": "compiled for onnxruntime on CPUs, proxy normalization at every activation",
    "ort-cpu, after a warm start": "compiled for onnxruntime on CPUs, from a trained network",
    "openvino, after a warm start": "compiled for OpenVINO, from a trained network",
    "cuda, after a warm start": "compiled for onnxruntime on a GPU, from a trained network",
    "cuda, float16": "the same in float16",
    "tensorrt, after a warm start": "compiled for TensorRT, from a trained network",
    "warm start": "all statistics constant, from a trained network",
    "PN everywhere": "all statistics constant, proxy normalization at every activation",
    "PN everywhere, reference padding": "the same, padded as in the reference implementation",
}
