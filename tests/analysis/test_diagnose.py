"""The power decomposition, against numpy on whole tensors, and the paper's diagnosis on deep networks."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pn_compiler
from pn_compiler import Diagnosis, SitePower
from pn_compiler.base.errors import ConfigError, UnsupportedModelError
from pn_compiler.nn import ProxyNormAct
from pn_compiler.testing import randomize_batch_norms
from tests.zoo import torchvision

Array = NDArray[np.float64]


def normalize(x: Array, groups: int | None, eps: float = 1e-5) -> Array:
    """x [N, C, *] by the statistics of each instance and group, or of the batch (None)."""
    if groups is None:
        axes = (0, *range(2, x.ndim))
        return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(2, keepdims=True)
    return (centred / np.sqrt(grouped.var(2, keepdims=True) + eps)).reshape(x.shape)


def powers(y: Array) -> Array:
    """P1, P2, P3, P4 of y [N, C, *] by their definition."""
    pixels = y.reshape(*y.shape[:2], -1)
    m, s = pixels.mean(2), pixels.std(2)
    return np.array([(m.mean(0) ** 2).mean(), m.var(0).mean(), (s.mean(0) ** 2).mean(), s.var(0).mean()])


def measured(site: SitePower) -> Array:
    return np.array([site.p1, site.p2, site.p3, site.p4])


def samples(*shape: int) -> Tensor:
    """Of unlike mean and spread in each sample and channel."""
    generator = torch.Generator().manual_seed(0)
    cells = (*shape[:2], *[1] * (len(shape) - 2))
    mean, spread = (torch.randn(cells, generator=generator, dtype=torch.float64) for _ in range(2))
    return mean + spread * torch.randn(shape, generator=generator, dtype=torch.float64)


NORMS = [
    (lambda: nn.GroupNorm(3, 6), 3, "GN"),
    (lambda: nn.GroupNorm(1, 6), 1, "LN"),
    (lambda: nn.LayerNorm([6, 5, 4], elementwise_affine=False), 1, "LN"),
    (lambda: nn.GroupNorm(6, 6), 6, "IN"),
    (lambda: nn.InstanceNorm2d(6, affine=True), 6, "IN"),
    (lambda: nn.BatchNorm2d(6), None, "BN"),
    (lambda: ProxyNormAct(2, 6, nn.ReLU()), 2, "GN+PN"),
    (lambda: ProxyNormAct(1, 6, nn.ReLU(), outputs=("activation", "scale", "shift")), 1, "LN+PN"),
]


def randomized(norm: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.double()


@pytest.mark.parametrize(("make", "groups", "kind"), NORMS)
@pytest.mark.parametrize("affine", [False, True])
def test_powers_agree_with_their_definition(make, groups, kind, affine) -> None:  # type: ignore[no-untyped-def]
    norm = randomized(make())
    x = samples(7, 6, 5, 4)
    y = normalize(x.numpy(), groups)
    if affine and norm.weight is not None:
        weight, bias = (p.detach().numpy().reshape(6, 1, 1) for p in (norm.weight, norm.bias))
        y = weight * y + bias
    (site,) = pn_compiler.diagnose(nn.Sequential(norm), x, batch_statistics=True, affine=affine).sites
    assert (site.name, site.kind, site.channels, site.samples) == ("0", kind, 6, 7)
    np.testing.assert_allclose(measured(site), powers(y), rtol=1e-10, atol=1e-14)
    assert site.power == pytest.approx((y**2).mean(), rel=1e-12)
    assert sum(site.shares) == pytest.approx(1, rel=1e-12)


def test_batch_norm_by_its_running_statistics() -> None:
    norm = randomize_batch_norms(nn.BatchNorm1d(6)).double()
    assert isinstance(norm, nn.BatchNorm1d)
    x = samples(7, 6, 5)
    y = F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps).numpy()
    (site,) = pn_compiler.diagnose(nn.Sequential(norm), x).sites
    np.testing.assert_allclose(measured(site), powers(y), rtol=1e-10)
    assert site.power == pytest.approx((y**2).mean(), rel=1e-12)


def test_inputs_without_space_have_no_instance_deviation() -> None:
    x = samples(7, 6)
    for norm, groups in ((nn.LayerNorm(6), 1), (nn.GroupNorm(2, 6), 2), (nn.BatchNorm1d(6), None)):
        model = nn.Sequential(norm.double())
        (site,) = pn_compiler.diagnose(model, x, batch_statistics=True).sites
        np.testing.assert_allclose(
            measured(site), powers(normalize(x.numpy(), groups)), rtol=1e-10, atol=1e-14
        )
        assert site.p3 == site.p4 == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    """The figures are those of the input as it is, whatever its dtype: only sums are rounded."""
    x = samples(7, 6, 5, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    (site,) = pn_compiler.diagnose(nn.Sequential(nn.GroupNorm(2, 6).to(dtype)), x).sites
    np.testing.assert_allclose(measured(site), powers(normalize(x.double().numpy(), 2)), rtol=1e-5)


def chain(depth: int, width: int) -> nn.Sequential:
    """The random network of the paper's Definition 1: periodic boundaries, weight and bias around 1 and 0."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(depth):
        inputs = width if index else 3
        conv = nn.Conv2d(inputs, width, 3, padding=1, padding_mode="circular", bias=False)
        norm = nn.BatchNorm2d(width)
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
        layers += [conv, norm, nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def deep() -> nn.Sequential:
    return chain(24, 64)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Of unlike brightness and contrast."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(2, 24, 1, 1, 1, generator=generator)
    return mean + spread * torch.randn(24, 3, 12, 12, generator=generator)


def p1_shares(diagnosis: Diagnosis) -> Array:
    return np.array([site.shares[0] for site in diagnosis.sites])


def test_layer_norm_collapses_with_depth_and_proxy_norm_does_not(deep: nn.Module, images: Tensor) -> None:
    """The paper's Figure 2, top row."""
    plain = pn_compiler.diagnose(pn_compiler.transform(deep, warm_start="none", proxy=False), images)
    share = p1_shares(plain)
    assert share[0] < 0.01
    assert share[1] < 0.4
    assert share[1] < share[3] < share[7] < share[15] < share[23]
    assert share[16:].min() > 0.9
    assert plain.collapsed == plain.sites[2:]
    assert "channel-wise collapse (P1 above 50 %) at 22 of 24 sites: 7, 10, 13, 16, 19, ..." in str(plain)

    proxy = pn_compiler.diagnose(pn_compiler.transform(deep, warm_start="none"), images)
    with_proxy = p1_shares(proxy)
    assert with_proxy.max() < 0.2
    assert with_proxy[16:].max() < 0.01
    assert {site.kind for site in proxy.sites} == {"LN+PN"}
    assert "collapse" not in str(proxy)

    batch = pn_compiler.diagnose(deep, images, batch_statistics=True)
    assert p1_shares(batch).max() < 1e-12
    assert not batch.uniform


def test_instance_norm_has_no_variability_of_instance_statistics(deep: nn.Module, images: Tensor) -> None:
    converted = pn_compiler.transform(deep, norm="instance", warm_start="none", proxy=False)
    for module in converted.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 0  # it takes more of instances with little contrast
    result = pn_compiler.diagnose(converted, images)
    assert {site.kind for site in result.sites} == {"IN"}
    assert max(site.p1 + site.p2 + site.p4 for site in result.sites) < 1e-12
    assert result.uniform == result.sites
    assert "instance statistics hardly vary (P2 + P4) at 24 of 24 sites" in str(result)


def test_a_real_network_before_and_after_conversion() -> None:
    model = randomize_batch_norms(torchvision().models.resnet18(num_classes=10))
    batches = torch.randn(12, 3, 32, 32).split(5)
    before = pn_compiler.diagnose(model, batches)
    converted = pn_compiler.transform(model, warm_start="none")
    after = pn_compiler.diagnose(converted, batches)
    recorded = pn_compiler.sites(converted)
    assert len(before.sites) == 20
    assert [s.name for s in before.sites] == [s.name for s in after.sites]
    assert {s.name: s.kind for s in after.sites} == {
        s.name: "LN+PN" if s.kind == "pn" else "LN" for s in recorded
    }
    names = [s.name for s in after.sites]
    assert names.index("layer2.0.bn2") < names.index("layer2.0.downsample.1") < names.index("layer2.1.bn1")
    assert all(s.samples == 12 and abs(s.power - 1) < 1e-3 for s in after.sites)
    folded = pn_compiler.diagnose(pn_compiler.fold(converted), batches)
    for one, other in zip(after.sites, folded.sites, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(measured(one), measured(other), rtol=1e-3, atol=1e-7)


def test_a_warm_start_keeps_what_activations_get_and_says_so() -> None:
    """Instances with the statistics of the population: those of one image in all its shifts."""
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    image = samples(1, 3, 6, 6)
    x = torch.cat([image.roll((i, j), (2, 3)) for i in range(6) for j in range(6)])
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = None
    model(x)
    with torch.no_grad():
        norm.running_var *= 1 - 1 / (36 * 36)  # PyTorch's is the unbiased estimate
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    converted = pn_compiler.transform(model)
    before, after = (pn_compiler.diagnose(m, x, affine=True) for m in (model, converted))
    np.testing.assert_allclose(measured(before.sites[0]), measured(after.sites[0]), rtol=1e-4, atol=1e-10)
    assert not after.notes
    plain = pn_compiler.diagnose(converted, x)
    assert plain.sites[0].shares[0] > 0.1 > pn_compiler.diagnose(model, x).sites[0].shares[0]
    assert "1 sites started warm" in str(plain)


def assert_equal(one: Diagnosis, other: Diagnosis) -> None:
    assert [(s.name, s.kind, s.samples) for s in one.sites] == [
        (s.name, s.kind, s.samples) for s in other.sites
    ]
    for a, b in zip(one.sites, other.sites, strict=True):
        np.testing.assert_allclose(measured(a), measured(b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("proxy", [False, True])
def test_the_cut_into_batches_does_not_matter(images: Tensor, size: int, proxy: bool) -> None:
    model = pn_compiler.transform(chain(6, 16).double(), proxy=proxy, warm_start="none")
    assert_equal(
        pn_compiler.diagnose(model, images.double().split(size)), pn_compiler.diagnose(model, images.double())
    )


def test_a_large_mean_costs_no_digits() -> None:
    """Sums of squares would cancel."""
    norm = nn.BatchNorm1d(6, eps=0).double()
    x = samples(40, 6, 5)
    near = pn_compiler.diagnose(nn.Sequential(norm), x.split(8)).sites[0]
    far = pn_compiler.diagnose(nn.Sequential(norm), (x + 1e6).split(8)).sites[0]
    np.testing.assert_allclose(measured(far)[1:], measured(near)[1:], rtol=1e-9)


def test_what_a_batch_may_be() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.norm(x if other is None else x + other)

    net, x = Net().double(), samples(6, 4, 3)
    loader = DataLoader(TensorDataset(x, torch.arange(6)), batch_size=4)
    whole = pn_compiler.diagnose(net, x)
    forms: list[Any] = [[x], x.split(2), loader, [{"x": x}], {"x": x}, ([t] for t in x.split(3))]
    for form in forms:
        assert_equal(pn_compiler.diagnose(net, form), whole)
    added = pn_compiler.diagnose(net, [{"x": x, "other": x.flip(0)}])
    assert_equal(added, pn_compiler.diagnose(net, x + x.flip(0)))


class Busy(nn.Module):
    """Draws random numbers, counts its calls, calls one norm twice and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.frozen = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.seen += len(x)
        y = self.drop(self.bn(self.conv(x) + torch.rand(())))
        y = self.frozen(self.bn(y * 3))
        if x.shape[2] < 6:
            raise RuntimeError("too small\nfor this network")
        return y


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(batch_statistics: bool, fails: bool) -> None:
    model = Busy().train()
    model.frozen.eval()
    model.conv.weight.requires_grad_(False)
    model.bn.register_forward_hook(lambda module, args, output: None)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    x = torch.randn(4, 3, 8, 8)
    torch.set_rng_state(random)
    batches = [x, x[:, :, :5]] if fails else [x]
    if fails:
        with pytest.raises(ConfigError, match=r"run on batch 2 \(\[4, 3, 5, 8\] float32\): too small$"):
            pn_compiler.diagnose(model, batches, batch_statistics=batch_statistics)
    else:
        result = pn_compiler.diagnose(model, batches, batch_statistics=batch_statistics)
        assert [site.name for site in result.sites] == ["bn", "bn:2", "frozen"]
        assert (result.sites[0].shares[0] < 1e-12) == batch_statistics
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert model.calls == 0
    assert not model.conv.weight.requires_grad
    assert model.bn.weight.requires_grad
    assert torch.is_grad_enabled()


def test_wrapped_models_are_looked_into() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), torch.randn(4, 3, 5, 5)
    compiled = torch.compile(net, backend="eager")
    compiled(x)  # its hooks would not be called any more
    plain = pn_compiler.diagnose(net, x)
    assert_equal(pn_compiler.diagnose(compiled, x), plain)
    outer = nn.Sequential(compiled)
    assert [s.name for s in pn_compiler.diagnose(outer, x).sites] == ["0._orig_mod.1"]
    assert_equal(pn_compiler.diagnose(nn.DataParallel(net), x), plain)


def test_values_that_are_not_finite_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    x = torch.randn(4, 3, 5, 5)
    bad = x.clone()
    bad[1, 0, 0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"^batch 2 holds values that are nan or infinite$"):
        pn_compiler.diagnose(net, [x, bad])
    last = net[2]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        last.weight[2] = torch.inf
    with pytest.raises(ConfigError, match=r"^batch 1 makes values that are nan or infinite, first at 3$"):
        pn_compiler.diagnose(net, x)


def test_what_is_left_out_is_noted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.whole, self.bn = nn.LayerNorm(5), nn.LayerNorm([4, 5, 5]), nn.BatchNorm2d(4)
            self.never = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.whole(self.last(x)))

    net, x = Net(), torch.randn(4, 4, 5, 5)
    result = pn_compiler.diagnose(net, x)
    assert [s.name for s in result.sites] == ["whole", "bn"]
    assert "last: left out, LayerNorm over the last 1 axes of (4, 4, 5, 5), not over [C, *]" in str(result)
    assert "1 BatchNorms, bn first, have the running statistics of an untrained network" in str(result)
    assert "untrained" not in str(pn_compiler.diagnose(net, x, batch_statistics=True))
    assert "whole: left out, its weight and bias are per element" in str(
        pn_compiler.diagnose(net, x, affine=True)
    )
    alone = pn_compiler.diagnose(nn.Sequential(nn.GroupNorm(2, 4)), x[:1])
    assert not alone.sites
    assert alone.notes == ("0: left out, a variance over samples needs 2 of them, and it saw 1",)
    assert "no normalizer is called as a module" in str(pn_compiler.diagnose(nn.Conv2d(4, 2, 1), x))


def test_errors() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    with pytest.raises(ConfigError, match="there is no batch"):
        pn_compiler.diagnose(net, [])
    with pytest.raises(ConfigError, match=r"does not run on batch 1 \(\[2, 5, 4, 4\] float32\)"):
        pn_compiler.diagnose(net, torch.randn(2, 5, 4, 4))
    with pytest.raises(ConfigError, match="unexpected keyword argument 'pixels'"):
        pn_compiler.diagnose(net, {"pixels": torch.randn(2, 3, 4, 4)})
    with pytest.raises(ConfigError, match="the model has no values"):
        pn_compiler.diagnose(nn.GroupNorm(2, 4, device="meta"), torch.randn(2, 4, 3))
    with pytest.raises(UnsupportedModelError, match="uninitialised LazyBatchNorm2d"):
        pn_compiler.diagnose(nn.Sequential(nn.LazyBatchNorm2d()), torch.randn(2, 3, 4, 4))
