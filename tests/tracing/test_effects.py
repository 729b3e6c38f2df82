"""What a conversion must not lose: in-place effects, hooks, computed weights, aliases, arguments."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import pn_compiler
from pn_compiler.base.errors import UnsupportedModelError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_in_place_activation_is_seen_by_later_readers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 1)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            self.act(y)  # its result is not even named
            return self.conv(y)

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.activation) == ("pn", "relu")
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


class Written(nn.Module):
    """A tensor of the site is overwritten in some way between the site and the convolution."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.write(self.bn(x)))


def _view_then_write(y: Tensor) -> Tensor:
    y.view(y.size(0), -1).relu_()
    return y


def _slice_then_write(y: Tensor) -> Tensor:
    y[:, :2].relu_()
    return y


def _chunk_then_write(y: Tensor) -> Tensor:
    F.relu(y.chunk(3, 1)[0], inplace=True)
    return y


def _write_behind_a_view(y: Tensor) -> Tensor:
    view = y.view(y.size(0), 3, -1)
    nn.functional.relu_(y)
    return view.view(y.shape)


def _divide(y: Tensor) -> Tensor:
    z = F.relu(y)
    z /= 2
    return z


def _write_out(y: Tensor) -> Tensor:
    z = F.relu(y)
    torch.add(z, 1, out=z)
    return z


def _write_items(y: Tensor) -> Tensor:
    z = F.relu(y)
    z[:, 0] = 1
    return z


WRITES = [
    _view_then_write, _slice_then_write, _chunk_then_write, _write_behind_a_view, _divide, _write_out,
    _write_items,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_writing_into_tensors_keeps_its_effect(write: Callable[[Tensor], Tensor]) -> None:
    net = randomize_batch_norms(Written(write)).eval()
    by_hand = copy.deepcopy(net)
    by_hand.bn = pn_compiler.transform(net, proxy=False).get_submodule("bn")
    for model in (pn_compiler.transform(net), pn_compiler.transform(net, proxy=False)):
        assert_same_outputs(model(IMAGES), by_hand(IMAGES))
        assert_same_outputs(pn_compiler.fold(model)(IMAGES), by_hand(IMAGES))


def test_consumers_that_compute_their_weight_are_left_alone() -> None:
    def weight_norm(conv: nn.Conv2d) -> None:
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(conv)

    def pruned(conv: nn.Conv2d) -> None:
        prune.random_unstructured(conv, "weight", 0.5)

    def hooked(conv: nn.Conv2d) -> None:
        conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))

    def adapted(conv: nn.Conv2d) -> None:
        conv.register_forward_hook(lambda module, inputs, output: output + inputs[0][:, :1].mean())

    for change in (adapted, weight_norm, nn.utils.spectral_norm, pruned, hooked):
        net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
        change(net[2])
        net = randomize_batch_norms(net).eval()
        converted = pn_compiler.transform(net)
        (site,) = pn_compiler.sites(converted)
        assert site.code == "PN202"
        assert "has hooks, or computes its weight" in site.reason
        assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    net.stream = open(__file__)  # noqa: SIM115  # closed by the with below
    with net.stream, pytest.raises(UnsupportedModelError, match="cannot be copied: cannot pickle"):
        pn_compiler.transform(net)


def test_one_module_under_two_names_is_no_absorber() -> None:
    root = nn.Module()
    root.a = root.b = nn.Conv2d(3, 3, 1)
    root.bn, root.bn2, root.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.SiLU()
    randomize_batch_norms(root)
    graph = fx.Graph()
    node = graph.placeholder("x")
    for target in ("bn", "act", "a", "bn2", "act", "b"):
        node = graph.call_module(target, (node,))
    graph.output(node)
    net = fx.GraphModule(root, graph).eval()
    converted = pn_compiler.transform(net)
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


def test_an_argument_that_was_left_out_cannot_be_given_later() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            y = F.relu(self.bn(x))
            return y if skip is None else y + skip

    converted = pn_compiler.transform(Net())
    assert converted(IMAGES, None).shape == converted(IMAGES, skip=None).shape == IMAGES.shape
    for model in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        with pytest.raises(TypeError, match="argument skip is of type Tensor, but the model was converted"):
            model(IMAGES, skip=IMAGES)
    both = pn_compiler.transform(Net(), (IMAGES, IMAGES))
    assert both(IMAGES, IMAGES).shape == IMAGES.shape


def test_hooks_stay_where_they_are() -> None:
    net = randomize_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))).eval()
    net[1].register_forward_hook(lambda module, inputs, output: output * 2)
    net.register_forward_hook(lambda module, inputs, output: output + 1)
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.code) == ("norm_only", "PN201")
    by_hand = copy.deepcopy(net)
    by_hand[0] = converted.get_submodule("0")
    for model in (converted, copy.deepcopy(converted), pn_compiler.fold(converted)):
        assert_same_outputs(model(IMAGES), by_hand(IMAGES))


def test_warnings_are_no_state() -> None:
    """`warnings` notes among the globals of the code what it has said."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("this is old", FutureWarning, stacklevel=1)
            return F.upsample(self.conv(torch.relu(self.bn(x))), scale_factor=2)

    net = randomize_batch_norms(Net()).eval()
    globals().pop("__warningregistry__", None)
    vars(F).pop("__warningregistry__", None)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.warns(UserWarning, match="upsample"):
            converted = pn_compiler.transform(net, IMAGES)
    assert isinstance(converted, fx.GraphModule)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]


def test_what_a_forward_stores_does_not_stay_on_the_callers_model() -> None:
    """The model runs, to be compared with its graph; a second conversion finds it as the first did."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            return self.conv(self.bn(self.kept).relu())

    net = randomize_batch_norms(Net()).eval()
    for _ in range(2):
        converted = pn_compiler.transform(net, IMAGES, strict=True)
        assert isinstance(converted, fx.GraphModule)
        assert not hasattr(net, "kept")
