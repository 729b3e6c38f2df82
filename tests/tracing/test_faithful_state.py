"""Hooks, replaced forwards and shared state are those of the copy, and stay what they are."""

import copy
import functools
import gc
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.config import WarmStart
from pn_compiler.base.errors import ConfigError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
KEPT: dict[str, Any] = {}
COUNT = 0


def body() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


def with_normalizers(net: nn.Module, converted: nn.Module) -> nn.Module:
    """`net` with the normalizers that `converted` has, where it has them."""
    net = copy.deepcopy(net)
    for name, module in converted.named_modules():
        if isinstance(module, nn.GroupNorm | pn_compiler.nn.AnchoredNorm):
            net.set_submodule(name, copy.deepcopy(module))
    return net


class Recorder:
    """Keeps the last output that it was given."""

    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.last = output

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.last = output


class Hooked(nn.Module):
    """Reads in its forward what a hook on its body, or on a layer of that, has kept."""

    def __init__(self, how: str, layer: str) -> None:
        super().__init__()
        self.body, self.out = body(), nn.Conv2d(4, 3, 1)
        self.kept: dict[str, Any] = {}
        self.listed: list[Any] = []
        self.recorder = Recorder()
        self.how = how
        self.layer = layer
        hooked = self.body.get_submodule(layer)
        kept, listed = self.kept, self.listed
        hooks: dict[str, Any] = {
            "lambda": lambda m, i, o: kept.update(f=o),
            "self": lambda m, i, o: self.kept.update(f=o),
            "bound method": self.keep,
            "partial": functools.partial(self.keep_as, "f"),
            "list": lambda m, i, o: listed.append(o),
            "object": self.recorder,
            "method of object": self.recorder.keep,
            "attribute": lambda m, i, o: setattr(self, "feature", o),
            "global": lambda m, i, o: KEPT.update(f=o),
            "keywords": lambda m, i, k, o: kept.update(f=o),
            "pre-hook": lambda m, i: kept.update(f=i[0]),
        }
        if how == "pre-hook":
            hooked.register_forward_pre_hook(hooks[how])
        elif how == "keywords":
            hooked.register_forward_hook(hooks[how], with_kwargs=True, always_call=True)
        else:
            hooked.register_forward_hook(hooks[how])

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept["f"] = output

    def keep_as(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.kept[name] = output

    def read(self) -> Any:
        if self.how == "list":
            return self.listed[-1]
        if "object" in self.how:
            return self.recorder.last
        if self.how == "attribute":
            return self.feature
        return KEPT["f"] if self.how == "global" else self.kept["f"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        feature = self.read()
        return y.mean() + (self.out(feature) if feature.shape[1] == 4 else feature)


HOOKS = [
    "lambda", "self", "bound method", "partial", "list", "object", "method of object", "attribute",
    "global", "keywords", "pre-hook",
]  # fmt: skip


def expected_of(net: nn.Module, converted: nn.Module) -> nn.Module:
    """A new network with the weights of `converted`: its normalizer, its hooks, no tracing."""
    inner: Any = net[0] if isinstance(net, nn.Sequential) else net
    path = "0.body.1" if isinstance(net, nn.Sequential) else "body.1"
    new: nn.Module = Hooked(inner.how, inner.layer)
    new = nn.Sequential(new, nn.ReLU()) if isinstance(net, nn.Sequential) else new
    new.set_submodule(path, copy.deepcopy(converted.get_submodule(path)))
    new.load_state_dict(converted.state_dict())
    return new.train(net.training)


def proxies() -> list[Any]:
    """All proxies that are alive."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), fx.Proxy)]


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("layer", ["", "0", "3"])
@pytest.mark.parametrize("how", HOOKS)
@torch.no_grad()
def test_what_hooks_keep_is_read_by_the_copy(how: str, layer: str, nested: bool, ran: bool) -> None:
    KEPT.clear()
    torch.manual_seed(0)
    net: nn.Module = Hooked(how, layer)
    inner: Any = net
    net = randomize_batch_norms(nn.Sequential(net, nn.ReLU()) if nested else net).eval()
    if ran:
        net(IMAGES)
    before = inner.read() if ran else None
    converted = pn_compiler.transform(net, proxy=False)
    assert not proxies()
    if ran:
        assert inner.read() is before
    expected = expected_of(net, converted)
    for model in (converted, pn_compiler.fold(converted)):
        for images in (IMAGES, OTHERS):
            assert_same_outputs(model(images), expected(images))
    if ran and how != "global":
        assert inner.read() is before
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]


def test_hooks_of_the_users_script_keep_their_place() -> None:
    seen: dict[str, Tensor] = {}
    net = randomize_batch_norms(nn.Sequential(body(), nn.Conv2d(4, 3, 1))).eval()
    net[0].register_forward_hook(lambda m, i, o: seen.update(f=o))
    converted = pn_compiler.transform(net)
    assert not seen
    y = converted(IMAGES)
    assert_same_outputs(converted.get_submodule("1")(seen["f"]), y)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]  # a region of its own


def test_backward_hooks_are_still_called() -> None:
    seen: list[Any] = []
    net = randomize_batch_norms(nn.Sequential(body(), nn.Conv2d(4, 3, 1))).eval()
    net[0].register_full_backward_hook(lambda m, i, o: seen.append(o))
    converted = pn_compiler.transform(net)
    converted(IMAGES.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1


# --- functions that close over the original --------------------------------------------------------------


def _method(conv: Any) -> None:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return 2 * self._conv_forward(x, self.weight, self.bias)

    conv.forward = types.MethodType(forward, conv)


def _closure(conv: Any) -> None:
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)


def _closed_method(conv: Any) -> None:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return 2 * F.conv2d(x, conv.weight, conv.bias)

    conv.forward = types.MethodType(forward, conv)


def _partial(conv: Any) -> None:
    conv.forward = functools.partial(_doubled, conv)


def _doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return 2 * F.conv2d(x, conv.weight, conv.bias)


def _default(conv: Any) -> None:
    conv.forward = lambda x, conv=conv: 2 * F.conv2d(x, conv.weight, conv.bias)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("patch", [_method, _closure, _closed_method, _partial, _default])
def test_replaced_forwards_are_those_of_the_copy(patch: Callable[[Any], None], place: int) -> None:
    net = randomize_batch_norms(body()).eval()
    patch(net[place])
    converted = pn_compiler.transform(net, proxy=False)
    plain = body()
    plain[1] = copy.deepcopy(converted.get_submodule("1"))
    plain.load_state_dict(converted.state_dict())
    patch(plain[place])
    with torch.no_grad():
        for model in (converted, plain):
            model.get_parameter(f"{place}.weight").mul_(3)  # the original's has no part in it
    assert_same_outputs(converted(IMAGES), plain(IMAGES))
    converted(IMAGES).sum().backward()
    assert converted.get_parameter(f"{place}.weight").grad is not None
    assert net[place].weight.grad is None


def test_a_replaced_forward_keeps_its_layer_from_being_absorbed_into() -> None:
    net = randomize_batch_norms(body()).eval()
    _closure(net[3])
    converted = pn_compiler.transform(net)
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), converted(IMAGES))


def test_functions_held_as_attributes_call_the_copy() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()
            self.steps = [lambda x: self.body(x), self.double]  # noqa: PLW0108  # a function of its own

        def double(self, x: Tensor) -> Tensor:
            return 2 * x

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    net = randomize_batch_norms(Holds()).eval()
    converted = pn_compiler.transform(net)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    assert_same_outputs(converted(IMAGES), 2 * pn_compiler.transform(net.body)(IMAGES))


# --- state -----------------------------------------------------------------------------------------------


class Box:
    """An object with an attribute."""

    def __init__(self) -> None:
        self.n = 0


class Counts(nn.Module):
    """Its output is larger by one with each call."""

    calls = 0

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = body(), how
        self.dict, self.list, self.box, self.deque = {"n": 0}, [0], Box(), deque([0], maxlen=1)
        self.nested = {"deep": [{"n": 0}]}
        self.previous: Any = None
        total = 0

        def count() -> int:
            nonlocal total
            total += 1
            return total

        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + getattr(self, f"by_{self.how}")(x)

    def by_dict(self, x: Tensor) -> Any:
        self.dict["n"] += 1
        return self.dict["n"]

    def by_list(self, x: Tensor) -> Any:
        self.list.append(1)
        return sum(self.list)

    def by_box(self, x: Tensor) -> Any:
        self.box.n += 1
        return self.box.n

    def by_deque(self, x: Tensor) -> Any:
        self.deque.append(self.deque[0] + 1)
        return self.deque[0]

    def by_nested(self, x: Tensor) -> Any:
        self.nested["deep"][0]["n"] += 1
        return self.nested["deep"][0]["n"]

    def by_closure(self, x: Tensor) -> Any:
        return self.count()

    def by_class(self, x: Tensor) -> Any:
        Counts.calls += 1
        return Counts.calls

    def by_global(self, x: Tensor) -> Any:
        global COUNT  # noqa: PLW0603  # what the test is about
        COUNT += 1
        return COUNT

    def by_global_dict(self, x: Tensor) -> Any:
        KEPT["n"] = KEPT.get("n", 0) + 1
        return KEPT["n"]

    def by_previous(self, x: Tensor) -> Any:
        total = x.mean() * 0 + 1 if self.previous is None else self.previous + 1
        self.previous = total
        return total


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "how",
    ["dict", "list", "box", "deque", "nested", "closure", "class", "global", "global_dict", "previous"],
)
@torch.no_grad()
def test_state_goes_on_from_call_to_call(how: str, nested: bool) -> None:
    global COUNT
    COUNT, Counts.calls = 0, 0
    KEPT.clear()
    net: nn.Module = Counts(how)
    inner: Any = net
    net = randomize_batch_norms(nn.Sequential(net, nn.Identity()) if nested else net).eval()
    converted = pn_compiler.transform(net, IMAGES)
    assert (COUNT, Counts.calls, KEPT) == (0, 0, {})
    assert inner.dict == {"n": 0}
    assert not proxies()
    first, second, third = (converted(IMAGES) for _ in range(3))
    assert_same_outputs(second, first + 1)
    assert_same_outputs(third, first + 2)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    assert inner.dict == {"n": 0}
    assert inner.list == [0]
    assert inner.count() == 1


class Writer(nn.Module):
    """Leaves its features with its parent, who reads them."""

    def __init__(self, store: dict[str, Any]) -> None:
        super().__init__()
        self.body, self.store = body(), store

    def forward(self, x: Tensor) -> Tensor:
        self.store["f"] = x
        return self.body(x)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.part = Writer(self.store)
        self.out = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x * 2)
        return y + self.out(self.store["f"])


class Siblings(nn.Module):
    """Branches on values around two modules, one of which reads what the other writes."""

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.writer, self.reader = Writer(self.store), Adds(self.store)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.reader(self.writer(x))


class Adds(nn.Module):
    def __init__(self, store: dict[str, Any]) -> None:
        super().__init__()
        self.store, self.bn = store, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + self.store["f"].mean()


@torch.no_grad()
@pytest.mark.parametrize("ran", [False, True])
def test_siblings_read_what_the_other_writes(ran: bool) -> None:
    net = randomize_batch_norms(Siblings()).eval()
    if ran:
        net(IMAGES)
    converted = pn_compiler.transform(net, proxy=False)
    expected = with_normalizers(net, converted)
    for images in (IMAGES, OTHERS):
        assert_same_outputs(converted(images), expected(images))


@pytest.mark.parametrize("ran", [False, True])
def test_what_modules_share_is_read_anew(ran: bool) -> None:
    net = randomize_batch_norms(Reader()).eval()
    if ran:
        net(IMAGES)
    converted = pn_compiler.transform(net)
    expected = copy.deepcopy(net)
    expected.part.body = copy.deepcopy(converted.get_submodule("part.body"))
    for images in (IMAGES, OTHERS):
        assert_same_outputs(converted(images), expected(images))


class Flags(nn.Module):
    """Switches a layer of another module to eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = body(), nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        self.drop.eval()
        return self.drop(self.body(x))


def test_a_forward_that_switches_modes_still_does() -> None:
    for net in (Flags(), nn.Sequential(Flags(), nn.ReLU())):
        converted = pn_compiler.transform(randomize_batch_norms(net).train())
        assert_same_outputs(converted(IMAGES), converted(IMAGES))
        assert all(module.training for module in net.modules())


class Odd(nn.Module):
    """A body, and a forward for each way to lose something."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = body(), how
        self.inner: nn.Module = INNER.get(how, nn.Identity)()
        self.feats: Any = []
        self.cache: dict[Any, Any] = {}
        self.grid: Any = None
        self.child = Child()

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"by_{self.how}")(x)

    def by_cleared_list(self, x: Tensor) -> Tensor:
        self.feats.clear()
        self.feats.append(x * 2)
        self.feats.append(self.body(x))
        return self.feats[1] + self.feats[0].mean()

    def by_new_list(self, x: Tensor) -> Tensor:
        self.feats = [x * 2]
        self.feats.append(self.body(x))
        return self.feats[1] + self.feats[0].mean()

    def by_table(self, x: Tensor) -> Tensor:
        if 6 not in self.cache:
            self.cache[6] = torch.arange(6.0)
        return self.body(x + self.cache[6])

    def by_grid(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.arange(6.0)
        return self.body(x + self.grid)

    def by_child(self, x: Tensor) -> Tensor:
        self.child.mask = (x > 0).float()
        return self.child(x)

    def by_skip(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.body(y) + self.inner.skip.mean()

    def by_none(self, x: Tensor) -> Tensor:
        nothing = self.inner(x)
        return self.body(x) if nothing is None else self.body(x * 2)

    def by_none_of_a_variable(self, x: Tensor) -> Tensor:
        nothing = self.inner(x)
        return self.body(x) if nothing is None else self.body(x * 2)

    def by_none_in_a_tuple(self, x: Tensor) -> Tensor:
        _, nothing, _ = self.inner(x)
        return self.body(x) if nothing is None else self.body(x * 2)

    def by_none_in_a_dict(self, x: Tensor) -> Tensor:
        nothing = self.inner(x)["b"]
        return self.body(x) if nothing is None else self.body(x * 2)

    def by_identity(self, x: Tensor) -> Tensor:
        y = F.dropout(x, 0.5, False)
        return self.body(x * 2 if y is x else x)

    def by_key(self, x: Tensor) -> Tensor:
        return self.body(x * {3: 2}.get(x.shape[1], 1))

    def by_memo(self, x: Tensor) -> Tensor:
        return self.body(_doubled_once(x))


class Skips(nn.Module):
    """Branches on values, and keeps one for its parent."""

    def forward(self, x: Tensor) -> Tensor:
        self.skip = x * 3 if x.sum() < 1e9 else x
        return x


class Nothing(nn.Module):
    """Branches on values, and returns nothing."""

    def forward(self, x: Tensor) -> None:
        if x.sum() > 1e9:
            raise ValueError("too large")


class NoneInAVariable(nn.Module):
    def forward(self, x: Tensor) -> Tensor | None:
        result = None
        if x.sum() > 1e9:
            result = x
        return result


class NoneInATuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return (x, None, x * 2) if x.sum() < 1e9 else (x, x, x)


class NoneInADict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        extra = x if x.sum() > 1e9 else None
        return {"a": x, "b": extra, "c": x}


INNER: dict[str, type[nn.Module]] = {
    "skip": Skips,
    "none": Nothing,
    "none_of_a_variable": NoneInAVariable,
    "none_in_a_tuple": NoneInATuple,
    "none_in_a_dict": NoneInADict,
}


class Child(nn.Module):
    """Has a mask that its parent sets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mask = body(), None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if self.mask is None else x * self.mask)


@functools.lru_cache(maxsize=4)
def _doubled_once(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", [name.removeprefix("by_") for name in vars(Odd) if name.startswith("by_")])
@torch.no_grad()
def test_odd_forwards_compute_the_same(how: str, nested: bool, ran: bool) -> None:
    net: nn.Module = Odd(how)
    net = randomize_batch_norms(nn.Sequential(net, nn.ReLU()) if nested else net).eval()
    if ran:
        net(IMAGES)
    converted = pn_compiler.transform(net, proxy=False)
    assert not proxies()
    expected = with_normalizers(net, converted)
    for images in (IMAGES, OTHERS, IMAGES):
        assert_same_outputs(converted(images), expected(images))


HOOKS: dict[str, Any] = {
    "forward": lambda module, args, output: None,
    "forward_pre": lambda module, args: None,
    "full_backward": lambda module, inputs, outputs: None,
    "full_backward_pre": lambda module, outputs: None,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_global_hooks_are_refused(kind: str) -> None:
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(HOOKS[kind])
    try:
        for function in (pn_compiler.transform, pn_compiler.fold):
            with pytest.raises(ConfigError, match="global"):
                function(body().eval())
    finally:
        handle.remove()
    pn_compiler.transform(body().eval())


class Indexes(nn.Module):
    """Branches on values, and has None in an index only."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None].squeeze(1) if x.sum() < 1e9 else x


def test_none_in_an_index_is_none_of_a_result() -> None:
    net = randomize_batch_norms(nn.Sequential(Indexes(), body())).eval()
    converted = pn_compiler.transform(net, IMAGES)
    assert isinstance(converted, torch.fx.GraphModule)


# --- parameters and statistics of a BatchNorm that other code reads ----------------------------------------


class Penalized(nn.Module):
    """Gives what `read` takes from its first BatchNorm beside its output."""

    def __init__(self, *, traced: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.out, self.traced = nn.Conv2d(4, 2, 1), traced

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.out(F.relu(self.bn(self.conv(x))))
        if not self.traced and float(y.detach().sum()) > 1e9:
            y = y * 2
        return y, self.bn.weight.abs().sum(), self.bn.bias * 2


class Statistics(Penalized):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *super().forward(x), self.bn.running_mean + 0, self.bn.num_batches_tracked + 0


@pytest.mark.parametrize("cls", [Penalized, Statistics])
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("warm_start", ["auto", "none"])
def test_a_batch_norm_that_is_read_stays(cls: type[Penalized], traced: bool, warm_start: WarmStart) -> None:
    x = torch.randn(2, 3, 6, 6)
    net = randomize_batch_norms(cls(traced=traced)).eval()
    converted = pn_compiler.transform(net, x, warm_start=warm_start)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.code) == ("skipped", "PN105" if traced else "PN101")
    assert_same_outputs(converted(x), net(x))
