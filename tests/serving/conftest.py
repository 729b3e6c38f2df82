"""Model repositories that the tests of all servers serve."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from examples.digits_network import DigitsNet
from pn_compiler.testing import randomize_batch_norms

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two inputs, [N, 3, L] and [N, 4] integers, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, signal: Tensor, marks: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.bn(self.conv(signal)))
        return {"features": x, "scores": self.head(x.mean(2) + marks)}


def digits_network() -> nn.Module:
    torch.manual_seed(0)
    return pn_compiler.transform(randomize_batch_norms(DigitsNet()).eval(), IMAGES)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "digits", and with "pair", which has several inputs and outputs and opset 21."""
    folder = tmp_path_factory.mktemp("repository") / "model_repository"
    pn_compiler.export_model_repository(
        digits_network(), folder, "digits", IMAGES, target_ort="1.18", max_batch_size=64
    )
    torch.manual_seed(0)
    pair = randomize_batch_norms(Pair()).eval()
    inputs = (torch.randn(2, 3, 8), torch.randint(0, 5, (2, 4)))
    pn_compiler.export_model_repository(
        pair, folder, "pair", inputs, opset_version=21, target_ort="1.18.1",
        input_names=("signal_in", "marks_in"), output_names=("features", "scores"),
    )  # fmt: skip
    return folder
