"""batch_norm as a function, in a mode that is written in or that several calls do not share."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import assert_batch_independent, assert_same_outputs

X = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Mode = bool | None  # None: that of the module


class Net(nn.Module):
    """One batch_norm in each of `modes`, and, with `branch`, code that only runs in train mode."""

    def __init__(self, modes: tuple[Mode, ...], branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in modes)
        self.modes, self.branch = modes, branch
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.branch and self.training:
            x = x * 2
        n = self.norm
        for mode, conv in zip(self.modes, self.convs, strict=True):
            training = self.training if mode is None else mode
            x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, training, 0.1, n.eps)
            x = conv(F.relu(x))
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize(
    "modes", [(False,), (None,), (True,), *itertools.permutations([False, None, True], 2)]
)
def test_every_mode_is_converted_or_refused_by_code(
    modes: tuple[Mode, ...], branch: bool, training: bool
) -> None:
    net = Net(modes, branch).train(training)
    before = copy.deepcopy(net.state_dict())
    converted = pn_compiler.transform(net, X)  # which compares
    assert all(map(torch.equal, net.state_dict().values(), before.values()))
    (site,) = pn_compiler.sites(converted)
    if site.kind == "skipped":
        assert site.code == ("PN106" if len(modes) > 1 else "PN104")
        assert_same_outputs(converted(X), net(X))
    else:
        assert_batch_independent(converted, X)
        assert all(module.training == training for module in converted.modules())


@pytest.mark.parametrize("modes", [(False,), (None,)])
def test_running_statistics_in_train_mode_start_warm(modes: tuple[Mode, ...]) -> None:
    plain = pn_compiler.transform(Net(modes).eval(), X)
    branching = pn_compiler.transform(Net(modes, branch=True).train(), X)
    assert [site.kind for site in pn_compiler.sites(branching)] == ["pn"]
    norm = plain.get_parameter("norm.weight")
    torch.testing.assert_close(branching.get_parameter("norm.weight"), norm, rtol=0, atol=0)


class OneChannel(nn.Module):
    """A batch_norm that stays: one value per instance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1).double()
        nn.init.constant_(self.norm.running_mean, 0.3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.relu(F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False))


@pytest.mark.parametrize("training", [False, True])
def test_what_stays_keeps_its_mode(training: bool) -> None:
    net, x = OneChannel(), torch.randn(3, 1, dtype=torch.float64)
    converted = pn_compiler.transform(net.train(training), x)
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN107"]
    for mode in (True, False):
        assert_same_outputs(converted.train(mode)(x), net.train(mode)(x))
    assert_same_outputs(copy.deepcopy(converted).train()(x), net(x))


def test_called_as_a_module_too_it_is_that_module() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm(self.first(x))

    converted = pn_compiler.transform(Both((False,)).eval(), X, strict=False)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    converted = pn_compiler.transform(Both((False,), branch=True).train(), X)
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN106"]
