"""What a converted model remembers, and files of it that earlier versions wrote."""

from pathlib import Path

import torch

import pn_compiler

SAVED = Path(__file__).with_name(
    "saved_by_0.1.pt"
)  # a dict: converted, folded, inputs, outputs; nn.Modules whole


def test_models_that_version_0_1_saved_still_load() -> None:
    saved = torch.load(SAVED, weights_only=False)
    for model in (saved["converted"], saved["folded"]):
        torch.testing.assert_close(model(saved["inputs"]), saved["outputs"])
        assert [site.name for site in pn_compiler.sites(model)] == ["b", "d"]
