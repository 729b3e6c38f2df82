"""Outputs that vary from call to call, and code that asks who runs it: a graph does as an eager call."""

import array
import collections
import contextlib
import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.errors import TraceError, VerificationError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A BatchNorm in front of `behind`, whatever that does."""

    def __init__(self, behind: Callable[["Net", Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.behind = behind

    def forward(self, x: Any) -> Any:
        return self.behind(self, F.relu(self.bn(self.conv(x))))


def make(behind: Callable[[Net, Any], Any], *, nested: bool, **state: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net(behind)
    vars(net).update(state)
    return randomize_batch_norms(nn.Sequential(net, nn.Conv2d(4, 3, 1)) if nested else net).eval()


def notes(converted: nn.Module, *codes: str) -> list[tuple[str, str]]:
    return [(note.code, note.site) for note in pn_compiler.notes(converted) if note.code in codes]


COUNT, GENERATOR = itertools.count(1), (i for i in range(1, 10**6))


class Counting(Net):
    steps = itertools.count(1)


def _first(iterator: Iterator[int]) -> int:
    for value in iterator:
        return value
    raise StopIteration


def _zipped(net: Net, x: Any) -> Any:
    a, _ = next(net.state)
    return x * a


def _written(net: Net, x: Any) -> Any:
    net.state[0] = net.state[0] % 7 + 1
    return x * float(net.state[0])


def _local(net: Net, x: Any) -> Any:
    TLS.count = getattr(TLS, "count", 0) + 1
    return x * TLS.count


TLS = threading.local()

#: what a graph would repeat for ever, and is seen while it is traced
SEEN: dict[str, tuple[Callable[[Net, Any], Any], Callable[[], Any]]] = {
    "count": (lambda net, x: x * next(net.state), lambda: itertools.count(1)),
    "cycle": (lambda net, x: x * next(net.state), lambda: itertools.cycle([1, 2, 3, 5, 7, 11, 13])),
    "iterator of a list": (lambda net, x: x * next(net.state), lambda: iter(list(range(1, 99)))),
    "range": (lambda net, x: x * _first(net.state), lambda: iter(range(1, 99))),
    "zip": (_zipped, lambda: zip(range(1, 99), range(99), strict=False)),
    "map": (lambda net, x: x * next(net.state), lambda: map(abs, range(1, 99))),
    "in a list": (lambda net, x: x * next(net.state[0]), lambda: [itertools.count(1)]),
    "global count": (lambda net, x: x * next(COUNT), lambda: None),
    "global generator": (lambda net, x: x * _first(GENERATOR), lambda: None),
    "numpy": (_written, lambda: np.ones(3)),
    "bytearray": (_written, lambda: bytearray(b"\1\1")),
    "array": (_written, lambda: array.array("d", [1.0])),
    "deque": (lambda net, x: x * (net.state.append(1) or len(net.state)), collections.deque),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", SEEN)
def test_python_state_keeps_its_module_whole(name: str, nested: bool) -> None:
    behind, state = SEEN[name]
    net = make(behind, nested=nested, state=state())
    converted = pn_compiler.transform(net)
    path = "0" * nested
    assert ("PN118", "" if name.startswith("global") else path) in notes(converted, "PN118")
    inner = converted.get_submodule(path)
    assert type(inner) is Net
    with torch.no_grad():  # as the original would: another factor in each call
        first, *others = [inner(IMAGES) for _ in range(3)]
    factors = [float((other / first).nanmedian()) for other in others]
    assert_same_outputs(others[0], first * factors[0])
    assert len({1.0, *(round(factor, 4) for factor in factors)}) == 3


def test_state_of_a_class_keeps_its_module_whole() -> None:
    net = randomize_batch_norms(Counting(lambda net, x: x * next(net.steps))).eval()
    assert notes(pn_compiler.transform(net), "PN118") == [("PN118", "")]


def test_iterators_of_the_forward_itself_are_traced() -> None:
    net = make(lambda net, x: x * next(iter([2, 3])) * sum(zip([1], [2], strict=True), ())[1], nested=False)
    converted = pn_compiler.transform(net, IMAGES)
    assert isinstance(converted, fx.GraphModule)
    assert not notes(converted, "PN118", "PN125")


def test_arrays_are_as_they_were_behind_the_trace() -> None:
    for state in (np.arange(1.0, 5.0), bytearray(b"\1\2"), array.array("d", [1.0, 2.0])):
        kept = copy.deepcopy(state)
        net = make(lambda net, x: x, nested=False)
        net.behind = lambda inner, x, state=state: _written_into(state, x)  # type: ignore[assignment]
        pn_compiler.transform(net)
        assert list(state) == list(kept)


def _written_into(state: Any, x: Any) -> Any:
    state[0] = state[0] + 1
    return x * float(state[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["count", "global generator", "numpy"])
def test_no_file_of_outputs_that_vary(tmp_path: Path, name: str, nested: bool) -> None:
    behind, state = SEEN[name]
    net, path = make(behind, nested=nested, state=state()), tmp_path / "m.onnx"
    with pytest.raises(VerificationError):
        pn_compiler.compile(net, path, IMAGES)
    converted = pn_compiler.transform(net, IMAGES)
    with pytest.raises(VerificationError):
        pn_compiler.export_onnx(converted, path, IMAGES)
    assert not path.exists()


def test_varying_outputs_are_a_refusal_with_a_code(tmp_path: Path) -> None:
    behind, state = SEEN["count"]
    net = make(behind, nested=True, state=state())
    assert notes(pn_compiler.transform(net, IMAGES), "PN125") == [("PN125", "0")]
    with pytest.raises(pn_compiler.base.errors.RefusedError, match="PN125"):
        pn_compiler.transform(net, IMAGES, strict=True)
    with pytest.raises(VerificationError, match="PN125"):
        pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES)
    report = pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, verify=False)
    assert "PN125" in {note.code for note in report.notes}
    assert "verified" not in str(report).splitlines()[-1]


#: what no watch sees: only the comparison does
UNSEEN: dict[str, Callable[[Net, Any], Any]] = {
    "thread": _local,
    "clock": lambda net, x: x * (1 + time.perf_counter_ns() % 1_000_003 / 1e6),  # far apart in any two calls
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_only_the_comparison_shows_is_an_error(tmp_path: Path, name: str, nested: bool) -> None:
    net = make(UNSEEN[name], nested=nested)
    with pytest.raises(TraceError, match="vary from call to call"):
        pn_compiler.transform(net, IMAGES)
    with pytest.raises(TraceError, match="vary from call to call"):
        pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES)
    if nested:  # as the message says
        converted = pn_compiler.transform(net, IMAGES, leaves=["0"])
        assert notes(converted, "PN125") == [("PN125", "0")]
        with pytest.raises(VerificationError, match="PN125"):
            pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, leaves=["0"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "behind",
    [
        lambda net, x: x + torch.randn(1, 4, 1, 1),
        lambda net, x: x + torch.rand_like(x),
        lambda net, x: x + torch.bernoulli(torch.sigmoid(x)),
        lambda net, x: F.dropout(x, 0.5, training=True),
        lambda net, x: x * float(np.random.rand()),  # noqa: NPY002
    ],
)
def test_random_networks_give_no_file(tmp_path: Path, behind: Callable[[Net, Any], Any]) -> None:
    with pytest.raises(VerificationError):
        pn_compiler.compile(make(behind, nested=False), tmp_path / "m.onnx", IMAGES)
    assert not list(tmp_path.iterdir())


# --- who runs it -----------------------------------------------------------------------------------------

WHO: dict[str, Callable[[], bool]] = {
    "fx": torch.fx._symbolic_trace.is_fx_tracing,
    "fx symbolic": torch.fx._symbolic_trace.is_fx_symbolic_tracing,
    "compiler": torch.compiler.is_compiling,
    "dynamo": torch.compiler.is_dynamo_compiling,
    "exporting": torch.compiler.is_exporting,
    "jit tracing": torch.jit.is_tracing,
    "jit scripting": torch.jit.is_scripting,
    "onnx": torch.onnx.is_in_onnx_export,
}


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("name", WHO)
def test_the_answer_of_an_eager_call_is_traced(name: str, untraceable: bool) -> None:
    asks = WHO[name]

    def behind(net: Net, x: Any) -> Any:
        y = x * 2 if asks() else x * 3
        return -y if untraceable and y.sum() > 1e9 else y

    net = make(behind, nested=False)
    converted = pn_compiler.transform(net, IMAGES, proxy=False, leaves=[""] if untraceable else [])
    by_hand = copy.deepcopy(net)
    by_hand.bn = copy.deepcopy(converted.get_submodule("bn"))
    assert_same_outputs(converted(IMAGES), by_hand(IMAGES))
    assert isinstance(converted, fx.GraphModule) is not untraceable
    assert not asks()


@pytest.mark.parametrize("name", ["compiler", "exporting", "onnx"])
def test_a_file_never_has_the_branch_of_the_exporter(tmp_path: Path, name: str) -> None:
    asks, path = WHO[name], tmp_path / "m.onnx"

    def behind(net: Net, x: Any) -> Any:
        return x * 2 if asks() else x * 3

    pn_compiler.compile(make(behind, nested=False), path, IMAGES)  # the graph has the eager branch
    path.unlink()
    with contextlib.suppress(VerificationError):  # what stays whole may be seen by the exporter: no file then
        pn_compiler.compile(make(behind, nested=True), path, IMAGES, leaves=["0"])
        _check(path, make(behind, nested=True))
    assert name == "onnx" or not path.exists()


def _check(path: Path, net: nn.Module) -> None:
    import onnxruntime

    converted = pn_compiler.transform(net, IMAGES, leaves=["0"]).eval()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), converted(IMAGES), rtol=1e-3, atol=1e-4)


def test_torch_fx_keeps_its_own_flag() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if torch.fx._symbolic_trace.is_fx_tracing() else x

    pn_compiler.transform(make(lambda net, x: x, nested=False))
    assert "mul" in str(fx.symbolic_trace(Asking()).graph)
    assert not torch.fx._symbolic_trace.is_fx_tracing()


def test_what_torch_compile_has_wrapped_is_traced_as_it_was_written() -> None:
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3

    def behind(net: Net, x: Any) -> Any:
        return net.inner(compiled(x))

    torch.manual_seed(0)
    net = Net(behind)
    net.inner = torch.compile(Inner(), backend="eager")  # type: ignore[assignment]
    converted = pn_compiler.transform(randomize_batch_norms(net).eval(), IMAGES, proxy=False)
    assert isinstance(converted, fx.GraphModule)
    y = F.relu(converted.get_submodule("bn")(net.conv(IMAGES)))
    assert_same_outputs(converted(IMAGES), (y * 2 + 1) * 3)
