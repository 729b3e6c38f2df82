"""The arguments of the command ``pn-compile``."""

import argparse
import importlib.metadata
import math
from pathlib import Path
from typing import NoReturn

from pn_compiler.base.errors import printable

REPOSITORY_OPTIONS = ("name", "force", "max_batch_size")
DATA_OPTIONS = ("mean", "std", "resize", "crop", "allow_data_code")


def _shape(text: str, example: str = "1,3,224,224") -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(size < 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes such as {example}")
    return sizes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an error of 0 or more, such as 0.01")
    return share


def _size(text: str) -> int | tuple[int, ...]:
    sizes = _shape(text, "256 or 192,256")
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one size, or height and width")
    return sizes if len(sizes) == 2 else sizes[0]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.replace(",", " ").split())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 0.5,0.5,0.5") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error, without the two screens of usage."""

    def error(self, message: str) -> NoReturn:
        usage = f"usage: {self.prog} MODEL -o FILE, and {self.prog} --help for all options"
        self.exit(2, f"{self.prog}: error: {printable(message)}; {usage}\n")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _file(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("expected the name of a file, which is verified before it appears")
    return _path(text)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pn-compile",
        description="Compiles a PyTorch model with BatchNorm into a verified, batch-independent ONNX file.",
        epilog="A model file runs no code when it is loaded, unless you pass --unsafe-pickle; --arch, "
        "--allow and --allow-data-code import the packages that are named.",
    )
    parser.add_argument(
        "model", nargs="?", type=_path, help="model.pt, checkpoint or exported program (.pt2)"
    )
    parser.add_argument("-o", "--output", type=_file, metavar="FILE", help="the ONNX file to write")
    parser.add_argument(
        "--report",
        type=_path,
        metavar="FILE",
        help="write the report as JSON, too; - prints that, and nothing else",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the table of sites, write nothing")
    parser.add_argument(
        "--diagnose", metavar="DATA",
        help="print the power decomposition of each normalizer, before and after conversion, on samples",
    )  # fmt: skip
    parser.add_argument("--list-passes", action="store_true", help="print the pipeline and exit")
    version = importlib.metadata.version("pn-compiler")
    parser.add_argument("--version", action="version", version=f"pn-compile {version}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice: even more")

    source = parser.add_argument_group("the model file")
    source.add_argument("--arch", metavar="PACKAGE.MODULE:FACTORY", help="makes the module of a state_dict")
    source.add_argument(
        "--allow", metavar="PACKAGE.MODULE.CLASS", action="append", default=[],
        help="a class that the file may use, beside those of torch.nn, torchvision and timm",
    )  # fmt: skip
    source.add_argument("--unsafe-pickle", action="store_true", help="let the file run any code it brings")
    source.add_argument(
        "--input-shape", type=_shape, action="append", metavar="N,C,H,W",
        help="shape of an input, batch included; once for each input. Default: from the file, else the "
        "channels of the first layer and 224 pixels",
    )  # fmt: skip

    _add_data_options(parser)

    conversion = parser.add_argument_group("conversion")
    conversion.add_argument("--norm", choices=("layer", "group", "instance"), default="layer")
    conversion.add_argument("--num-groups", type=_positive, metavar="G", help="implies --norm group")
    conversion.add_argument(
        "--proxy", action=argparse.BooleanOptionalAction, default=True, help="proxy normalization"
    )
    conversion.add_argument("--proxy-padding", choices=("activation", "output"), default="activation")
    conversion.add_argument(
        "--warm-start", choices=("auto", "running_stats", "none"),
        help="what weight and bias are computed from (default: --calibrate, else the running statistics "
        "where a BatchNorm was trained)",
    )  # fmt: skip
    conversion.add_argument(
        "--calibrate", metavar="DATA",
        help="fit weight and bias to unlabelled samples; some hundred are enough",
    )  # fmt: skip
    conversion.add_argument(
        "--distill", type=_positive, metavar="STEPS",
        help="train the result for some steps, 150 for example, to give the outputs of the original on the "
        "samples of --calibrate",
    )  # fmt: skip
    conversion.add_argument(
        "--distill-logits", choices=("auto", "all", "none"),
        help="which outputs hold logits of classes along dim 1, for --distill: all, with those of a "
        "segmentation network; auto (the default): those [N, K]",
    )  # fmt: skip
    conversion.add_argument(
        "--static-statistics", nargs="?", const="auto", choices=("auto", "all"),
        help="replace instance statistics by constants from the samples of --calibrate: faster, and lossy; "
        "auto (the default): as many as --error-budget allows",
    )  # fmt: skip
    conversion.add_argument(
        "--error-budget", type=_share, metavar="E",
        help="largest relative error of the output by --static-statistics (default: 0.01)",
    )  # fmt: skip
    conversion.add_argument(
        "--leaf", dest="leaves", metavar="PATH", action="append", default=[],
        help="a module, such as backbone.neck, whose forward must not be traced",
    )  # fmt: skip
    conversion.add_argument("--strict", action="store_true", help="exit with 3 if a BatchNorm is refused")

    export = parser.add_argument_group("ONNX")
    export.add_argument(
        "--target", choices=("portable", "ort-cpu", "openvino", "cuda", "tensorrt", "auto"),
        default="portable",
        help="what the file is for: any runtime (the default); onnxruntime on CPUs like this one, on which "
        "it is the fastest; OpenVINO; onnxruntime on a GPU; TensorRT; or what --tune found",
    )  # fmt: skip
    export.add_argument(
        "--tune", action="store_true",
        help="with --target auto: measure on this machine, unless it was done before, and keep the fastest",
    )  # fmt: skip
    export.add_argument(
        "--opset", type=_positive, metavar="N",
        help="18 to 24 (default: 20, which onnxruntime 1.17 loads; for OpenVINO and TensorRT 21)",
    )  # fmt: skip
    export.add_argument("--target-ort", metavar="VERSION", help="the onnxruntime that must load it, as 1.18")
    export.add_argument("--static-batch", action="store_true", help="fix the batch to that of the input")
    export.add_argument("--input-names", type=_names, default=(), metavar="A,B", help="in the file")
    export.add_argument("--output-names", type=_names, default=(), metavar="A,B", help="in the file")
    export.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="of weights and activations; inputs, outputs and normalizers stay float32",
    )  # fmt: skip
    export.add_argument(
        "--external-data", action="store_true",
        help="write the weights to FILE.data, beside the ONNX file; above 2 GB this is done in any case",
    )  # fmt: skip
    export.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="compare with PyTorch before writing",
    )  # fmt: skip
    _add_repository_options(parser)
    return parser


def _add_repository_options(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--model-repository", type=_path, metavar="DIR",
        help="write a folder that Triton and MLServer serve as it is; a model in it gets a new version",
    )  # fmt: skip
    serving.add_argument("--name", help="of the model in DIR")
    serving.add_argument("--force", action="store_true", help="replace the newest version in DIR")
    serving.add_argument(
        "--max-batch-size", type=_positive, metavar="N",
        help="samples that a server may put into one batch (default: 32)",
    )  # fmt: skip


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group(
        "data",
        "DATA is a file .npy, .npz or .safetensors of samples, preprocessed as for training; a folder of "
        "images, which are prepared as by torchvision's Resize, CenterCrop, ToTensor and Normalize; or "
        "package.module:function, which yields batches.",
    )
    data.add_argument(
        "--mean", type=_numbers, nargs="+", metavar="M",
        help="for each channel, of pixels on the scale 0 to 1, such as 0.485,0.456,0.406; goes with --std",
    )  # fmt: skip
    data.add_argument("--std", type=_numbers, nargs="+", metavar="S", help="for each channel, on that scale")
    data.add_argument("--resize", type=_size, metavar="N", help="pixels of the shorter side, or H,W")
    data.add_argument("--crop", type=_size, metavar="N", help="side of the centre that is kept, or H,W")
    data.add_argument("--allow-data-code", action="store_true", help="let DATA be package.module:function")
