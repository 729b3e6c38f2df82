"""What the compiler says about a model: sites, and diagnostics with a stable code."""

import dataclasses
from typing import Literal

Severity = Literal["note", "warning"]
SiteKind = Literal["pn", "norm_only", "skipped"]

#: code -> (severity, what it means). Warnings are refusals: ``strict=True`` turns them into an error.
CODES: dict[str, tuple[Severity, str]] = {
    "PN100": ("note", "the model has no BatchNorm"),
    "PN101": ("warning", "inside a module whose forward torch.fx cannot trace"),
    "PN102": ("warning", "never called in the traced forward"),
    "PN103": ("warning", "frozen BatchNorm: a constant affine, nothing depends on the batch"),
    "PN104": ("warning", "no running statistics, so no warm start is possible"),
    "PN105": ("warning", "subclass of BatchNorm with a forward of its own, or read by other code"),
    "PN106": ("warning", "functional batch_norm whose operands are not plain parameters and buffers"),
    "PN107": ("warning", "one value per group: normalizing would erase the data"),
    "PN108": ("warning", "hooks on the BatchNorm would be lost"),
    "PN109": ("warning", "running statistics that are not finite"),
    "PN110": ("note", "the forward branches on self.training; the traced branch is fixed"),
    "PN111": ("warning", "inside TorchScript or a quantized module: there is nothing to convert"),
    "PN112": ("note", "the forward stores a value on its module; the converted one does not"),
    "PN113": ("note", "activation checkpointing in the forward is traced away"),
    "PN114": ("note", "kept whole: the forward asks for a type that only a call tells"),
    "PN115": ("note", "kept whole: the forward rewrites parameters"),
    "PN116": ("note", "kept whole: the forward computes under a mode of its own"),
    "PN117": ("note", "kept whole: the forward draws random numbers or reads a clock"),
    "PN118": ("note", "kept whole: the forward changes state, or reads what a hook writes"),
    "PN119": ("note", "inputs of unknown type are taken to be tensors"),
    "PN120": ("warning", "code that cannot be traced calls batch_norm as a function"),
    "PN121": ("warning", "batch_norm is called as a function, in a branch that was not traced"),
    "PN122": ("note", "kept whole: the forward gives an autograd function what no graph can hold"),
    "PN123": ("note", "kept whole: the forward computes gradients, or changes what has them"),
    "PN124": (
        "note",
        "the forward asks how many dimensions or pieces a value has: fixed to those of the example",
    ),
    "PN125": ("warning", "outputs vary from call to call for the same inputs and random numbers"),
    "PN126": ("note", "normalized on all channels of an expansion, in the file"),
    "PN128": ("note", "kept whole: torch.fx cannot trace the forward, or it was asked for"),
    "PN201": ("note", "no activation follows the BatchNorm"),
    "PN202": ("note", "left without proxy normalization: a consumer cannot absorb its shift"),
    "PN203": ("note", "proxy normalization was switched off"),
    "PN204": ("note", "a shared BatchNorm is followed by different things"),
    "PN205": ("warning", "num_groups does not divide the channels"),
    "PN206": ("warning", "instance or group statistics of [N, C] inputs: LayerNorm over C instead"),
    "PN207": ("note", "warm start inexact at the border of a zero-padded convolution"),
    "PN208": ("note", "several activations read the BatchNorm's output"),
    "PN209": ("note", "calibration leaves more than a tenth of the BatchNorm's variance unexplained"),
    "PN210": ("note", "where the scale and shift of proxy normalization went, in the folded network"),
    "PN211": ("note", "the graph was not compared with the model that it was traced from"),
    "PN212": ("note", "how far the conversion moved the outputs"),
    "PN214": ("warning", "features of a converted network that cannot be read"),
    "PN215": ("warning", "a module of a converted network was changed, and its graph cannot be made anew"),
    "PN216": ("warning", "a method of the original class computes the right thing only in the graph"),
    "PN217": ("warning", "a module of a converted network was moved to another place"),
    "PN218": ("warning", "hooks on a part of a converted network that cannot be called on its own"),
    "PN219": ("note", "normalized before an expansion, on few channels, in the file"),
    "PN301": ("note", "which weights of a checkpoint were taken"),
    "PN302": ("note", "entries of a checkpoint that do not belong to the network were left out"),
    "PN303": ("note", "a program that was exported in train mode is read as in eval mode"),
    "PN304": ("warning", "a converted network that no file can hold"),
    "PN305": ("note", "weights of a converted network: its architecture was converted first"),
    "PN306": ("warning", "weights of a converted network that do not say how it was converted"),
    "PN310": ("warning", "the outputs of a sample depend on the others in its batch"),
    "PN311": ("note", "the network with BatchNorm could not be measured beside the file"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnostic:
    """One remark about one site.

    Attributes:
        code: key of `CODES`.
        site: path of the BatchNorm, such as ``layer1.0.bn2``; empty for the whole model.
        message: what was found.
        hint: what the user can do; empty if nothing needs doing.
    """

    code: str
    site: str
    message: str
    hint: str = ""

    @property
    def severity(self) -> Severity:
        return CODES[self.code][0]

    def __str__(self) -> str:
        where = f" {self.site}" if self.site else ""
        return f"{self.code}{where}: {self.message}" + (f" ({self.hint})" if self.hint else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """What became of one BatchNorm of the input model.

    Attributes:
        name: path of the BatchNorm in the input model.
        kind: "pn" (normalizer + activation + proxy normalization), "norm_only" or "skipped".
        norm: normalizer put in its place: "layer", "group", "instance" or "rms"; None if skipped.
        num_groups: groups of that normalizer; None if skipped.
        anchor: share of the population's variance in that of an instance, from 0 to 1.
        activation: name of the activation that follows, such as "relu"; None if there is none.
        code: code of the reason why it is not "pn", or of the most important remark; None if none.
        reason: that remark in words; empty if none.
        warm_start: whether weight and bias were computed from running statistics or calibration data.
        residual: mean square difference to the BatchNorm's output on the calibration data, relative to the
            variance of that; None if it was not calibrated.
        error: |n - t| / |t|, with t the BatchNorm's output and n that of what is there now, both for the same
            input; None if it was not measured.
        affine: where scale and shift of proxy normalization went, once folded; empty before.
        static: whether the normalizer became a constant scale and shift, by `pn_compiler.freeze_statistics`.
        narrow: "32 of 192 channels" if the file normalizes those before the layer that makes them many (see
            docs/method.md); else empty.
    """

    name: str
    kind: SiteKind
    norm: str | None = None
    num_groups: int | None = None
    activation: str | None = None
    code: str | None = None
    reason: str = ""
    warm_start: bool = False
    residual: float | None = None
    error: float | None = None
    static: bool = False
    affine: str = ""
    anchor: float = 0.0
    narrow: str = ""


def skipped(diagnostic: Diagnostic) -> Site:
    """The record of a BatchNorm that is left alone because of `diagnostic`."""
    hint = f" ({diagnostic.hint})" if diagnostic.hint else ""
    return Site(diagnostic.site, "skipped", code=diagnostic.code, reason=diagnostic.message + hint)
