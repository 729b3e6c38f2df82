"""Every model with BatchNorm that timm and torchvision have.

    python -m benchmarks.zoo --stage transform --libs timm,torchvision --json zoo.json
    python -m benchmarks.zoo --stage onnx --one-per-family --json families.json

"transform" converts each on the meta device, without memory for parameters, and accounts for every BatchNorm.
"onnx" compiles models with random weights and running statistics, verifies them in onnxruntime at batch 1 and
2, takes a training step at batch 1, and sees whether torch.onnx exports the unconverted model.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import pn_compiler
from pn_compiler.graph_utils import count_parameters
from pn_compiler.testing import randomize_batch_norms
from pn_compiler.tracing import batch_norms
from tests import zoo

Row = dict[str, Any]


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
        return models.get_model(name, weights=None, weights_backbone=None)
    except TypeError:
        return models.get_model(name, weights=None)


def family(library: str, model: nn.Module) -> str:
    """The file of the library that defines the model."""
    return f"{library}.{type(model).__module__.rpartition('.')[2]}"


def transform_one(task: tuple[str, str]) -> Row | None:
    """One row of the stage "transform"; None for a model without BatchNorm."""
    library, name = task
    row: Row = {"library": library, "model": name}
    start = time.perf_counter()
    try:
        model = build(library, name, meta=True)
        wanted = [path for path, _ in batch_norms(model)]
        if not wanted:
            return None
        converted = pn_compiler.transform(model)
        sites = pn_compiler.sites(converted)
        names = {site.name for site in sites}
        left = [path for path, _ in batch_norms(converted)]
        row["batch_norms"] = len(wanted)
        row["kinds"] = collections.Counter(site.kind for site in sites)
        row["activations"] = sum(site.activation is not None for site in sites)
        row["codes"] = collections.Counter(site.code for site in sites if site.code)
        row["skipped"] = {site.name: site.code for site in sites if site.kind == "skipped"}
        row["unaccounted"] = sorted(set(wanted) - names) + sorted(set(left) - set(row["skipped"]))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        row["traceback"] = traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def input_size(model: nn.Module) -> tuple[int, ...]:
    """The model's own input size, or 3x224x224; video models take eight small frames."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if "video" in type(model).__module__:
        return (3, 16, 112, 112)
    fixed = tuple(config.get("input_size") or (3, 224, 224))
    smallest = config.get("min_input_size")
    return tuple(smallest) if smallest and not config.get("fixed_input_size") else fixed


def onnx_one(task: tuple[str, str]) -> Row:
    """One row of the stage "onnx"."""
    library, name = task
    torch.manual_seed(0)
    model = randomize_batch_norms(build(library, name, meta=False)).eval()
    row: Row = {"library": library, "model": name, "family": family(library, model)}
    inputs = (torch.randn(2, *input_size(model)),)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = pn_compiler.compile(model, Path(folder) / "m.onnx", inputs)
            row["error"], row["bytes"] = report.max_error, report.file_bytes
            row["kinds"] = collections.Counter(site.kind for site in report.sites)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            row["unconverted_fails"] = _plain_export_fails(model, inputs, Path(folder) / "p.onnx")
        row["training"] = _training_step(model, inputs)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _plain_export_fails(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> str | None:
    """Why the unconverted model cannot be exported and verified either; None if it can."""
    try:
        pn_compiler.export_onnx(model, path, inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None


def _training_step(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
    """ "ok", or what is wrong with a step of SGD in train mode at batch 1."""
    try:
        converted = pn_compiler.transform(model.train())
        outputs = torch.utils._pytree.tree_leaves(converted(*(x[:1] for x in inputs)))
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


def smallest_of_each_family(libraries: list[str]) -> list[tuple[str, str]]:
    """The model with the fewest parameters of each family that holds BatchNorm."""
    best: dict[str, tuple[int, tuple[str, str]]] = {}
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
    print(f"failures     {len(failures)}\nunaccounted  {len(unaccounted)} models")
    return 1 if failures or unaccounted else 0


def summarize_onnx(rows: list[Row]) -> int:
    """Prints the table of families; 1 if one fails that exports unconverted."""
    print(f"{'family':<34}{'model':<34}{'error':>9}{'s':>7}  training, failure")
    ours = 0
    for row in sorted(rows, key=lambda r: r["family"]):
        failed = row.get("failed")
        told = row["training"] if failed is None else f"{row['training']}; {failed}"
        if failed is not None:
            likewise = row["unconverted_fails"]
            ours += likewise is None
            told += f" | unconverted: {likewise or 'exports'}"
        error = "-" if failed else f"{row['error']:.1e}"
        print(f"{row['family']:<34}{row['model']:<34}{error:>9}{row['seconds']:>7}  {told[:220]}")
    print(f"{len(rows)} families, {sum('failed' not in r for r in rows)} compiled and verified")
    print(f"{ours} fail that export unconverted; {sum(r['training'] != 'ok' for r in rows)} do not train")
    return 1 if ours else 0


def run(function: Any, tasks: list[tuple[str, str]], jobs: int) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in tqdm(pool.imap_unordered(function, tasks), total=len(tasks), disable=None, leave=False):
            if row is not None:
                yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("transform", "onnx"), required=True)
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
    function, summarize = (
        (transform_one, summarize_transform) if arguments.stage == "transform" else (onnx_one, summarize_onnx)
    )
    rows = list(run(function, tasks, arguments.jobs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    status = summarize(rows)
    print(f"{time.perf_counter() - start:.0f} s with {arguments.jobs} processes, torch {torch.__version__}")
    return status


if __name__ == "__main__":
    sys.exit(main())
