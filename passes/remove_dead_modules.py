"""The pass that drops the modules orphaned by others."""

from torch import fx

from pn_compiler.graph.pass_base import GraphPass, PassResult


class RemoveDeadModules(GraphPass):
    """Removes modules that no node calls or reads any more.

    Outputs: preserved exactly.
    """

    preserves_outputs = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        before = len(list(gm.modules()))
        gm.delete_all_unused_submodules()
        return PassResult(before - len(list(gm.modules())))
