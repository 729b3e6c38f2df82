"""pn_compiler.save and load: the network that comes back is the one that went, and no code is in the file."""

import copy
import pickle
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import ConfigError, ExportError, LoadError, UnsupportedModelError
from pn_compiler.loading.inert_pickle import parse_pickle
from pn_compiler.loading.model_file import load_model
from pn_compiler.saving.state_dicts import ConvertedNetworks
from pn_compiler.testing import randomize_batch_norms
from tests import killed, zoo

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def from_torchvision(name: str, **options: Any) -> nn.Module:
    made: nn.Module = getattr(zoo.torchvision().models, name)(num_classes=5, **options)
    return made


def from_timm(name: str) -> nn.Module:
    made: nn.Module = zoo.timm().create_model(name, num_classes=5)
    return made


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_network,
    "mobilenet": lambda: from_torchvision("mobilenet_v3_small"),
    "squeezenet": lambda: from_torchvision("squeezenet1_1"),  # without a BatchNorm
}


def trained(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(network).eval()


def converted(network: nn.Module, **options: Any) -> nn.Module:
    """`network` after a conversion, and a step of training that moves every parameter."""
    model = pn_compiler.transform(trained(network), IMAGES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def saved_and_loaded(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    pn_compiler.save(model, folder / "model.pt")
    return pn_compiler.load(folder / "model.pt", **options)


def assert_same(loaded: nn.Module, model: nn.Module, x: Tensor = IMAGES) -> None:
    """That they are the same network: values and outputs to the last bit, and what they say of themselves."""
    assert loaded is not model
    assert [name for name, _ in loaded.named_modules()] == [name for name, _ in model.named_modules()]
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]
    state, own = model.state_dict(), loaded.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in loaded.named_parameters()
    }
    assert pn_compiler.sites(loaded) == pn_compiler.sites(model)
    assert pn_compiler.notes(loaded) == pn_compiler.notes(model)
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(loaded(x), expected)
    assert all(tensor.device.type == "cpu" for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("name", NETWORKS)
def test_public_networks(name: str, tmp_path: Path) -> None:
    model = converted(NETWORKS[name]())
    loaded = saved_and_loaded(model, tmp_path)
    assert_same(loaded, model)
    if name == "plain":  # what was loaded is like what was converted
        assert_same(copy.deepcopy(loaded), model)
        assert_same(saved_and_loaded(loaded, tmp_path), model)
    x = IMAGES.clone().requires_grad_()
    for network in (model, loaded):
        network(x)[0].sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert any(grad is not None for grad in gradients.values())
    assert all(
        gradients[name] is None if own.grad is None else torch.equal(own.grad, gradients[name])
        for name, own in loaded.named_parameters()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer"}, {"norm": "group"}, {"norm": "instance"}, {"num_groups": 2}, {"proxy": False},
        {"anchor": 0.5, "norm": "layer"}, {"anchor": {"1": 0.25}}, {"proxy_padding": "output"},
        {"warm_start": "none"}, {"warm_start": "none", "norm_only_bias": False},
        {"leaves": ["0"]}, {"leaves": [nn.Linear]}, {"calibration": [IMAGES], "warm_start": "calibrate"},
        {"calibration": [IMAGES], "anchor": "auto"},
    ],
)  # fmt: skip
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = converted(plain_network(), **options)
    assert_same(saved_and_loaded(model, tmp_path), model)


def test_no_example(tmp_path: Path) -> None:
    model = pn_compiler.transform(trained(plain_network()))
    assert_same(saved_and_loaded(model, tmp_path), model)


class Blocks(nn.Module):
    """A ResNet of torchvision's blocks, with few channels."""

    def __init__(self) -> None:
        super().__init__()
        block = zoo.torchvision().models.resnet.BasicBlock
        down = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(block(8, 8), block(8, 8))
        self.layer2 = nn.Sequential(block(8, 12, 2, down), block(12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Inner(nn.Module):
    """Branches on values, so it stays whole, with converted parts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.lone, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        self.offset = torch.full((1,), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lone(self.conv(x)).mean((2, 3)) * self.scale + self.offset
        return self.head(y if y.sum() > 0 else -y)


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its parameters; tied weights; keyword and non-tensor arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.lstm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.LSTM(4, 4, batch_first=True)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor, double: bool = False, *, shift: Tensor | None = None) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y, _ = self.lstm(y.transpose(1, 2))
        y = self.two(self.one(y))
        if shift is not None:
            y = y + shift
        return y * 2 if double else y


ALLOW = [f"{__name__}.{name}" for name in ("Blocks", "Inner", "Recurrent")]


def test_network_that_is_not_one_graph(tmp_path: Path) -> None:
    model = converted(Inner())
    assert type(model) is Inner
    assert_same(saved_and_loaded(model, tmp_path, allow=ALLOW), model)
    model.head = nn.Linear(4, 7)
    assert_same(saved_and_loaded(model, tmp_path, allow=ALLOW), model)
    with pytest.raises(LoadError, match=r"--allow tests\.saving\.test_saving\.Inner"):
        pn_compiler.load(tmp_path / "model.pt")


def test_other_modules_and_arguments(tmp_path: Path) -> None:
    x, shift = torch.randn(2, 3, 9), torch.randn(4)
    model = pn_compiler.transform(trained(Recurrent()), (x, True), example_kwargs={"shift": shift})
    loaded = saved_and_loaded(model, tmp_path, allow=ALLOW)
    assert torch.equal(loaded(x, True, shift=shift), model(x, True, shift=shift))
    assert loaded.two.weight is loaded.one.weight
    assert loaded.lstm._flat_weights[0] is loaded.lstm.weight_ih_l0


# Changed since the conversion ----------------------------------------------------------------------


def new_head(model: nn.Module) -> None:
    model.fc = nn.Linear(12, 7)


def head_of_several(model: nn.Module) -> None:
    model.fc = nn.Sequential(nn.Dropout(0.0), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2))


def no_head(model: nn.Module) -> None:
    model.fc = nn.Identity()


def new_block(model: nn.Module) -> None:
    model.layer2[1] = zoo.torchvision().models.resnet.BasicBlock(12, 12)


def other_block(model: nn.Module) -> None:
    model.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU())


def other_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()


def appended(model: nn.Module) -> None:
    model.layer2.append(nn.Conv2d(12, 12, 1))


def two_changes(model: nn.Module) -> None:
    new_head(model)
    model(IMAGES)
    other_stem(model)
    model(IMAGES)


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.layer2.requires_grad_(True)
    model.train()
    model.layer1.eval()


def double(model: nn.Module) -> None:
    model.double()


def attributes(model: nn.Module) -> None:
    model.num_classes, model.labels, model.layer1[0].stride = 5, ["cat", {"dog": 1.5}], 1


CHANGES = [
    new_head, head_of_several, no_head, new_block, other_block, other_stem, appended, two_changes, frozen,
    double, attributes,
]  # fmt: skip


@pytest.fixture(scope="module")
def blocks() -> nn.Module:
    return converted(Blocks())


@pytest.mark.parametrize("change", CHANGES)
def test_changes_since(change: Callable[[nn.Module], None], blocks: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(blocks)
    change(model)
    loaded = saved_and_loaded(model, tmp_path, allow=ALLOW)
    assert_same(loaded, model)
    if change is attributes:
        assert (loaded.num_classes, loaded.labels, loaded.layer1[0].stride) == (5, ["cat", {"dog": 1.5}], 1)
    loaded.float().fc = nn.Sequential(nn.LazyLinear(3))  # it is still the user's own
    assert loaded(IMAGES).shape == (2, 3)


def test_timm_head(tmp_path: Path) -> None:
    model = converted(from_timm("test_efficientnet"))
    model.reset_classifier(3)
    loaded = saved_and_loaded(model, tmp_path)
    assert_same(loaded, model)
    assert loaded.num_classes == 3
    assert torch.equal(loaded.forward_features(IMAGES), model.forward_features(IMAGES))


def test_wrapped_networks(blocks: nn.Module, tmp_path: Path) -> None:
    compiled_one = torch.compile(blocks, backend="eager")
    averaged = torch.optim.swa_utils.AveragedModel(blocks)
    for wrapped in (compiled_one, nn.DataParallel(compiled_one), averaged, copy.deepcopy(compiled_one)):
        assert_same(saved_and_loaded(wrapped, tmp_path, allow=ALLOW), blocks)
    pickled = pickle.loads(pickle.dumps(blocks))
    assert_same(saved_and_loaded(pickled, tmp_path, allow=ALLOW), blocks)


def test_head_that_absorbed(tmp_path: Path) -> None:
    model = converted(plain_network())
    assert type(model[8]) is not nn.Linear
    model[8] = nn.Linear(6, 4)
    assert_same(saved_and_loaded(model, tmp_path), model)
    model[3] = nn.Conv2d(8, 6, 5)
    assert_same(saved_and_loaded(model, tmp_path), model)


# Refused when it is saved --------------------------------------------------------------------------


def with_hook(model: nn.Module) -> nn.Module:
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_lambda(model: nn.Module) -> nn.Module:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model[8] = Local()
    return model


def parametrized(model: nn.Module) -> nn.Module:
    model[8] = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
    return model


def untied(model: nn.Module) -> nn.Module:
    model.register_parameter("weight_of_conv", model[0].weight)
    return model


def edited_graph(model: nn.Module) -> nn.Module:
    graph = model.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.neg, (output.args[0],)),)
    model.recompile()
    return model


REFUSED = [with_hook, with_lambda, parametrized, untied, edited_graph, pn_compiler.fold]


@pytest.mark.parametrize("change", REFUSED)
def test_refused_when_saved(change: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = change(converted(plain_network()))
    path = tmp_path / "model.pt"
    path.write_text("what was there")
    with pytest.raises(UnsupportedModelError, match=r"^PN304 [^\n]+$"):
        pn_compiler.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    assert path.read_text() == "what was there"


def test_refused_without_a_conversion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a result of"):
        pn_compiler.save(plain_network(), tmp_path / "model.pt")
    static, _ = pn_compiler.freeze_statistics(converted(plain_network()), [IMAGES])
    with pytest.raises(UnsupportedModelError, match=r"PN304.*folded or frozen"):
        pn_compiler.save(static, tmp_path / "model.pt")
    with pytest.raises(ExportError, match="there is no folder"):
        pn_compiler.save(converted(plain_network()), tmp_path / "missing" / "model.pt")
    traced = pn_compiler.transform(torch.fx.symbolic_trace(trained(plain_network())), IMAGES)
    with pytest.raises(UnsupportedModelError, match=r"PN304.*came as a graph"):
        pn_compiler.save(traced, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="no values"):
        pn_compiler.save(pn_compiler.transform(plain_network().to("meta")), tmp_path / "model.pt")
    assert not [*tmp_path.iterdir()]


class Killing(nn.Linear):
    """Kills the process that pickles it."""

    pickled = 0

    def __getstate__(self) -> Any:
        type(self).pickled += 1  # the first time only whether it can be
        return vars(self) if self.pickled == 1 else killed.kill_this_process()


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    model, path = converted(Blocks()), tmp_path / "model.pt"
    pn_compiler.save(model, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(ExportError, match=r"^cannot write .*model\.pt: [^\n]+$"):
            pn_compiler.save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    model.fc = Killing(12, 2)
    assert killed.exit_code(pn_compiler.save, model, path) == -signal.SIGKILL
    assert path.read_bytes() == before
    pn_compiler.save(converted(Blocks()), path)  # removes what the killed one has left
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_the_file_names_no_code(tmp_path: Path) -> None:
    model = converted(Blocks())
    pn_compiler.save(model, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        parsed = parse_pickle(archive.read("content/data.pkl"))
    assert not [name for name in parsed.names if name.startswith(("pn_compiler", "torch.fx"))]
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert (tmp_path / "model.pt").stat().st_size < 1.1 * size + 300_000


# On the command line -------------------------------------------------------------------------------


def compiled(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    status = cli.main([*map(str, arguments), "-o", "out.onnx"])
    told = capsys.readouterr()
    assert status == cli.DONE, told.err
    return told.out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_file_computes(model: nn.Module, x: Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model.eval()(x).detach(), rtol=1e-3, atol=1e-4)


def test_compiles_a_saved_network(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = converted(plain_network())
    pn_compiler.save(model, "model.pt")
    compiled(capsys, "model.pt")  # in the shape of the example that it was converted with
    assert_file_computes(model, IMAGES)


def read(**given: Any) -> nn.Module:
    """The network of the weights in weights.pt, as the command reads it with these options."""
    networks = ConvertedNetworks(given, lambda _: {"example_inputs": IMAGES})
    return load_model(Path("weights.pt"), arch=f"{__name__}:Blocks", rebuild=networks).model


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "group"}, {"norm": "layer", "anchor": 0.5}, {"proxy": False}, {"warm_start": "none"}],
    ids=str,
)
def test_converted_state_dicts(options: dict[str, Any], folder: Path) -> None:
    model = converted(Blocks(), **options)
    torch.save(model.state_dict(), "weights.pt")
    loaded = read()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    found, expected = pn_compiler.sites(loaded), pn_compiler.sites(model)
    assert [(s.name, s.kind, s.norm, s.anchor) for s in found] == [
        (s.name, s.kind, s.norm, s.anchor) for s in expected
    ]
    assert torch.equal(read(**options)(IMAGES), model(IMAGES))
    with pytest.raises(LoadError, match=r"^[^\n]*converted with norm="):
        read(norm="instance")
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    torch.save({"epoch": 1, "model_ema": wrapped.state_dict()}, "weights.pt")
    assert torch.equal(read()(IMAGES), model(IMAGES))
    torch.save(dict(model.state_dict()), "weights.pt")  # which records nothing
    assert torch.equal(read(**options)(IMAGES), model(IMAGES))
    if "norm" in options or options.get("warm_start") == "none":
        with pytest.raises(LoadError, match=r"^[^\n]*PN306"):
            read()
    else:
        assert torch.equal(read()(IMAGES), model(IMAGES))


def test_converted_state_dicts_that_do_not_fit(folder: Path) -> None:
    state = converted(Blocks()).state_dict()
    torch.save(dict(state), "weights.pt")
    with pytest.raises(LoadError, match=r"^[^\n]*does not fit"):
        read(num_groups=4, norm="rms")
    torch.save({name: value for name, value in state.items() if name != "fc.weight"}, "weights.pt")
    with pytest.raises(LoadError, match=r"^[^\n]*does not fit[^\n]*fc\.weight"):
        read()
    state._metadata[""]["pn_compiler.options"] = {"norm": [1], "pipeline": "os.system"}
    torch.save(state, "weights.pt")
    with pytest.raises(LoadError, match=r"^[^\n]*strange options"):
        read()


def test_compiles_a_converted_state_dict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = converted(Blocks(), norm="layer")
    torch.save(model.state_dict(), "weights.pt")
    arch = ("--arch", f"{__name__}:Blocks", "--norm", "layer", "--input-shape", "1,3,32,32")
    assert "PN305" in compiled(capsys, "weights.pt", *arch, "-v")
    assert_file_computes(model, IMAGES)


def test_a_pickled_conversion_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(converted(plain_network()), "model.pt")
    assert cli.main(["model.pt", "-o", "out.onnx"]) == cli.FAILED
    assert "pn_compiler.save(model, path)" in capsys.readouterr().err
