"""Model files: what is loaded, what is refused, and that nothing runs that the user did not ask for."""

import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import LoadError
from pn_compiler.loading import load_model
from pn_compiler.loading.program_texts import is_harmless_operator as _is_harmless_operator
from pn_compiler.loading.size_expressions import is_size_expression as _is_harmless_expression
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())


def test_whole_modules_of_known_libraries(tmp_path: Path) -> None:
    models = {
        "torch": plain(),
        "torchvision": zoo.torchvision().models.mobilenet_v3_small(),
        "timm": zoo.timm().create_model("efficientnet_b0"),
    }
    for name, model in models.items():
        torch.save(model, tmp_path / f"{name}.pt")
        loaded = load_model(tmp_path / f"{name}.pt").model
        assert type(loaded) is type(model)
        assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_bomb_only_goes_off_when_asked(tmp_path: Path, unsafe: bool) -> None:
    model = plain()
    model.payload = Bomb(tmp_path / "boom")  # type: ignore[assignment]
    torch.save(model, tmp_path / "model.pt")
    if unsafe:
        load_model(tmp_path / "model.pt", unsafe_pickle=True)
        assert (tmp_path / "boom").exists()
        return
    with pytest.raises(LoadError, match=r"uses builtins\.getattr, pathlib.*can run any code"):
        load_model(tmp_path / "model.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "posix.system", "builtins.eval", "torch.hub.load", "torch.load"]
)
def test_functions_are_refused_by_name(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"X\x01\x00\x00\x00x\x85R."
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/version", "3\n")
        archive.writestr("model/byteorder", "little")
    with pytest.raises(LoadError, match=name.replace(".", r"\.")):
        load_model(tmp_path / "model.pt")


def test_modules_that_bring_source_text_are_refused(tmp_path: Path) -> None:
    torch.save(torch.fx.symbolic_trace(plain()), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"source text.*--unsafe-pickle"):
        load_model(tmp_path / "model.pt")


def test_a_class_of_the_users_own_is_admitted_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_package.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_package  # type: ignore[import-not-found]

    torch.save(my_package.Net(), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"uses my_package\.Net.*--allow my_package\.Net"):
        load_model(tmp_path / "model.pt")
    assert isinstance(load_model(tmp_path / "model.pt", allow=["my_package.Net"]).model, my_package.Net)
    monkeypatch.delattr(my_package, "Net")
    with pytest.raises(LoadError, match="cannot be imported"):
        load_model(tmp_path / "model.pt", allow=["my_package.Net"])


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model_state_dict", "parallel", "compiled"])
def test_state_dicts_with_an_architecture(tmp_path: Path, wrap: str) -> None:
    state: Any = Mine().state_dict()
    if wrap in ("parallel", "compiled"):
        prefix = {"parallel": "module.", "compiled": "_orig_mod."}[wrap]
        state = OrderedDict((prefix + key, value) for key, value in state.items())
    elif wrap != "bare":
        state = {"epoch": 3, wrap: state, "optimizer": {"lr": 0.1}}
    torch.save(state, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", arch="tests.loading.test_loading:Mine").model
    assert torch.equal(loaded.get_parameter("fc.weight"), next(iter(_tensors(state))))


def _tensors(state: Any) -> Any:
    nested = next((state[k] for k in ("state_dict", "model_state_dict") if k in state), state)
    return nested.values()


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (None, "--arch torchvision.models:resnet18"),
        ("nonsense", "expected package.module:factory"),
        ("no_such_package:net", "cannot be imported"),
        ("torch.nn:Nothing", "cannot be imported: torch.nn has no Nothing$"),
        ("torch.nn:linear", r"torch.nn has no linear \(did you mean Linear\?\)"),
        ("torch.nn:Linear.weights", "cannot be imported: Linear has no weights"),
        ("torch.nn.Linear", "expected package.module:factory, such as torch.nn:Linear"),
        ("torch.nn:Linear", "missing"),
        ("torch.nn:ReLU", "does not fit"),
        ("builtins:dict", "made a dict"),
    ],
)
def test_state_dicts_with_a_wrong_architecture(tmp_path: Path, arch: str | None, message: str) -> None:
    torch.save(Mine().state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=message):
        load_model(tmp_path / "model.pt", arch=arch)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    torch.save(plain(), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    files = {
        "empty.pt": (b"", "is empty"),
        "cut.pt": (good[: len(good) // 2], "cut short"),
        "text.pt": (b"hello, I am a text", "not a model saved by"),
        "plain.pkl": (pickle.dumps({"a": 1}), "plain pickle"),
        "number.pt": (None, "holds a int"),
    }
    torch.save(3, tmp_path / "number.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    for name, (content, message) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadError, match=message):
            load_model(tmp_path / name)
    with pytest.raises(LoadError, match="not a model saved by"):
        load_model(tmp_path / "other.zip")
    with pytest.raises(LoadError, match="No such file"):
        load_model(tmp_path / "missing.pt")
    with pytest.raises(LoadError, match="Is a directory"):
        load_model(tmp_path)


def test_every_corruption_is_one_error(tmp_path: Path) -> None:
    torch.save(plain(), tmp_path / "good.pt")
    good = bytearray((tmp_path / "good.pt").read_bytes())
    failed = 0
    for position in range(0, len(good), 97):
        bad = bytearray(good)
        bad[position] ^= 0xFF
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            load_model(tmp_path / "bad.pt")
        except LoadError:
            failed += 1
    assert failed > 10  # others only changed padding or a weight


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")  # torch 2.9 has none
def test_torchscript_is_refused_with_what_to_do(tmp_path: Path) -> None:
    class Scripted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    torch.jit.save(torch.jit.trace(Scripted(), torch.ones(1)), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"TorchScript.*save the original nn\.Module"):
        load_model(tmp_path / "model.pt")


# Exported programs


def exported(path: Path, model: nn.Module, *, dynamic: bool = True) -> Path:
    x = torch.randn(2, 3, 8, 8)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)
    return path


def tampered(path: Path, change: Callable[[str, Any], Any], extra: dict[str, bytes] | None = None) -> Path:
    """A copy of a program with its JSON entries changed, and `extra` entries."""
    target = path.with_name("tampered.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".json"):
                content = json.dumps(change(name, json.loads(content))).encode()
            copy.writestr(name, content)
        folder = source.namelist()[0].partition("/")[0]
        for name, content in (extra or {}).items():
            copy.writestr(f"{folder}/{name}", content)
    return target


def test_programs_bring_their_inputs(tmp_path: Path) -> None:
    dynamic = load_model(exported(tmp_path / "d.pt2", plain().eval()))
    assert dynamic.fixed_batch is None
    assert dynamic.inputs is not None
    assert dynamic.inputs.args[0].shape == (2, 3, 8, 8)
    assert load_model(exported(tmp_path / "s.pt2", plain().eval(), dynamic=False)).fixed_batch == 2


def test_programs_that_would_run_code_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "p.pt2", plain().eval())

    def same(name: str, content: Any) -> Any:
        return content

    def call(target: str) -> Callable[[str, Any], Any]:
        def change(name: str, content: Any) -> Any:
            if name.endswith("models/model.json"):
                content["graph_module"]["graph"]["nodes"][0]["target"] = target
            return content

        return change

    def pickled(name: str, content: Any) -> Any:
        if name.endswith("weights_config.json"):
            next(iter(content["config"].values()))["use_pickle"] = True
        return content

    def evaluated(name: str, content: Any) -> Any:
        text = json.dumps(content).replace("Symbol('s", "__import__('os').system('touch boom') or Symbol('s")
        return json.loads(text)

    cases = [
        (call("torch.hub.load"), None, r"calls torch\.hub\.load"),
        (call("torch.ops.load_library"), None, r"calls torch\.ops\.load_library"),
        (call("torch.ops.aten.__init__"), None, "calls"),
        (call("_operator.attrgetter"), None, "calls"),
        (pickled, None, "pickled object"),
        (evaluated, None, "not arithmetic"),
        (same, {"data/constants/opaque_obj_0": b""}, "may bring code"),
        (same, {"data/aotinductor/model/model.so": b""}, "may bring code"),
    ]
    assert load_model(tampered(path, same)).fixed_batch is None  # tampering itself is not what is refused
    for change, extra, message in cases:
        with pytest.raises(LoadError, match=message):
            load_model(tampered(path, change, extra))


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s0 + 1",
        "Max(1, s0)",
        "Symbol('s77', positive=True, integer=True)",
        "((s0 - 1)//2)",
        "Mul(Integer(3), Symbol('s16'))",
    ],
)
def test_size_arithmetic_is_harmless(text: str) -> None:
    assert _is_harmless_expression(text)
    assert _is_harmless_expression(f"Mul(Integer(3), Add({text}, 1))")


@pytest.mark.parametrize(
    "text",
    ["().__class__", "__import__('os')", "s0[0]", "'a'*3", "lambda: 0", "exec('s0')", "open", "(", ""],
)  # fmt: skip
def test_anything_else_is_not(text: str) -> None:
    assert not _is_harmless_expression(text)


def test_operators() -> None:
    assert _is_harmless_operator("torch.ops.aten.conv2d.default")
    assert _is_harmless_operator("_operator.getitem")
    for target in (
        "torch.load",
        "torch.ops.aten.conv2d.__call__",
        "_operator.methodcaller",
        "math.__loader__",
    ):
        assert not _is_harmless_operator(target), target


def test_functions_with_arguments_in_modules(tmp_path: Path) -> None:
    models = [
        zoo.torchvision().models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
        ),
        zoo.torchvision().models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
        nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"),
        zoo.timm().create_model("visformer_tiny"),  # holds an Enum of timm
        nn.LSTM(2, 3, 2, bidirectional=True),
        nn.ModuleDict({"a-b": nn.ReLU(), "3x3/1": nn.Linear(1, 1)}),
    ]
    for model in models:
        torch.save(model, tmp_path / "model.pt")
        loaded = load_model(tmp_path / "model.pt").model
        assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("options", [(), ("--unsafe-pickle",)])
def test_torchvision_beside_a_cpu_build_of_torch(tmp_path: Path, options: tuple[str, ...]) -> None:
    """In a process of its own, in which nobody has declared torchvision's compiled operators."""
    torch.save(zoo.torchvision().models.resnet18(), tmp_path / "resnet18.pt")
    done = subprocess.run(
        [sys.executable, "-m", "pn_compiler.cli", str(tmp_path / "resnet18.pt"), "--dry-run", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layer4.1.bn2" in done.stdout


def test_the_program_of_a_converted_network(tmp_path: Path) -> None:
    """It asks for a common dtype; there is nothing left to convert."""
    net = randomize_batch_norms(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    )
    images = torch.randn(2, 3, 6, 6)
    converted = pn_compiler.transform(net.eval(), images)
    torch.export.save(torch.export.export(converted, (images,)), tmp_path / "converted.pt2")
    loaded = load_model(tmp_path / "converted.pt2").model
    again = pn_compiler.transform(loaded, images)
    assert [note.code for note in pn_compiler.notes(again)] == ["PN100"]
    assert_same_outputs(again(images), converted(images))
