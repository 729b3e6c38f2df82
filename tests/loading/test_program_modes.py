"""Programs that were exported in train mode are read as in eval mode."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import LoadError
from pn_compiler.loading import LoadedModel, load_model
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """All that differs between the modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-2, momentum=0.3)
        self.last = nn.BatchNorm2d(4, eps=1e-4, affine=False)
        self.drop, self.drops = nn.Dropout(0.5), nn.Dropout2d(0.3)
        self.recurrent = nn.LSTM(4, 4, 2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drops(torch.relu(self.bn(self.conv(x))))
        y = self.last(self.drop(y)).flatten(2).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.2 if self.training else 0.0)
        return self.recurrent(y)[0]


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Net())


def load(folder: Path, model: nn.Module, *, decomposed: bool = False) -> LoadedModel:
    program = torch.export.export(model, (X,))
    torch.export.save(program.run_decompositions() if decomposed else program, folder / "p.pt2")
    return load_model(folder / "p.pt2")


@pytest.mark.filterwarnings("ignore:.*_flat_weights.*:UserWarning")  # torch.export on recurrent layers
def test_train_mode_is_read_as_eval_mode(tmp_path: Path) -> None:
    loaded = load(tmp_path, net().train())
    assert [note.code for note in loaded.notes] == ["PN303"]
    assert "batch_norm" in loaded.notes[0].message
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    assert_same_outputs(loaded.model(X), net().eval()(X))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    calls = [n for n in loaded.model.graph.nodes if n.target == torch.ops.aten.batch_norm.default]
    assert [call.args[7] for call in calls] == [1e-2, 1e-4]
    assert calls[0].args[6] == 0.3
    assert not load(tmp_path, net().eval()).notes


@pytest.mark.parametrize("train", [False, True])
def test_decomposed_programs(tmp_path: Path, train: bool) -> None:
    model = randomize_batch_norms(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    )
    loaded = load(tmp_path, model.train(train), decomposed=True)
    assert [note.code for note in loaded.notes] == (["PN303"] if train else [])
    assert_same_outputs(loaded.model(X), model.eval()(X))
    assert [site.kind for site in pn_compiler.sites(pn_compiler.transform(loaded.model, X))] == ["norm_only"]


def test_both_modes_convert_to_the_same(tmp_path: Path) -> None:
    model = randomize_batch_norms(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    )
    want = pn_compiler.transform(model.eval(), X)
    for train in (True, False):
        converted = pn_compiler.transform(load(tmp_path, model.train(train)).model, X)
        assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
        assert_same_outputs(converted(X), want(X))


def test_batch_norms_without_statistics_keep_their_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    loaded = load(tmp_path, model.eval())
    assert not loaded.notes
    assert_same_outputs(loaded.model(X), model(X))


def test_other_randomness_is_refused(tmp_path: Path) -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return (
                x + self.bn(x) * torch.rand(x.shape[0], 1, 1, 1).round() if self.training else x + self.bn(x)
            )

    with pytest.raises(LoadError, match=r"train mode.*random numbers.*model\.eval\(\)"):
        load(tmp_path, Depth().train())


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
    )
    torch.export.save(torch.export.export(randomize_batch_norms(model).train(), (X,)), "p.pt2")
    assert cli.main(["p.pt2", "-o", "m.onnx"]) == cli.DONE
    said = capsys.readouterr().out
    assert "PN303" in said
    assert "verified    largest error" in said
