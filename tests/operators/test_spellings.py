"""BatchNorms of every kind: subclasses, lazy and synchronized ones, closed ones, fake tensors."""

import pytest
import torch
import torch.ao.nn.intrinsic
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import pn_compiler
from pn_compiler.base.errors import UnsupportedModelError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net_with(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


def plain() -> nn.Sequential:
    return net_with(nn.BatchNorm2d(4))


class Wraps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class WrapsTwice(Wraps):
    """As those that cast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class WrapsInTraining(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y


@pytest.mark.parametrize("cls", [Wraps, WrapsTwice, WrapsInTraining])
@pytest.mark.parametrize("training", [False, True])
def test_subclasses_that_call_super_are_converted(cls: type[nn.BatchNorm2d], training: bool) -> None:
    net = net_with(cls(4)).train(training)
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.code) == ("1", "pn", None)
    assert type(net[1]) is cls
    assert {"1.weight", "1.bias"} <= dict(converted.named_parameters()).keys()
    assert_same_outputs(converted(X), pn_compiler.transform(plain())(X))


class Scales(nn.BatchNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Looks(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        return super().forward(x) + self.running_mean.sum()


class Branches(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("cls", [Scales, Looks, Branches])
def test_subclasses_with_more_to_them_are_reported(cls: type[nn.BatchNorm2d]) -> None:
    net = net_with(cls(4))
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.code) == ("skipped", "PN105")
    assert_same_outputs(converted(X), net(X))


def test_synchronized_cumulative_and_lazy_norms() -> None:
    expected = pn_compiler.transform(plain())(X)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(plain())
    assert_same_outputs(pn_compiler.transform(synchronized)(X), expected)
    assert_same_outputs(pn_compiler.transform(net_with(nn.BatchNorm2d(4, momentum=None)))(X), expected)
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(2, 1))
    with pytest.raises(UnsupportedModelError, match="0 is an uninitialised LazyConv2d: run the model once"):
        pn_compiler.transform(lazy)
    lazy(X)
    lazy.load_state_dict(plain().state_dict())
    assert_same_outputs(pn_compiler.transform(lazy.eval())(X), expected)


def test_a_batch_norm_alone_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"wrap it, as in nn.Sequential\(model\)"):
        pn_compiler.transform(nn.BatchNorm2d(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_are_named_and_work_on() -> None:
    net = nn.Sequential(plain(), torch.jit.script(net_with(nn.BatchNorm2d(4))[1:]), nn.ReLU())
    net[0][3] = nn.Conv2d(4, 4, 1)
    converted = pn_compiler.transform(net)
    assert [(s.name, s.kind, s.code) for s in pn_compiler.sites(converted)] == [
        ("0.1", "pn", None), ("1.1", "skipped", "PN111"),
    ]  # fmt: skip
    assert_same_outputs(converted(X), pn_compiler.transform(net, proxy=False)(X))
    assert_same_outputs(pn_compiler.fold(converted)(X), converted(X))
    assert all(p.is_leaf and p.requires_grad for p in converted.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao
def test_quantized_parts_are_named() -> None:
    fused = torch.ao.nn.intrinsic.ConvBn2d(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).train()
    fused.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    net = nn.Sequential(plain(), torch.ao.nn.intrinsic.qat.ConvBn2d.from_float(fused)).eval()
    converted = pn_compiler.transform(net)
    assert [(s.name, s.kind, s.code) for s in pn_compiler.sites(converted)] == [
        ("0.1", "pn", None), ("1.bn", "skipped", "PN111"),
    ]  # fmt: skip
    assert_same_outputs(converted(X), pn_compiler.transform(net, proxy=False)(X))


def test_fake_tensors_give_the_structure_without_memory() -> None:
    with FakeTensorMode():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.warm_start) == ("pn", True)
    assert all(isinstance(p, FakeTensor) for p in converted.parameters())
    assert all(isinstance(p, FakeTensor) for p in pn_compiler.fold(converted).parameters())


def test_new_parameters_live_on_the_device_of_their_norm() -> None:
    net = nn.Sequential(plain(), plain().to("meta"))
    devices = {n: p.device.type for n, p in pn_compiler.transform(net).named_parameters()}
    assert {n for n, device in devices.items() if device == "meta"} == {n for n in devices if n[0] == "1"}
    assert "1.1.proxy_weight" in devices


def test_subclassed_inputs_pass_through() -> None:
    class Tagged(torch.Tensor):
        pass

    converted = pn_compiler.transform(plain())
    result = converted(X.as_subclass(Tagged))
    assert isinstance(result, Tagged)
    assert_same_outputs(result.as_subclass(torch.Tensor), converted(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [False, True])
def test_a_norm_without_tensors_has_the_dtype_of_its_neighbours(dtype: torch.dtype, first: bool) -> None:
    norm = nn.BatchNorm2d(4 if not first else 3, affine=False, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm) if not first else nn.Sequential(norm, nn.Conv2d(3, 4, 3))
    converted = pn_compiler.transform(net.to(dtype), warm_start="none")
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert converted(X.to(dtype)).dtype == dtype
