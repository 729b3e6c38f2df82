"""The command ``pn-compile``: a thin shell over `pn_compiler.compile`."""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pn_compiler import terminal
from pn_compiler.arguments import check_usage, make_parser
from pn_compiler.base.config import ExportConfig, RecoveryConfig, TransformConfig
from pn_compiler.base.errors import (
    BatchDependentError,
    ConfigError,
    PnCompilerError,
    RefusedError,
    named_line,
)
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.base.interruption import STATUS as INTERRUPTED
from pn_compiler.base.interruption import Interruption, interruptible
from pn_compiler.base.options import options_of, pick
from pn_compiler.base.user_warnings import ConversionWarning
from pn_compiler.repository.options import ModelRepository

if TYPE_CHECKING:
    from pn_compiler.data.sources import Batches
    from pn_compiler.loading import LoadedModel
    from pn_compiler.reporting.outcome import Outcome

DONE, FAILED, USAGE, REFUSED, BATCH_DEPENDENT = 0, 1, 2, 3, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 done; 1 an error, told in one line; 2 wrong usage; 3 ``--strict`` and a site was refused; 4 the file
    would depend on the batch, and ``--allow-batch-dependent`` is not given; 130 interrupted.
    """
    try:
        with interruptible() as interruption:
            return _main(argv, interruption)
    except SystemExit:
        with contextlib.suppress(ConfigError):
            terminal.write("")  # what --help printed
        raise


def _main(argv: Sequence[str] | None, interruption: Interruption) -> int:
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)]
    logging.getLogger("pn_compiler").setLevel(level)  # not the libraries, which log each of their steps
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConversionWarning if arguments.verbose else Warning)
            typed = sys.argv[1:] if argv is None else argv
            return _run(arguments, shlex.join(["pn-compile", *typed]), interruption)
    except KeyboardInterrupt:
        return _fail(interruption.message, INTERRUPTED)
    except RefusedError as error:
        return _fail(str(error), REFUSED, error if arguments.verbose else None)
    except BatchDependentError as error:
        return _fail(str(error), BATCH_DEPENDENT, error if arguments.verbose else None)
    except PnCompilerError as error:
        return _fail(str(error), FAILED, error if arguments.verbose else None)
    except Exception as error:
        if interruption.requested:  # a library turned it into an error of its own
            return _fail(interruption.message, INTERRUPTED)
        return _fail(_unexpected(error), FAILED, error if arguments.verbose else None)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for; ends the command with status 2 if that is wrong."""
    arguments: argparse.Namespace = make_parser().parse_args(argv)
    if arguments.config is None:
        return arguments
    from pn_compiler.recipes import complete

    return complete(arguments)


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory for this model and input shape"
    return f"internal error, please report it with the output of -v: {named_line(error)}"


def _fail(message: str, status: int, error: Exception | None = None) -> int:
    if error is not None:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    terminal.write_error(message)
    return status


def _run(arguments: argparse.Namespace, command: str, interruption: Interruption) -> int:
    if arguments.list_passes:
        return _list_passes()
    check_usage(arguments)
    from pn_compiler.destinations import STDOUT, check_files, reports
    from pn_compiler.loading import LoadedModel, load_model  # torch is only imported for work
    from pn_compiler.reporting.node_data import NAMES
    from pn_compiler.saving.state_dicts import ConvertedNetworks

    interruption.starting = False
    check_files(arguments, NAMES)
    with terminal.stages(interruption.enter, quiet=arguments.quiet) as say:
        say("load")
        loaded = load_model(
            arguments.model,
            arch=arguments.arch,
            allow=arguments.allow,
            checkpoint_key=arguments.checkpoint_key,
            unsafe_pickle=arguments.unsafe_pickle,
            rebuild=ConvertedNetworks(
                _given(arguments, TransformConfig), lambda model: _example(LoadedModel(model), arguments)
            ),
        )
        if arguments.part is not None:
            loaded = _part(loaded, arguments.part)
        if arguments.diagnose is not None:
            text, outcome = _diagnose(loaded, arguments, say)
        elif arguments.dry_run:
            text, outcome = _dry_run(loaded, arguments)
        else:
            text, outcome = _compile(loaded, arguments, say)
        interruption.check()
        outcome = dataclasses.replace(outcome, title=arguments.model.name, command=command)
        outcome.write(reports(arguments))
        if arguments.plot is not None:
            outcome.plot(arguments.plot)
        if arguments.save_config is not None:
            from pn_compiler.recipes import save

            save(arguments, arguments.save_config)
        interruption.check()
    if STDOUT in arguments.report:
        terminal.write(outcome.to_json())
    elif not arguments.quiet:
        terminal.write(f"{text}\n")
    return DONE


def _part(loaded: "LoadedModel", path: str) -> "LoadedModel":
    from pn_compiler.data.parts import part_of
    from pn_compiler.running.copying import unwrap

    return dataclasses.replace(loaded, model=part_of(unwrap(loaded.model), path), inputs=None)


def _transform_options(loaded: "LoadedModel", arguments: argparse.Namespace) -> dict[str, Any]:
    from pn_compiler.graph.graph_module import is_converted

    options = _given(arguments, TransformConfig)
    if arguments.arch is not None and is_converted(loaded.model):  # they were used to convert it
        options = {name: value for name, value in options.items() if name in ("strict", "metric")}
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
        if loaded.inputs is None:
            return {}
        return {"example_inputs": loaded.inputs.args, "example_kwargs": loaded.inputs.kwargs or None}
    from pn_compiler.data.input_shape import described_inputs

    batch = specs[0].shape[0]
    if loaded.fixed_batch not in (None, batch):
        raise ConfigError(f"the program was exported for a batch of {loaded.fixed_batch}, not of {batch}")
    inputs = described_inputs(loaded.model, specs)
    return {"example_inputs": inputs.args, "example_kwargs": inputs.kwargs}


def _compile(
    loaded: "LoadedModel", arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[str, "Outcome"]:
    """What to say, and what was found."""
    import pn_compiler
    from pn_compiler.export.summary import details, summary
    from pn_compiler.reporting.node_data import viewer_command, write_node_data
    from pn_compiler.reporting.outcome import Outcome

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
    text = terminal.lines(summary(report))
    if arguments.verbose:
        text = f"{details(report, terminal.table)}\n\n{text}"
    if arguments.node_data is not None:
        write_node_data(Path(report.path), report.sites, arguments.node_data)
        text += f"\nviewer      {terminal.printable_lines(viewer_command(report.path, arguments.node_data))}"
    if loaded.fixed_batch is not None:
        text += f"\nbatch       fixed to {loaded.fixed_batch}, as the program was exported"
    return text, Outcome(report)


def _dry_run(loaded: "LoadedModel", arguments: argparse.Namespace) -> tuple[str, "Outcome"]:
    import pn_compiler
    from pn_compiler.api import transform_and_measure
    from pn_compiler.export import Report
    from pn_compiler.export.summary import details, summary
    from pn_compiler.graph.pass_log import pass_log, summed
    from pn_compiler.reporting.outcome import Outcome
    from pn_compiler.running.inputs import Inputs

    options, example = _transform_options(loaded, arguments), _example(loaded, arguments)
    inputs = Inputs.of(example.get("example_inputs"), example.get("example_kwargs"))
    with pass_log() as runs:
        converted, fidelity = transform_and_measure(
            loaded.model, inputs, pick(TransformConfig, options), options.get("calibration")
        )
    report = Report(
        sites=pn_compiler.sites(converted), notes=(*loaded.notes, *pn_compiler.notes(converted)),
        fidelity=fidelity, passes=tuple(summed(runs)),
    )  # fmt: skip
    parts = (details(report, terminal.table), "", terminal.lines(summary(report)))
    return "\n".join([*parts, "dry run: nothing was written"]), Outcome(report)


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
) -> tuple[str, "Outcome"]:
    """What to say, and what was found."""
    import pn_compiler
    from pn_compiler.graph.graph_module import is_converted
    from pn_compiler.reporting.outcome import Outcome

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
    return terminal.printable_lines(text), Outcome(diagnoses=found)


def _list_passes() -> int:
    from pn_compiler.graph.pass_base import about
    from pn_compiler.passes import fold_pipeline, freeze_pipeline, narrow_pipeline, transform_pipeline

    pipelines = {
        "transform": transform_pipeline(TransformConfig()),
        "fold": fold_pipeline(),
        "freeze": freeze_pipeline({}),
        "narrow": narrow_pipeline({}),
    }
    for name, passes in pipelines.items():
        terminal.write(f"{name}\n")
        for position, graph_pass in enumerate(passes, start=1):
            terminal.write(f"  {position}. {type(graph_pass).__name__}: {about(graph_pass)}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
