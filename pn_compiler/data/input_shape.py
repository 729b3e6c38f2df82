"""The inputs to compile a model with: given, stored in the file, or guessed from its first layer."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from pn_compiler.base.errors import ConfigError, first_line
from pn_compiler.graph.graph_utils import called_module, traits_of
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.memory import refuse_giant_tensors, total_memory

GUESSED_PIXELS = 224
_MOST_GUESSED = 2**28  # most elements of an input whose shape the user did not give
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


def random_inputs(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> Inputs:
    """A standard normal tensor for each of `shapes`, in the dtype of the model's parameters.

    Raises:
        ConfigError: it would be larger than the memory of this machine.
    """
    for shape in shapes:
        if torch.float32.itemsize * math.prod(shape) > total_memory():
            raise ConfigError(f"input shape {shape}: a tensor of that size does not fit into memory")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    return Inputs(tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


def guess_shape(model: nn.Module, traced: nn.Module) -> tuple[tuple[int, ...], str]:
    """The input shape that timm stores with a model, or else that of its first layer.

    Raises:
        ConfigError: it cannot be guessed.
    """
    stored = _stored_shape(model)
    if stored is not None:
        return stored, "from the file (pretrained_cfg)"
    if not isinstance(traced, fx.GraphModule):
        raise ConfigError(f"the input shape cannot be guessed, for the forward cannot be traced: {_ASK}")
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    required = [node for node in places if not node.args]
    if len(required) != 1:
        raise ConfigError(f"the model takes {len(required)} inputs, whose shapes are unknown: {_ASK}")
    layer = _first_layer(traced, required[0])
    if isinstance(layer, nn.Conv2d):
        shape: tuple[int, ...] = (1, layer.in_channels, GUESSED_PIXELS, GUESSED_PIXELS)
        return shape, f"guessed: {layer.in_channels} channels of the first layer, {GUESSED_PIXELS} pixels"
    if isinstance(layer, nn.Linear):
        return (1, layer.in_features), f"guessed: {layer.in_features} features of the first layer"
    raise ConfigError(f"the input shape cannot be guessed from the first layer: {_ASK}")


def _stored_shape(model: nn.Module) -> tuple[int, ...] | None:
    stored = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = stored.get("input_size") if isinstance(stored, Mapping) else getattr(stored, "input_size", None)
    return (1, *size) if isinstance(size, tuple | list) and size else None


def _first_layer(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The first convolution or linear layer behind `node`, reached through shape-preserving layers."""
    while len(node.users) >= 1:
        node = next(iter(node.users))
        module = called_module(gm, node)
        if isinstance(module, nn.Conv2d | nn.Linear) or module is None:
            return module
        if not traits_of(gm, node).channels:
            return None
    return None
