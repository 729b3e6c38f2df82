"""The pass that replaces normalizers by constants."""

from collections.abc import Mapping

from torch import Tensor, fx

from pn_compiler.graph.graph_utils import module_calls, replace_module
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.fold.fold_proxy_norm import FoldProxyNorm


class FreezeNormalizers(GraphPass):
    """Replaces normalizers by a constant scale and shift per channel.

    Given:   gn(x), and constants s, t for it        Result:  x * s + t at the same path
    Leaves alone: normalizers without constants.
    Outputs: changed on purpose: the statistics of an instance no longer matter.
    Source: docs/static.md.
    """

    runs_after = (FoldProxyNorm,)

    def __init__(self, constants: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """`constants`: path of each normalizer to freeze -> (scale, shift), [C] each."""
        self.constants = constants

    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        for path in module_calls(gm):
            if path in self.constants and type(gm.get_submodule(path)) is not ConstantAffine:
                replace_module(gm, path, ConstantAffine(*self.constants[path]))
                rewritten += 1
        return PassResult(rewritten)
