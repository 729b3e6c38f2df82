"""Checkpoints as training runs write them: where the weights are, under which names, beside what."""

import argparse
import collections
import datetime
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import ConfigError, LoadError
from pn_compiler.loading import LoadedModel, load_model
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo

ARCH = "tests.loading.test_training_checkpoints:net"
X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """With a part that has the name of a wrapper, which must stay."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net.Block()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize_batch_norms(Net(), seed).eval()


def state(seed: int = 1, prefix: str = "") -> dict[str, Any]:
    return {prefix + key: value for key, value in net(seed).state_dict().items()}


def load(folder: Path, content: Any, **options: Any) -> LoadedModel:
    torch.save(content, folder / "checkpoint.pt")
    return load_model(folder / "checkpoint.pt", **{"arch": ARCH, **options})


def codes(loaded: LoadedModel) -> list[str]:
    return [note.code for note in loaded.notes]


def assert_is(loaded: LoadedModel, seed: int) -> None:
    assert_same_outputs(loaded.model.eval()(X), net(seed)(X))


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.module.", "module._orig_mod.", "model.", "net.", "backbone.", "model.module._orig_mod.net.",
     "module.module.module.", "_forward_module.model.".removeprefix("_")],
)  # fmt: skip
def test_prefixes_in_any_order_and_number(tmp_path: Path, prefix: str) -> None:
    assert_is(load(tmp_path, state(prefix=prefix)), 1)
    lightning = {"state_dict": state(prefix=prefix) | {"criterion.weight": torch.ones(2)}, "epoch": 1}
    loaded = load(tmp_path, lightning)
    assert_is(loaded, 1)
    assert codes(loaded) == ["PN301", "PN302"]
    assert "criterion.weight" in loaded.notes[1].message


def test_wrappers_inside(tmp_path: Path) -> None:
    inside = {key.replace("backbone.", "backbone._orig_mod.module."): v for key, v in state().items()}
    assert_is(load(tmp_path, inside), 1)


def test_a_network_that_is_wrapped_itself(tmp_path: Path) -> None:
    loaded = load(tmp_path, state(), arch="tests.loading.test_training_checkpoints:wrapped")
    assert_same_outputs(loaded.model(X), net(1)(X))


def wrapped() -> nn.Module:
    return nn.DataParallel(net()).eval()


def adam() -> dict[str, Any]:
    parameters = list(net().parameters())
    optimizer = torch.optim.Adam(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "content",
    [
        lambda: {"net": state(), "epoch": 3},
        lambda: {"weights": {"generator": state()}},
        lambda: {"target_large": state(), "args_ema": {"a.b": torch.ones(1)}},
        lambda: {"model": net(1), "optimizer": None},
        lambda: {"model": state(prefix="module."), "optimizer": adam()},
        lambda: AveragedModel(net(1)).state_dict(),
        lambda: {"state_dict": state(), "best": torch.tensor(0.7), "metrics": {"a.b": torch.ones(1)}},
        lambda: state() | {"epoch": 7, "name": "run"},
    ],
)  # fmt: skip
def test_where_the_weights_are(tmp_path: Path, content: Callable[[], Any]) -> None:
    value = content()
    if isinstance(value.get("model"), nn.Module):
        name = "tests.loading.test_training_checkpoints.Net"
        loaded = load(tmp_path, value, arch=None, allow=[name, f"{name}.Block"])
        assert isinstance(loaded.model, Net)
    else:
        loaded = load(tmp_path, value)
    assert_is(loaded, 1)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema", "swa_state_dict"])
def test_averages_are_taken_and_named(tmp_path: Path, average: str) -> None:
    content = {"state_dict": state(1), average: state(2, "module.") | {"n_averaged": torch.tensor(3)}}
    loaded = load(tmp_path, content)
    assert_is(loaded, 2)
    assert (loaded.notes[0].code, average in loaded.notes[0].message) == ("PN301", True)
    assert "others under state_dict" in loaded.notes[0].message
    assert_is(load(tmp_path, content, checkpoint_key="state_dict"), 1)
    content[average] = {"backbone.conv.weight": torch.ones(4, 3, 3, 3)}  # of some parameters only
    assert_is(load(tmp_path, content), 1)
    content[average] = None  # type: ignore[assignment]
    assert_is(load(tmp_path, content), 1)


def test_several_networks_in_one_state_dict(tmp_path: Path) -> None:
    both = {"state_dict": state(1, "student.") | state(2, "teacher.")}
    with pytest.raises(LoadError, match=r"under student, teacher: choose with --checkpoint-key"):
        load(tmp_path, both)
    assert_is(load(tmp_path, both, checkpoint_key="state_dict.teacher"), 2)
    same = {"state_dict": state(1, "student.") | state(1, "teacher.")}
    assert_is(load(tmp_path, same), 1)
    averaged = {"state_dict": state(1, "model.") | state(2, "ema_model.module.")}
    loaded = load(tmp_path, averaged)
    assert_is(loaded, 2)
    assert "state_dict.ema_model.module were taken, an average" in loaded.notes[0].message
    assert_is(load(tmp_path, averaged, checkpoint_key="state_dict.model"), 1)
    beside = state(1) | state(2, "teacher.")
    loaded = load(tmp_path, beside)
    assert_is(loaded, 1)
    assert codes(loaded) == ["PN302"]
    assert_is(load(tmp_path, beside, checkpoint_key="teacher"), 2)
    assert_is(load(tmp_path, state(1) | state(2, "ema.module.")), 2)
    with pytest.raises(LoadError, match=r"has no 'state_dict\.other'"):
        load(tmp_path, averaged, checkpoint_key="state_dict.other")
    with pytest.raises(LoadError, match=r"has no 'weights'.*'state_dict': dict"):
        load(tmp_path, averaged, checkpoint_key="weights")


def test_a_prefix_of_few_names_is_no_wrapper(tmp_path: Path) -> None:
    """A linear layer fits into anything that has a weight and a bias."""
    with pytest.raises(LoadError, match="does not fit"):
        load(tmp_path, state(), arch="tests.loading.test_training_checkpoints:linear")
    loaded = load(
        tmp_path, state(), arch="tests.loading.test_training_checkpoints:linear", checkpoint_key="head"
    )
    assert torch.equal(loaded.model.get_parameter("weight"), state()["head.weight"])


def linear() -> nn.Module:
    return nn.Linear(4, 2)


def training_run() -> dict[str, Any]:
    """What trainers store beside the weights."""
    now = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    return {
        "args": argparse.Namespace(lr=0.1, data=pathlib.Path("/data/x"), model="net", deep={"a": [1, (2,)]}),
        "hyper_parameters": {"config": types.SimpleNamespace(width=4), "path": pathlib.PurePosixPath("a/b")},
        "windows": pathlib.PureWindowsPath("C:/a"),
        "started": now, "day": now.date(), "time": now.time(), "took": now - now, "zone": now.tzinfo,
        "lr_schedulers": [{"milestones": collections.Counter([3, 3, 5])}],
        "best_accuracy": np.float64(0.5), "best_epoch": np.int64(3), "done": np.bool_(True),
        "curve": np.arange(6.0).reshape(2, 3), "half": np.float16(1),
        "rng": np.random.RandomState(0).get_state(),
        "frozen": frozenset(["a"]), "torch": torch.__version__, "empty": b"", "raw": b"abc",
    }  # fmt: skip


def test_what_training_runs_store_beside_them(tmp_path: Path) -> None:
    assert_is(load(tmp_path, training_run() | {"state_dict": state()}), 1)


def test_values_beside_weights_are_as_they_were(tmp_path: Path) -> None:
    """In a module, whose forward may read them."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.options = training_run()  # type: ignore[assignment]
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt").model.options
    expected = training_run()
    np.testing.assert_equal(loaded.pop("curve"), expected.pop("curve"))
    np.testing.assert_equal(loaded.pop("rng"), expected.pop("rng"))
    assert loaded == expected
    assert [type(value) for value in vars(loaded["args"]).values()] == [float, type(Path()), str, dict]


def test_timm_and_lightning(tmp_path: Path) -> None:
    """The entries that they write, for a network of timm."""
    model = randomize_batch_norms(zoo.timm().create_model("resnet10t", num_classes=3)).eval()
    arch = "tests.loading.test_training_checkpoints:resnet10t"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
    timm = {
        "epoch": 3, "arch": "resnet10t", "state_dict": resnet10t().state_dict(), "optimizer": optimizer,
        "version": 2, "args": argparse.Namespace(data_dir=Path("/data"), opt="sgd"),
        "amp_scaler": {"scale": 1.0}, "state_dict_ema": model.state_dict(), "metric": 71.2,
    }  # fmt: skip
    lightning = {
        "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()} | {"loss.w": torch.ones(3)},
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint{'monitor': None}": {
            "best_model_score": torch.tensor(0.3), "best_model_path": "a.ckpt"}},
        "optimizer_states": [optimizer], "lr_schedulers": [{"milestones": collections.Counter([3])}],
        "hparams_name": "kwargs", "hyper_parameters": {"args": argparse.Namespace(root=Path("/data"))},
    }  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    for content in (timm, lightning):
        assert_same_outputs(load(tmp_path, content, arch=arch).model.eval()(images), model(images))


def resnet10t() -> nn.Module:
    torch.manual_seed(5)
    return zoo.timm().create_model("resnet10t", num_classes=3)


def test_leftovers_of_thop(tmp_path: Path) -> None:
    places = ("", "backbone.", "backbone.bn.")
    names = [place + name for place in places for name in ("total_ops", "total_params")]
    counters = {name: torch.zeros(1, dtype=torch.float64) for name in names}
    loaded = load(tmp_path, state() | counters)
    assert_is(loaded, 1)
    assert codes(loaded) == ["PN302"]
    assert_is(load(tmp_path, {f"module.{key}": v for key, v in (state() | counters).items()}), 1)


def test_safetensors(tmp_path: Path) -> None:
    save_file(state(prefix="model."), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", arch=ARCH)
    assert_is(loaded, 1)
    with pytest.raises(LoadError, match="--arch"):
        load_model(tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])
    with pytest.raises(LoadError, match="safetensors fails"):
        load_model(tmp_path / "cut.safetensors", arch=ARCH)


def test_classes_inside_classes(tmp_path: Path) -> None:
    torch.save(net(1), tmp_path / "model.pt")
    name = "tests.loading.test_training_checkpoints.Net"
    with pytest.raises(LoadError, match=rf"--allow {name} --allow {name}\.Block"):
        load_model(tmp_path / "model.pt")
    with pytest.raises(LoadError, match=rf"--allow {name}\.Block"):
        load_model(tmp_path / "model.pt", allow=[name])
    assert_is(load_model(tmp_path / "model.pt", allow=[name, f"{name}.Block"]), 1)
    torch.save(Net.Block(), tmp_path / "block.pt")  # whose outer class is no part of the file
    assert isinstance(load_model(tmp_path / "block.pt", allow=[f"{name}.Block"]).model, Net.Block)


def test_an_averaged_model_as_a_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.save(AveragedModel(randomize_batch_norms(model)), tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt").model
    converted = pn_compiler.transform(loaded, X)
    assert_same_outputs(converted.eval()(X), pn_compiler.transform(model, X).eval()(X))


def test_a_file_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    nothing = {"epoch": 3, "optimizer": torch.optim.SGD(net().parameters(), 0.1).state_dict(), "log": ["a"]}
    with pytest.raises(LoadError, match=r"'epoch': int, 'optimizer': dict, 'log': list"):
        load(tmp_path, nothing)
    with pytest.raises(LoadError, match="under 'log', but a list"):
        load(tmp_path, nothing, checkpoint_key="log")
    with pytest.raises(LoadError, match="it is empty"):
        load(tmp_path, {})


def test_convert_state_dict_takes_the_same() -> None:
    converted = pn_compiler.transform(net(), X)
    expected = pn_compiler.transform(net(1), X)
    checkpoints = [
        state(prefix="module._orig_mod."),
        training_run() | {"state_dict": state(prefix="model.") | {"criterion.weight": torch.ones(2)}},
        {"state_dict": state(2), "model_ema": state(1, "module.") | {"n_averaged": torch.tensor(1)}},
        {"model": net(1)},
        state() | {"total_ops": torch.zeros(1)},
    ]
    for checkpoint in checkpoints:
        converted.load_state_dict(pn_compiler.convert_state_dict(checkpoint, converted))
        assert_same_outputs(converted(X), expected(X))
    both = {"state_dict": state(1, "student.") | state(2, "teacher.")}
    converted.load_state_dict(pn_compiler.convert_state_dict(both, converted, key="state_dict.student"))
    assert_same_outputs(converted(X), expected(X))
    with pytest.raises(ConfigError, match="choose"):
        pn_compiler.convert_state_dict(both, converted)
    with pytest.raises(ConfigError, match="'epoch': int"):
        pn_compiler.convert_state_dict({"epoch": 3}, converted)


@pytest.mark.parametrize("strict", [True, False])
def test_a_converted_network_points_to_convert_state_dict(strict: bool) -> None:
    converted = pn_compiler.transform(net(), X)
    with pytest.raises(RuntimeError, match=r"BatchNorm.*pn_compiler\.convert_state_dict"):
        converted.load_state_dict(state(), strict=strict)
    converted.load_state_dict(converted.state_dict())


def converted_net() -> nn.Module:
    return pn_compiler.transform(net(), X)


def test_the_command_says_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state(1), "state_dict_ema": state(2)}, "checkpoint.pt")
    common = ["checkpoint.pt", "--arch", ARCH, "--input-shape", "1,3,8,8"]
    assert cli.main([*common, "-o", "m.onnx", "--report", "r.json"]) == cli.DONE
    assert "PN301: the weights under state_dict_ema were taken" in capsys.readouterr().out
    assert '"PN301"' in Path("r.json").read_text()
    assert cli.main([*common, "--dry-run", "--checkpoint-key", "state_dict"]) == cli.DONE
    assert "PN301: the weights under state_dict were taken" in capsys.readouterr().out
    common[2] = ARCH.replace(":net", ":converted_net")
    assert cli.main([*common, "-o", "m.onnx"]) == cli.FAILED
    assert "pn_compiler.convert_state_dict" in capsys.readouterr().err
