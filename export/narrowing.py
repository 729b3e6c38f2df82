"""Which normalizers of a file run on the few channels before an expansion, and what that gains."""

import dataclasses
import functools

from torch import fx, nn

from pn_compiler.base.config import TargetName
from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.graph.graph_module import is_converted, notes, record, sites
from pn_compiler.graph.graph_utils import module_calls
from pn_compiler.graph.pass_base import run_pipeline
from pn_compiler.passes import narrow_pipeline
from pn_compiler.passes.fold.normalize_before_expansion import NORMALIZERS, Expansion
from pn_compiler.regions.observed_calls import ObservedCalls
from pn_compiler.running.inputs import Inputs


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """What decides, for a target.

    Attributes:
        value: picoseconds that the normalizer of a file takes for one value.
        product: picoseconds of a multiplication and addition in a convolution.
    """

    value: float
    product: float


_PORTABLE = Costs(value=900, product=22)  # the plain layout, with its reorders
_BLOCKED = Costs(value=280, product=22)  # whole blocks, and sums of squares by convolutions
#: Memory is dear there, and products are not: half the channels pay. No GPU was measured.
_GPU = Costs(value=1, product=0)
#: "auto" chooses among files of one graph: what pays in the blocked layout pays in the plain one, too.
#: For OpenVINO, whose kernel takes a normalizer and its activation in one, it was not measured.
_COSTS: dict[str, Costs] = {
    "portable": _PORTABLE, "ort-cpu": _BLOCKED, "auto": _BLOCKED, "cuda": _GPU, "tensorrt": _GPU
}  # fmt: skip
_BLOCK = 16  # channels that a convolution computes at once
_LEAST = 1.0  # microsecond; what gains less is within the noise


def narrow(model: nn.Module, inputs: Inputs, target: TargetName) -> tuple[Diagnostic, ...]:
    """Moves normalizers of a folded `model` before the expansions in front of them, where it pays.

    Args:
        model: edited in place: its graphs, not the parameters that it has. Its table of sites, if it has one,
            says where it was done.
        inputs: arguments of a call; by their size it is decided.
        target: of the file.

    Returns:
        A note for each normalizer behind an expansion: PN219 where it was done, PN126 and why where not.
    """
    graphs = {path: gm for path, gm in model.named_modules() if isinstance(gm, fx.GraphModule)}
    if target not in _COSTS or not any(type(module) in NORMALIZERS for module in model.modules()):
        return ()
    costs = _COSTS[target]
    calls = ObservedCalls(model, lambda: inputs)
    found: list[Diagnostic] = []
    for path, gm in graphs.items():
        prefix = f"{path}." if path else ""
        shapes = {name: _shape(calls.of(prefix + name)) for name in module_calls(gm)}
        passes = narrow_pipeline(shapes, functools.partial(why_not, costs=costs))
        found += [
            dataclasses.replace(note, site=prefix + note.site) for note in run_pipeline(passes, gm).notes
        ]
    if is_converted(model):
        done = {note.site: note.message for note in found if note.code == "PN219"}
        table = (dataclasses.replace(site, narrow=done.get(site.name, "")) for site in sites(model))
        record(model, tuple(table), notes(model))
    return tuple(found)


def _shape(call: Inputs | None) -> tuple[int, ...]:
    """The shape of what a module is called with; () if unknown."""
    tensors = () if call is None else call.tensors()
    return tuple(tensors[0].shape) if len(tensors) == 1 else ()


def why_not(found: Expansion, costs: Costs) -> str | None:
    """Why `found` should stay as it is; None if the file gets faster without.

    The normalizer has fewer values to read and write, and the two layers take more products than the one::

        gain = pixels (value (C - r) - product (r n + r C / G - n C))

    The gain in microseconds, by the formula, and measured with LayerNorm and RMSNorm: onnxruntime 1.32, an
    AMD EPYC with AVX-512, medians of 5 rounds, an inverted residual of mobilenet_v2 or a bottleneck end of
    resnet50 on its own, one group. Those for ort-cpu are from when a value took 550 picoseconds there, before
    sums of squares were convolutions; with 280, measured since, nothing pays::

        n -> C, pixels          portable  1 thread    2 threads    ort-cpu  1 thread    2 threads
        16 -> 96, 112 x 112     293       274, 299    170, 97      -124     -31, -13    96, -77
        24 -> 144, 56 x 56      195       163, 167    129, 72      61       90, 92      140, 68
        32 -> 192, 28 x 28      31        7, 10       25, 2        -17      -11, -11    34, -12
        64 -> 384, 14 x 14      7         -3, -1      17, 28       -16      -14, -13    15, 18
        96 -> 576, 14 x 14      -2        -10, -10    18, -11      -36      -28, -30    24, -21
        64 -> 256, 56 x 56      -140      -44, -92    -, -154      -332     -289, -299  -, -242
        512 -> 2048, 7 x 7      -260      -, -213     -, -112      -286     -, -320     -, -149

    Where InstanceNormalization runs on one of several threads, LayerNorm gains more with each.
    """
    rows = -(-found.narrow // found.groups // _BLOCK) * _BLOCK
    added = found.groups * rows * (found.columns + found.channels // found.groups)
    products = added - found.columns * found.channels
    if not costs.product:
        return None if 2 * found.narrow < found.channels else f"{found.narrow} are not less than half of them"
    gain = 1e-6 * found.pixels * (costs.value * (found.channels - found.narrow) - costs.product * products)
    if gain >= _LEAST:
        return None
    return f"with {found.narrow} the file would take {max(-gain, 0):.0f} microseconds more, by estimate"
