"""The inputs to compile a model with: given, stored in the file, or guessed from its first layer."""

import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from pn_compiler.base.errors import ConfigError, first_line
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.data.parts import part_hint
from pn_compiler.graph.graph_utils import called_module, traits_of
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.memory import refuse_giant_tensors, total_memory

GUESSED_PIXELS = 224
_MOST_GUESSED = 2**28  # most elements of an input whose shape the user did not give
_MOST_INDICES = 2  # of integers that nothing is known of: 0 and 1 are valid indices almost everywhere
_ASK_EACH = "describe each, for example --input tokens:int64:1,128 (example_inputs=)"
_ASK = "pass the shape, for example --input-shape 1,3,224,224 (input_shape=(1, 3, 224, 224))"


def choose_inputs(
    model: nn.Module,
    traced: nn.Module,
    given: Inputs | None,
    input_shape: tuple[int, ...] | None,
) -> tuple[Inputs, str]:
    """(inputs, where their shape comes from). The model is run on the inputs to check them.

    Raises:
        ConfigError: no shape is given and none can be guessed, or the model does not run on it.
    """
    if given is not None and input_shape is not None:
        raise ConfigError("give example_inputs or input_shape, not both")
    if given is not None:
        inputs, source = given, "given"
    else:
        shape, source = (input_shape, "given") if input_shape is not None else guess_shape(model, traced)
        if (
            not isinstance(shape, Sequence)
            or not shape
            or any(type(size) is not int or size < 1 for size in shape)
        ):
            raise ConfigError(f"input shape {shape} ({source}): expected positive sizes")
        if source != "given" and math.prod(shape) > _MOST_GUESSED:
            raise ConfigError(f"input shape {shape} ({source}) is too large to be right: {_ASK}")
        inputs = random_inputs(model, [shape])
    refuse_giant_tensors(model, inputs)
    try:
        with untouched(model, keep_state=True):
            inputs.call(model)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs.tensors())
        how = "" if source == "given" else f" ({source})"
        raise ConfigError(
            f"the model does not run on an input of shape {shapes}{how}: {first_line(error)}; {_ASK}"
            f"{'' if isinstance(traced, fx.GraphModule) else part_hint(model)}"
        ) from error
    return inputs, source


def stated_inputs(model: nn.Module, input_shape: tuple[int, ...] | None) -> Inputs | None:
    """Inputs of the given shape, or the one stored with the model; None if there is none or it is invalid."""
    shape = input_shape or _stored_shape(model)
    try:
        inputs = None if shape is None else random_inputs(model, [shape])
        if inputs is not None:
            refuse_giant_tensors(model, inputs)
    except Exception:  # choose_inputs reports why
        return None
    return inputs


def described_inputs(model: nn.Module, specs: Sequence[InputSpec]) -> Inputs:
    """Random inputs as the user described them, those by name as the forward of `model` takes them.

    Raises:
        ConfigError: one would be larger than the memory of this machine, or is no parameter of the forward.
    """
    tensors = random_inputs(model, [spec.shape for spec in specs], [spec.dtype for spec in specs]).args
    pairs = list(zip(specs, tensors, strict=True))
    by_place = tuple(tensor for spec, tensor in pairs if not spec.name)
    named = {spec.name: tensor for spec, tensor in pairs if spec.name}
    if len(by_place) + len(named) < len(specs):
        raise ConfigError("two inputs have the same name: --input NAME:...")
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*by_place, **named)
    except TypeError as error:
        raise ConfigError(
            f"the inputs are not those of the forward of {type(model).__name__}{signature}: {error}"
        ) from error
    return Inputs(bound.args, bound.kwargs)


def random_inputs(
    model: nn.Module, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str] | None = None
) -> Inputs:
    """A random tensor for each of `shapes`: standard normal, or indices that all embeddings of `model` have.

    Args:
        model: whose parameters' dtype they have by default.
        shapes: with the batch.
        dtypes: names of dtypes; empty for the default.

    Raises:
        ConfigError: one would be larger than the memory of this machine.
    """
    default = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    embeddings = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for shape, name in zip(shapes, dtypes or [""] * len(shapes), strict=True):
        if torch.float32.itemsize * math.prod(shape) > total_memory():
            raise ConfigError(f"input shape {shape}: a tensor of that size does not fit into memory")
        dtype: torch.dtype = getattr(torch, name) if name else default
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            most = 2 if dtype == torch.bool else min([*embeddings, torch.iinfo(dtype).max])
            highest = most if embeddings or dtype == torch.bool else min(most, _MOST_INDICES)
            tensors.append(torch.randint(highest, shape, generator=generator).to(dtype))
    return Inputs(tuple(tensors))


def guess_shape(model: nn.Module, traced: nn.Module) -> tuple[tuple[int, ...], str]:
    """The input shape that timm stores with a model, or else that of its first layer.

    Raises:
        ConfigError: it cannot be guessed.
    """
    stored = _stored_shape(model)
    if stored is not None:
        return stored, "from the file (pretrained_cfg)"
    if not isinstance(traced, fx.GraphModule):
        raise ConfigError(
            f"the input shape cannot be guessed, for the forward cannot be traced: {_ASK}{part_hint(model)}"
        )
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    required = [node for node in places if not node.args]
    if len(required) != 1:
        raise ConfigError(f"the model takes {len(required)} inputs, whose shapes are unknown: {_ASK_EACH}")
    layer = _first_layer(traced, required[0])
    if isinstance(layer, nn.Conv2d):
        shape: tuple[int, ...] = (1, layer.in_channels, GUESSED_PIXELS, GUESSED_PIXELS)
        return shape, f"guessed: {layer.in_channels} channels of the first layer, {GUESSED_PIXELS} pixels"
    if isinstance(layer, nn.Linear):
        return (1, layer.in_features), f"guessed: {layer.in_features} features of the first layer"
    if isinstance(layer, nn.Embedding):
        raise ConfigError(f"the model takes indices for its first layer, an Embedding: {_ASK_EACH}")
    raise ConfigError(f"the input shape cannot be guessed from the first layer: {_ASK}")


def _stored_shape(model: nn.Module) -> tuple[int, ...] | None:
    stored = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = stored.get("input_size") if isinstance(stored, Mapping) else getattr(stored, "input_size", None)
    return (1, *size) if isinstance(size, tuple | list) and size else None


def _first_layer(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The first convolution, linear layer or embedding behind `node`, through layers that keep the shape."""
    while len(node.users) >= 1:
        node = next(iter(node.users))
        module = called_module(gm, node)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding) or module is None:
            return module
        if not traits_of(gm, node).channels:
            return None
    return None
