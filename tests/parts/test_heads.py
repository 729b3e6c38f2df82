"""Modules that a user puts into a converted network get what the network would give them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import TraceError
from pn_compiler.testing import assert_same_outputs
from tests.parts.networks import COPIES, IMAGES, converted

X = IMAGES.double()

#: name of a network, path of its last linear layer, of what is put in its place: itself, or its container
HEADS: list[tuple[str, str, str]] = [
    ("mobilenet_v3_small", "classifier.3", "classifier.3"),
    ("resnet10", "fc", "fc"),
    ("timm/test_efficientnet", "classifier", "classifier"),
]
SMALL = [
    ("backbone", "heads.main", "heads.main"),
    ("classifier", "classifier.1", "classifier"),
    ("sequential", "8", "8"),
]


def value_before(model: nn.Module, path: str) -> Tensor:
    """The input of the linear layer at `path`: the value that its weight and bias are for."""
    old = model.get_submodule(path)
    expected = model(X)
    model.set_submodule(path, nn.Identity())
    x: Tensor = model(X)
    model.set_submodule(path, old)
    assert_same_outputs(F.linear(x, old.weight, old.bias), expected, tolerance=1e-9)
    assert_same_outputs(model(X), expected, tolerance=1e-9)
    return x


@pytest.mark.parametrize(
    ("name", "linear", "place", "again"),
    [*((*head, "itself") for head in HEADS), *((*head, again) for head in SMALL for again in COPIES)],
)
def test_a_head_gets_the_value_of_the_network(name: str, linear: str, place: str, again: str) -> None:
    model = COPIES[again](converted(name))
    x = value_before(model, linear)
    torch.manual_seed(1)
    for head in (
        nn.Linear(x.shape[1], 7),
        nn.Sequential(nn.LayerNorm(x.shape[1]), nn.Linear(x.shape[1], 4), nn.ReLU()),
        nn.Identity(),
    ):
        head.double()
        model.set_submodule(place, head)
        assert_same_outputs(model(X), head(x), tolerance=1e-9)
        assert model.get_submodule(place) is head


def test_a_head_in_a_container_by_index_and_key() -> None:
    model = converted("classifier")
    x = value_before(model, "classifier.1")
    model.classifier[-1] = head = nn.Linear(16, 7).double()
    assert_same_outputs(model(X), head(x), tolerance=1e-9)

    model = converted("backbone")
    x = value_before(model, "heads.main")
    model.heads["main"] = head = nn.Linear(12, 7).double()
    assert_same_outputs(model(X), head(x), tolerance=1e-9)


def test_a_new_head_trains_and_exports(tmp_path: Path) -> None:
    model = converted("classifier")
    model.float().classifier[-1] = nn.Linear(16, 7)
    model(IMAGES).square().mean().backward()
    assert model.classifier[-1].weight.grad is not None
    report = pn_compiler.export_onnx(model, tmp_path / "model.onnx", IMAGES)
    assert report.path is not None


def test_compiled_before_it_was_called() -> None:
    model = converted("classifier")
    x = value_before(model, "classifier.1")
    model.classifier[-1] = head = nn.Linear(16, 7).double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_outputs(compiled(X), head(x), tolerance=1e-9)


def test_a_block_in_the_middle() -> None:
    model = converted("resnet10")
    before = pn_compiler.features(model, ["layer3"])(X)["layer3"]
    model.layer4 = layer = nn.Conv2d(256, 512, 1).double()
    assert_same_outputs(model(X), model.fc(layer(before).mean((2, 3))), tolerance=1e-9)


def test_appended_and_deleted_children_count() -> None:
    model = converted("backbone")
    x = pn_compiler.features(model, ["blocks.1"])(X)["blocks.1"]
    weight, bias = model.heads["main"].weight, model.heads["main"].bias
    model.blocks.append(extra := nn.Conv2d(12, 12, 1).double())
    assert_same_outputs(model(X), F.linear(extra(x).mean((2, 3)), weight, bias), tolerance=1e-9)
    del model.blocks[2]
    assert_same_outputs(model(X), F.linear(x.mean((2, 3)), weight, bias), tolerance=1e-9)


def test_what_was_made_for_another_place_is_refused() -> None:
    model = converted("backbone")
    del model.blocks[0]  # the second moves to the place of the first
    with pytest.raises(TraceError, match="PN217"):
        model(X)


def test_the_activation_of_a_site_cannot_be_replaced_unnoticed() -> None:
    model = converted("classifier")
    model.features[0][2] = nn.GELU()
    with pytest.raises(TraceError, match="PN215"):
        model(X)
