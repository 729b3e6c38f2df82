"""The public function export_model_repository."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pn_compiler.base.config import DType, ExportConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.options import changed, pick, values
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.compilation import export_onnx
from pn_compiler.graph.pass_base import Progress
from pn_compiler.inspection.model_checks import check_module
from pn_compiler.repository.adding import add_to_repository
from pn_compiler.repository.options import ModelRepository
from pn_compiler.running.inputs import Inputs

if TYPE_CHECKING:
    from pn_compiler.export import OnnxFile, Report


def export_model_repository(
    model: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    name: str,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    force: bool = ModelRepository.force,
    max_batch_size: int = ModelRepository.max_batch_size,
    opset_version: int | None = ExportConfig.opset_version,
    target_ort: str | None = ExportConfig.target_ort,
    dynamic_batch: bool = ExportConfig.dynamic_batch,
    dynamic_axes: Sequence[str] | Mapping[str, Mapping[int, str]] = ExportConfig.dynamic_axes,
    external_data: bool = ExportConfig.external_data,
    dtype: DType = ExportConfig.dtype,
    input_names: Sequence[str] = ExportConfig.input_names,
    output_names: Sequence[str] = ExportConfig.output_names,
    verify: bool = ExportConfig.verify,
    allow_batch_dependent: bool = ExportConfig.allow_batch_dependent,
    progress: Progress | None = None,
) -> "Report":
    """Writes a folder that Triton and MLServer serve as it is, and that tests itself: see docs/deploy.md.

    ``directory/name/1`` gets the ONNX file, ``golden.npz`` for ``python -m pn_compiler.smoke``, and
    ``report.json``; the configurations lie beside it. A name that is there gets the next version, which
    appears at once and whole. Arguments that are not listed here are those of `export_onnx`.

    Args:
        model: as for `export_onnx`; or an ONNX file, taken as it is: options of the export are refused.
        directory: of all models; made if only this last folder of its path is missing.
        name: under which the model is served.
        example_inputs: arguments of a call by position. For an ONNX file with only the batch unknown and
            floats as inputs they may be left out.
        example_kwargs: arguments of that call by name.
        force: replace the newest version instead of adding one.
        max_batch_size: samples that a server may put into one batch. It does so only where the first axis of
            all inputs and outputs is the batch, and each sample gets the answer that it gets alone.
        target_ort: the oldest onnxruntime among the servers, such as "1.18".

    Returns:
        The report; ``report.repository`` is the folder of the version.

    Raises:
        ConfigError: an impossible option.
        ExportError: the model cannot be exported, the folder not be written, or its other versions have other
            inputs or outputs.
        VerificationError: the ONNX model computes something else; nothing is written then.
    """
    repository, options = pick(ModelRepository, locals()), pick(ExportConfig, locals())
    if not isinstance(model, str | os.PathLike):
        check_module(model)
        return export_onnx(
            model, None, example_inputs, example_kwargs=example_kwargs, repository=repository,
            progress=progress, **values(options),
        )  # fmt: skip
    given = [name for name in changed(options) if name != "target_ort"]
    if given:
        raise ConfigError(f"{model} is exported already, and taken as it is: leave out {', '.join(given)}")
    return _add_file(Path(model), repository, Inputs.of(example_inputs, example_kwargs), target_ort, progress)


def _add_file(
    path: Path,
    repository: ModelRepository,
    example: Inputs | None,
    target_ort: str | None,
    progress: Progress | None,
) -> "Report":
    from pn_compiler.export import OnnxFile, Report, check_loadable
    from pn_compiler.repository.writing import check_repository

    check_repository(repository)
    file = OnnxFile.read(path)
    if target_ort is not None:
        check_loadable(target_ort, file.opset_version, file.ir_version)
    report = Report(
        path=str(path), opset_version=file.opset_version, ir_version=file.ir_version,
        inputs=file.inputs, outputs=file.outputs, file_bytes=path.stat().st_size,
    )  # fmt: skip
    return add_to_repository(
        repository, path, example or _random_inputs(file), report, stopwatch=Stopwatch(progress)
    )


def _random_inputs(file: "OnnxFile") -> Inputs:
    """Noise in the shapes of the inputs, with a batch of 2 where it is free."""
    tensors = []
    for value in file.inputs:
        if value["dtype"] != "float" or not all(isinstance(size, int) for size in value["shape"][1:]):
            raise ConfigError(f"input {value['name']} {value['shape']} {value['dtype']}: give example_inputs")
        sizes = [size if isinstance(size, int) else 2 for size in value["shape"]]
        tensors.append(torch.randn(sizes, generator=torch.Generator().manual_seed(0)))
    return Inputs(tuple(tensors))
