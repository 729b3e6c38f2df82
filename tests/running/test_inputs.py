"""Arguments of every form: by name, optional, variable in number, nested."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, ExportError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GAIN = torch.rand(2, 1, 1, 1, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


class Named(Block):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, gain: Tensor | None = None, flip: bool = False
    ) -> Tensor:
        y = self.body(x)
        y = y if mask is None else y * mask
        y = y if gain is None else y * gain
        return y.flip(-1) if flip else y


class AnyNames(Block):
    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        y = self.body(x)
        return y * options["gain"] if options.get("gain") is not None else y


class AnyNumber(Block):
    def forward(self, *images: Tensor) -> list[Tensor]:
        return [self.body(image) for image in images]


class Nested(Block):
    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        image, (gain, _) = batch["image"], batch["gains"]
        return {"map": self.body(image) * gain, "means": (image.mean((1, 2, 3)), None)}


CALLS: list[tuple[type[Block], tuple[Any, ...], dict[str, Any], str]] = [
    (Named, (X,), {}, "pn"),
    (Named, (X,), {"gain": GAIN}, "pn"),
    (Named, (X, None), {"gain": GAIN, "flip": True}, "pn"),
    (Named, (), {"x": X, "mask": GAIN}, "pn"),
    (AnyNames, (X,), {}, "pn"),
    (AnyNames, (X,), {"gain": GAIN}, "pn"),
    (AnyNumber, (X, X + 1), {}, "norm_only"),  # its parts are called twice
    (Nested, ({"image": X, "gains": (GAIN, None)},), {}, "pn"),
]


@pytest.mark.parametrize(("cls", "args", "kwargs", "kind"), CALLS)
def test_conversion_and_export(
    cls: type[Block], args: tuple[Any, ...], kwargs: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    net = randomize_batch_norms(cls()).eval()
    converted = pn_compiler.transform(net, args, example_kwargs=kwargs)
    assert [site.kind for site in pn_compiler.sites(converted)] == [kind]
    plain = pn_compiler.transform(net, args, example_kwargs=kwargs, proxy=False)
    assert_same_outputs(tensors(converted(*args, **kwargs)), tensors(plain(*args, **kwargs)))
    report = pn_compiler.export_onnx(converted, tmp_path / "m.onnx", args, example_kwargs=kwargs)
    assert report.max_error < 1e-5
    assert all(value["shape"][0] == "batch" for value in report.inputs)
    again = pn_compiler.compile(net, tmp_path / "n.onnx", args, example_kwargs=kwargs, dynamic_batch=False)
    assert [value["shape"][0] for value in again.inputs] == [2] * len(report.inputs)


def tensors(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def test_one_tensor_in_two_places_is_two_inputs(tmp_path: Path) -> None:
    net = randomize_batch_norms(AnyNumber()).eval()
    report = pn_compiler.compile(net, tmp_path / "m.onnx", (X, X), dynamic_batch=False)
    assert len(report.inputs) == 2


def test_without_examples_optional_arguments_keep_their_defaults() -> None:
    converted = pn_compiler.transform(Named())
    assert_same_outputs(converted(X, None, flip=False), converted(X))
    with pytest.raises(TypeError, match="argument flip is True, but the model was converted with flip=False"):
        converted(X, flip=True)
    with pytest.raises(TypeError, match="gain"):
        pn_compiler.transform(AnyNames())(X, gain=GAIN)


def test_arguments_of_unknown_number_stay_with_the_model_itself() -> None:
    net = randomize_batch_norms(AnyNumber()).eval()
    converted = pn_compiler.transform(net)
    assert isinstance(converted, AnyNumber)
    assert len(converted(X, X, X)) == 3


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"do not fit Named.forward: too many positional arguments"):
        pn_compiler.transform(Named(), (X, X, X))
    with pytest.raises(ConfigError, match=r"do not fit Named.forward: got an unexpected keyword argument"):
        pn_compiler.compile(Named(), tmp_path / "m.onnx", X, example_kwargs={"scale": GAIN})
    with pytest.raises(ExportError, match="expected a tensor or a tuple with tensors"):
        pn_compiler.export_onnx(Named(), tmp_path / "m.onnx", ())


@pytest.mark.parametrize(
    "options",
    [
        {"example_kwargs": "x"}, {"calibration": 3}, {"input_shape": 5}, {"input_shape": ()},
        {"input_shape": (1, 3, 10**9, 10**9)}, {"target_ort": 1.18}, {"input_names": [1]},
        {"input_names": "x"}, {"distill_steps": "3"}, {"distill_steps": -1}, {"repository": 3}, {"path": 3},
        {"example_inputs": X.to_sparse()}, {"example_inputs": X.to("meta")},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_the_wrong_kind_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        pn_compiler.compile(Named(), **{"path": tmp_path / "m.onnx", **options})


def test_an_eval_of_the_model_that_returns_nothing_or_raises(tmp_path: Path) -> None:
    class Silent(nn.Sequential):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    class Raising(nn.Sequential):
        def eval(self) -> Any:
            raise ValueError("no eval mode")

    parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    images = torch.randn(2, 3, 6, 6)
    pn_compiler.compile(Silent(*parts), tmp_path / "m.onnx", images)
    with pytest.raises(ConfigError, match="no eval mode"):
        pn_compiler.compile(Raising(*parts), tmp_path / "m.onnx", images)


def test_a_batch_of_no_samples_and_sparse_outputs() -> None:
    class Sparse(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = super().forward(x).relu().to_sparse()
            return result

    parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    for images in (torch.randn(0, 3, 6, 6), torch.randn(2, 3, 6, 6)):
        converted = pn_compiler.transform(Sparse(*parts).eval(), images)
        assert "PN212" in {note.code for note in pn_compiler.notes(converted)}
