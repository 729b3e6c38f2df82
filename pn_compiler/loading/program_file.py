"""Exported programs as modules."""

import torch
from torch import fx

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import LoadError, root_cause
from pn_compiler.loading.archives import Archive
from pn_compiler.loading.loaded import LoadedModel
from pn_compiler.loading.program_audit import audit_program
from pn_compiler.loading.program_modes import to_eval_mode
from pn_compiler.running.inputs import Inputs

_LISTED = 4  # operators in a note


def load_program(archive: Archive, *, unsafe: bool) -> LoadedModel:
    """The program in `archive`, with the inputs that it was exported with.

    Args:
        archive: a file written by torch.export.save.
        unsafe: load it unchecked.

    Raises:
        LoadError: it is damaged, would run code, or takes what cannot be given here.
    """
    path = archive.path
    if not unsafe:
        audit_program(archive)
    try:
        with path.open("rb") as file:  # torch warns of a name that does not end in .pt2
            program = torch.export.load(file)
        module = program.module(check_guards=False)  # guards are source text of the file
        plain = fx.GraphModule(module, module.graph)  # without the export's ban on train() and eval()
        users = set(program.graph_signature.user_inputs)
    except Exception as error:  # a damaged program can raise anything in torch
        raise LoadError(
            f"cannot load {path}: torch.export.load fails on it ({root_cause(error)[:200]})"
        ) from error
    try:
        switched = to_eval_mode(plain)
    except LoadError as error:
        raise LoadError(f"{path} {error}") from error
    if program.example_inputs is None or program.example_inputs[1]:
        raise LoadError(f"{path} takes keyword arguments: export it with positional inputs only")
    if not program.example_inputs[0]:
        raise LoadError(f"{path} has no example inputs: export it again with torch.export.save")
    inputs = Inputs(tuple(program.example_inputs[0]))
    return LoadedModel(plain.eval(), inputs, _fixed_batch(program.graph, users), _modes(switched))


def _modes(switched: list[str]) -> tuple[Diagnostic, ...]:
    if not switched:
        return ()
    more = f" and {len(switched) - _LISTED} more" if len(switched) > _LISTED else ""
    listed = ", ".join(switched[:_LISTED]) + more
    message = f"the program was exported in train mode, and is read as in eval mode: {listed}"
    return (Diagnostic("PN303", "", message),)


def _fixed_batch(graph: fx.Graph, users: set[str]) -> int | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, torch.Tensor):
            return value.shape[0] if value.dim() and isinstance(value.shape[0], int) else None
    return None
