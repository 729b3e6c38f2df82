"""The pass that replaces each BatchNorm by a batch-independent normalizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.config import TransformConfig, norm_name
from pn_compiler.base.diagnostics import Diagnostic, Site, skipped
from pn_compiler.base.errors import PostconditionError
from pn_compiler.graph.graph_utils import called_module, module_calls, replace_module
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.graph.ranks import pixels, rank
from pn_compiler.graph.site_table import put_site, site_table, update_site
from pn_compiler.graph.warm_start import (
    LARGE_RESIDUAL,
    Calibrated,
    affine_from_running_stats,
    is_warm,
    plain_affine,
    population,
)
from pn_compiler.inspection.batch_norms import (
    FixedMode,
    closed_diagnostic,
    closed_kind,
    has_plain_forward,
    is_batch_norm,
)
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.inspection.functional_norms import NAMES, reaches_batch_norm
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import AnchoredNorm, Statistics
from pn_compiler.operators.op_names import operator_name
from pn_compiler.passes.prepare.canonicalize_modules import CanonicalizeModules
from pn_compiler.passes.prepare.norm_calls import is_norm_call, norm_operands


class ReplaceBatchNorm(GraphPass):
    """Replaces each BatchNorm by a normalizer that starts from its running statistics.

    Given:   bn(C)                    Result:  gn(G, C) at the same path; G = 1 is LayerNorm over [C, *]
                                               AnchoredNorm(G, C) with norm="rms" or an anchor
    Leaves alone: PN103 frozen, PN104 no running statistics, PN105 unknown subclass, or read by
        other code, PN106 functional with operands of mixed owners, PN107 one value per group, PN108
        hooks, PN109 not finite, PN111 TorchScript or quantized.
    Outputs: changed on purpose; kept where instance statistics equal the running statistics.
    Source: docs/method.md, "Warm start".
    """

    requires = (CanonicalizeModules,)

    def __init__(
        self,
        config: TransformConfig,
        calibrated: Mapping[str, Calibrated] | None = None,
        left_alone: frozenset[str] = frozenset(),
    ) -> None:
        """`left_alone`: paths of BatchNorms that untraced code also calls."""
        self.config = config
        self.calibrated = calibrated or {}
        self.left_alone = left_alone

    def run(self, gm: fx.GraphModule) -> PassResult:
        notes: list[Diagnostic] = []
        rewritten = 0
        read = _read_outside(gm)
        for path, calls in module_calls(gm).items():
            norm = gm.get_submodule(path)
            if not is_batch_norm(norm):
                continue
            refusal = self._refusal(path, norm, calls) or _read_refusal(path, id(norm) in read)
            if refusal is not None:
                notes.append(refusal)
                put_site(gm, skipped(refusal))
                continue
            assert isinstance(norm, _BatchNorm)
            num_groups, remark = self._groups(path, norm, calls)
            put_site(gm, self._rewrite(gm, path, norm, num_groups))
            for diagnostic in (self._residual(path), remark):
                if diagnostic is not None:
                    notes.append(diagnostic)
                    update_site(gm, path, diagnostic)
            rewritten += 1
        for node in gm.graph.nodes:
            refusal = _refused_call(gm, node)
            if refusal is not None:
                notes.append(refusal)
                put_site(gm, skipped(refusal))
        return PassResult(rewritten, tuple(notes))

    def ensures(self, gm: fx.GraphModule) -> None:
        table = site_table(gm)
        for path in module_calls(gm):
            if is_batch_norm(gm.get_submodule(path)) and path not in table:
                raise PostconditionError(f"{path} is a BatchNorm that no record accounts for")

    def _refusal(self, path: str, norm: nn.Module, calls: list[fx.Node]) -> Diagnostic | None:
        kind = closed_kind(norm)
        if kind is not None:
            return closed_diagnostic(path, kind)
        if path in self.left_alone:
            reason = "code that cannot be traced calls it, too, under another name"
            return Diagnostic("PN101", path, reason, "give each call a BatchNorm of its own")
        if not isinstance(norm, _BatchNorm):
            return Diagnostic("PN103", path, f"{type(norm).__name__} is a constant affine")
        if not has_plain_forward(norm):
            return Diagnostic(
                "PN105",
                path,
                f"{type(norm).__module__}.{type(norm).__name__} may compute more than a BatchNorm",
                "replace it by the torch.nn class if it does not",
            )
        if has_hooks(norm):
            return Diagnostic("PN108", path, "it has hooks", "remove them before the conversion")
        if norm.running_mean is None or norm.running_var is None:
            if self.config.warm_start != "none":
                return Diagnostic(
                    "PN104", path, "it has no running statistics", "warm_start='none' converts it"
                )
        elif has_values(norm.running_mean) and not (
            torch.isfinite(norm.running_mean).all()
            and torch.isfinite(norm.running_var).all()
            and (norm.running_var >= 0).all()
        ):
            return Diagnostic(
                "PN109", path, "its running statistics are not finite", "retrain or repair them"
            )
        warm = is_warm(norm, self.config.warm_start)
        constant = self.config.norm == "rms" and self.config.anchor_for(path, warm=warm) == 1
        if norm.num_features == 1 and not constant and self._may_be_flat(norm, calls):
            return Diagnostic("PN107", path, "its input holds one value per instance")
        return None

    @staticmethod
    def _may_be_flat(norm: _BatchNorm, calls: list[fx.Node]) -> bool:
        """Whether a channel of an instance holds, or may hold, one value: [N, C] or a single pixel."""
        one_dimensional = isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm)
        for source in (call.all_input_nodes[0] for call in calls):
            known = pixels(source)
            if known == 1 or (known is None and one_dimensional and rank(source) in (2, None)):
                return True
        return False

    def _groups(self, path: str, norm: _BatchNorm, calls: list[fx.Node]) -> tuple[int, Diagnostic | None]:
        channels = norm.num_features
        num_groups = self.config.groups_for(channels)
        if num_groups == channels and channels > 1 and self._may_be_flat(norm, calls):
            return 1, Diagnostic(
                "PN206",
                path,
                f"{num_groups} groups of {channels} channels would hold one value each: LayerNorm over C",
                "for [N, C, L] inputs, pass example_inputs",
            )
        asked = self.config.num_groups
        if asked is not None and num_groups != asked:
            return num_groups, Diagnostic(
                "PN205",
                path,
                f"{asked} groups do not divide {channels} channels: {num_groups} groups",
            )
        return num_groups, None

    def _residual(self, path: str) -> Diagnostic | None:
        """A diagnostic if no weight and bias come close to what the BatchNorm computes."""
        fitted = self.calibrated.get(path)
        if fitted is None or fitted.residual <= LARGE_RESIDUAL:
            return None
        return Diagnostic(
            "PN209",
            path,
            f"calibration leaves {100 * fitted.residual:.0f} % of the variance of its output unexplained",
            "fewer groups, distillation or fine-tuning bring it back",
        )

    def _rewrite(self, gm: fx.GraphModule, path: str, norm: _BatchNorm, num_groups: int) -> Site:
        """Returns the record of the new normalizer."""
        like = next((t for t in (norm.weight, norm.running_mean) if t is not None), _nearby(gm, path))
        warm = is_warm(norm, self.config.warm_start)
        anchor = self.config.anchor_for(path, warm=warm)
        new = self._normalizer(norm, num_groups, like, anchor, warm=warm)
        weight, bias = affine_from_running_stats(norm, num_groups) if warm else plain_affine(norm)
        fitted = self.calibrated.get(path)
        if fitted is not None:
            weight, bias = fitted.weight, fitted.bias
        with torch.no_grad():
            new.weight.copy_(weight)
            new.bias.copy_(bias)
        new.weight.requires_grad_(norm.weight is not None and norm.weight.requires_grad)
        new.bias.requires_grad_(norm.bias is not None and norm.bias.requires_grad)
        replace_module(gm, path, new)
        if isinstance(norm, FixedMode):
            new.train(gm.training)
        kind = "rms" if self.config.norm == "rms" else norm_name(num_groups, norm.num_features)
        residual = None if fitted is None else fitted.residual
        return Site(path, "norm_only", kind, num_groups, warm_start=warm, residual=residual, anchor=anchor)

    def _normalizer(
        self, norm: _BatchNorm, num_groups: int, like: torch.Tensor, anchor: float, *, warm: bool
    ) -> nn.GroupNorm | AnchoredNorm:
        """The new normalizer with the statistics of the population, if it has any; weight 1 and bias 0."""
        size = num_groups, norm.num_features
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if not self.config.anchored:
            return nn.GroupNorm(*size, norm.eps, **options)
        statistics: Statistics = "rms" if self.config.norm == "rms" else "anchored"
        new = AnchoredNorm(*size, norm.eps, statistics=statistics, **options)
        values = {"anchor": torch.tensor(anchor, dtype=torch.float64)}
        if warm and has_values(like):
            values["population_mean"], values["population_var"] = population(norm, num_groups)
        for name, buffer in new.named_buffers():
            if name in values:
                buffer.copy_(values[name])
        return new


def _read_outside(gm: fx.GraphModule) -> set[int]:
    """Ids of the modules whose parameters or buffers the graph reads directly."""
    owners = (str(node.target).rpartition(".")[0] for node in gm.graph.nodes if _is_read(node))
    return {id(gm.get_submodule(owner)) for owner in owners}


def _is_read(node: fx.Node) -> bool:
    return node.op == "get_attr" and bool(node.users)


def _read_refusal(path: str, read: bool) -> Diagnostic | None:
    """Why a BatchNorm stays whose parameters or statistics are read elsewhere: a normalizer's differ."""
    if not read:
        return None
    return Diagnostic(
        "PN105",
        path,
        "the forward also reads its parameters or statistics, which a normalizer does not have",
        "let nothing but the BatchNorm read them",
    )


def _nearby(gm: fx.GraphModule, path: str) -> torch.Tensor:
    """A tensor with the dtype and device of the BatchNorm at `path`, which itself has no tensors.

    It is a parameter of the closest preceding module that has one, else of any module.
    """
    remaining, seen = list(module_calls(gm)[path]), set()
    while remaining:
        node = remaining.pop(0)
        if node in seen:
            continue
        seen.add(node)
        module = called_module(gm, node)
        for parameter in () if module is None else module.parameters():
            if parameter.is_floating_point():
                return parameter
        remaining += node.all_input_nodes
    return next((p for p in gm.parameters() if p.is_floating_point()), torch.empty(0))


def _refused_call(gm: fx.GraphModule, node: fx.Node) -> Diagnostic | None:
    """Why a batch_norm that `node` calls, directly or not, stays; None if it calls none."""
    if is_norm_call(node):
        return _unreadable(node)
    if node.op != "call_function" or operator_name(node) in NAMES or not reaches_batch_norm(node.target):
        return None
    name = getattr(node.target, "__name__", str(node.target))
    return Diagnostic(
        "PN120",
        node.name,
        f"the function {name} calls batch_norm, and cannot be traced",
        "let it be a module that calls an nn.BatchNorm",
    )


def _unreadable(node: fx.Node) -> Diagnostic:
    operands = norm_operands(node)
    owners = [str(o.target) for o in operands.values() if isinstance(o, fx.Node)]
    name = next((o.rpartition(".")[0] for o in owners if "." in o), node.name)
    return Diagnostic(
        "PN106",
        name,
        f"{operator_name(node)} on operands that are not the parameters and buffers of one module, "
        "or in several modes",
        "use nn.BatchNorm; an exported program must come straight from torch.export.export",
    )
