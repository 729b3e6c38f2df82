"""Names of nodes that say which module they come from: viewers group them by the parts between slashes."""

import ast
from collections.abc import Iterable, Mapping

import onnx
import onnx_ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # torch.onnx: the modules around a node, and its own name at the end
_PATHS = "pn_compiler.module_paths"
#: begins names that are messages: runtimes show the name of a node that they refuse
MESSAGE = "this file is for "


def module_paths(graph: onnx_ir.Graph) -> dict[str, str]:
    """Name of each value that a module computes -> path of that module, as torch.onnx noted it."""
    paths: dict[str, str] = {}
    for node in graph.all_nodes():
        path = _path(node)
        if path:
            paths |= {value.name: path for value in node.outputs if value.name}
    return paths


def _path(node: onnx_ir.Node) -> str:
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    modules = [scope for scope in scopes[:-1] if isinstance(scope, str)]
    return modules[-1] if modules else ""


def note_paths(model: onnx_ir.Model, paths: Mapping[str, str]) -> None:
    """Remembers `paths` with `model`, until its nodes are named."""
    model.meta[_PATHS] = dict(paths)


def noted_paths(model: onnx_ir.Model) -> dict[str, str]:
    """What `note_paths` has noted."""
    paths: dict[str, str] = model.meta.get(_PATHS, {})
    return paths


def name_nodes(proto: onnx.ModelProto, paths: Mapping[str, str]) -> None:
    """Names each node of `proto` after its module and operator, such as ``/layer1/0/conv2/Conv``.

    What a rewrite has put there belongs to the module whose value it computes, or else reads; a value that it
    calls ``value/more`` belongs where ``value`` does. A loop over images is of no module. Messages stay.
    """
    _name(proto.graph.node, dict(paths), set())


def _name(nodes: Iterable[onnx.NodeProto], paths: dict[str, str], taken: set[str]) -> None:
    for node in nodes:
        values = [name for value in (*node.output, *node.input) for name in (value, value.partition("/")[0])]
        path = next((paths[name] for name in values if name in paths and node.op_type != "Scan"), "")
        if path:
            for value in node.output:
                paths.setdefault(value, path)
        if not node.name.startswith(MESSAGE):
            node.name = _unique("/".join(["", *filter(None, path.split(".")), node.op_type]), taken)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _name(graph.node, paths, taken)


def _unique(name: str, taken: set[str]) -> str:
    """`name`, with a number where it is taken."""
    number, unique = 0, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique)
    return unique
