"""Every model with BatchNorm that timm and torchvision have.

    python -m benchmarks.zoo --stage transform --libs timm,torchvision --json zoo.json
    python -m benchmarks.zoo --stage compare --json compared.json
    python -m benchmarks.zoo --stage onnx --one-per-family --json families.json

"transform" converts each on the meta device, without memory for parameters, and accounts for every BatchNorm.
"compare" converts models with random weights and running statistics and an example, so that what is traced is
compared with the model; it says how much longer that takes than without an example.
"onnx" compiles models with random weights and running statistics, verifies them in onnxruntime at batch 1 and
3, takes a training step at batch 1, and sees whether torch.onnx exports the unconverted model.
"""

import argparse
import collections
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import pn_compiler
from pn_compiler.graph.graph_utils import count_parameters
from pn_compiler.inspection.batch_norms import batch_norms
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

Row = dict[str, Any]
Name = tuple[str, str]  # library, model
Task = Callable[[Name], Row | None]
_TASKS_PER_PROCESS = 20  # torch.export does not give all memory back


def model_names(library: str) -> list[str]:
    """Every architecture of "timm" or "torchvision", quantized ones left out."""
    if library == "timm":
        return list(zoo.timm().list_models())
    models = zoo.torchvision().models
    return [name for name in models.list_models() if not name.startswith("quantized_")]


def build(library: str, name: str, *, meta: bool) -> nn.Module:
    """The model in eval mode, without trained weights; on the meta device if it can be made there."""
    with torch.device("meta" if meta else "cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _make(library, name).eval()
        except NotImplementedError:  # an initialisation that looks at values
            if not meta:
                raise
    return build(library, name, meta=False)


def _make(library: str, name: str) -> nn.Module:
    if library == "timm":
        model: nn.Module = zoo.timm().create_model(name)
        return model
    models = zoo.torchvision().models
    try:
        detector = models.get_model(name, weights=None, weights_backbone=None)
    except TypeError:
        return models.get_model(name, weights=None)
    if name.startswith(("retinanet", "fcos")) or hasattr(detector, "rpn"):
        detector.transform.min_size, detector.transform.max_size = (64,), 64  # large images only cost time
    if hasattr(detector, "rpn"):  # and many proposals memory
        detector.rpn._post_nms_top_n = {"training": 32, "testing": 32}
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 16
        detector.roi_heads.detections_per_img = 8
    return detector


def family(library: str, model: nn.Module) -> str:
    """The file of the library that defines the model."""
    return f"{library}.{type(model).__module__.rpartition('.')[2]}"


def transform_one(task: Name) -> Row | None:
    """One row of the stage "transform"; None for a model without BatchNorm."""
    return _convert(task, compare=False)


def compare_one(task: Name) -> Row | None:
    """One row of the stage "compare"; None for a model without BatchNorm."""
    return _convert(task, compare=True)


def _convert(task: Name, *, compare: bool) -> Row | None:
    library, name = task
    row: Row = {"library": library, "model": name}
    start = time.perf_counter()
    try:
        model = build(library, name, meta=True)
        paths = [path for path, _ in batch_norms(model)]
        if not paths:
            return None
        if compare:
            converted = _transform_compared(build(library, name, meta=False), row)
        else:
            converted = pn_compiler.transform(model)
        sites = pn_compiler.sites(converted)
        names = {site.name for site in sites}
        left = [path for path, _ in batch_norms(converted)]
        row["batch_norms"] = len(paths)
        row["kinds"] = collections.Counter(site.kind for site in sites)
        row["activations"] = sum(site.activation is not None for site in sites)
        row["codes"] = collections.Counter(site.code for site in sites if site.code)
        row["skipped"] = {site.name: site.code for site in sites if site.kind == "skipped"}
        row["unaccounted"] = sorted(set(paths) - names) + sorted(set(left) - set(row["skipped"]))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        row["traceback"] = traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _transform_compared(model: nn.Module, row: Row) -> nn.Module:
    """The model converted with an example; `row` gets the seconds of that, and of a conversion without."""
    torch.manual_seed(0)
    randomize_batch_norms(model)
    start = time.perf_counter()
    pn_compiler.transform(model)
    between = time.perf_counter()
    converted = pn_compiler.transform(model, example_inputs(model, 2))
    row["plain_seconds"], row["compared_seconds"] = between - start, time.perf_counter() - between
    return converted


def example_inputs(model: nn.Module, batch: int) -> tuple[Any, ...]:
    """Arguments of a call in eval mode, as small as the architecture admits."""
    module = type(model).__module__
    if ".detection" in module:
        return ([torch.rand(3, 64, 64) for _ in range(batch)],)
    if ".optical_flow" in module:
        return (torch.randn(batch, 3, 128, 128), torch.randn(batch, 3, 128, 128))
    if module.endswith(".s3d"):
        return (torch.randn(batch, 3, 16, 224, 224),)
    if ".video" in module:
        return (torch.randn(batch, 3, 16, 112, 112),)
    if type(model).__name__ == "Inception3":
        return (torch.randn(batch, 3, 299, 299),)  # of the auxiliary head in train mode
    config = getattr(model, "pretrained_cfg", None) or {}
    fixed = tuple(config.get("input_size") or (3, 224, 224))
    smallest = config.get("min_input_size")
    size = tuple(smallest) if smallest and not config.get("fixed_input_size") else fixed
    return (torch.randn(batch, *size),)


def training_inputs(model: nn.Module) -> tuple[Any, ...]:
    """Arguments of a call in train mode at batch 1; detectors need targets."""
    inputs = example_inputs(model, 1)
    if ".detection" not in type(model).__module__:
        return inputs
    target: dict[str, torch.Tensor] = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 56.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]]]).repeat(1, 17, 1),
    }
    return (*inputs, [target])


def onnx_one(task: Name) -> Row:
    """One row of the stage "onnx"."""
    library, name = task
    torch.manual_seed(0)
    model = randomize_batch_norms(build(library, name, meta=False)).eval()
    row: Row = {"library": library, "model": name, "family": family(library, model)}
    inputs = example_inputs(model, 2)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = _compile(model, Path(folder) / "m.onnx", inputs)
            row["error"], row["bytes"] = report.max_error, report.file_bytes
            row["kinds"] = collections.Counter(site.kind for site in report.sites)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            row["unconverted_fails"] = _plain_export_fails(model, inputs, Path(folder) / "p.onnx")
        row["training"] = _training_step(model)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _compile(model: nn.Module, path: Path, inputs: tuple[Any, ...]) -> Any:
    """With a dynamic batch axis if the network has one: pairs of images and lists of them fix it."""
    try:
        return pn_compiler.compile(model, path, inputs)
    except pn_compiler.PnCompilerError:
        if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor):
            raise
        return pn_compiler.compile(model, path, inputs, dynamic_batch=False)


def _plain_export_fails(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> str | None:
    """Why torch.onnx cannot export the unconverted model either, shapes fixed; None if it can."""
    try:
        torch.onnx.export(model, inputs, path, dynamo=True, opset_version=20, verbose=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None


def _training_step(model: nn.Module) -> str:
    """ "ok", or what fails in a step of SGD in train mode at batch 1."""
    try:
        converted = pn_compiler.transform(model.train())
        outputs = torch.utils._pytree.tree_leaves(converted(*training_inputs(model)))
        sum(o.float().square().mean() for o in outputs if isinstance(o, torch.Tensor)).backward()
        gradients = {name: p.grad for name, p in converted.named_parameters() if p.requires_grad}
        torch.optim.SGD(converted.parameters(), lr=1e-3).step()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    missing = [name for name, gradient in gradients.items() if gradient is None]
    bad = [name for name, g in gradients.items() if g is not None and not torch.isfinite(g).all()]
    if bad:
        return f"gradients not finite: {', '.join(bad[:3])}"
    return f"no gradient: {', '.join(missing[:3])}" if missing else "ok"


def smallest_of_each_family(libraries: list[str]) -> list[Name]:
    """The model with the fewest parameters of each family that holds BatchNorm."""
    best: dict[str, tuple[int, Name]] = {}
    tasks = [(library, name) for library in libraries for name in model_names(library)]
    for library, name in tqdm(tasks, disable=None, desc="families", leave=False):
        model = build(library, name, meta=True)
        if not any(batch_norms(model)):
            continue
        key, size = family(library, model), count_parameters(model)
        if key not in best or size < best[key][0]:
            best[key] = (size, (library, name))
    return [task for _, task in best.values()]


def summarize_transform(rows: list[Row]) -> int:
    """Prints the summary; 1 if any BatchNorm is unaccounted for."""
    failures = [row for row in rows if "error" in row]
    kinds: collections.Counter[str] = collections.Counter()
    codes: collections.Counter[str] = collections.Counter()
    for row in rows:
        kinds.update(row.get("kinds", {}))
        codes.update(row.get("codes", {}))
    followed = sum(row.get("activations", 0) for row in rows)
    unaccounted = [(row["model"], row["unaccounted"]) for row in rows if row.get("unaccounted")]
    per_library = collections.Counter(row["library"] for row in rows)
    print(f"models       {len(rows)} ({', '.join(f'{k} {v}' for k, v in per_library.items())})")
    print(f"BatchNorms   {kinds.total()}")
    for kind in ("pn", "norm_only", "skipped"):
        print(f"{kind:<12} {kinds[kind]} ({100 * kinds[kind] / max(1, kinds.total()):.1f} %)")
    share = 100 * kinds["pn"] / max(1, followed)
    print(f"             {share:.1f} % of those that an activation follows are pn")
    print("codes        " + ", ".join(f"{code} {count}" for code, count in sorted(codes.items())))
    for row in failures:
        print(f"failure      {row['model']}: {row['error']}")
    for name, paths in unaccounted:
        print(f"unaccounted  {name}: {', '.join(paths)}")
    extra = sorted(
        row["compared_seconds"] - row["plain_seconds"] for row in rows if "compared_seconds" in row
    )
    if extra:
        middle, most = extra[len(extra) // 2], extra[-1]
        print(f"comparison   {middle:.1f} s (median), {most:.1f} s (most), with an example of two")
    print(f"failures     {len(failures)}\nunaccounted  {len(unaccounted)} models")
    return 1 if failures or unaccounted else 0


def summarize_onnx(rows: list[Row]) -> int:
    """Prints the table of families; 1 if one fails that exports unconverted."""
    print(f"{'family':<34}{'model':<34}{'error':>9}{'s':>7}  training, failure")
    ours = 0
    for row in sorted(rows, key=lambda r: r["family"]):
        failed = row.get("failed")
        outcome = row["training"] if failed is None else f"{row['training']}; {failed}"
        if failed is not None:
            likewise = row["unconverted_fails"]
            ours += likewise is None
            outcome += f" | unconverted: {likewise or 'exports'}"
        error = "-" if failed else f"{row['error']:.1e}"
        print(f"{row['family']:<34}{row['model']:<34}{error:>9}{row['seconds']:>7}  {outcome[:220]}")
    print(f"{len(rows)} families, {sum('failed' not in r for r in rows)} compiled and verified")
    print(f"{ours} fail that export unconverted; {sum(r['training'] != 'ok' for r in rows)} do not train")
    return 1 if ours else 0


def run(function: Task, tasks: list[Name], jobs: int) -> Iterator[Row]:
    """The rows of all `tasks`, as they are ready. A process that dies costs only its own row."""
    left = list(tasks)
    with tqdm(total=len(tasks), disable=None, leave=False) as bar:
        while left:
            rows: list[tuple[Name, Row | None]] = []
            try:
                yield from _run(function, left[: _TASKS_PER_PROCESS * jobs], jobs, rows)
            except BrokenProcessPool:  # by one of the first tasks without a row: each goes alone once
                done = {task for task, _ in rows}
                suspects = [task for task in left if task not in done][:jobs]
                rows += [(task, _run_alone(function, task)) for task in suspects]
                yield from (row for task, row in rows if task in suspects and row is not None)
            left = [task for task in left if task not in {task for task, _ in rows}]
            bar.update(len(rows))


def _run(function: Task, tasks: list[Name], jobs: int, rows: list[tuple[Name, Row | None]]) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            row = future.result()
            rows.append((futures[future], row))
            if row is not None:
                yield row


def _run_alone(function: Task, task: Name) -> Row | None:
    try:
        return next(_run(function, [task], 1, []), None)
    except BrokenProcessPool:
        library, name = task
        died = "the process died, perhaps out of memory"
        return {
            "library": library, "model": name, "family": library, "seconds": 0.0,
            "error": died, "failed": died, "unconverted_fails": None, "training": died,
        }  # fmt: skip


_STAGES: dict[str, tuple[Task, Callable[[list[Row]], int]]] = {
    "transform": (transform_one, summarize_transform),
    "compare": (compare_one, summarize_transform),
    "onnx": (onnx_one, summarize_onnx),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=tuple(_STAGES), required=True)
    parser.add_argument("--libs", default="timm,torchvision")
    parser.add_argument("--one-per-family", action="store_true", help="the smallest model of each family")
    parser.add_argument("--match", default="", help="only models whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    libraries = arguments.libs.split(",")
    start = time.perf_counter()
    if arguments.one_per_family:
        tasks = smallest_of_each_family(libraries)
    else:
        tasks = [(library, name) for library in libraries for name in model_names(library)]
    tasks = [task for task in tasks if arguments.match in task[1]]
    function, summarize = _STAGES[arguments.stage]
    rows = []
    for row in run(function, tasks, arguments.jobs):
        rows.append(row)
        if arguments.json is not None:  # each time: a long run that is stopped leaves what it has
            arguments.json.write_text(json.dumps(rows, indent=1))
    status = summarize(rows)
    print(f"{time.perf_counter() - start:.0f} s with {arguments.jobs} processes, torch {torch.__version__}")
    return status


if __name__ == "__main__":
    sys.exit(main())
