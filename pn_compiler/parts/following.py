"""Traces a method or a part of the original network, and converts it as the network was: same modules."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import PnCompilerError, TraceError, first_line
from pn_compiler.graph.graph_module import ConvertedModule
from pn_compiler.graph.graph_utils import module_calls
from pn_compiler.graph.pass_base import run_pipeline
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.nn import ProxyNormAct, ProxyStatistics
from pn_compiler.parts.borders import open_border
from pn_compiler.parts.followed_sites import follow_sites
from pn_compiler.parts.structure import Absorbed, Structure, module_at
from pn_compiler.passes import preparation_pipeline
from pn_compiler.passes.convert.share_statistics import ShareStatistics
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.trace_module import trace_module

_STATISTICS = "proxy_statistics"


def follow(
    structure: Structure,
    converted: nn.Module,
    method: str,
    inputs: Inputs | None,
    *,
    taps: Collection[str] = (),
    whole: bool = False,
    fixed: bool = False,
    feeding: Callable[[str], ProxyNormAct | None] = lambda path: None,
) -> ConvertedModule:
    """The graph of `method`, with the modules of `converted`.

    Args:
        structure: of `converted`; used up.
        converted: the network or the part of it.
        method: name of a method of its original class, such as "forward".
        inputs: its arguments, on the meta device; None if unknown.
        taps: paths of modules whose outputs the graph returns instead, by path.
        whole: whether this is the graph of the network itself, so that no other activation may follow a
            site than its own, and zero padding stands where it stands.
        feeding: from the path of a convolution that begins the method to the site whose output it pads.
        fixed: whether all but the tensors in `inputs` is fixed; the graph then takes these, one by one.

    Raises:
        TraceError: it cannot be traced, or needs something else than the network was converted for.
    """
    root = structure.root
    if fixed and inputs is not None:
        vars(root)["forward"] = _of_tensors(getattr(root, method), inputs)
        inputs = Inputs((*inputs.tensors(),))
    gm, _, _ = trace_module(root, inputs, frozenset(structure.whole), example=lambda: inputs, taps=taps)
    infer_ranks(gm, inputs)
    run_pipeline(preparation_pipeline(), gm)
    _adopt(gm, converted, root)
    follow_sites(gm, converted, strictly=whole)
    if not whole and not taps:
        open_border(gm, feeding)
    _refuse_structure(gm, root)
    run_pipeline((ShareStatistics(),), gm)  # of all sites, as in the network: the last digit depends on it
    if taps:
        output = gm.graph.output_node()
        output.args = (output.args[0][0],)  # type: ignore[index]  # the pair that the tracer returns
    gm.graph.eliminate_dead_code()
    gm = ConvertedModule(
        gm, gm.graph, type(root).__name__
    )  # without what is not called; it may be in use elsewhere
    gm.graph.lint()
    shared = module_at(converted, _STATISTICS)
    for module in gm.children():
        if isinstance(module, ProxyStatistics) and isinstance(shared, ProxyStatistics):
            module.enabled = shared.enabled
    return gm


def _of_tensors(method: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
    """`method` with the arguments `inputs`, as a function of the tensors in them."""
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))

    def forward(*tensors: Any) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(x, Tensor) else x for x in leaves], spec
        )
        return method(*args, **kwargs)

    return forward


def _adopt(gm: ConvertedModule, converted: nn.Module, root: nn.Module) -> None:
    """Puts the modules and tensors of `converted` in the places of those of the structure."""
    for path in module_calls(gm):
        own, module = module_at(converted, path), gm.get_submodule(path)
        if isinstance(own, Absorbed):
            continue  # what it stands for is needed to recognise the site
        made_here = module_at(root, path) is None and not _tensors(module)
        if own is not None and not made_here:
            gm.set_submodule(path, own)
        elif _tensors(module):
            raise TraceError(
                f"{path} is not part of the converted network: the traced forward never calls it"
            )
    for node in gm.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        holder, own = gm.get_submodule(owner), module_at(converted, owner)
        parameter = None if own is None else own._parameters.get(name)
        buffer = None if own is None else own._buffers.get(name)
        if parameter is not None:
            holder._parameters[name] = parameter
        elif buffer is not None:
            holder._buffers[name] = buffer
        elif getattr(getattr(holder, name, None), "is_meta", False):
            raise TraceError(
                f"{node.target} is not part of the converted network: its forward never reads it"
            )


def _refuse_structure(gm: ConvertedModule, root: nn.Module) -> None:
    """Raises TraceError if `gm` still calls a module of the structure, whose parameters have no values."""
    empty = {id(module) for module in root.modules()}
    for path in module_calls(gm):
        module = gm.get_submodule(path)
        if id(module) in empty and _tensors(module):
            raise TraceError(f"{path} belongs to a site, and is called without it")


def _tensors(module: nn.Module) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


def why(error: Exception) -> str:
    """The reason in `error` why something could not be followed."""
    if isinstance(error, PnCompilerError):
        return str(error)
    return first_line(error)
