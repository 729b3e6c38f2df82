"""What a training loop keeps beside the weights: averages, checkpoints, accumulated gradients, and the
statistics that a site holds in evaluation."""

import copy
import io
import threading
import zipfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pn_compiler import param_groups
from pn_compiler.nn import InputAffineConv2d, ProxyNormAct
from pn_compiler.testing import assert_same_outputs
from tests import zoo
from tests.training_step import THREE, TINY, distance, images, loss_of, network, sites, step


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs of `model` in evaluation, which must not depend on what it has computed before."""
    with torch.no_grad():
        out = model.eval()(x)
        afresh = copy.deepcopy(model)
        for site in sites(afresh).values():
            site.train()  # statistics are computed in every call
        assert torch.equal(out, afresh(x))
    return out


@torch.no_grad()
def disturb(model: nn.Module, amount: float = 0.05) -> None:
    for parameter in model.parameters():
        parameter.add_(amount * torch.rand_like(parameter))


# Averages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_averaged_models_evaluate_with_their_own_parameters(name: str) -> None:
    zoo.timm()
    from timm.utils import ModelEmaV3

    model, x = network(name).eval(), images(2)
    evaluated(model, x)  # the copies start with statistics of these parameters
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ema = ModelEmaV3(model, decay=0.5)
    start = evaluated(model, x)
    for average in (mean, ema):
        assert torch.equal(evaluated(average.module, x), start)
    mean.update_parameters(model)  # the first one copies
    disturb(model)
    mean.update_parameters(model)
    ema.update(model)
    expected = network(name).eval()
    for parameter, before in zip(model.parameters(), expected.parameters(), strict=True):
        before.data.lerp_(parameter.data, 0.5)
    for average in (mean, ema):
        assert_same_outputs(evaluated(average.module, x), evaluated(expected, x))
    assert not torch.allclose(evaluated(model, x), evaluated(expected, x), rtol=1e-3)


def test_a_copy_has_hooks_of_its_own() -> None:
    model = network("test_resnet")
    calls: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, _, kwargs: calls.append(module), with_kwargs=True)
    copied = copy.deepcopy(model)
    copied.register_forward_hook(lambda module, args, kwargs, out: calls.append(module), with_kwargs=True)
    model(images(1))
    assert calls == [model]
    copied(images(1))
    assert calls == [model, copied, copied]


# Statistics held in evaluation ---------------------------------------------------------------------

CHANGES: dict[str, Callable[[ProxyNormAct], object]] = {
    "in place": lambda site: site.proxy_weight.add_(0.1),
    "behind autograd's back": lambda site: site.proxy_bias.data.add_(0.1),
    "through numpy": lambda site: site.bias.detach().numpy().__iadd__(0.1),
    "copy_": lambda site: site.weight.copy_(site.weight * 2),
    "load_state_dict": lambda site: site.load_state_dict({k: v + 0.1 for k, v in site.state_dict().items()}),
    "load_state_dict, assigned": lambda site: site.load_state_dict(
        {k: v + 0.1 for k, v in site.state_dict().items()}, assign=True
    ),
    "new parameter": lambda site: setattr(site, "proxy_weight", nn.Parameter(site.proxy_weight + 0.1)),
    "parametrized": lambda site: nn.utils.parametrize.register_parametrization(
        site, "proxy_bias", nn.Softplus()
    ),
    "one channel": lambda site: site.weight[0].mul_(1.5),
    "proxy_eps": lambda site: setattr(site, "proxy_eps", 0.5),
    "activation": lambda site: setattr(site, "activation", nn.Sigmoid()),
    "learned slope": lambda site: site.activation.weight.add_(0.1),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("activation", [nn.PReLU(4), nn.SiLU()])
def test_no_change_is_missed(change: str, activation: nn.Module) -> None:
    if change == "learned slope" and not isinstance(activation, nn.PReLU):
        return
    site = ProxyNormAct(1, 4, copy.deepcopy(activation)).eval()
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    before = evaluated(site, x)
    with torch.no_grad():
        CHANGES[change](site)
    assert not torch.equal(evaluated(site, x), before)


def test_threads_share_a_site() -> None:
    model, x = network("test_efficientnet").eval(), images(2)
    expected, wrong = evaluated(copy.deepcopy(model), x), []

    def serve() -> None:
        with torch.inference_mode():
            wrong.extend(1 for _ in range(5) if not torch.equal(model(x), expected))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_held_statistics_do_not_leave_the_process() -> None:
    model = network("test_efficientnet").eval()
    states, tensors = [], []
    for _ in range(2):
        states.append(model.state_dict().keys())
        torch.save(model, file := io.BytesIO())
        with zipfile.ZipFile(file) as archive:
            tensors.append([(e.filename, e.file_size) for e in archive.infolist() if "/data/" in e.filename])
        evaluated(model, images(1))
    assert states[0] == states[1]
    assert tensors[0] == tensors[1]
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(evaluated(loaded, images(2)), evaluated(model, images(2)))


@pytest.mark.parametrize("name", THREE)
def test_held_statistics_are_small(name: str) -> None:
    """Kernels of few parameters may be held, large ones not."""
    model, x = network(name).eval(), images(1)
    before = held_bytes(model)
    evaluated(model, x)
    assert held_bytes(model) - before < 0.5 * before


def held_bytes(model: nn.Module) -> int:
    """Of all tensors that the attributes of modules hold, each storage once."""
    storages: dict[int, int] = {}
    waiting: list[object] = [vars(module) for module in model.modules()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif type(value).__module__.startswith("pn_compiler") and not isinstance(value, nn.Module):
            waiting.extend(vars(value).values() if hasattr(value, "__dict__") else ())
    return sum(storages.values())


def test_inference_mode_does_not_spoil_later_training() -> None:
    model, x = network("test_efficientnet").eval(), images(2)
    _, gradients = step(model, x)
    with torch.inference_mode():
        model(x)
    evaluated(model, x)
    assert distance(step(model, x)[1], gradients) == 0


# Batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THREE)
def test_accumulated_gradients_equal_those_of_the_whole_batch(name: str) -> None:
    """Up to the order of summation: a few eps, each sample's gradient being the same."""
    model, x = network(name).double(), images(6).double()
    _, gradients = step(model, x)
    model.zero_grad()
    for micro in x.split(2):
        (loss_of(model(micro)) / 3).backward()
    accumulated = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(accumulated, gradients) < 100 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("name", THREE)
def test_a_sample_does_not_see_its_batch(name: str) -> None:
    """Bitwise at every site. Convolutions choose other kernels for other batches: a few eps at the end."""
    model, x, inputs = network(name).eval(), images(5), {}
    hooks = [
        site.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].clone()}))
        for path, site in sites(model).items()
    ]
    with torch.no_grad():
        together = model(x)
        for hook in hooks:
            hook.remove()
        alone = torch.cat([model(sample) for sample in x.split(1)])
        for path, site in sites(model).items():
            whole, one = (
                out[0] if isinstance(out := site(t.clone()), tuple) else out
                for t in (inputs[path], inputs[path][2:3])
            )
            assert torch.equal(whole[2:3], one)
    assert_same_outputs(alone, together, tolerance=2e-6)


# Checkpoints, clipping, reparametrization ----------------------------------------------------------


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> nn.Module:
    for index in steps:
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        loss_of(model.train()(x)).square().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return model


@pytest.mark.parametrize("name", TINY)
def test_resuming_from_a_checkpoint_changes_nothing(name: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network(name)
        return model, torch.optim.AdamW(param_groups(model, 0.1, 0.2), 1e-2)

    straight = trained(*start(), range(4))
    model, optimizer = start()
    trained(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = start()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed = trained(model, optimizer, range(2, 4))
    for actual, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert distance(dict(straight.named_parameters()), dict(network(name).named_parameters())) > 1e-3


def test_gradients_are_clipped_all_together() -> None:
    model = network("test_efficientnet").double()
    _, gradients = step(model, images().double())
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.testing.assert_close(total, torch.stack([g.norm() for g in gradients.values()]).norm())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name] * 0.5 / (total + 1e-6))


def consumer(model: nn.Module) -> tuple[str, InputAffineConv2d]:
    return next((n, m) for n, m in model.named_modules() if isinstance(m, InputAffineConv2d))


def test_weight_and_spectral_norm_of_a_consumer() -> None:
    model, x = network("test_resnet").double(), images(2).double()
    out, gradients = step(model, x)
    name, conv = consumer(model)
    direction = conv.weight.detach().clone()
    parametrizations.weight_norm(conv)
    actual_out, actual = step(model, x)
    assert_same_outputs(actual_out, out)
    # d loss / d norm = gradient along the direction, per output channel (Salimans & Kingma 2016, eq. 3)
    along = (gradients[f"{name}.weight"] * direction).flatten(1).sum(1) / direction.flatten(1).norm(dim=1)
    assert_same_outputs(actual[f"{name}.parametrizations.weight.original0"].flatten(), along)
    model = network("test_resnet").double()  # in training the power iteration goes on
    _, conv = consumer(model)
    conv.weight.data *= 3 / torch.linalg.matrix_norm(conv.weight.data.flatten(1), 2)
    expected = copy.deepcopy(model)
    parametrizations.spectral_norm(conv, n_power_iterations=200)
    consumer(expected)[1].weight.data /= 3
    assert_same_outputs(model(x), expected(x), tolerance=1e-6)
    step(model, x)
