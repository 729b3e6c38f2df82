"""What `transform` warns of: once for a call, in the name of the caller, with codes."""

import linecache
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pn_compiler
from pn_compiler import ConversionWarning
from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.user_warnings import gathered, must_know
from pn_compiler.testing import randomize_batch_norms


class Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 1 if self.training else y


class Stores(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.features = super().forward(x)
        return self.features * 2


class Checkpoints(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


NETWORKS = {
    "PN104": lambda: Net(nn.BatchNorm2d(4, track_running_stats=False)),
    "PN110": Branches,
    "PN112": Stores,
    "PN113": Checkpoints,
}


@pytest.mark.parametrize("code", NETWORKS)
def test_what_a_user_must_know_is_a_warning(code: str) -> None:
    net = randomize_batch_norms(NETWORKS[code]()).eval()
    with pytest.warns(ConversionWarning) as caught:
        converted = pn_compiler.transform(net, torch.randn(2, 3, 8, 8))
    (warning,) = caught
    assert isinstance(warning.message, ConversionWarning)
    assert code in {found.code for found in warning.message.diagnostics}
    assert set(warning.message.diagnostics) <= set(pn_compiler.notes(converted))
    assert code in str(warning.message)


def test_calibration_that_explains_little_is_a_warning() -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(Net(nn.BatchNorm2d(4))).eval()
    batches = [torch.randn(8, 3, 8, 8) * torch.linspace(0.1, 9, 8).view(-1, 1, 1, 1)]
    with pytest.warns(ConversionWarning, match="PN209"):
        pn_compiler.transform(net, warm_start="calibrate", calibration=batches, norm="instance")


def test_it_points_to_the_line_of_the_caller() -> None:
    net = NETWORKS["PN104"]()
    with pytest.warns(ConversionWarning) as caught:
        pn_compiler.transform(net)
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).strip() == "pn_compiler.transform(net)"


def test_many_sites_are_one_warning_and_one_line() -> None:
    norms = [nn.BatchNorm2d(3, track_running_stats=False) for _ in range(7)]
    with pytest.warns(ConversionWarning) as caught:
        pn_compiler.transform(nn.Sequential(*norms))
    (warning,) = caught
    assert len(warning.message.diagnostics) == 7
    assert "PN104 at 7 sites (0, 1, 2 and 4 more): no running statistics" in str(warning.message)


def test_nothing_to_know_is_no_warning() -> None:
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pn_compiler.transform(randomize_batch_norms(frozen))


def test_an_error_in_the_place_of_the_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConversionWarning) as caught:
            pn_compiler.transform(NETWORKS["PN104"]())
    assert [found.code for found in caught.value.diagnostics] == ["PN104"]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_harmless_refusals_and_notes_are_not_among_them() -> None:
    notes = [Diagnostic(code, "a", "x") for code in ("PN103", "PN201", "PN211", "PN212", "PN205")]
    assert [note.code for note in must_know(notes)] == ["PN205"]
    assert gathered(notes[:1]) == ["PN103 a: x"]
