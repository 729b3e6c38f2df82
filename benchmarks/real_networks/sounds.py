"""Synthesised sounds of known pitch: harmonics, vibrato and noise."""

import math

import torch
from torch import Tensor

SAMPLE_RATE = 16000
FRAME = 1024  # samples that CREPE hears
LOWEST, HIGHEST = 60.0, 1200.0  # Hz; between them all pitches are equally likely, in cents
_HARMONICS = 40


def cents(frequency: Tensor) -> Tensor:
    """Above 10 Hz, as CREPE counts them."""
    return 1200 * (frequency / 10).log2()


def synthesize(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(frames [N, 1024] of mean 0 and deviation 1, their pitch in cents at the centre [N]).

    A frame has up to 40 harmonics that fall off by 0 to 12 dB an octave and vary by a resonance, a vibrato of
    up to 50 cents at 4 to 8 Hz, and white noise 0 to 40 dB below it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    frequency = (uniform(math.log(LOWEST), math.log(HIGHEST))).exp()
    time = (torch.arange(FRAME, dtype=torch.float64) - FRAME / 2) / SAMPLE_RATE  # 0 at the centre
    # pitch = frequency * 2^(depth sin(w t + start) / 1200): its phase is the integral, here a sum
    depth, rate, start = uniform(0, 50, 1), 2 * math.pi * uniform(4, 8, 1), uniform(0, 2 * math.pi, 1)
    bend = depth * (rate * time + start).sin()
    phase = (2 * math.pi * frequency[:, None] * 2 ** (bend / 1200) / SAMPLE_RATE).cumsum(1)
    number = torch.arange(1, _HARMONICS + 1, dtype=torch.float64)
    audible = number * frequency[:, None] * 2 ** (50 / 1200) < SAMPLE_RATE / 2
    resonance = uniform(300, 3000, 1), uniform(0.3, 1.5, 1)  # Hz, octaves
    away = (number * frequency[:, None] / resonance[0]).log2() / resonance[1]
    level = number ** -uniform(0, 2, 1) * (0.1 + (-away.square()).exp()) * audible
    starts = uniform(0, 2 * math.pi, _HARMONICS)
    tone = torch.zeros(count, FRAME, dtype=torch.float64)
    for index, k in enumerate(number.tolist()):
        tone += level[:, index, None] * (k * phase + starts[:, index, None]).sin()
    noise = torch.randn(count, FRAME, generator=generator, dtype=torch.float64)
    loudness = tone.square().mean(1, keepdim=True).sqrt()
    frames = tone + noise * loudness * 10 ** (-uniform(0, 40, 1) / 20)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), cents(frequency * 2 ** (depth[:, 0] * start[:, 0].sin() / 1200)).float()
