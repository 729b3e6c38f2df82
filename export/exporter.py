"""What torch.onnx makes of a model, without traces of the machine that it was made on."""

import contextlib
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pn_compiler.errors import ExportError, first_line
from pn_compiler.export.external_data import move_weights_out
from pn_compiler.export.names import rename
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.simplify import freeze_reshapes
from pn_compiler.export.verify import imitate
from pn_compiler.inputs import Inputs


def export_graph(
    model: nn.Module, inputs: Inputs, options: ExportOptions, staged: Path | None
) -> onnx.ModelProto:
    """The ONNX model that torch.onnx makes, with the IR version of its opset and no traces of source."""
    dynamic_shapes = None
    # torch.export takes a batch of 1 for a constant, and one tensor in two places for one input
    inputs = imitate(inputs, 2 if options.dynamic_batch else None)
    if inputs.args and isinstance(inputs.args[-1], dict):  # torch.onnx would take it for the keywords
        inputs = Inputs((), inputs.by_name(model))
    if options.dynamic_batch:
        batch = torch.export.Dim("batch", min=1)
        dynamic_shapes = pytree.tree_map(
            lambda x: {0: batch} if isinstance(x, torch.Tensor) and x.dim() else None, inputs.by_name(model)
        )
    try:
        with _quiet(), torch.no_grad():  # with gradients, pieces of a split may not be written to
            program = torch.onnx.export(
                model.eval(),
                inputs.args,
                kwargs=dict(inputs.kwargs),
                dynamo=True,
                opset_version=options.opset_version,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    except Exception as error:
        hint = "; if the batch axis is the cause, try a static batch" if options.dynamic_batch else ""
        cause = f"{_no_tensor(model, inputs)}{_cause(error)}{hint}"
        raise ExportError(f"torch.onnx cannot export the model: {cause}") from error
    assert program is not None
    if not program.model.graph.outputs:
        raise ExportError("the forward returns no tensor: an ONNX file would have no outputs")
    rename(program.model.graph, options.names)
    if staged is not None:
        move_weights_out(program.model, staged)
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    if options.dynamic_batch:
        _name_batch(proto)
    freeze_reshapes(proto)
    proto.ir_version = min(
        proto.ir_version, max(8, onnx.helper.OP_SET_ID_VERSION_MAP[("ai.onnx", options.opset_version)])
    )
    proto.producer_name = "pn_compiler"
    proto.producer_version = importlib.metadata.version("pn-compiler")
    return proto


def _no_tensor(model: nn.Module, inputs: Inputs) -> str:
    """Which output, if any, a file cannot give, as the begin of a message."""
    with contextlib.suppress(Exception), torch.no_grad():
        for path, leaf in pytree.tree_flatten_with_path(inputs.call(model))[0]:
            if leaf is not None and not isinstance(leaf, torch.Tensor):
                return (
                    f"output{pytree.keystr(path)} is of type {type(leaf).__name__}, and a file gives tensors "
                    "only, in tuples, lists and dicts: "
                )
    return ""


def _strip(proto: onnx.ModelProto) -> None:
    """Removes stack traces and module paths, which name files of the machine that compiled."""
    del proto.metadata_props[:]
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]


def _name_batch(proto: onnx.ModelProto) -> None:
    """Calls the batch axis "batch"; torch.onnx names it s31 or the like when several inputs have it."""
    shapes = [value.type.tensor_type.shape for value in proto.graph.input]
    symbols = {shape.dim[0].dim_param for shape in shapes if len(shape.dim)} - {""}
    if not symbols:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbol.sub("batch", dim.dim_param)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself; its failures are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """Type and first line of the innermost exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
