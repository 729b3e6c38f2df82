"""What became of each BatchNorm, on the nodes of the file: data that Model Explorer shows in its graph.

Graphs and nodes go by their names in the file, as with Model Explorer's adapter model-explorer-onnx.
"""

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pn_compiler.base.diagnostics import Site
from pn_compiler.base.errors import ExportError
from pn_compiler.base.files import write_atomically
from pn_compiler.base.strict_json import to_json

if TYPE_CHECKING:
    import onnx

_COLOURS = {"pn": "#bfe3cb", "norm_only": "#c9d8f0", "skipped": "#f3c98b"}
_MOST = "#cf4a3c"
_GRADIENT = [{"stop": 0, "bgColor": "#e3f1e8"}, {"stop": 1, "bgColor": _MOST}]
# sums and means over nodes say nothing: those of a site all have its value
_SINGLE = {"hideAggregatedStats": ["sum", "avg"], "hideInChildrenStatsTable": True}


def write_node_data(path: Path, sites: Sequence[Site], folder: Path) -> None:
    """Writes the files `NAMES` to `folder`, which is made if there is none.

    Args:
        path: the ONNX file, with the names of nodes that `pn_compiler.compile` gives.
        sites: of the converted network.

    Raises:
        ExportError: a file cannot be written.
    """
    import onnx  # only when it is needed

    contents = node_data(onnx.load(path, load_external_data=False).graph, sites)
    _make(folder)
    for name, content in contents.items():
        write_atomically(folder / name, to_json(content).encode())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot write {folder}: {error.strerror}") from error


def viewer_command(path: str, folder: Path) -> str:
    """What shows the graph with its data, once model-explorer-onnx is installed."""
    data = ",".join(str(folder / name) for name in NAMES)
    return shlex.join(
        ["model-explorer", path, "--extensions=model_explorer_onnx", f"--node_data_paths={data}"]
    )


def node_data(graph: "onnx.GraphProto", sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """For each of `NAMES` its content: the paths of `sites`, their codes, and their errors in percent."""
    owned: dict[str, dict[str, Site]] = {graph.name: {}}
    for inner, node, site in _owned(graph, sites):
        owned.setdefault(inner, {})[node] = site
    return {name: {inner: of(owned[inner]) for inner in owned} for name, of in _CONTENTS.items()}


def _paths(owned: dict[str, Site]) -> dict[str, Any]:
    return {"name": "BatchNorm", "results": {n: {"value": s.name} for n, s in owned.items()}, **_SINGLE}


def _codes(owned: dict[str, Site]) -> dict[str, Any]:
    results = {name: {"value": _code(site), "bgColor": _COLOURS[site.kind]} for name, site in owned.items()}
    return {"name": "code", "results": results, **_SINGLE, "showExpandedSummaryOnGroupNode": True}


def _errors(owned: dict[str, Site]) -> dict[str, Any]:
    results = {name: _error(site.error) for name, site in owned.items() if site.error is not None}
    return {"name": "error, %", "results": results, **_SINGLE, "gradient": _GRADIENT}


# a node has one value of each, and shows that of the last
_CONTENTS = {"sites.json": _paths, "codes.json": _codes, "errors.json": _errors}
NAMES = tuple(_CONTENTS)


def _owned(graph: "onnx.GraphProto", sites: Sequence[Site]) -> Iterator[tuple[str, str, Site]]:
    """Graph and name of each node that a site has become, or that is a part of it, and that site."""
    by_path = {tuple(site.name.split(".")): site for site in sites}
    for inner, name, node in _nodes(graph, graph.name):
        path = tuple(node.name.split("/")[1:-1])
        within = (path[:length] for length in range(len(path), 0, -1))
        site = next((by_path[part] for part in within if part in by_path), None)
        if site is not None:
            yield inner, name, site


def _nodes(
    graph: "onnx.GraphProto", graph_name: str, prefix: str = ""
) -> Iterator[tuple[str, str, "onnx.NodeProto"]]:
    """Graph, name and node: to the viewer a body is a graph of its own, a branch part of that around it."""
    for node in graph.node:
        yield graph_name, prefix + node.name, node
        for attribute in node.attribute:
            body = f"{prefix}{node.name}/{attribute.name}"
            if node.op_type == "If":
                yield from _nodes(attribute.g, graph_name, f"{body}/")
            else:
                yield from _nodes(attribute.g, body)


def _error(error: float) -> dict[str, Any]:
    if not math.isfinite(error):  # which JSON has no number for
        return {"value": str(error), "bgColor": _MOST}
    return {"value": float(f"{100 * error:.3g}")}


def _code(site: Site) -> str:
    return f"{site.kind} {site.code}" if site.code else site.kind
