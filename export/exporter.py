"""What torch.onnx makes of a model, without traces of the machine that it was made on."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ExportError, root_cause
from pn_compiler.data.parts import part_hint
from pn_compiler.export.dynamic_axes import DynamicAxes
from pn_compiler.export.external_data import move_weights_out
from pn_compiler.export.folded_norms import as_one_operator, expand_folded_norms
from pn_compiler.export.io_names import rename
from pn_compiler.export.node_names import module_paths, note_paths
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.programs import PlainProgram
from pn_compiler.export.rewrites.simplify import freeze_reshapes
from pn_compiler.export.verify import imitate
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.inputs import Inputs

logger = logging.getLogger(__name__)


def export_graph(
    model: nn.Module, inputs: Inputs, options: ExportOptions, staged: Path | None
) -> onnx_ir.Model:
    """The ONNX model that torch.onnx makes, with the IR version of its opset and no traces of source."""
    dynamic_shapes = None
    axes = DynamicAxes.of(options.dynamic_axes, model, inputs) if options.dynamic_axes else None
    # torch.export takes a batch of 1 for a constant, and one tensor in two places for one input
    inputs = imitate(inputs, 2 if options.dynamic_batch else None)
    if inputs.args and isinstance(inputs.args[-1], dict):  # torch.onnx would take it for the keywords
        inputs = Inputs((), inputs.by_name(model))
    if options.dynamic_batch or axes is not None:
        dynamic_shapes = _dynamic_shapes(inputs.by_name(model), axes, dynamic_batch=options.dynamic_batch)
    uses_data = _uses_data(model.eval(), inputs)
    try:
        with _quiet(), torch.no_grad():  # with gradients, pieces of a split may not be written to
            program = _translated(model, inputs, options.opset, dynamic_shapes, uses_data=uses_data)
    except Exception as error:
        hint = "; if the batch axis is the cause, try a static batch" if options.dynamic_batch else ""
        hint += "; if the other dynamic axes are, leave out --dynamic (dynamic_axes)" if axes else ""
        if uses_data:
            raise ExportError(
                "torch.onnx cannot export the model: its forward uses .data of a tensor, which torch.export "
                "cannot follow: use detach(), and compute weights without storing them"
            ) from error
        cause = f"{_no_tensor(model, inputs)}{root_cause(error)}{hint}{part_hint(model)}"
        raise ExportError(f"torch.onnx cannot export the model: {cause}") from error
    assert program is not None
    if not program.model.graph.outputs:
        raise ExportError("the forward returns no tensor: an ONNX file would have no outputs")
    result = program.model
    rename(result.graph, options.names)
    paths = module_paths(result.graph)
    _strip(result)
    note_paths(result, paths)
    expand_folded_norms(result)
    if staged is not None:
        move_weights_out(result, staged)
    if options.dynamic_batch:
        _name_sizes(result.graph, [(value, 0, "batch") for value in result.graph.inputs])
    if axes is not None:
        tables = zip(result.graph.inputs, axes.names, strict=True)
        _name_sizes(result.graph, [(value, axis, name) for value, t in tables for axis, name in t.items()])
    freeze_reshapes(result)
    result.ir_version = min(
        result.ir_version, max(8, onnx.helper.OP_SET_ID_VERSION_MAP[("ai.onnx", options.opset)])
    )
    return result


def _translated(
    model: nn.Module, inputs: Inputs, opset: int, dynamic_shapes: Any, *, uses_data: bool
) -> torch.onnx.ONNXProgram | None:
    """What torch.onnx makes of `model`: of its program, or else of the module, which it traces by itself."""
    if uses_data:  # torch.onnx would try again with strict=True, where it ends the process
        return _of_program(model, inputs, opset, dynamic_shapes)
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):  # it has rules for those
        try:
            return _of_program(model, inputs, opset, dynamic_shapes)
        except Exception as error:
            logger.debug("the program was not translated: %s", error)
    return torch.onnx.export(
        model,
        inputs.args,
        kwargs=dict(inputs.kwargs),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=dynamic_shapes,
        verbose=False,
    )


def _of_program(
    model: nn.Module, inputs: Inputs, opset: int, dynamic_shapes: Any
) -> torch.onnx.ONNXProgram | None:
    # as torch.onnx traces: sizes of 0 and 1 are like others
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with oblivious, as_one_operator(model):
        program = torch.export.export(
            model, inputs.args, dict(inputs.kwargs), dynamic_shapes=dynamic_shapes, strict=False
        )
    return torch.onnx.export(PlainProgram.of(program), dynamo=True, opset_version=opset, verbose=False)


def _dynamic_shapes(given: dict[str, Any], axes: DynamicAxes | None, *, dynamic_batch: bool) -> Any:
    """What torch.export needs to know of the sizes of `given`, arguments by name."""
    batch = torch.export.Dim("batch", min=1) if dynamic_batch else None
    count = sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(given))
    dims = (axes or DynamicAxes(({},) * count)).dims(batch)

    def of(leaf: Any) -> dict[int, Any] | None:
        found = next(dims) if isinstance(leaf, torch.Tensor) else None
        return found if isinstance(leaf, torch.Tensor) and leaf.dim() else None

    return pytree.tree_map(of, given)


class _DataWatch(TorchFunctionMode):
    """Notices when ``.data`` of a tensor is read or set."""

    used: bool = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.used = self.used or bool(func in _DATA)
        return func(*args, **(kwargs or {}))


_DATA = (torch.Tensor.data.__get__, torch.Tensor.data.__set__)  # type: ignore[attr-defined]  # a property


def _uses_data(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a forward reads or sets ``.data`` of a tensor."""
    with untouched(model, keep_state=True), _DataWatch() as watch, contextlib.suppress(Exception):
        inputs.call(model)  # a failure is reported by the exporter
    return bool(watch.used)


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


def _strip(model: onnx_ir.Model) -> None:
    """Removes stack traces and module paths, which name files of the machine that compiled.

    The traced graph goes as well: it would hold the weights in memory.
    """
    ClearMetadataAndDocStringPass()(model)
    parts: list[Any] = [model, model.graph, *model.graph.all_nodes(), *_values(model.graph)]
    for part in parts:
        part.doc_string = None
        part.metadata_props.clear()
        part.meta.clear()


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    """All that have a name in a file, those of subgraphs included."""
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]


def _name_sizes(graph: onnx_ir.Graph, axes: Iterable[tuple[onnx_ir.Value, int, str]]) -> None:
    """Gives the sizes of `axes`, (input, axis, name), their names; torch.onnx calls them s31 or the like.

    Raises:
        ExportError: one has a fixed size, because the forward asks for it.
    """
    names: dict[str, str] = {}
    for value, axis, name in axes:
        size = value.shape[axis] if value.shape else None
        if isinstance(size, int) and name != "batch":
            raise ExportError(f"the forward fixes {name} of {value.name} to {size}: leave {name} out")
        if isinstance(size, onnx_ir.SymbolicDim) and size.value:
            names[size.value] = name
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

    def renamed(size: int | onnx_ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int):
            return size
        return size.value and symbol.sub(lambda found: names[found[0]], size.value)

    for value in _values(graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(map(renamed, value.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself; its failures are exceptions.

    torch.export prints the whole graph when it fails, which goes to the log.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [talkative.level for talkative in loggers]
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        try:
            for talkative in loggers:
                talkative.setLevel(logging.ERROR)
            yield
        finally:
            for talkative, level in zip(loggers, levels, strict=True):
                talkative.setLevel(level)
            if printed.getvalue():
                logger.debug("torch.onnx printed:\n%s", printed.getvalue())


_TALKATIVE = ("torch.onnx", "onnxscript", "torch.export", "torch.fx.experimental.symbolic_shapes")
