"""The command ``pn-compile``: a thin shell over `pn_compiler.compile`."""

import argparse
import contextlib
import importlib.metadata
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pn_compiler.errors import ConfigError, PnCompilerError, RefusedError

if TYPE_CHECKING:
    from pn_compiler.loading import LoadedModel

DONE, FAILED, USAGE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
_STAGES = 16  # of a whole run, for the progress bar


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 done; 1 an error, told in one line; 2 wrong usage; 3 ``--strict`` and a site was refused.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)],
        format="%(name)s: %(message)s",
    )
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            if not arguments.verbose:
                warnings.simplefilter("ignore")
            return _run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    except RefusedError as error:
        return _fail(str(error), REFUSED, error if arguments.verbose else None)
    except PnCompilerError as error:
        return _fail(str(error), FAILED, error if arguments.verbose else None)
    except Exception as error:
        message = f"internal error, please report it with the output of -v: {type(error).__name__}: {error}"
        return _fail(message, FAILED, error if arguments.verbose else None)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that temporary files are removed."""
    raise KeyboardInterrupt


def _fail(message: str, status: int, error: Exception | None = None) -> int:
    if error is not None:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    sys.stderr.write(f"pn-compile: error: {' '.join(message.split())}\n")
    return status


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list_passes:
        return _list_passes()
    _check_usage(arguments)
    for path in (arguments.output, arguments.report):
        if path is not None and not arguments.dry_run:
            from pn_compiler.export import check_writable

            check_writable(path)
    _refuse_same_file(arguments.model, arguments.output, arguments.report, arguments.diagnose)
    with _progress() as say:
        say("load")
        from pn_compiler.loading import load_model  # torch is only imported for work

        loaded = load_model(
            arguments.model,
            arch=arguments.arch,
            allow=arguments.allow,
            unsafe_pickle=arguments.unsafe_pickle,
        )
        if arguments.diagnose is not None:
            text = _diagnose(loaded, arguments, say)
        else:
            text = _dry_run(loaded, arguments) if arguments.dry_run else _compile(loaded, arguments, say)
    sys.stdout.write(text + "\n")
    return DONE


def _check_usage(arguments: argparse.Namespace) -> None:
    if arguments.model is None:
        _parser().error("the following arguments are required: model")
    if arguments.diagnose is None and arguments.output is None and not arguments.dry_run:
        _parser().error("-o/--output is required (or --dry-run, or --diagnose)")
    clashes = ("output", "dry_run", "input_shape")
    for name in (name for name in clashes if arguments.diagnose is not None and getattr(arguments, name)):
        _parser().error(
            f"--diagnose writes no model and takes shapes from its data: leave out --{name.replace('_', '-')}"
        )


def _refuse_same_file(*paths: Path | None) -> None:
    """The model, the data, the ONNX file and the report must be different files."""
    given = [path.resolve() for path in paths if path is not None]
    double = next((path for path in given if given.count(path) > 1), None)
    if double is not None:
        raise ConfigError(f"{double} is named twice among the model, the data, the output and the report")


def _transform_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("norm", "num_groups", "proxy", "proxy_padding", "warm_start", "strict", "leaves")
    return {name: getattr(arguments, name) for name in names}


def _example_inputs(loaded: "LoadedModel", arguments: argparse.Namespace) -> tuple[Any, ...] | None:
    """What the model is compiled with: the shapes that the user gave, else what the file brings."""
    if not arguments.input_shape:
        return None if loaded.inputs is None else loaded.inputs.args
    from pn_compiler.input_shape import random_inputs

    batch = arguments.input_shape[0][0]
    if loaded.fixed_batch not in (None, batch):
        raise ConfigError(f"the program was exported for a batch of {loaded.fixed_batch}, not of {batch}")
    return random_inputs(loaded.model, arguments.input_shape).args


def _compile(loaded: "LoadedModel", arguments: argparse.Namespace, say: Callable[[str], None]) -> str:
    import pn_compiler
    from pn_compiler.export import write_atomically

    report = pn_compiler.compile(
        loaded.model,
        arguments.output,
        _example_inputs(loaded, arguments),
        opset_version=arguments.opset,
        dynamic_batch=not arguments.static_batch and loaded.fixed_batch is None,
        verify=arguments.verify,
        progress=say,
        **_transform_options(arguments),
    )
    if arguments.report is not None:
        write_atomically(arguments.report, report.to_json().encode())
    if loaded.fixed_batch is None:
        return str(report)
    return f"{report}\nbatch       fixed to {loaded.fixed_batch}, as the program was exported"


def _dry_run(loaded: "LoadedModel", arguments: argparse.Namespace) -> str:
    import pn_compiler
    from pn_compiler.diagnostics import format_sites

    converted = pn_compiler.transform(
        loaded.model, _example_inputs(loaded, arguments), **_transform_options(arguments)
    )
    notes = [str(note) for note in pn_compiler.notes(converted) if not note.site]
    return "\n".join([format_sites(pn_compiler.sites(converted)), *notes, "dry run: nothing was written"])


def _diagnose(loaded: "LoadedModel", arguments: argparse.Namespace, say: Callable[[str], None]) -> str:
    import json

    import pn_compiler
    from pn_compiler.data import BATCH_SIZE, load_batches
    from pn_compiler.export import write_atomically
    from pn_compiler.graph_module import is_converted

    batches = load_batches(
        arguments.diagnose,
        loaded.model,
        batch_size=loaded.fixed_batch or BATCH_SIZE,
        whole=loaded.fixed_batch is not None,
    )
    say("diagnose")
    found = {"as given": pn_compiler.diagnose(loaded.model, batches, affine=True)}
    if not is_converted(loaded.model):
        first = next(iter(batches))
        converted = pn_compiler.transform(
            loaded.model, first.args, example_kwargs=first.kwargs, **_transform_options(arguments)
        )
        say("diagnose")
        found["converted"] = pn_compiler.diagnose(converted, batches, affine=True)
    if arguments.report is not None:
        content = {title: json.loads(diagnosis.to_json()) for title, diagnosis in found.items()}
        write_atomically(arguments.report, (json.dumps(content, indent=2) + "\n").encode())
    what = "power of the normalizers' outputs"  # weight and bias included: a warm start keeps those
    return "\n\n".join(f"{what}, {title}\n{diagnosis}" for title, diagnosis in found.items())


def _list_passes() -> int:
    from pn_compiler.config import TransformConfig
    from pn_compiler.passes import fold_pipeline, transform_pipeline

    pipelines = {"transform": transform_pipeline(TransformConfig()), "fold": fold_pipeline()}
    for name, passes in pipelines.items():
        sys.stdout.write(f"{name}\n")
        for position, graph_pass in enumerate(passes, start=1):
            line = (type(graph_pass).__doc__ or "").strip().splitlines()[0]
            sys.stdout.write(f"  {position}. {type(graph_pass).__name__}: {line}\n")
    return DONE


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing in a pipe."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar}| {elapsed} {desc}"
    with tqdm(total=_STAGES, disable=None, leave=False, bar_format=layout, file=sys.stderr) as bar:

        def say(stage: str) -> None:
            bar.update(min(1, _STAGES - bar.n))
            bar.set_description_str(stage)
            bar.refresh()

        yield say


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(size < 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes such as 1,3,224,224")
    return sizes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pn-compile",
        description="Compiles a PyTorch model with BatchNorm into a verified, batch-independent ONNX file.",
        epilog="A model file runs no code when it is loaded, unless you pass --unsafe-pickle; --arch and "
        "--allow import the packages that they name.",
    )
    parser.add_argument("model", nargs="?", type=Path, help="model.pt, checkpoint or exported program (.pt2)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON, too")
    parser.add_argument("--dry-run", action="store_true", help="print the table of sites, write nothing")
    parser.add_argument(
        "--diagnose", type=Path, metavar="FILE",
        help="print the power decomposition of each normalizer, before and after conversion, on the samples "
        "of a .npy or .npz file, preprocessed as for training",
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

    conversion = parser.add_argument_group("conversion")
    conversion.add_argument("--norm", choices=("layer", "group", "instance"), default="layer")
    conversion.add_argument("--num-groups", type=_positive, metavar="G", help="implies --norm group")
    conversion.add_argument(
        "--proxy", action=argparse.BooleanOptionalAction, default=True, help="proxy normalization"
    )
    conversion.add_argument("--proxy-padding", choices=("activation", "output"), default="activation")
    conversion.add_argument("--warm-start", choices=("auto", "running_stats", "none"), default="auto")
    conversion.add_argument(
        "--leaf", dest="leaves", metavar="PATH", action="append", default=[],
        help="a module, such as backbone.neck, whose forward must not be traced",
    )  # fmt: skip
    conversion.add_argument("--strict", action="store_true", help="exit with 3 if a BatchNorm is refused")

    export = parser.add_argument_group("ONNX")
    export.add_argument("--opset", type=_positive, default=20, metavar="N", help="18 to 24 (default: 20)")
    export.add_argument("--static-batch", action="store_true", help="fix the batch to that of the input")
    export.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="compare with PyTorch before writing",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
