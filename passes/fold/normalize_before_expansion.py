"""The pass that moves normalizers in front of the layers that make many channels of few."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.graph.graph_utils import add_module, call_module_after, called_module, replace_module
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.nn import FoldedNorm
from pn_compiler.numerics.expansions import factor, fewest_rows
from pn_compiler.passes.absorption import Router, set_weight_and_bias
from pn_compiler.passes.fold.fold_proxy_norm import FoldProxyNorm

_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LinearLayer = nn.Linear | nn.modules.conv._ConvNd
NORMALIZERS = (nn.GroupNorm, FoldedNorm)
_DTYPES = (torch.float32, torch.float64)  # in half precision a second rounding would show


@dataclasses.dataclass(frozen=True, slots=True)
class Expansion:
    """A linear layer that widens, with a normalizer behind it.

    Attributes:
        columns: n, values that a pixel of its output is computed from.
        channels: C of its output.
        groups: G of the normalizer.
        narrow: channels, G times as many as fit a group, that can be normalized instead.
        pixels: values of a channel.
    """

    columns: int
    channels: int
    groups: int
    narrow: int
    pixels: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """The two calls of an expansion, their modules, and M = [W, b - shift] without columns of zeros.

    Attributes:
        matrix: M, [C, n], float64.
        used: which columns M has of [W, b - shift].
        centered: whether the normalizer subtracts the mean.
    """

    producer: fx.Node
    call: fx.Node
    linear: LinearLayer
    norm: nn.GroupNorm | FoldedNorm
    matrix: Tensor
    used: Tensor
    centered: bool
    expansion: Expansion


class NormalizeBeforeExpansion(GraphPass):
    """Normalizes the few channels before an expansion instead of the many behind it.

    Given:   conv(n -> C) -> gn(C)             Result:  conv(n -> r) -> gn(r) -> conv1x1(r -> C)
    Leaves alone: layers that do not widen, have groups or half precision; with other readers, hooks or shared
        weights, or if `why_not` has a reason (PN126).
    Outputs: preserved to rounding. The second convolution has weight and bias of the normalizer.
    Source: docs/method.md, "Normalizing before an expansion".
    """

    runs_after = (FoldProxyNorm,)
    preserves_outputs = True

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        why_not: Callable[[Expansion], str | None] = lambda _: None,
        multiple: int = 16,
    ) -> None:
        """The options.

        Args:
            shapes: path of each normalizer -> shape of its input; those without are left alone.
            why_not: why an expansion should stay as it is; None if it should not.
            multiple: of how many channels a group is made, at least.
        """
        self.shapes, self.why_not, self.multiple = shapes, why_not, multiple

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        router = Router(gm, through_padding=False)
        notes, rewritten = [], 0
        for call in list(gm.graph.nodes):
            site = _match(gm, call, self.shapes.get(str(call.target), ()), self.multiple)
            if site is None:
                continue
            found, path = site.expansion, str(call.target)
            reason = _refusal(site, router) or self.why_not(found)
            if reason is not None:
                notes.append(Diagnostic("PN126", path, f"all {found.channels} channels: {reason}"))
                continue
            _rewrite(gm, site)
            notes.append(Diagnostic("PN219", path, f"{found.narrow} of {found.channels} channels"))
            rewritten += 1
        return PassResult(rewritten, tuple(notes))


def _match(gm: fx.GraphModule, call: fx.Node, shape: tuple[int, ...], multiple: int) -> _Site | None:
    """The expansion whose normalizer `call` calls with an input of `shape`; None if there is none."""
    norm, producer = called_module(gm, call), next(iter(call.args), None)
    if type(norm) not in NORMALIZERS or not isinstance(producer, fx.Node):
        return None
    linear = called_module(gm, producer)
    if type(linear) not in _LINEAR or getattr(linear, "groups", 1) != 1:
        return None
    assert isinstance(norm, nn.GroupNorm | FoldedNorm)
    assert isinstance(linear, LinearLayer)
    channels = len(linear.weight)
    batched = len(shape) == (2 if isinstance(linear, nn.Linear) else linear.weight.dim())
    widens = linear.weight[0].numel() < channels
    if not batched or shape[1] != channels or not widens or not _is_plain(linear, norm):
        return None
    matrix = _matrix(linear, norm)
    used = matrix.any(0)
    centered = isinstance(norm, nn.GroupNorm) or norm.centered
    rows = -(-fewest_rows(int(used.sum()), centered=centered) // multiple) * multiple
    expansion = Expansion(
        linear.weight[0].numel(), channels, norm.num_groups, norm.num_groups * rows, math.prod(shape[2:])
    )
    if not used.any() or expansion.narrow >= channels:
        return None
    return _Site(producer, call, linear, norm, matrix[:, used], used, centered, expansion)


def _is_plain(*modules: nn.Module) -> bool:
    """Whether all values are there, finite, and of one dtype that has digits enough."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    if len({tensor.dtype for tensor in tensors}) != 1 or tensors[0].dtype not in _DTYPES:
        return False
    return all(has_values(tensor) and bool(tensor.isfinite().all()) for tensor in tensors)


def _matrix(linear: LinearLayer, norm: nn.GroupNorm | FoldedNorm) -> Tensor:
    """[W, b - shift], [C, n + 1] in float64."""
    weight = linear.weight.double().flatten(1)
    constant = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.double()
    if isinstance(norm, FoldedNorm) and norm.shift is not None:
        constant = constant - norm.shift.double()
    return torch.cat([weight, constant.unsqueeze(1)], 1)


def _refusal(site: _Site, router: Router) -> str | None:
    """Why `site` must stay as it is; None if it can change."""
    if set(site.producer.users) != {site.call}:
        return f"something else reads {site.producer.target}, too"
    if len(site.call.args) > 1 or site.call.kwargs or site.producer.kwargs:
        return "it is called with arguments by name"
    return router.fixed_weight(site.producer) or router.fixed_weight(site.call)


def _rewrite(gm: fx.GraphModule, site: _Site) -> None:
    groups, rows = site.norm.num_groups, site.expansion.narrow // site.norm.num_groups
    parts = [factor(part, rows, centered=site.centered) for part in site.matrix.chunk(groups)]
    into = site.matrix.new_zeros(groups * rows, len(site.used))
    into[:, site.used] = torch.cat([part for part, _ in parts])
    path = str(site.call.target)
    replace_module(gm, str(site.producer.target), _narrowed(site.linear, into))
    replace_module(gm, path, _plain(site.norm, groups * rows))
    widening = _widening(site, [part for _, part in parts]).train(site.norm.training)
    wide = add_module(gm, f"{path}_expansion", widening)
    added = call_module_after(gm, site.call, wide, (site.call,))
    site.call.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def _narrowed(linear: LinearLayer, matrix: Tensor) -> LinearLayer:
    """`linear` with the rows of `matrix`, [r, n + 1], as weight and bias."""
    weight, bias = matrix[:, :-1], matrix[:, -1] if matrix[:, -1].any() else None
    if isinstance(linear, nn.Linear):
        return _with_values(
            nn.Linear(linear.in_features, len(matrix), bias is not None), linear, weight, bias
        )
    same = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    kind: Any = type(linear)
    options = {name: getattr(linear, name) for name in same}
    new = kind(linear.in_channels, len(matrix), bias=bias is not None, **options)
    return _with_values(new, linear, weight, bias)


def _widening(site: _Site, parts: list[Tensor]) -> LinearLayer:
    """From the normalized channels to those of the expansion, with weight and bias of the normalizer."""
    bias, narrow, wide = site.norm.bias, site.expansion.narrow, site.expansion.channels
    if site.norm.weight is not None:
        scales = site.norm.weight.double().unsqueeze(1).chunk(len(parts))
        parts = [scale * part for scale, part in zip(scales, parts, strict=True)]
    if isinstance(site.linear, nn.Linear):
        blocks: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        return _with_values(nn.Linear(narrow, wide, bias is not None), site.linear, blocks, bias)
    kind: Any = type(site.linear)
    new = kind(narrow, wide, 1, groups=len(parts), bias=bias is not None)
    return _with_values(new, site.linear, torch.cat(parts), bias)


def _with_values(new: LinearLayer, like: LinearLayer, weight: Tensor, bias: Tensor | None) -> LinearLayer:
    """`new` with these values, in the dtype and on the device of `like`."""
    new.to(like.weight)
    set_weight_and_bias(new, weight.view_as(new.weight), bias)
    return new.requires_grad_(like.weight.requires_grad)


def _plain(norm: nn.GroupNorm | FoldedNorm, channels: int) -> nn.GroupNorm | FoldedNorm:
    """A normalizer like `norm` for so many channels, without weight and bias."""
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(norm.num_groups, channels, norm.eps, affine=False)
    return FoldedNorm(
        norm.num_groups, channels, centered=norm.centered, share=norm.share, var=norm.var,
        shift=None, weight=None, bias=None,
    )  # fmt: skip
