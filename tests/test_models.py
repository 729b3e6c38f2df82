"""What is taken as a model, and what one clear error says of the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

import pn_compiler
from pn_compiler.base.errors import ConfigError, PnCompilerError, TraceError, VerificationError
from pn_compiler.export import make_session
from pn_compiler.integrations.opacus import prepare
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms
from tests import zoo

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "transform": pn_compiler.transform,
    "transform strict": lambda model: pn_compiler.transform(model, IMAGES, strict=True),
    "compile": lambda model: pn_compiler.compile(model, "never.onnx", IMAGES),
    "fold": pn_compiler.fold,
    "export_onnx": lambda model: pn_compiler.export_onnx(model, "never.onnx", IMAGES),
    "diagnose": lambda model: pn_compiler.diagnose(model, [IMAGES]),
    "distill": lambda model: pn_compiler.distill(model, network(), [IMAGES]),
    "distill from": lambda model: pn_compiler.distill(pn_compiler.transform(network()), model, [IMAGES]),
    "freeze_statistics": lambda model: pn_compiler.freeze_statistics(model, [IMAGES]),
    "convert_state_dict": lambda model: pn_compiler.convert_state_dict({}, model),
    "param_groups": lambda model: pn_compiler.param_groups(model, 0.1),
    "sites": pn_compiler.sites,
    "notes": pn_compiler.notes,
    "prepare": prepare,
}
NO_MODELS = {
    "name": "resnet18", "path": Path("model.pt"), "none": None, "class": nn.Conv2d, "function": network,
    "state_dict": {"weight": IMAGES}, "tensor": IMAGES, "list": [nn.ReLU()],
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("model", NO_MODELS)
def test_what_is_no_module_is_one_clear_error(function: str, model: str) -> None:
    with pytest.raises(ConfigError, match=r"^expected a torch\.nn\.Module, got .*: ") as caught:
        FUNCTIONS[function](NO_MODELS[model])
    assert "\n" not in str(caught.value)


def test_an_exported_program_is_told_to_give_its_module() -> None:
    program = torch.export.export(network(), (IMAGES,))
    with pytest.raises(ConfigError, match=r"program\.module\(\)"):
        pn_compiler.transform(program)  # type: ignore[arg-type]
    assert count_modules(pn_compiler.transform(program.module()), nn.BatchNorm2d) == 0


class Asserts(nn.Module):
    """As a bare assert does: pytest gives those in tests a message."""

    def __init__(self, limit: float = 1.0) -> None:
        super().__init__()
        self.body, self.limit = network(), limit

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] >= self.limit:
            raise AssertionError
        return self.body(x)


def test_a_bare_assert_in_a_forward_is_named(tmp_path: Path) -> None:
    with pytest.raises(PnCompilerError, match="AssertionError"):
        pn_compiler.compile(Asserts(), tmp_path / "m.onnx", IMAGES)
    with pytest.raises(VerificationError, match="batch 3: AssertionError"):
        pn_compiler.export_onnx(Asserts(limit=3), tmp_path / "m.onnx", IMAGES)
    with pytest.raises(ConfigError, match="AssertionError"):
        pn_compiler.diagnose(Asserts(), [IMAGES])

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    with pytest.raises(TraceError, match="ValueError"):
        pn_compiler.fold(Fails())


class Dropped(nn.Module):
    """A functional dropout that reads the flag, as densenet's: each mode has a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.dropout(x, 0.5, self.training))


def extractor(model: nn.Module, *nodes: str) -> fx.GraphModule:
    zoo.torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, list(nodes))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inputs", [None, IMAGES])
def test_feature_extractors_are_converted(training: bool, inputs: Tensor | None, tmp_path: Path) -> None:
    models = zoo.torchvision().models
    model = randomize_batch_norms(models.ResNet(models.resnet.BasicBlock, [2, 1, 1, 2])).eval()
    extracted = extractor(model, "layer1", "layer4").train(training)
    modes = {name: module.training for name, module in extracted.named_modules()}
    converted = pn_compiler.transform(extracted, inputs, strict=True)
    assert {name: module.training for name, module in extracted.named_modules()} == modes
    assert converted.training == training
    assert count_modules(converted, nn.BatchNorm2d) == 0
    whole = pn_compiler.transform(model, strict=True)
    kinds = [{s.name: s.kind for s in pn_compiler.sites(m)} for m in (converted, whole)]
    assert kinds[0] == kinds[1]
    values: dict[str, Tensor] = {}
    for layer in ("layer1", "layer4"):
        whole.get_submodule(f"{layer}.1.relu").register_forward_hook(
            lambda module, args, output, layer=layer: values.update({layer: output})
        )
    whole(IMAGES)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), values)
    if training and inputs is None:
        report = pn_compiler.compile(extracted, tmp_path / "m.onnx", IMAGES)
        assert len(report.outputs) == 2


@pytest.mark.parametrize("training", [False, True])
def test_the_graph_of_the_mode_is_taken(training: bool, tmp_path: Path) -> None:
    extracted = extractor(Dropped().eval(), "body.3").train(training)
    converted = pn_compiler.transform(extracted)
    assert [note.code for note in pn_compiler.notes(converted)][:1] == ["PN110"]
    expected = pn_compiler.fold(pn_compiler.transform(network()))(IMAGES)
    assert torch.equal(converted(IMAGES)["body.3"], converted(IMAGES)["body.3"]) is not training
    assert_same_outputs(pn_compiler.fold(extractor(Dropped(), "body.3"))(IMAGES)["body.3"], network()(IMAGES))
    pn_compiler.compile(extracted, tmp_path / "m.onnx", IMAGES)
    session = make_session(str(tmp_path / "m.onnx"))
    (actual,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert_same_outputs(torch.from_numpy(actual), expected, tolerance=1e-5)


class Around(nn.Module):
    """A graph as the backbone of a network."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = graph, nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        return self.head(features["3"] if isinstance(features, dict) else features)


def graphs() -> dict[str, nn.Module]:
    whole = fx.symbolic_trace(network())
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda module, path: True  # type: ignore[method-assign]
    nested = nn.Sequential(network())
    calls_whole = fx.GraphModule(nested, tracer.trace(nested))
    split = split_module(
        fx.symbolic_trace(network()), network(), lambda node: int(node.name not in ("_0", "_1"))
    )
    return {
        "whole": whole,
        "calls whole": calls_whole,
        "split": split,
        "extractor": extractor(network(), "3"),
    }


@pytest.mark.parametrize("kind", ["whole", "calls whole", "split", "extractor"])
@pytest.mark.parametrize("inside", [False, True])
def test_graph_modules_are_converted(kind: str, inside: bool) -> None:
    torch.manual_seed(1)
    graph = graphs()[kind].eval()
    plain: nn.Module = network()
    if inside:
        graph, plain = Around(graph), Around(plain)
        plain.head.load_state_dict(graph.head.state_dict())  # type: ignore[attr-defined, operator]
    converted = pn_compiler.transform(graph.eval(), IMAGES, strict=True)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.activation) == ("pn", "relu")
    outputs = converted(IMAGES)
    outputs = outputs["3"] if isinstance(outputs, dict) else outputs
    assert_same_outputs(outputs, pn_compiler.transform(plain.eval(), IMAGES)(IMAGES))
