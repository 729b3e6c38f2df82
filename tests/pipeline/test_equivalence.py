"""What is traced is compared with the model as the user brought it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, TraceError, VerificationError
from pn_compiler.pipeline.equivalence import (
    ChaoticOutputsError,
    check_equivalent,
    largest_difference,
    likely_cause,
)
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolution, BatchNorm, ReLU, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def tail(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.bn(self.conv(x))))

    def forward(self, x: Tensor) -> Any:
        return self.tail(x)


class AsksProxy(Net):
    """Looks at the attributes of the proxy while it is traced: what no tracer notices."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.out(y * (1.0 if vars(y) else 0.5))


def ready(net: nn.Module) -> nn.Module:
    return randomize_batch_norms(net).eval()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = AsksProxy()
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_transform_refuses_without_strict_and_names_the_first_module() -> None:
    with pytest.raises(
        TraceError, match=r"output that differs is that of body\.out .*inputs differ"
    ) as error:
        pn_compiler.transform(ready(Inner()), X)
    assert "Look at body (AsksProxy): it looks at the attributes of a value" in str(error.value)


def test_keeping_the_named_module_whole_mends_it() -> None:
    model = ready(Inner())
    converted = pn_compiler.transform(model, X, leaves=["body"])
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]


def test_wherever_inputs_are_known(tmp_path: Path) -> None:
    model, path = ready(Inner()), tmp_path / "m.onnx"
    with pytest.raises(TraceError, match="something else"):
        pn_compiler.compile(model, path, input_shape=(2, 3, 8, 8))
    assert not path.exists()
    with pytest.raises(TraceError, match="something else"):
        pn_compiler.transform(model, warm_start="calibrate", calibration=[X])


def test_a_file_is_compared_with_the_model_itself_not_with_a_copy(tmp_path: Path) -> None:
    class Copied(Net):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            other = Copied()
            other.load_state_dict(self.state_dict())
            nn.init.zeros_(other.out.weight)
            return other.eval()

    with pytest.raises(VerificationError):
        pn_compiler.export_onnx(ready(Copied()), tmp_path / "m.onnx", X)
    assert not (tmp_path / "m.onnx").exists()


class FarBranch(Net):
    """Differs from its trace only where activations are large."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.out(y * (1.0 if vars(y) or not (y.abs() > 40).any() else 0.5))


def test_differences_beyond_the_example_are_found() -> None:
    model = ready(FarBranch())
    with pytest.raises(TraceError, match="on scaled copies of the example inputs"):
        pn_compiler.transform(model, X)


def test_an_example_that_does_not_run_is_told_with_the_models_own_message() -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1:] != (3, 8, 8):
                raise ValueError("images of 8 by 8 pixels, please")
            return self.tail(x)

    for call in (
        lambda: pn_compiler.transform(ready(Picky()), torch.randn(2, 3, 9, 9), leaves=[""]),
        lambda: pn_compiler.transform(ready(Net()), torch.randn(2, 4, 8, 8)),
    ):
        with pytest.raises(ConfigError, match="does not run on the example inputs"):
            call()


def test_values_that_the_model_refuses_are_not_tried_on_the_graph() -> None:
    class Ranged(Net):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.abs().max() < 50, "normalized images only")
            return self.tail(x)

    assert pn_compiler.sites(pn_compiler.transform(ready(Ranged()), X))


@pytest.mark.parametrize("given", ["args", "kwargs", "calibration", "compile"])
def test_the_callers_inputs_are_never_written_to(given: str, tmp_path: Path) -> None:
    class Scales(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(x.mul_(1.5))

    model, x = ready(Scales()), X.clone()
    if given == "args":
        pn_compiler.transform(model, x)
    elif given == "kwargs":
        pn_compiler.transform(model, example_kwargs={"x": x})
    elif given == "calibration":
        pn_compiler.transform(model, warm_start="calibrate", calibration=[x])
    else:
        pn_compiler.compile(model, tmp_path / "m.onnx", x)
    assert torch.equal(x, X)


def test_the_model_is_left_as_it_was() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.tail(x)

    model = ready(Counts()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    pn_compiler.transform(model, X)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.calls == 0
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_branch_on_training_is_compared_in_train_mode() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.tail(x)
            return (y, y.mean()) if self.training else y

    for mode in (True, False):
        converted = pn_compiler.transform(ready(Auxiliary()).train(mode), X)
        assert "PN110" in {note.code for note in pn_compiler.notes(converted)}


def test_an_example_too_small_for_train_mode_is_noted() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(4, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Any:
            y = self.bn(self.linear(x))
            return (y, y.mean()) if self.training else y

    converted = pn_compiler.transform(Flat(), torch.randn(1, 4))  # one value per channel
    assert "PN211" in {note.code for note in pn_compiler.notes(converted)}
    assert "PN211" not in {
        note.code for note in pn_compiler.notes(pn_compiler.transform(Flat(), torch.randn(2, 4)))
    }


def test_without_inputs_the_notes_say_that_nothing_was_compared() -> None:
    codes = {note.code for note in pn_compiler.notes(pn_compiler.transform(ready(Net())))}
    assert "PN211" in codes
    codes = {note.code for note in pn_compiler.notes(pn_compiler.transform(ready(Net()), X))}
    assert "PN211" not in codes


def test_a_dtype_that_is_written_in_is_compared_in_it() -> None:
    class Float(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(x.float()).float()

    model = ready(Float())
    other = copy.deepcopy(model)
    check_equivalent(model, other, Inputs((X,)))
    nn.init.constant_(other.bn.bias, 3.0)  # type: ignore[arg-type,union-attr]
    with pytest.raises(TraceError, match=r"output that differs is that of bn"):
        check_equivalent(model, other, Inputs((X,)))


def test_likely_causes() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x
            y /= 2
            return x

    class Types(nn.Module):
        def forward(self, x: Any) -> Any:
            return x if isinstance(x, Tensor) else x[0]

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(1)

    class Renorm(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data / 2
            return super().forward(x)

    hooked = nn.Conv2d(3, 3, 1)
    hooked.register_forward_hook(lambda m, i, o: o)
    assert "type" in likely_cause(Types())
    assert "random" in likely_cause(Noise())
    assert "rewrites" in likely_cause(Renorm(3, 3, 1))
    assert "hook" in likely_cause(hooked)
    assert "in place" in likely_cause(InPlace())
    assert "attributes" in likely_cause(AsksProxy())


NAN = float("nan")


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN]), float("inf")),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), float("inf")),
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]), 1.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), float("inf")),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, float("inf")),
        ((torch.ones(2),), (torch.ones(3),), float("inf")),
        ((torch.ones(2), 3), (torch.ones(2), 4), float("inf")),
        ((torch.ones(2), True), (torch.ones(2), True), 0.0),
        (torch.ones(0, 3), torch.ones(0, 3), 0.0),
    ],
)  # fmt: skip
def test_largest_difference(actual: Any, expected: Any, difference: float) -> None:
    assert largest_difference(actual, expected) == difference


def test_a_chaotic_network_is_reported_as_such_and_not_refused() -> None:
    class Chaotic(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y = torch.sigmoid(self.out(0.5 * y * (1 + torch.erf(y / 2**0.5))))
            for _ in range(60):
                y = 3.99 * y * (1 - y)
            return y

    converted = pn_compiler.transform(ready(Chaotic()), X)
    assert "PN211" in {note.code for note in pn_compiler.notes(converted)}


class AlmostConstant(nn.Module):
    """A BatchNorm over values that differ by `spread` only, behind an operator whose last digits vary."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.bn, self.pattern = nn.BatchNorm2d(3, affine=False), 1 + spread * torch.cos(X.double() * 1e3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.sigmoid(x * 0 + 1.1) * self.pattern)


@pytest.mark.parametrize(
    ("spread", "error"), [(-4e-16, ChaoticOutputsError), (-4e-14, TraceError), (-1e-9, TraceError)]
)
def test_rounding_inside_a_network_explains_what_is_as_small_as_it(
    spread: float, error: type[Exception]
) -> None:
    """In train mode the output is nothing but last digits, whatever the input: only more counts."""
    model, graph = AlmostConstant(4e-16), AlmostConstant(spread)
    with pytest.raises(error):
        check_equivalent(model.train(), graph.train(), Inputs((X.double(),)), own_modes=True)
