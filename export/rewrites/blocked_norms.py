"""A normalizer in onnxruntime's blocked layout, in the two forms of `pn_compiler.export.rewrites.blocked`."""

import dataclasses
from typing import Any

import numpy as np
import onnx_ir

from pn_compiler.export.rewrites.norms import Array, Norm
from pn_compiler.export.rewrites.rules import constant_input

DOMAIN = "com.microsoft.nchwc"
_LONGEST_SUM = 4096  # terms that a convolution adds one after the other in float32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TakenOut:
    """A normalizer that is not in the graph for the time being.

    Attributes:
        name: of its result.
        norm: what it computes; its values are of the graph that it was in.
        shape: of its input, -1 where unknown.
        weight: [C], that of the depthwise convolution behind it.
    """

    name: str
    norm: Norm
    shape: tuple[int, ...]
    weight: Array


def can_be_restored(norm: Norm, shape: tuple[int, ...], block: int, *, one_image: bool) -> bool:
    """Whether there is a form for it: of images of known size, and no group shares a block with another."""
    if len(shape) != 4 or -1 in shape[1:]:
        return False
    of_whole_blocks = norm.channels // norm.groups % block == 0
    return of_whole_blocks or (norm.groups == 1 and _is_for_one_image(norm, shape, one_image))


def _is_for_one_image(norm: Norm, shape: tuple[int, ...], one_image: bool) -> bool:
    return one_image and shape[0] == 1 and bool((norm.share > 0).all())


def restore(
    graph: onnx_ir.Graph, conv: onnx_ir.Node, taken: TakenOut, block: int, *, one_image: bool
) -> onnx_ir.Node | None:
    """Computes statistics of what `conv` reads, and has `conv` normalize it.

    Args:
        conv: the depthwise convolution that stands for the normalizer, with whatever onnxruntime has fused
            into it.
        block: channels in a block.
        one_image: whether the form for one image may be used.

    Returns:
        A Reshape on the way, if this is in the blocked layout.
    """
    kernel, x = constant_input(conv, 1), conv.inputs[0]
    assert kernel is not None
    assert x is not None
    if not conv.outputs[0].is_graph_output():
        conv.outputs[0].name = f"{taken.name}/normalized"
    writer = _Writer(onnx_ir.tape.Tape(graph), taken, x, len(kernel), block)
    if conv.domain == DOMAIN and _is_for_one_image(taken.norm, taken.shape, one_image):
        return writer.divide_weight(conv)
    entry = writer.normalize_input(conv)
    return entry if conv.domain == DOMAIN else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the operators of one normalizer.

    Attributes:
        tape: appends to the graph.
        taken: the normalizer.
        x: its input now, [N, rows, H, W].
        rows: its channels, and those that fill the last block.
        block: channels in a block.
    """

    tape: onnx_ir.tape.Tape
    taken: TakenOut
    x: onnx_ir.Value
    rows: int
    block: int

    def divide_weight(self, conv: onnx_ir.Node) -> onnx_ir.Node:
        """The form for one image: the weight of `conv` is divided by the standard deviation.

        With S the sum of squares over a group, n its size and m its mean, the variance is::

            share S / n + var          =  share / n (S + n var / share)            not centered
            share (S / n - m^2) + var  =  share ((S + n var / share) / n - m^2)    centered

        where the convolutions of the channels add n var / share as their biases.
        """
        norm, groups = self.taken.norm, self.taken.norm.groups
        size = norm.channels // groups * self.taken.shape[2] * self.taken.shape[3]
        power, entry = self._sums_of_squares(size * norm.var / norm.share)
        scale, mean = np.sqrt(size / norm.share), None
        if norm.centered:
            means = self._op("GlobalAveragePool", self.x, domain=DOMAIN)
            part = self._constant([groups / norm.channels], "part")
            mean = self._op("Mul", self._of_groups(means, 1), part)
            power = self._op("Mul", power, self._constant([1 / size], "size"))
            power = self._op("Sub", power, self._op("Mul", mean, mean))
            least = norm.var / norm.share  # rounding may end below it
            power = self._op("Max", power, self._constant(self._per_group(least), "least"))
            scale = 1 / np.sqrt(norm.share)
        weight = self._padded(self.taken.weight * np.repeat(scale, norm.channels // groups))
        factor = self._op("Pow", power, self._constant([-0.5], "exponent"))
        product = self._op("Mul", factor, self._constant(self._per_group(weight), "weight"))
        conv.replace_input_with(1, product if groups == 1 else self._reshape(product, [self.rows, 1, 1, 1]))
        if mean is not None:
            shift = self._reshape(self._op("Mul", product, mean), [self.rows])
            conv.replace_input_with(2, self._op("Sub", conv.inputs[2], shift))
        return entry

    def normalize_input(self, conv: onnx_ir.Node) -> onnx_ir.Node:
        """The form for any batch: in any order of the elements of a group, or of the channels of one."""
        norm, groups = self.taken.norm, self.taken.norm.groups
        if norm.two_stage:
            grouped = self._reshape(self.x, [0, groups, self.rows // groups, -1])
            d = self._op("Sub", grouped, self._mean(grouped)) if norm.centered else grouped
            squares = self._mean(self._op("Mul", d, d))
            if (norm.share != 1).any():
                squares = self._op("Mul", squares, self._constant(norm.share.reshape(-1, 1, 1), "share"))
            variance = self._op("Add", squares, self._constant(norm.var.reshape(-1, 1, 1), "var"))
            y = self._op("Mul", d, self._op("Pow", variance, self._constant([-0.5], "exponent")))
        else:
            grouped = self._reshape(self.x, [0, groups, -1])
            ones, zeros = self._constant(np.ones(groups), "ones"), self._constant(np.zeros(groups), "zeros")
            y = self._op("InstanceNormalization", grouped, ones, zeros, epsilon=float(norm.var[0]))
        conv.replace_input_with(0, self._reshape(y, [-1, self.rows, *self.taken.shape[2:]]))
        weight = self._padded(self.taken.weight).reshape(-1, 1, 1, 1)
        conv.replace_input_with(1, self._constant(weight, "weight"))
        entry = grouped.producer()
        assert entry is not None
        return entry

    def _sums_of_squares(self, added: Array) -> tuple[onnx_ir.Value, onnx_ir.Node]:
        """Of each group of one image plus `added` [G], as `_of_groups` gives it; and a Reshape on the way."""
        norm, (height, width) = self.taken.norm, self.taken.shape[2:]
        bands = _bands(height, width)
        part = np.repeat(added, norm.channels // norm.groups) * norm.groups / norm.channels / bands
        bias = np.repeat(self._padded(part), bands)  # alike in a group, whatever the order of its blocks
        rows, size = self.rows * bands, [height // bands, width]
        kernel = self._reshape(self.x, [rows, 1, *size])
        image = self.x if bands == 1 else self._reshape(self.x, [1, rows, *size])
        sums = self._op(
            "Conv", image, kernel, self._constant(bias, "bias"),
            domain=DOMAIN, group=rows, kernel_shape=size,
        )  # fmt: skip
        entry = kernel.producer()
        assert entry is not None
        return self._of_groups(sums, bands), entry

    def _of_groups(self, values: onnx_ir.Value, bands: int) -> onnx_ir.Value:
        """Sums of [1, rows * bands, 1, 1] over each group: [1, 1, 1, 1], or [G, 1] of several groups."""
        if self.rows > self.taken.norm.channels:  # what fills the last block may hold anything
            real = np.arange(self.rows) < self.taken.norm.channels
            blocks = real.reshape(-1, 1, self.block).repeat(bands, axis=1)
            values = self._op("Mul", values, self._constant(blocks.reshape(1, -1, 1, 1), f"real_{bands}"))
        if self.taken.norm.groups > 1:
            values = self._reshape(values, [self.taken.norm.groups, -1])
        return self._op("ReduceSum", values, self._constant([1], "axis", np.int64))

    def _per_group(self, values: Array) -> Array:
        """Values of groups or channels in the shape to broadcast against those of `_of_groups`."""
        return values.reshape((-1, 1, 1, 1) if self.taken.norm.groups == 1 else (self.taken.norm.groups, -1))

    def _padded(self, values: Array) -> Array:
        """Of C channels, with zeros for those that fill the last block."""
        return np.pad(values, (0, self.rows - len(values)))

    def _mean(self, grouped: onnx_ir.Value) -> onnx_ir.Value:
        """Over each channel of [N, G, C / G, S], then over the group."""
        for axis in (3, 2):
            grouped = self._op("ReduceMean", grouped, self._constant([axis], f"axis_{axis}", np.int64))
        return grouped

    def _reshape(self, value: onnx_ir.Value, shape: list[int]) -> onnx_ir.Value:
        name = f"shape_{'_'.join(map(str, shape))}"
        return self._op("Reshape", value, self._constant(shape, name, np.int64))

    def _op(
        self, name: str, *inputs: onnx_ir.Value | None, domain: str = "", **attributes: Any
    ) -> onnx_ir.Value:
        graph = self.tape.graph_like
        assert isinstance(graph, onnx_ir.Graph)
        result = onnx_ir.Value(name=f"{self.taken.name}/{len(graph)}")  # of the module of the normalizer
        return self.tape.op(name, inputs, attributes, domain=domain, output=result)

    def _constant(self, values: Any, name: str, dtype: type[Any] = np.float32) -> onnx_ir.Value:
        """An initializer, the same one for the same name."""
        graph, full = self.tape.graph_like, f"{self.taken.name}/norm/{name}"
        assert isinstance(graph, onnx_ir.Graph)
        if full in graph.initializers:
            return graph.initializers[full]
        return self.tape.initializer(onnx_ir.tensor(np.asarray(values, dtype)), full)


def _bands(height: int, width: int) -> int:
    """Into how many bands of rows an image is cut, such that no sum is too long; a divisor of its height."""
    bands = range(1, height + 1)
    return next(n for n in bands if height % n == 0 and (height // n * width <= _LONGEST_SUM or n == height))
