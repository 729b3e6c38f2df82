"""Convolutions, linear layers and norms with random arguments."""

import random

Drawn = tuple[str, str, str]  # kind, line of __init__ for $m or nothing, lines of forward

PADDING_MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")


def convolution(rng: random.Random, channels: int, rank: int) -> Drawn:
    """A convolution of any form that takes `channels` channels and `rank` spatial dimensions."""
    out = rng.choice((2, 4, 4, 6, 8))
    kernel = rng.choice((1, 1, 2, 3, 3))
    options = [f"padding={rng.choice((0, kernel // 2, kernel // 2, 1))}"]
    groups = rng.choice([1, 1, 1, *(g for g in range(2, channels + 1) if channels % g == 0)])
    out = max(1, out // groups) * groups
    if groups > 1:
        options.append(f"groups={groups}")
    if rng.random() < 0.15:
        options.append("stride=2")
    elif rng.random() < 0.15:
        options[0] = "padding='same'"
    if rng.random() < 0.15:
        options.append("dilation=2")
    if rng.random() < 0.3:
        options.append("bias=False")
    if rng.random() < 0.25:
        options.append(f"padding_mode={rng.choice(PADDING_MODES)!r}")
    layer = f"nn.Conv{rank}d({channels}, {out}, {kernel}, {', '.join(options)})"
    draw = rng.random()
    if draw < 0.04:
        layer = f"nn.utils.parametrizations.weight_norm({layer})"
    elif draw < 0.06 and rank == 2:
        layer = f"RenormConv({channels}, {out}, {kernel})"
    elif draw < 0.08:
        return (
            "conv",
            f"self.$m = {layer}\nself.$m.register_forward_hook(lambda m, i, o: o * 2)",
            "$o = self.$m($a)",
        )
    return "conv", f"self.$m = {layer}", "$o = self.$m($a)"


def transposed(rng: random.Random, channels: int, rank: int) -> Drawn:
    out, kernel, stride = rng.choice((2, 4, 6)), rng.choice((1, 2, 3)), rng.choice((1, 2))
    groups = 2 if channels % 2 == 0 and rng.random() < 0.3 else 1
    layer = f"nn.ConvTranspose{rank}d({channels}, {out}, {kernel}, stride={stride}, groups={groups})"
    return "transposed", f"self.$m = {layer}", "$o = self.$m($a)"


def linear(rng: random.Random, last: int) -> Drawn:
    bias = rng.choice(("", ", bias=False"))
    return "linear", f"self.$m = nn.Linear({last}, {rng.choice((2, 4, 6, 8))}{bias})", "$o = self.$m($a)"


def norm(rng: random.Random, channels: int, rank: int) -> Drawn:
    """A BatchNorm of any form for `channels` channels and `rank` spatial dimensions, 0 for [N, C]."""
    options = [str(channels)]
    if rng.random() < 0.15:
        options.append("affine=False")
    if rng.random() < 0.1:
        options.append(
            rng.choice(("eps=1e-3", "momentum=None", "momentum=0.01", "track_running_stats=False"))
        )
    layer = f"nn.BatchNorm{max(1, rank)}d"
    call, draw = "$o = self.$m($a)", rng.random()
    if draw < 0.08:
        own = "self.$m.running_mean, self.$m.running_var, self.$m.weight, self.$m.bias"
        function = rng.choice(("F.batch_norm", "nn.functional.batch_norm"))
        call = f"$o = {function}($a, {own}, False, 0.1, self.$m.eps)"
        if rng.random() < 0.2:
            call += f"\n$o = {function}(F.relu($o), {own}, False, 0.1, self.$m.eps)"
        options = options[:1]
    elif draw < 0.1:
        return "norm", f"self.$m = ABN({channels})", call
    elif draw < 0.12 and rank == 2:
        return "norm", f"self.$m = {rng.choice(('OwnNorm', 'FusedNormAct'))}({channels})", call
    elif draw < 0.14:
        layer = "nn.SyncBatchNorm"
    elif draw < 0.15:
        call = "$o = $a\nfor layer in (self.$m, self.$m):\n    $o = layer($o)"
    return "norm", f"self.$m = {layer}({', '.join(options)})", call
