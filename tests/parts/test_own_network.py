"""Classes, containers, attributes and methods of the network are those of the original."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, TraceError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.parts.networks import COPIES, IMAGES, Backbone, converted, network

X = IMAGES.double()


@pytest.mark.parametrize("name", ["backbone", "sequential", "classifier", "resnet10"])
def test_the_result_is_a_graph_and_an_instance_of_its_class(name: str) -> None:
    model, original = converted(name), network(name)
    assert isinstance(model, fx.GraphModule)
    assert isinstance(model, type(original))
    for path, module in original.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and path:
            assert type(model.get_submodule(path)) is type(module)


@pytest.mark.parametrize("again", COPIES)
def test_containers_are_subscripted_and_iterated_over(again: str) -> None:
    model = COPIES[again](converted("backbone"))
    assert len(model.blocks) == 2
    assert [len(block) for block in model.blocks] == [3, 3]
    assert isinstance(model.blocks[1][0], nn.Conv2d)
    assert list(model.heads) == ["main"]
    assert isinstance(model.blocks[0][:2], nn.Sequential)
    features = COPIES[again](converted("classifier")).features
    assert len(features) == 3
    assert [*features][1] is features[1] is features[-2]


@pytest.mark.parametrize("again", COPIES)
def test_a_network_that_is_a_sequential_is_one(again: str) -> None:
    model = COPIES[again](converted("sequential"))
    expected = model(X)
    assert len(model) == 9
    assert [type(child).__name__ for child in model[6:]] == [
        "AdaptiveAvgPool2d",
        "Flatten",
        "InputAffineLinear",
    ]
    assert model[-2] is [*model][7]
    model.append(nn.ReLU())
    assert len(model) == 10
    assert_same_outputs(model(X), expected.relu(), tolerance=1e-9)
    assert isinstance(model.pop(9), nn.ReLU)
    assert_same_outputs(model(X), expected, tolerance=1e-9)


@pytest.mark.parametrize("again", COPIES)
def test_attributes_properties_and_methods(again: str) -> None:
    model = COPIES[again](converted("backbone"))
    assert (model.stride, model.labels, model.family, model.width) == (2, ["cat", "dog"], "backbone", 8)
    assert model.describe() == "Backbone 8 cat"
    labels = torch.tensor([1, 3])
    assert_same_outputs(model.loss(X, labels), F.cross_entropy(model(X), labels), tolerance=1e-9)


@pytest.mark.parametrize("again", COPIES)
def test_methods_give_the_values_of_the_graph(again: str) -> None:
    """What the head absorbed is applied: its weight and bias are those for the value that encode returns."""
    model = COPIES[again](converted("backbone"))
    head = model.heads["main"]
    assert_same_outputs(F.linear(model.encode(X), head.weight, head.bias), model(X), tolerance=1e-9)
    assert_same_outputs(model.encode(X, pool=False).mean((2, 3)), model.encode(X), tolerance=1e-9)
    assert_same_outputs(model.extract(X), model.encode(X, pool=False), tolerance=1e-9)
    assert_same_outputs(model.extract(X), pn_compiler.features(model, ["blocks.1"])(X)["blocks.1"])


def test_methods_follow_the_parameters_and_modules() -> None:
    model = converted("backbone")
    before = model.encode(X)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    assert not torch.equal(model.encode(X), before)
    model.load_state_dict(
        {name: value.clone() for name, value in converted("backbone").state_dict().items()}, assign=True
    )
    assert_same_outputs(model.encode(X), before, tolerance=1e-12)
    model.bn1 = nn.Identity()
    with torch.no_grad():
        expected = F.linear(model.encode(X), model.heads["main"].weight, model.heads["main"].bias)
    assert_same_outputs(model(X), expected, tolerance=1e-9)


def test_gradients_flow_through_a_method() -> None:
    model = converted("backbone").train()
    model.encode(X).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("heads"))


def test_code_that_would_be_wrong_is_refused() -> None:
    model = converted("backbone")
    with pytest.raises(TraceError, match="PN216"):
        model.count(X)  # it changes an attribute, so that it cannot be traced
    with pytest.raises(AttributeError, match="unused"):
        model.unconverted(X)  # the forward never calls that layer, so that the graph does not have it


def test_parts_are_called_on_their_own() -> None:
    model = converted("resnet10")
    values = pn_compiler.features(model, ["layer2", "layer3", "layer3.0"])(X)
    assert_same_outputs(model.layer3(values["layer2"]), values["layer3"], tolerance=1e-9)
    assert_same_outputs(model.layer3[1](values["layer3.0"]), values["layer3"], tolerance=1e-9)
    assert model.layer3[0].stride == 2


def test_a_class_that_pickle_cannot_find_becomes_a_plain_graph() -> None:
    class Local(Backbone):
        pass

    model = pn_compiler.transform(randomize_batch_norms(Local()).eval())
    again = pickle.loads(pickle.dumps(model))
    assert_same_outputs(again(IMAGES), model(IMAGES))
    assert not isinstance(again, Backbone)


@pytest.mark.parametrize(("name", "attribute"), [("timm/test_resnet", "fc"), ("timm/test_byobnet", "head")])
def test_timm(name: str, attribute: str) -> None:
    model, original = converted(name), network(name)
    assert model.num_features == original.num_features
    assert model.pretrained_cfg == original.pretrained_cfg
    features = model.forward_features(X)
    last = {"fc": "layer4", "head": "final_conv"}[attribute]
    assert_same_outputs(features, pn_compiler.features(model, [last])(X)[last], tolerance=1e-9)
    assert_same_outputs(model.forward_head(features), model(X), tolerance=1e-9)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    pooled: Tensor = model(X)
    assert_same_outputs(pooled, model.forward_head(features, pre_logits=True), tolerance=1e-9)
    model.reset_classifier(7)
    model.double()
    assert_same_outputs(model(X), model.get_classifier()(pooled), tolerance=1e-9)
    assert_same_outputs(model.forward_head(features), model(X), tolerance=1e-9)


def test_features_by_path() -> None:
    model = converted("resnet10")
    extractor = pn_compiler.features(model, {"layer3": "deep", "bn1": "first", "avgpool": "pooled"})
    values = extractor(X)
    assert list(values) == ["deep", "first", "pooled"]
    assert_same_outputs(model.fc(values["pooled"].flatten(1)), model(X), tolerance=1e-12)
    assert {id(p) for p in extractor.parameters()} <= {id(p) for p in model.parameters()}


def test_features_are_those_of_the_graph_to_the_last_bit() -> None:
    model = converted("classifier").float()
    seen: dict[fx.Node, Tensor] = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            seen[node] = result = super().run_node(node)
            return result

    Interpreter(model).run(IMAGES)
    (pool,) = (node for node in seen if node.target == "avgpool")
    activation = pool.args[0]
    (absorber,) = (node for node in seen if node.target == "classifier.1")
    _, scale, shift = (seen.get(value) for value in absorber.args)
    expected = pn_compiler.nn.ChannelAffine()(seen[activation], scale, shift)
    assert torch.equal(pn_compiler.features(model, ["features"])(IMAGES)["features"], expected)


def test_features_that_do_not_exist_are_refused() -> None:
    model = converted("backbone")
    for paths in (["unused"], ["nothing"], [], "blocks"):
        with pytest.raises(ConfigError):
            pn_compiler.features(model, paths)
    with pytest.raises(ConfigError):
        pn_compiler.features(network("backbone"), ["blocks.0"])


def test_hooks_on_parts_are_called() -> None:
    model = converted("resnet10")
    expected, layer4, seen = model(X), pn_compiler.features(model, ["layer4"])(X)["layer4"], []
    handle = model.layer4.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same_outputs(model(X), expected, tolerance=1e-9)
    assert_same_outputs(seen, [layer4], tolerance=1e-9)
    double = model.layer3.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(model(X), expected)
    handle.remove()
    double.remove()
    assert torch.equal(model(X), expected)
    assert len(seen) == 2


def test_parts_that_begin_with_a_padded_convolution() -> None:
    """What the convolution pads is the shift of the site before it: the part gets what the site gives."""
    original = converted("classifier")
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "proxy" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    for model in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        expected, seen = model(X), []
        found = pn_compiler.features(model, ["features.0", "features.1"])(X)
        assert_same_outputs(model.features[1](found["features.0"]), found["features.1"], tolerance=1e-9)
        handle = model.features[1].register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: B023
        assert_same_outputs(model(X), expected, tolerance=1e-9)
        assert_same_outputs(seen, [found["features.1"]], tolerance=1e-9)
        handle.remove()
    alone = copy.deepcopy(original.features[1])  # the site is not with it
    with pytest.raises(TraceError, match="PN216"):
        alone(found["features.0"])


class Flagged(nn.Module):
    """Cannot be traced without its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, active: bool) -> Tensor:
        x = self.bn(self.conv(x))
        return x.relu() if active else x


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Flagged(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x, True))


def test_hooks_that_cannot_be_called_are_reported() -> None:
    model = pn_compiler.transform(randomize_batch_norms(Flags()).eval().double())
    expected = model(X)
    model.part.register_forward_hook(lambda *_: None)
    with pytest.warns(pn_compiler.ConversionWarning, match="PN218 part"):
        assert_same_outputs(model(X), expected, tolerance=1e-9)


class Hides(nn.Module):
    """Has methods and attributes of the names that functional activations get in a graph."""

    silu = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.sigmoid = ("not", "a module")

    def relu(self, x: Tensor) -> Tensor:
        return x * 100

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.silu(self.out(F.relu(self.bn(self.conv(x))) + 1)))


@torch.no_grad()
def test_attributes_do_not_hide_what_the_graph_calls() -> None:
    for net in (Hides(), nn.Sequential(Hides(), nn.Conv2d(2, 2, 1))):
        randomize_batch_norms(net).eval()
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        result = pn_compiler.transform(net, x, anchor=1.0)
        assert_same_outputs(result(x), net(x), tolerance=1e-5)
        part = result if isinstance(net, Hides) else result.get_submodule("0")
        assert part.silu == 3
        assert part.sigmoid == ("not", "a module")
