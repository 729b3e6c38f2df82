"""The command ``pn-compile``: a thin shell over `pn_compiler.compile`."""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pn_compiler.arguments import check_usage, make_parser
from pn_compiler.base.config import ExportConfig, RecoveryConfig, TransformConfig
from pn_compiler.base.errors import ConfigError, PnCompilerError, RefusedError, named_line, printable
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.base.interruption import STATUS as INTERRUPTED
from pn_compiler.base.interruption import Interruption, interruptible
from pn_compiler.base.options import options_of
from pn_compiler.repository.options import ModelRepository

if TYPE_CHECKING:
    from pn_compiler.data.sources import Batches
    from pn_compiler.loading import LoadedModel

_STDOUT = Path("-")
DONE, FAILED, USAGE, REFUSED = 0, 1, 2, 3
_STAGES = 16  # of a whole run, for the progress bar


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 done; 1 an error, told in one line; 2 wrong usage; 3 ``--strict`` and a site was refused.
    """
    try:
        with interruptible() as interruption:
            return _main(argv, interruption)
    except SystemExit:
        with contextlib.suppress(ConfigError):
            _print("")  # what --help printed
        raise


def _main(argv: Sequence[str] | None, interruption: Interruption) -> int:
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)],
        format="%(name)s: %(message)s",
    )
    try:
        with warnings.catch_warnings():
            if not arguments.verbose:
                warnings.simplefilter("ignore")
            return _run(arguments, interruption)
    except KeyboardInterrupt:
        return _fail(interruption.message, INTERRUPTED)
    except RefusedError as error:
        return _fail(str(error), REFUSED, error if arguments.verbose else None)
    except PnCompilerError as error:
        return _fail(str(error), FAILED, error if arguments.verbose else None)
    except Exception as error:
        if interruption.requested:  # a library turned it into an error of its own
            return _fail(interruption.message, INTERRUPTED)
        return _fail(_unexpected(error), FAILED, error if arguments.verbose else None)


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory for this model and input shape"
    return f"internal error, please report it with the output of -v: {named_line(error)}"


def _fail(message: str, status: int, error: Exception | None = None) -> int:
    if error is not None:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        sys.stderr.write(f"pn-compile: error: {printable(message)}\n")
        sys.stderr.flush()
    return status


def _print(text: str) -> None:
    """To the standard output, which may be a pipe that nobody reads any more.

    Raises:
        ConfigError: it takes nothing, for example because the disk is full.
    """
    try:
        if sys.stdout is not None:  # which it is if the caller closed it
            encoding = sys.stdout.encoding or "utf-8"  # names of files may be beyond it
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            raise ConfigError(f"cannot print the result: {error.strerror}") from error


def _run(arguments: argparse.Namespace, interruption: Interruption) -> int:
    if arguments.list_passes:
        return _list_passes()
    check_usage(arguments)
    from pn_compiler.loading import load_model  # torch is only imported for work

    interruption.starting = False
    report = None if arguments.report == _STDOUT else arguments.report
    _check_files(arguments, report)
    with _progress(interruption.enter) as say:
        say("load")
        loaded = load_model(
            arguments.model,
            arch=arguments.arch,
            allow=arguments.allow,
            checkpoint_key=arguments.checkpoint_key,
            unsafe_pickle=arguments.unsafe_pickle,
        )
        if arguments.part is not None:
            loaded = _part(loaded, arguments.part)
        if arguments.diagnose is not None:
            text, content = _diagnose(loaded, arguments, say)
        elif arguments.dry_run:
            text, content = _dry_run(loaded, arguments), None
        else:
            text, content = _compile(loaded, arguments, say)
        if content is not None and report is not None:
            from pn_compiler.base.files import write_atomically

            write_atomically(report, content.encode())
        interruption.check()
    _print(content if content is not None and arguments.report == _STDOUT else f"{text}\n")
    return DONE


def _part(loaded: "LoadedModel", path: str) -> "LoadedModel":
    from pn_compiler.data.parts import part_of
    from pn_compiler.running.copying import unwrap

    return dataclasses.replace(loaded, model=part_of(unwrap(loaded.model), path), inputs=None)


def _check_files(arguments: argparse.Namespace, report: Path | None) -> None:
    """Raises PnCompilerError if a file cannot be written, or is another one that is named, too."""
    for path in (arguments.output, report):
        if path is not None and not arguments.dry_run:
            from pn_compiler.base.files import check_writable

            check_writable(path)
    data = [Path(source) for source in (arguments.diagnose, arguments.calibrate) if source is not None]
    weights = [Path(f"{arguments.output}.data")] if arguments.output and "external_data" in arguments else []
    _refuse_same_file(arguments.model, arguments.output, report, *data, *weights)


def _refuse_same_file(*paths: Path | None) -> None:
    """The model, the data, the ONNX file with its weights and the report must be different files."""
    seen: set[object] = set()
    for path in paths:
        if path is not None:
            identity = _identity(path)
            if identity in seen:
                raise ConfigError(
                    f"{path} is named twice among the model, the data, the output and the report"
                )
            seen.add(identity)


def _identity(path: Path) -> object:
    """Equal for two names of one file, links of both kinds included."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # there is none yet, or it cannot be looked at
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _transform_options(loaded: "LoadedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    from pn_compiler.graph.graph_module import is_converted

    options = _given(arguments, TransformConfig)
    auto = options.get("anchor") == "auto"
    source = arguments.calibrate or (arguments.diagnose if auto else None)
    if not auto:
        options.pop("metric", None)  # one of `distill` and `freeze_statistics`
    if source is not None:
        options["calibration"] = _batches(loaded, source, arguments)
        if not auto and not is_converted(loaded.model):
            options.setdefault("warm_start", "calibrate")
    return options


def _given(arguments: argparse.Namespace, *stages: type) -> dict[str, Any]:
    """The options of `stages` that the user gave, by name: the others keep the defaults of the API."""
    names = (name for stage in stages for name in options_of(stage))
    return {name: getattr(arguments, name) for name in names if name in arguments}


def _example(loaded: "LoadedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    """What the model is compiled with: the inputs that the user described, else what the file brings."""
    specs = arguments.inputs or [InputSpec(shape) for shape in arguments.input_shape or ()]
    if not specs:
        return {} if loaded.inputs is None else {"example_inputs": loaded.inputs.args}
    from pn_compiler.data.input_shape import described_inputs

    batch = specs[0].shape[0]
    if loaded.fixed_batch not in (None, batch):
        raise ConfigError(f"the program was exported for a batch of {loaded.fixed_batch}, not of {batch}")
    inputs = described_inputs(loaded.model, specs)
    return {"example_inputs": inputs.args, "example_kwargs": inputs.kwargs}


def _compile(
    loaded: "LoadedModel", arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[str, str]:
    """What to say, and the report as JSON."""
    import pn_compiler

    repository = _given(arguments, ModelRepository)
    options = _transform_options(loaded, arguments) | _given(arguments, RecoveryConfig, ExportConfig)
    if loaded.fixed_batch is not None:
        options["dynamic_batch"] = False
    report = pn_compiler.compile(
        loaded.model,
        arguments.output,
        **_example(loaded, arguments),
        repository=ModelRepository(**repository) if repository else None,
        progress=say,
        **options,
    )
    report = dataclasses.replace(report, notes=(*loaded.notes, *report.notes))
    text = str(report)
    if loaded.fixed_batch is not None:
        text += f"\nbatch       fixed to {loaded.fixed_batch}, as the program was exported"
    return text, report.to_json()


def _dry_run(loaded: "LoadedModel", arguments: argparse.Namespace) -> str:
    import pn_compiler
    from pn_compiler.base.diagnostics import format_sites

    converted = pn_compiler.transform(
        loaded.model, **_example(loaded, arguments), **_transform_options(loaded, arguments)
    )
    notes = [str(note) for note in (*loaded.notes, *pn_compiler.notes(converted)) if not note.site]
    return "\n".join([format_sites(pn_compiler.sites(converted)), *notes, "dry run: nothing was written"])


def _batches(loaded: "LoadedModel", source: str, arguments: argparse.Namespace) -> "Batches":
    """The samples of DATA, in batches that the model takes."""
    from pn_compiler.data.sources import BATCH_SIZE, load_batches

    return load_batches(
        source,
        loaded.model,
        batch_size=loaded.fixed_batch or BATCH_SIZE,
        whole=loaded.fixed_batch is not None,
        mean=arguments.mean and [*itertools.chain(*arguments.mean)],
        std=arguments.std and [*itertools.chain(*arguments.std)],
        resize=arguments.resize,
        crop=arguments.crop,
        interpolation=arguments.interpolation,
        labelled="metric" in arguments,
        allow_code=arguments.allow_data_code,
    )


def _diagnose(
    loaded: "LoadedModel", arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[str, str]:
    """What to say, and the same as JSON."""
    import json

    import pn_compiler
    from pn_compiler.base.strict_json import to_json
    from pn_compiler.graph.graph_module import is_converted

    batches = _batches(loaded, arguments.diagnose, arguments)
    say("diagnose")
    found = {"as given": pn_compiler.diagnose(loaded.model, batches, affine=True)}
    if not is_converted(loaded.model):
        first = next(iter(batches))
        converted = pn_compiler.transform(
            loaded.model, first.args, example_kwargs=first.kwargs, **_transform_options(loaded, arguments)
        )
        say("diagnose")
        found["converted"] = pn_compiler.diagnose(converted, batches, affine=True)
    what = "power of the normalizers' outputs"  # weight and bias included: a warm start keeps those
    parts = [f"{what}, {title}\n{diagnosis}" for title, diagnosis in found.items()]
    text = "\n\n".join([*map(str, loaded.notes), *parts])
    return text, to_json({title: json.loads(diagnosis.to_json()) for title, diagnosis in found.items()})


def _list_passes() -> int:
    from pn_compiler.passes import fold_pipeline, freeze_pipeline, transform_pipeline

    pipelines = {
        "transform": transform_pipeline(TransformConfig()),
        "fold": fold_pipeline(),
        "freeze": freeze_pipeline({}),
    }
    for name, passes in pipelines.items():
        _print(f"{name}\n")
        for position, graph_pass in enumerate(passes, start=1):
            line = (type(graph_pass).__doc__ or "").strip().splitlines()[0]
            _print(f"  {position}. {type(graph_pass).__name__}: {line}\n")
    return DONE


@contextlib.contextmanager
def _progress(enter: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing in a pipe. Each stage is told to `enter`."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar}| {elapsed} {desc}"
    with tqdm(total=_STAGES, disable=None, leave=False, bar_format=layout, file=sys.stderr) as bar:

        def say(stage: str) -> None:
            enter(stage)
            bar.update(min(1, _STAGES - bar.n))
            bar.set_description_str(stage)
            bar.refresh()

        yield say


if __name__ == "__main__":
    sys.exit(main())
