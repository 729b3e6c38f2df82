"""A BatchNorm with dropout and activation in it, called by code that cannot be traced, keeps all of them."""

import copy
import pickle
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

X = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fused(**options: Any) -> nn.Module:
    zoo.timm()
    from timm.layers import BatchNormAct2d

    module: nn.Module = BatchNormAct2d(8, **options)
    return module


class Opaque(nn.Module):
    """A branch that depends on values keeps it whole."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.c, self.b, self.o = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.b(self.c(x))) if x.mean() < 1e9 else x


def make(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Opaque(fused(**options))).double().eval()


def by_hand(net: Any, converted: Any, act: nn.Module, x: Tensor = X) -> Tensor:
    normal = F.group_norm(net.c(x), converted.b.num_groups, converted.b.weight, converted.b.bias, 1e-5)
    result: Tensor = net.o(act(normal))
    return result


ACTS = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky": nn.LeakyReLU, "none": nn.Identity}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_the_activation_runs(act: str, given: bool) -> None:
    net = make(act_layer=ACTS[act], inplace=False)
    converted = pn_compiler.transform(net, X if given else None, norm="layer")
    torch.testing.assert_close(converted(X), by_hand(net, converted, ACTS[act]()))
    assert [(s.name, s.kind) for s in pn_compiler.sites(converted)] == [("b", "norm_only")]
    assert {"b.weight", "b.bias"} <= converted.state_dict().keys()
    assert not any("running" in name or name.startswith("b_") for name in converted.state_dict())


def test_parameters_of_the_activation_keep_their_names() -> None:
    net = make(act_layer=nn.PReLU, inplace=False)
    converted = pn_compiler.transform(net, X, norm="layer")
    assert torch.equal(converted.get_parameter("b.act.weight"), net.get_parameter("b.act.weight"))
    torch.testing.assert_close(converted(X), by_hand(net, converted, net.get_submodule("b.act")))


def test_dropout_stays_between() -> None:
    net = make(drop_layer=nn.Dropout).train()
    converted = pn_compiler.transform(net, X, norm="layer", proxy=False)
    torch.manual_seed(1)
    actual = converted(X)
    torch.manual_seed(1)
    expected = by_hand(net, converted, nn.Sequential(nn.Dropout(), nn.ReLU()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"drop_layer": nn.Dropout}])
def test_proxy_normalization_takes_the_activation_in(options: dict[str, Any]) -> None:
    converted: Any = pn_compiler.transform(make(**options), X, warm_start="none")
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    site = copy.deepcopy(converted.b)
    site.following = ()
    torch.testing.assert_close(converted(X), converted.o(site(converted.c(X))))
    dropped = int("drop_layer" in options)
    assert sum(isinstance(module, nn.Dropout) for module in converted.b.modules()) == dropped


def test_a_refused_one_stays_as_it_is() -> None:
    net: Any = make()
    net.b.running_var[0] = float("nan")
    converted: Any = pn_compiler.transform(net)
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN109"]
    assert type(converted.b) is type(net.b)
    net.b.running_var[0] = converted.b.running_var[0] = 1.0
    torch.testing.assert_close(converted(X), net(X))


def test_what_is_made_of_it_has_the_activation() -> None:
    net = make()
    converted = pn_compiler.transform(net, X, norm="layer")
    expected = by_hand(net, converted, nn.ReLU())
    frozen, _ = pn_compiler.freeze_statistics(converted, [X], budget=0.0)
    for again in (
        copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), pn_compiler.fold(converted), frozen,
    ):  # fmt: skip
        torch.testing.assert_close(again(X), expected)


def test_checkpoints_of_the_original_fit() -> None:
    net, other = make(act_layer=nn.PReLU), make(act_layer=nn.PReLU)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(tensor * 1.25)
    state = pn_compiler.convert_state_dict(other.state_dict(), pn_compiler.transform(net, X))
    expected = pn_compiler.transform(other, X).state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name])


def test_calibration_fits_the_norm_alone() -> None:
    net = make()
    options: dict[str, Any] = {"norm": "layer", "warm_start": "calibrate", "calibration": [X]}
    converted = pn_compiler.transform(net, X, **options)
    plain = make(act_layer=nn.Identity)
    plain.load_state_dict(net.state_dict(), strict=False)
    rectified = nn.Sequential(plain.get_submodule("c"), nn.Sequential(plain.get_submodule("b"), nn.ReLU()))
    reference = nn.Sequential(rectified, plain.get_submodule("o"))
    expected = pn_compiler.transform(reference, X, proxy=False, **options)
    torch.testing.assert_close(
        converted.get_parameter("b.weight"), expected.get_parameter("0.1.0.weight"), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(converted(X), by_hand(net, converted, nn.ReLU()))


def test_the_file_has_the_activation(tmp_path: Path) -> None:
    class Loop(nn.Module):
        """Whole for its mode, which an export can follow."""

        def __init__(self) -> None:
            super().__init__()
            self.c, self.b, self.o = nn.Conv2d(3, 8, 3), fused(), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.b(self.c(x))
            return self.o(y)

    net = randomize_batch_norms(Loop()).eval()
    converted = pn_compiler.transform(net, X.float(), norm="layer")
    assert isinstance(converted, Loop)
    pn_compiler.export_onnx(converted, tmp_path / "net.onnx", X.float())
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": X.float().numpy()})
    torch.testing.assert_close(
        torch.from_numpy(actual), by_hand(net, converted, nn.ReLU(), X.float()), rtol=1e-4, atol=1e-5
    )
