"""A record for everything that ties samples to their batch, including what no graph reached."""

import dataclasses

from torch import nn

from pn_compiler.base.diagnostics import Diagnostic, Site, skipped
from pn_compiler.inspection.batch_norms import batch_norms, closed_diagnostic, closed_kind, is_batch_norm
from pn_compiler.inspection.child_uses import children_looked_into, read_norms
from pn_compiler.inspection.functional_norms import calls_batch_norm
from pn_compiler.regions.regions import Trace


def account(
    model: nn.Module, traced: Trace, table: dict[str, Site], notes: list[Diagnostic]
) -> tuple[Site, ...]:
    """One record per BatchNorm of `model`, in its order, including those that no graph reached.

    Args:
        model: the original model.
        traced: its trace.
        table: the records of what the graphs reached.
        notes: one is added for each of the others.
    """
    missed = [_lost(name, model, traced) for name, _ in batch_norms(model) if name not in table]
    looked_into = {note.site for note in missed if note.code in ("PN101", "PN111")}
    missed += [note for note in _lost_calls(model, traced, looked_into) if note.site not in table]
    notes += missed
    records = table | {(site := skipped(note)).name: site for note in missed}
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    sites = sorted(records.values(), key=lambda site: order.get(site.name, len(order)))
    return tuple(dataclasses.replace(site, name=site.name or "the model") for site in sites)


def shared_with_whole(model: nn.Module, traced: Trace) -> set[str]:
    """Paths of the BatchNorms with several names, one of them in a module that stays whole.

    Converting them under only one name would turn one layer into two.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_batch_norm(module):
            names.setdefault(id(module), []).append(path)
    return {
        path
        for paths in names.values()
        if len(paths) > 1
        and any(p.startswith(f"{whole}.") for p in paths for whole in traced.opaque if whole)
        for path in paths
    }


def _lost_calls(model: nn.Module, traced: Trace, looked_into: set[str]) -> list[Diagnostic]:
    """A diagnostic for each module whose code calls batch_norm as a function without any graph having it.

    Args:
        model, traced: as for `account`.
        looked_into: BatchNorms already reported; code around them that reads their statistics needs no more.
    """
    lost = []
    closed: list[str] = []
    for name, module in model.named_modules():
        inside = _inside(name)
        if name in traced.norm_calls or is_batch_norm(module) or not calls_batch_norm(module):
            continue
        if any(name.startswith(outer) for outer in closed):
            continue
        if closed_kind(module):
            closed.append(inside)
        if not any(other.startswith(inside) for other in looked_into):
            lost.append(_lost_call(name, model, traced))
    return lost


def _lost_call(name: str, model: nn.Module, traced: Trace) -> Diagnostic:
    """Says why no graph has the batch_norm call in the code of the module `name`."""
    where = name or "the model"
    kind = closed_kind(model.get_submodule(name))
    if kind:
        return closed_diagnostic(name, kind)
    if name in traced.unread_norm_calls:
        return Diagnostic("PN102", name, "nothing reads the result of its batch_norm")
    if name in traced.entered:
        return Diagnostic(
            "PN121",
            name,
            f"the code of {where} calls batch_norm, but not in the branch that was traced",
            "call transform in the mode that the result will be used in, or use nn.BatchNorm",
        )
    lost = _lost(name, model, traced)
    if lost.code == "PN101" or name in traced.opaque:
        return Diagnostic(
            "PN120",
            name,
            f"the code of {where} calls batch_norm: {_why_whole(name, traced)}",
            "let it hold an nn.BatchNorm, and call that as a module: self.bn(x)",
        )
    return lost


def _lost(name: str, model: nn.Module, traced: Trace) -> Diagnostic:
    """Says why no graph reached the BatchNorm `name`."""
    around = [module for path, module in model.named_modules() if not path or name.startswith(f"{path}.")]
    kinds = [kind for module in around if (kind := closed_kind(module))]
    if kinds:
        return closed_diagnostic(name, kinds[0])
    norm = model.get_submodule(name)
    names = [path for path, other in model.named_modules(remove_duplicate=False) if other is norm]
    whole = [path for path in traced.opaque if any(other.startswith(_inside(path)) for other in names)]
    if not whole or all(_is_traced(other, traced) for other in names):
        return Diagnostic("PN102", name, "the traced forward never calls it")
    owner, _, attribute = name.rpartition(".")
    why, where = _why_whole(whole[-1], traced), whole[-1] or "the model"
    if owner == whole[-1] and _normalizes_with(model.get_submodule(owner), attribute):
        message = f"{why}; it calls batch_norm with the weights and statistics of the BatchNorm"
        hint = f"write self.{attribute}(x) instead of that call"
        return Diagnostic("PN101", name, message, hint)
    if children_looked_into(type(model.get_submodule(whole[-1]))) is None:  # type: ignore[arg-type]  # hashable
        message = f"{why}; its code reads the statistics of some BatchNorm, which may be this one"
        return Diagnostic("PN101", name, message, "read them as self.name.running_mean, or call modules only")
    message = f"{why}; the BatchNorm is shared, or other code looks into it"
    return Diagnostic("PN101", name, message, f"let {where} call it as a module of its own")


def _is_traced(path: str, traced: Trace) -> bool:
    """Whether a graph was traced through what holds the module at `path`: the innermost part decides."""
    graphs = [region.prefix for region in traced.regions if region.owner is None]
    whole = [_inside(other) for other in traced.opaque]
    depths = [max((len(p) for p in each if path.startswith(p)), default=-1) for each in (graphs, whole)]
    return depths[0] > depths[1]


def _inside(path: str) -> str:
    """What the paths of the modules in the one at `path` begin with."""
    return f"{path}." if path else ""


def _why_whole(path: str, traced: Trace) -> str:
    reason = traced.reasons.get(path, "")
    if reason.startswith("the forward "):
        reason = f"it {reason.removeprefix('the forward ')}"
    return f"the forward of {path or 'the model'} cannot be traced" + (f", since {reason}" if reason else "")


def _normalizes_with(owner: nn.Module, attribute: str) -> bool:
    """Whether `owner` calls batch_norm as a function, and reads the tensors of its `attribute`."""
    return calls_batch_norm(owner) and attribute in read_norms(type(owner))  # type: ignore[arg-type]  # hashable
