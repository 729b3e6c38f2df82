"""Converted networks under the tools that people train with: each computes what plain PyTorch does."""

import copy
import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pn_compiler
from pn_compiler.nn import ProxyNormAct
from pn_compiler.numerics.affine import absorb_affine
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms, relative_error
from tests.training_step import (
    NETWORKS,
    THREE,
    TINY,
    by_blocks,
    distance,
    images,
    loss_of,
    network,
    sites,
    step,
)

# in torch's own compiler and torch.func
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")

# Half precision ------------------------------------------------------------------------------------


def bounds(model: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative errors of outputs and gradients that rounding to `dtype` explains.

    Layers round independently: eps * sqrt(layers). In the gradient of a piecewise linear activation, a
    rounding that crosses a bend changes the slope by 1. A standard normal has the mass 0.4 eps within
    +-eps/2 of a bend, which is a relative error of sqrt(0.4 eps) in norm at each activation.
    """
    eps = torch.finfo(dtype).eps
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear | nn.GroupNorm | ProxyNormAct) for m in model.modules())
    bends = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in model.modules())
    smooth = eps * math.sqrt(layers)
    return smooth, smooth + math.sqrt(0.4 * eps * bends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["autocast", "parameters"])
@pytest.mark.parametrize("name", THREE)
def test_half_precision(name: str, how: str, dtype: torch.dtype) -> None:
    model, x = network(name), images()
    out, gradients = step(model, x)
    if how == "autocast":
        with torch.autocast("cpu", dtype):
            actual_out, actual = step(model, x)
    else:
        actual_out, actual = step(copy.deepcopy(model).to(dtype), x.to(dtype))
    of_outputs, of_gradients = bounds(model, dtype)
    assert actual_out.dtype == dtype
    assert relative_error(actual_out, out) < of_outputs  # false for nan
    assert distance(actual, gradients) < of_gradients
    assert all(g.isfinite().all() for g in actual.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_never_computed_in_half_precision(dtype: torch.dtype) -> None:
    model, seen = network("mobilenet_v2"), []
    for site in sites(model).values():
        nn.init.normal_(site.proxy_weight, 0, 1e-3)  # 1 + it is 1 in bfloat16
        site.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.autocast("cpu", dtype):
        model(images(1))
    assert len(seen) == len(sites(model))
    for activation, *pair in seen:
        assert activation.dtype == dtype
        assert all(t.dtype == torch.float32 for t in pair if t is not None)
    for site in sites(model).values():
        half = copy.deepcopy(site).to(dtype)
        with torch.autocast("cpu", dtype):
            inside = half.scale_and_shift()
        for actual, expected in zip(inside, copy.deepcopy(half).double().scale_and_shift(), strict=True):
            assert actual.dtype == torch.float32
            assert_same_outputs(actual, expected, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_what_consumers_take_in(dtype: torch.dtype) -> None:
    """The bias that stands for the shift: rounded, it moves a whole channel."""
    weight, shifts = torch.randn(8, 16, 3, 3), torch.randn(2, 16)

    def biases() -> tuple[Tensor | None, ...]:
        one = absorb_affine(weight, None, None, shifts[0])[1]
        many: Tensor = vmap(lambda shift: absorb_affine(weight, None, None, shift)[1])(shifts)
        return one, many

    expected = biases()
    with torch.autocast("cpu", dtype):
        actual = biases()
    for inside, outside in zip(actual, expected, strict=True):
        assert_same_outputs(inside, outside, tolerance=1e-6)


@pytest.mark.parametrize("name", THREE)
def test_channels_last(name: str) -> None:
    model, x = network(name).double(), images().double()  # in float32 another order moves values over a bend
    out, gradients = step(model, x)
    formats: list[bool] = []
    for site in sites(model).values():
        site.register_forward_hook(
            lambda _, args, out: formats.extend(
                t.is_contiguous(memory_format=torch.channels_last)
                for t in (args[0], out[0] if isinstance(out, tuple) else out)
            )
        )
    model = model.to(memory_format=torch.channels_last)
    actual_out, actual = step(model, x.to(memory_format=torch.channels_last))
    assert formats
    assert all(formats)
    assert_same_outputs(actual_out, out)
    assert distance(actual, gradients) < 1e-12


# torch.compile -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TINY)
def test_compiled_step_equals_the_eager_one(name: str) -> None:
    model, x = network(name), images()
    out, gradients = step(model, x)
    actual_out, actual = step(model, x, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert_same_outputs(actual_out, out, tolerance=1e-6)
    assert distance(actual, gradients) < 1e-6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler")
def test_inductor_under_autocast() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()
    )  # fmt: skip  # seconds of g++ for each layer
    model, x = pn_compiler.transform(net, warm_start="none"), images(2)[..., :16, :16]
    out, gradients = step(model, x)
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual_out, actual = step(model, x, compiled)
    of_outputs, of_gradients = bounds(model, torch.bfloat16)
    assert relative_error(actual_out, out) < of_outputs
    assert distance(actual, gradients) < of_gradients


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", TINY)
def test_compiled_code_serves_other_values_and_batch_sizes(name: str) -> None:
    model = network(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for batch in (4, 4, 2, 3, 5, 4):
        x = images(batch)
        out, gradients = step(model, x)
        actual_out, actual = step(model, x, compiled)
        assert_same_outputs(actual_out, out, tolerance=1e-6)
        assert distance(actual, gradients) < 1e-6
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 2  # one for the first batch size, one for all others
    assert not counters["graph_break"]


# Gradient checkpointing, torch.func, second order --------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    backbone = randomize_batch_norms(NETWORKS["resnet18"]())
    stages = nn.Sequential(backbone.layer1, backbone.layer2, backbone.layer3)
    model = nn.Sequential(*(pn_compiler.transform(stage) for stage in stages), nn.Flatten()).double()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64, requires_grad=True)
    out, gradients = step(model, x)
    for call in (
        lambda x: checkpoint(model, x, use_reentrant=reentrant),
        lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant),
    ):
        actual_out, actual = step(model, x, call)
        assert torch.equal(actual_out, out)
        assert distance(actual, gradients) == 0


@pytest.mark.parametrize("name", TINY)
def test_checkpointed_blocks(name: str) -> None:
    """The recipe of docs/training.md: the same network, whose blocks are modules and save less."""
    whole, x = network(name).double(), images(2).double()
    model, blocks = by_blocks(name)
    model = model.double()
    assert model.state_dict().keys() == whole.state_dict().keys()
    out, gradients = step(model, x)
    # smooth activations of several sites share quadrature nodes, good to 1e-10
    assert_same_outputs(out, whole(x), tolerance=1e-9)
    assert distance(gradients, step(whole, x)[1]) < 1e-9
    before = bytes_saved(model, x)
    for path in blocks:
        model.set_submodule(path, checkpoint_wrapper(model.get_submodule(path)))
    assert bytes_saved(model, x) < 0.85 * before
    actual_out, actual = step(model, x)
    assert torch.equal(actual_out, out)
    assert (
        distance({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in actual.items()}, gradients) == 0
    )


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Memory that a forward keeps for the backward, parameters not counted."""
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
        total = sum(kept.values())
    del out
    return total


@pytest.mark.parametrize("name", THREE)
def test_functional_call_and_gradients_per_sample(name: str) -> None:
    model, x = network(name), images(3)
    parameters = dict(model.named_parameters())
    assert torch.equal(functional_call(model, parameters, (x,)), model(x))

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss_of(functional_call(model, parameters, (sample[None],)))

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(len(x)):
        _, alone = step(model, x[index : index + 1])
        assert distance({n: g[index] for n, g in per_sample.items()}, alone) < 1e-5


def test_ensemble_by_vmap() -> None:
    x, models = images(2), [network("test_resnet") for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.05)
    assert relative_error(models[0](x), models[1](x)) > 0.01
    # each fx.GraphModule has a class of its own, which stack_module_state does not take
    ensemble = [nn.Sequential(model) for model in models]
    base = copy.deepcopy(ensemble[0]).to("meta")
    together = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*stack_module_state(ensemble))
    for actual, model in zip(together, models, strict=True):
        assert_same_outputs(actual, model(x))


@pytest.mark.parametrize("name", TINY)
def test_second_derivatives(name: str) -> None:
    """Hessian times a vector: twice backward, forward over backward, and for smooth ones differences."""
    model, x = network(name).double(), images(2).double()
    parameters = dict(model.named_parameters())
    vector = {n: torch.randn_like(p) * p.detach().std() for n, p in parameters.items() if p.std() > 0}
    vector = {n: vector.get(n, torch.zeros_like(p)) for n, p in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,)).square().mean()

    first = torch.autograd.grad(model(x).square().mean(), list(parameters.values()), create_graph=True)
    dot = sum((g * v).sum() for g, v in zip(first, vector.values(), strict=True))
    twice = dict(zip(parameters, torch.autograd.grad(dot, list(parameters.values())), strict=True))
    assert distance(twice, jvp(grad(loss), (parameters,), (vector,))[1]) < 1e-8
    if name == "test_efficientnet":
        ahead, behind = (
            grad(loss)({n: p + h * vector[n] for n, p in parameters.items()}) for h in (1e-6, -1e-6)
        )
        assert distance({n: (ahead[n] - behind[n]) / 2e-6 for n in twice}, twice) < 1e-5
