"""Every trainable parameter in the group that the method gives it."""

import fnmatch
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn
from torch.nn.utils import parametrizations

import pn_compiler
from pn_compiler import param_groups
from pn_compiler.base.errors import ConfigError
from pn_compiler.nn import ProxyNormAct
from tests import zoo


@functools.cache
def network(name: str) -> nn.Module:
    """Name is "timm:..." or "torchvision:..."; converted, unless it ends with "!"."""
    library, model = name.rstrip("!").split(":")
    models = zoo.timm().create_model if library == "timm" else zoo.torchvision().models.get_model
    built: nn.Module = models(model)
    return built if name.endswith("!") else pn_compiler.transform(built, warm_start="none")


NETWORKS = [
    "torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0",
    "torchvision:resnet18!", "timm:resnet18d", "timm:mobilenetv3_small_050", "timm:levit_128s",
    "timm:xcit_nano_12_p16_224", "timm:convnext_atto!", "timm:vit_tiny_patch16_224!",
]  # fmt: skip


def by_name(groups: list[dict[str, Any]]) -> dict[str, set[nn.Parameter]]:
    return {group["name"]: set(group["params"]) for group in groups}


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(NETWORKS), decay=st.floats(0, 1), proxy=st.floats(0, 1), seed=st.integers(0, 99))
def test_each_trainable_parameter_is_in_one_group(name: str, decay: float, proxy: float, seed: int) -> None:
    model = network(name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(torch.rand((), generator=generator) < 0.9))
    groups = param_groups(model, decay, proxy)
    counted = Counter(parameter for group in groups for parameter in group["params"])
    assert counted == Counter(p for p in model.parameters() if p.requires_grad)
    expected = {"no_decay": 0.0, "decay": decay, "proxy": proxy}
    assert all(group["weight_decay"] == expected[group["name"]] for group in groups)
    torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_where_their_layers_say(name: str) -> None:
    model = network(name).requires_grad_()
    groups = by_name(param_groups(model, 0.1, 0.2))
    sites = [module for module in model.modules() if isinstance(module, ProxyNormAct)]
    assert bool(sites) != name.endswith("!")
    assert groups.get("proxy", set()) == {p for s in sites for p in (s.proxy_weight, s.proxy_bias)}
    normalizers = (ProxyNormAct, nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)
    listed = getattr(model, "no_weight_decay", set)()  # timm's own
    for path, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if not n.startswith("proxy")}
        if isinstance(module, normalizers):
            assert groups["no_decay"] >= set(own.values())
        elif isinstance(module, nn.Conv2d | nn.Linear):
            kept = any(fnmatch.fnmatchcase(f"{path}.weight", pattern) for pattern in listed)
            assert own["weight"] in groups["no_decay" if kept else "decay"]
            assert "bias" not in own or own["bias"] in groups["no_decay"]


@pytest.mark.parametrize(
    "name", ["timm:vit_tiny_patch16_224!", "timm:convnext_atto!", "torchvision:resnet18!"]
)
def test_without_proxy_normalization_it_agrees_with_timm(name: str) -> None:
    model = network(name).requires_grad_()
    zoo.timm()
    from timm.optim import param_groups_weight_decay

    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=skipped)
    ours = param_groups(model, 0.1)
    assert [group["weight_decay"] for group in ours] == [group["weight_decay"] for group in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert set(our["params"]) == set(their["params"])


def test_names_without_decay_are_taken_from_the_caller_and_from_modules() -> None:
    original = network("timm:levit_128s!").requires_grad_()
    biases = {p for n, p in original.named_parameters() if "attention_biases" in n}
    assert all(p.ndim == 2 for p in biases)
    assert by_name(param_groups(original, 0.1))["no_decay"] >= biases
    assert by_name(param_groups(nn.Sequential(nn.Identity(), original), 0.1))["no_decay"] >= biases
    converted = network("timm:levit_128s").requires_grad_()
    biases = {p for n, p in converted.named_parameters() if "attention_biases" in n}
    for names in (original.no_weight_decay(), ["*.attention_biases"]):
        assert by_name(param_groups(converted, 0.1, no_weight_decay=names))["no_decay"] >= biases


def test_proxy_parameters_decay_like_the_kernels_by_default() -> None:
    groups = param_groups(network("torchvision:resnet18").requires_grad_(), 0.3)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "no_decay": 0.0, "decay": 0.3, "proxy": 0.3,
    }  # fmt: skip


def small(activation: type[nn.Module] = nn.PReLU) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 4, 3))
    return pn_compiler.transform(net, warm_start="none")


compiled = functools.partial(torch.compile, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, GradSampleModule, nn.DataParallel, nn.Sequential])
def test_a_wrapped_model_has_the_same_groups(wrap: Any) -> None:
    learns = wrap is not GradSampleModule  # it refuses a module at two paths, as a PReLU of a site is
    model = small(nn.PReLU if learns else nn.ReLU)
    names = {p: n for n, p in model.named_parameters()}
    plain, wrapped = by_name(param_groups(model, 0.1)), by_name(param_groups(wrap(model), 0.1))
    assert plain == wrapped
    assert {names[p] for p in plain["proxy"]} == {"1.proxy_weight", "1.proxy_bias"}
    assert {names[p] for p in plain["decay"]} == {"0.weight", "3.weight"}
    slopes = {"1.activation.weight"} if learns else set()
    assert {names[p] for p in plain["no_decay"]} == {"0.bias", "1.weight", "1.bias", "3.bias"} | slopes


def test_shared_and_parametrized_parameters() -> None:
    model = small()
    parametrizations.weight_norm(model.get_submodule("3"))
    nn.utils.parametrize.register_parametrization(model.get_submodule("1"), "proxy_bias", nn.Tanh())
    both = nn.ModuleDict({"one": model, "other": model, "layer_norm": nn.LayerNorm([4, 2, 2])})
    groups = param_groups(both, 0.1, 0.2)
    counted = Counter(p for group in groups for p in group["params"])
    assert counted == Counter(both.parameters())
    names = {p: n for n, p in both.named_parameters()}
    assert {names[p] for p in by_name(groups)["proxy"]} == {
        "one.1.proxy_weight", "one.1.parametrizations.proxy_bias.original",
    }  # fmt: skip
    assert both["layer_norm"].weight in by_name(groups)["no_decay"]


def test_the_proxy_decay_is_the_gradient_of_an_l2_penalty() -> None:
    """Two steps of SGD with momentum, against the penalty written into the loss."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    trained = []
    for in_loss in (False, True):
        torch.manual_seed(1)
        model = small().double()
        site = model.get_submodule("1")
        optimizer = torch.optim.SGD(param_groups(model, 0, 0 if in_loss else 0.3), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if in_loss:
                loss = loss + 0.15 * (site.proxy_weight.square().sum() + site.proxy_bias.square().sum())
            loss.backward()
            optimizer.step()
        trained.append(site)
    for name in ("weight", "proxy_weight", "proxy_bias"):
        torch.testing.assert_close(getattr(trained[0], name), getattr(trained[1], name), rtol=0, atol=1e-14)
        assert getattr(trained[0], name).grad.abs().max() > 1e-6


def test_timm_and_schedulers_take_the_groups() -> None:
    model = small()
    zoo.timm()
    from timm.optim import create_optimizer_v2

    fn = functools.partial(param_groups, weight_decay=0.1, proxy_weight_decay=0.2)
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, param_group_fn=fn)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "no_decay": 0.0, "decay": 0.1, "proxy": 0.2,
    }  # fmt: skip
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.1, 0.2], total_steps=4)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    again = torch.optim.AdamW(param_groups(model, 0), lr=1)
    again.load_state_dict(optimizer.state_dict())
    assert [g["weight_decay"] for g in again.param_groups] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
def test_refuses_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ConfigError, match="'decay'"):
        param_groups(nn.Linear(2, 2), decay)
    with pytest.raises(ConfigError, match="'proxy'"):
        param_groups(nn.Linear(2, 2), 0.1, decay)
