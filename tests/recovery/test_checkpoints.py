"""A BatchNorm checkpoint goes into a network that is converted already."""

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo


def trained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomize_batch_norms(zoo.torchvision().models.resnet18(num_classes=7), seed).eval()


@pytest.mark.parametrize("options", [{}, {"num_groups": 4}, {"proxy_padding": "output"}], ids=str)
def test_it_gives_what_converting_the_checkpoint_gives(options: dict[str, object]) -> None:
    converted = pn_compiler.transform(trained(0), **options)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if "proxy" in name:
                parameter.normal_()  # trained on since
    want = pn_compiler.transform(trained(1), **options)
    state = pn_compiler.convert_state_dict(trained(1).state_dict(), converted)
    converted.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert_same_outputs(converted(x), want(x))
    for name, value in want.state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_through_flatten_and_submodules_that_stay_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.SiLU(),
                nn.Flatten(), nn.Linear(4 * 16, 2, bias=False),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.sum() > -1e9 else x

    models = [randomize_batch_norms(Net(), seed).eval() for seed in (0, 1)]
    converted = pn_compiler.transform(models[0])
    converted.load_state_dict(pn_compiler.convert_state_dict(models[1].state_dict(), converted))
    x = torch.randn(2, 3, 6, 6)
    assert_same_outputs(converted(x), pn_compiler.transform(models[1])(x))


def test_what_does_not_fit_is_named() -> None:
    converted = pn_compiler.transform(trained(0))
    state = trained(1).state_dict()
    with pytest.raises(ConfigError, match=r"has no layer1\.0\.bn1\.running_mean"):
        pn_compiler.convert_state_dict({k: v for k, v in state.items() if "layer1.0.bn1" not in k}, converted)
    with pytest.raises(ConfigError, match=r"missing conv1\.weight"):
        pn_compiler.convert_state_dict({k: v for k, v in state.items() if k != "conv1.weight"}, converted)
    with pytest.raises(ConfigError, match="unknown head"):
        pn_compiler.convert_state_dict({**state, "head": torch.ones(1)}, converted)
    with pytest.raises(ConfigError, match=r"fc\.weight is \(1,\)"):
        pn_compiler.convert_state_dict({**state, "fc.weight": torch.ones(1)}, converted)
    scratch = pn_compiler.transform(trained(0), warm_start="none")
    with pytest.raises(ConfigError, match="warm_start='running_stats'"):
        pn_compiler.convert_state_dict(state, scratch)
