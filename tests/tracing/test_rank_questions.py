"""Forwards that ask how many dimensions a value has: the example answers, and the graph checks it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.regions.observed_calls import ObservedCalls
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.tracing.networks import IMAGES, Net, by_hand, make

GENERATOR = torch.Generator().manual_seed(1)
OTHERS = [torch.randn(batch, 3, 6, 6, generator=GENERATOR) for batch in (1, 5)]


def transform(net: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """Converted to plain normalizers, which can stand in the place of BatchNorms."""
    return pn_compiler.transform(net, inputs or None, proxy=False, **options)


def codes(converted: nn.Module) -> set[str]:
    return {note.code for note in pn_compiler.notes(converted)}


def _asserts(net: Net, x: Any) -> Any:
    assert x.dim() == 4, "expected images"
    return x * 2


def _broadcast(net: Net, x: Any) -> Any:
    shape = [1] * x.dim()
    shape[1] = -1
    return x * net.scale.view(shape)


def _axes(net: Net, x: Any) -> Any:
    for axis in range(2, x.dim()):
        x = x - 0.5 * x.mean(axis, keepdim=True)
    return x


def _rest(net: Net, x: Any) -> Any:
    n, c, *rest = x.shape
    return x.reshape(n, c, -1).cumsum(2).reshape(n, c, *rest)


def _in_place(net: Net, x: Any) -> Any:
    y = x * 1
    y.unsqueeze_(0)
    return y.squeeze(0) * 2 if y.dim() == 5 else x


def _match(net: Net, x: Any) -> Any:
    match x.dim():
        case 4:
            return x * 2
    return x


def _behind_a_norm(net: Net, x: Any) -> Any:
    y = net.conv(x)
    return x * 2 if y.flatten(2).ndim == 3 else x


QUESTIONS: dict[str, Callable[[Net, Any], Any]] = {
    "dim": lambda net, x: x * 2 if x.dim() == 4 else x,
    "ndim": lambda net, x: x.flatten(2).unflatten(2, x.shape[2:]) * 2 if x.ndim > 2 else x,
    "ndimension": lambda net, x: x * 2 if x.ndimension() == 4 else x,
    "getattr": lambda net, x: x * getattr(x, "ndim"),  # noqa: B009
    "len of shape": lambda net, x: x * 2 if len(x.shape) == 4 else x,
    "len of size()": lambda net, x: x * 2 if len(x.size()) == 4 else x,
    "len of a slice": lambda net, x: x * len(x.shape[2:]),
    "in": lambda net, x: x * 2 if x.dim() in (4, 5) else x,
    "table": lambda net, x: x * {3: 1.0, 4: 2.0}[x.dim()],
    "text": lambda net, x: x * 2 if f"{x.ndim}d" == "4d" else x,
    "mean": lambda net, x: x - x.mean(tuple(range(2, x.dim())), keepdim=True),
    "tuple of shape": lambda net, x: x + x.new_ones(tuple(x.shape)),
    "star of shape": lambda net, x: x + x.new_ones((1, *x.shape[1:])),
    "of an item": lambda net, x: x * 2 if x[0].dim() == 3 else x,
    "of pieces": lambda net, x: x * 2 if x.chunk(3, 1)[0].dim() == 4 else x,
    "of x += 1": lambda net, x: _plus(x) * 2 if _plus(x).dim() == 4 else x,
    "assert": _asserts,
    "[1] * dim": _broadcast,
    "range": _axes,
    "*rest": _rest,
    "in place": _in_place,
    "match": _match,
    "behind a layer": _behind_a_norm,
}


def _plus(x: Any) -> Any:
    y = x.clone()
    y += 1
    return y


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_answered_for_the_example(name: str, nested: bool) -> None:
    net = make(QUESTIONS[name], nested=nested).double()
    converted = transform(net, IMAGES.double(), strict=True)
    assert isinstance(converted, fx.GraphModule)
    assert [site.activation for site in pn_compiler.sites(converted)] == ["relu"]
    assert [note.site for note in pn_compiler.notes(converted) if note.code == "PN124"] == ["0" * nested]
    expected = by_hand(net, converted)
    for images in (IMAGES, *OTHERS):
        assert_same_outputs(converted(images.double()), expected(images.double()))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_question_in_train_mode(momentum: float | None) -> None:
    net = make(lambda net, x: QUESTIONS["dim"](net, net.first(x)), train=True)
    net.first = nn.BatchNorm2d(3, momentum=momentum)  # type: ignore[assignment]
    before = copy.deepcopy(net.state_dict())
    converted = transform(net, IMAGES)
    assert isinstance(converted, fx.GraphModule)
    assert converted.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert_same_outputs(converted(IMAGES), by_hand(net, converted)(IMAGES))


def test_another_number_of_dimensions_is_refused_in_a_call() -> None:
    converted = pn_compiler.transform(make(QUESTIONS["dim"]), IMAGES)
    with pytest.raises(TypeError, match="argument x has 3 dimensions"):
        converted(IMAGES[0])
    folded = pn_compiler.fold(converted)
    with pytest.raises(TypeError, match="argument x has 3 dimensions"):
        folded(IMAGES[0])


def test_nothing_is_checked_if_nothing_is_asked() -> None:
    converted = pn_compiler.transform(make(lambda net, x: x * 2), IMAGES)
    assert isinstance(converted, fx.GraphModule)
    assert "check_shapes" not in str(converted.graph)
    assert "PN124" not in codes(converted)


def test_without_inputs_the_module_stays_whole() -> None:
    net = make(QUESTIONS["dim"])
    converted = transform(net)
    assert type(converted) is Net
    for images in (IMAGES, IMAGES[0]):
        assert_same_outputs(converted(images), by_hand(net, converted)(images))


def _squeezed(net: Net, x: Any) -> Any:
    y = x.mean((2, 3)).squeeze()
    if y.dim() == 1:  # of a single sample
        y = y.unsqueeze(0)
    return x * y[:, :, None, None]


@pytest.mark.parametrize("batch", [1, 2])
def test_what_depends_on_the_batch_is_not_answered(batch: int) -> None:
    net = make(_squeezed)
    converted = transform(net, IMAGES[:batch])
    for images in (IMAGES, *OTHERS):
        assert_same_outputs(converted(images), by_hand(net, converted)(images))


def test_what_depends_on_the_size_of_images_is_not_answered() -> None:
    net = make(lambda net, x: x * 2 if x.mean(3, keepdim=True)[:, :, :1].squeeze(2).dim() == 3 else x)
    assert isinstance(transform(net, IMAGES), fx.GraphModule)
    net = make(lambda net, x: F.pad(x * 2 if x[:, :, 5:].squeeze(2).dim() == 3 else x, (1, 1, 1, 1)))
    converted = transform(net, IMAGES)
    larger = torch.randn(1, 3, 9, 9)
    assert_same_outputs(converted(larger), by_hand(net, converted)(larger))


class Stateful(nn.Module):
    """Counts its calls, and draws with Python and NumPy: a question runs it, and must not show."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        self.seen += 1
        return x + torch.rand(1) * 0


def test_a_question_leaves_no_trace_in_the_model() -> None:
    inner = Stateful()

    class Outer(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: net.inner(x) * 2 if net.inner(x).dim() == 4 else x)
            self.inner = inner

    net = randomize_batch_norms(Outer()).eval()
    state = torch.get_rng_state()
    converted = transform(net, IMAGES)
    assert torch.equal(state, torch.get_rng_state())
    assert not inner.calls
    assert inner.seen == 0
    assert not converted.get_submodule("inner").calls
    assert isinstance(converted, fx.GraphModule)


class Deep(nn.Module):
    """Twelve blocks that each ask: one run answers all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Net(QUESTIONS["dim"]) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.pad(block(x), (1, 1, 1, 1))
        return x


def test_what_does_not_fit_at_other_sizes_is_not_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x)
            self.head = nn.Linear(48, 2)

        def forward(self, x: Any) -> Tensor:
            y = self.head(super().forward(x).flatten(1))
            return y * 2 if y.dim() == 2 else y

    converted = pn_compiler.transform(randomize_batch_norms(Fixed()).eval(), IMAGES)
    assert isinstance(converted, fx.GraphModule)
    assert "reduction dim" not in caplog.text + capfd.readouterr().err


def test_each_layer_runs_once_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from pn_compiler.tracing import traced_ranks

    runs: list[Any] = []
    original = traced_ranks._Run._execute

    def counted(self: Any, node: fx.Node, *more: Any) -> Any:
        runs.append((id(self), node))
        return original(self, node, *more)

    monkeypatch.setattr(traced_ranks._Run, "_execute", counted)
    converted = pn_compiler.transform(randomize_batch_norms(Deep()).eval(), IMAGES)
    assert isinstance(converted, fx.GraphModule)
    assert runs
    assert len(runs) == len(set(runs))
    runs.clear()
    pn_compiler.transform(make(lambda net, x: x * 2), IMAGES)
    assert not runs


# --- several ranks, several inputs -----------------------------------------------------------------------


class Either(nn.Module):
    """BatchNorm1d with a branch for each rank, as PointNet-like networks share it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn, self.out = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = self.bn(y.transpose(1, 2)).transpose(1, 2) if y.dim() == 3 else self.bn(y)
        return self.out(F.relu(y))


class Twice(nn.Module):
    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.either, self.untraceable = Either(), untraceable

    def forward(self, x: Tensor) -> Tensor:
        y = self.either(x).mean(1) + self.either(x.mean(1))
        return -y if self.untraceable and y.sum() > 1e9 else y


@pytest.mark.parametrize("untraceable", [False, True])
def test_a_module_that_is_called_with_several_ranks(untraceable: bool) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(Twice(untraceable)).eval().double()
    points = torch.randn(3, 7, 4, dtype=torch.float64)
    converted = transform(net, points)
    assert isinstance(converted, fx.GraphModule) is not untraceable
    assert_same_outputs(converted(points), by_hand(net, converted)(points))


def test_several_inputs_nested_and_by_name() -> None:
    class Several(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x)

        def forward(self, batch: Any, *, mask: Any = None, scale: float = 1.0) -> Any:  # type: ignore[override]
            x = batch["images"][0] if batch["images"][0].dim() == 4 else batch["images"][0].unsqueeze(0)
            x = x * mask if mask.dim() == 4 else x * mask[:, None, None, None]
            return super().forward(x * scale)

    net = randomize_batch_norms(Several()).eval()
    batch, mask = {"images": [IMAGES]}, torch.rand(2)
    converted = transform(net, batch, example_kwargs={"mask": mask})
    assert isinstance(converted, fx.GraphModule)
    assert_same_outputs(converted(batch, mask=mask), by_hand(net, converted)(batch, mask=mask))
    with pytest.raises(TypeError, match="argument mask has 4 dimensions"):
        converted(batch, mask=mask[:, None, None, None])
    with pytest.raises(TypeError, match="argument batch has 3 dimensions"):
        converted({"images": [IMAGES[0]]}, mask=mask)


def test_what_depends_on_a_number_is_not_answered() -> None:
    class Numbered(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x)

        def forward(self, x: Any, axis: int, scale: float) -> Tensor:  # type: ignore[override]
            y = super().forward(x * scale)
            return y * 2 if x.flatten(axis).dim() == 2 else y

    net = randomize_batch_norms(Numbered()).eval()
    converted = transform(net, IMAGES, 1, 0.5)
    for axis in (1, 2):
        assert_same_outputs(converted(IMAGES, axis, 0.5), by_hand(net, converted)(IMAGES, axis, 0.5))


# --- parts of models that stay whole ---------------------------------------------------------------------


class Whole(nn.Module):
    """Calls parts that ask, and branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(QUESTIONS["dim"]), Net(QUESTIONS["len of shape"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(-x if x.sum() > 1e9 else x)


def test_parts_of_what_stays_whole_know_their_inputs() -> None:
    net = randomize_batch_norms(Whole()).eval().double()
    converted = transform(net, IMAGES.double())
    assert type(converted) is Whole
    assert isinstance(converted.first, fx.GraphModule)
    assert [site.activation for site in pn_compiler.sites(converted)] == ["relu", "relu"]
    assert_same_outputs(converted(IMAGES.double()), by_hand(net, converted)(IMAGES.double()))
    with pytest.raises(TypeError, match="argument x has 3 dimensions"):
        converted(IMAGES[0].double())


def test_calls_are_observed_when_asked_for() -> None:
    net, asked = Twice(untraceable=False).eval(), []

    def inputs() -> Inputs:
        asked.append(1)
        return Inputs((torch.randn(3, 7, 4),))

    calls = ObservedCalls(net, inputs)
    assert not asked
    seen = calls.of("")
    assert seen is not None
    (x,) = seen.args
    assert x.shape == (3, 7, 4)
    assert calls.of("either") is None  # of two ranks
    assert calls.of("nowhere") is None
    assert len(asked) == 1
    assert copy.deepcopy(calls) is calls  # it holds a whole model


# --- where inputs come from ------------------------------------------------------------------------------


def test_inputs_from_calibration_and_from_a_shape(tmp_path: Path) -> None:
    net = make(QUESTIONS["dim"])
    converted = pn_compiler.transform(net, warm_start="calibrate", calibration=[IMAGES, *OTHERS])
    assert isinstance(converted, fx.GraphModule)
    assert "PN124" in codes(converted)
    for options in ({"input_shape": (2, 3, 6, 6)}, {"example_inputs": IMAGES}):
        report = pn_compiler.compile(net, tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
        assert [site.kind for site in report.sites] == ["pn"]
        assert "PN124" in {note.code for note in report.notes}
    net.pretrained_cfg = {"input_size": (3, 6, 6)}  # as timm stores it
    assert [site.kind for site in pn_compiler.compile(net, tmp_path / "m.onnx").sites] == ["pn"]


# --- modules made in the forward -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        lambda net, x: nn.ReLU()(x - 0.1),
        lambda net, x: nn.Sequential(nn.Softplus(), nn.Identity())(x),
        lambda net, x: nn.Flatten(2)(x).view(x.shape),
    ],
)
def test_modules_without_tensors_that_the_forward_makes(before: Callable[[Net, Any], Any]) -> None:
    net = make(before).double()
    converted = transform(net, IMAGES.double())
    assert isinstance(converted, fx.GraphModule)
    assert_same_outputs(converted(IMAGES.double()), by_hand(net, converted)(IMAGES.double()))


def test_layers_with_weights_that_the_forward_makes_stay() -> None:
    net = make(lambda net, x: nn.Conv2d(3, 3, 1)(x))  # drawn anew in each call
    assert type(transform(net)) is Net


# --- pieces ----------------------------------------------------------------------------------------------

PIECES: dict[str, Callable[[Net, Any], Any]] = {
    "split": lambda net, x: torch.cat([F.relu(piece) for piece in x.split(2, 1)], 1),
    "split of torch": lambda net, x: torch.cat([piece * 2 for piece in torch.split(x, [1, 2], 1)], 1),
    "chunk": lambda net, x: torch.cat([*reversed(x.chunk(3, 1))], 1),
    "unbind": lambda net, x: torch.stack([F.relu(piece - 0.1) for piece in x.unbind(1)], 1),
    "len": lambda net, x: x * len(x.unbind(1)),
    "enumerate": lambda net, x: torch.cat([y * i for i, y in enumerate(x.tensor_split(3, 1))], 1),
    "list": lambda net, x: torch.cat(list(x.split(1, 1))[::-1], 1),
    "star": lambda net, x: torch.cat([*x.split(1, 1), x], 1)[:, 1:4],
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_counted(name: str) -> None:
    net = make(PIECES[name]).double()
    converted = transform(net, IMAGES.double(), strict=True)
    assert isinstance(converted, fx.GraphModule)
    for images in (IMAGES, *OTHERS, torch.randn(2, 3, 9, 8)):
        assert_same_outputs(converted(images.double()), by_hand(net, converted)(images.double()))


def test_another_number_of_channels_is_refused_where_pieces_are_counted() -> None:
    net = make(lambda net, x: torch.cat([piece * 2 for piece in x.split(1, 1)], 1)[:, :3])
    converted = transform(net, IMAGES)
    with pytest.raises(TypeError, match="argument x"):
        converted(torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("axis", [0, 2])
def test_pieces_of_what_varies_are_not_counted(axis: int) -> None:
    net = make(lambda net, x: torch.cat([y + y.mean(1, keepdim=True) for y in x.split(1, axis)], axis))
    converted = transform(net, IMAGES)
    for images in (IMAGES, *OTHERS, torch.randn(2, 3, 9, 8)):
        assert_same_outputs(converted(images), by_hand(net, converted)(images))
