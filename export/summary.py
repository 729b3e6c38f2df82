"""What a report says: a summary that one can act on, and the long tables."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pn_compiler.base.diagnostics import CODES, Site
from pn_compiler.base.tables import format_table, site_rows, size
from pn_compiler.base.user_warnings import gathered, listed
from pn_compiler.export.operator_names import onnx_names

if TYPE_CHECKING:
    from pn_compiler.export.report import Report

OWN_LINES = frozenset({"PN212"})  # notes that the summary says elsewhere
_INDENT = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a summary.

    Attributes:
        label: what it is about, in a word or two.
        text: what there is to say.
        mood: how a terminal or a page shows it.
    """

    label: str
    text: str
    mood: Literal["", "good", "warning", "next"] = ""

    def __str__(self) -> str:
        return f"{self.label:<{_INDENT - 1}} {self.text}"


def summary(report: "Report") -> list[Line]:
    """What was done, what it cost, and what to do next."""
    parts = (_conversion, _notes, _values, _recovery, _target, _fidelity, _verdict, _speed, _written, _next)
    return [line for part in parts for line in part(report)]


Table = Callable[[tuple[str, ...], Sequence[tuple[str, ...]]], str]


def details(report: "Report", table: Table = format_table) -> str:
    """The long tables: of sites, of operators, and of what was frozen.

    Args:
        table: shows rows under a header.
    """
    tables = [table(*site_rows(report.sites))] if report.sites else []
    counts = operator_counts(report)
    if counts:
        tables.append(table(("operator", "before", "after"), counts))
    if report.static is not None:
        tables.append(str(report.static))
    if report.seconds:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
        tables.append(str(Line("seconds", stages)))
    return "\n\n".join(tables)


def operator_counts(report: "Report") -> list[tuple[str, str, str]]:
    """Each operator under one name, and how often it was there before and is in the file."""
    benchmark = report.benchmark
    before = onnx_names(report.operators_before) if benchmark is None else benchmark.operators
    after = report.operators_after
    return [(name, str(before.get(name, "")), str(after.get(name, ""))) for name in sorted({*before, *after})]


def _conversion(report: "Report") -> Iterator[Line]:
    sites = report.sites
    if not sites:
        return
    left = [site for site in sites if site.kind == "skipped"]
    converted = [site for site in sites if site.kind != "skipped"]
    norms = _counted([_norm(site) for site in converted])
    text = f"{len(converted)} of {len(sites)} BatchNorms" + (f": {norms}" if norms else "")
    yield Line("converted", text, "good" if converted and not left else "")
    if left:
        yield Line("left alone", f"{len(left)}: {_reasons(left)}", "warning")
    if converted:
        proxied = [site for site in converted if site.kind == "pn"]
        others = [site for site in converted if site.kind != "pn"]
        why = f"; without it {len(others)}: {_reasons(others)}" if others else ""
        yield Line("proxy", f"proxy normalization at {len(proxied)} of {len(converted)}{why}")


def _norm(site: Site) -> str:
    return f"{_NORMS.get(site.norm or '', site.norm)}{' with an anchor' if site.anchor else ''}"


_NORMS = {"layer": "LayerNorm", "group": "GroupNorm", "instance": "InstanceNorm", "rms": "RMSNorm"}


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _reasons(sites: Sequence[Site]) -> str:
    """How many of `sites` have each code, what that means, and where they are."""
    by_code: dict[str, list[str]] = {}
    for site in sites:
        by_code.setdefault(site.code or "", []).append(site.name)
    parts = []
    for code, names in sorted(by_code.items(), key=lambda item: -len(item[1])):
        meaning = f"{code} {CODES[code][1].removeprefix(_PREFIX)}" if code else "no remark"
        count = f" ({len(names)})" if len(by_code) > 1 else ""
        parts.append(f"{meaning}: {listed(names, 2)}" if len(names) < _MANY else f"{meaning}{count}")
    return "; ".join(parts)


_PREFIX = "left without proxy normalization: "
_MANY = 4  # sites with the same reason, from which on their number says more than their names


def _notes(report: "Report") -> Iterator[Line]:
    listed_above = {site.name for site in report.sites if site.kind == "skipped"}
    said = [
        note
        for note in report.notes
        if note.code not in OWN_LINES
        and note.site not in listed_above
        and (note.severity == "warning" or not note.site or note.code in _ALWAYS)
    ]
    for text in gathered(said):
        yield Line("note", text, "warning" if CODES[text[:5]][0] == "warning" else "")


_ALWAYS = frozenset({"PN110", "PN112", "PN113", "PN209"})


def _values(report: "Report") -> Iterator[Line]:
    for label, values in (("input", report.inputs), ("output", report.outputs)):
        for value in values:
            yield Line(label, f"{value['name']} [{', '.join(map(str, value['shape']))}] {value['dtype']}")
    if report.input_shape_source != "given":
        yield Line("input shape", report.input_shape_source, "warning")


def _recovery(report: "Report") -> Iterator[Line]:
    if report.distillation is not None:
        for text in str(report.distillation).splitlines():
            yield Line("distilled", text)
    if report.static is not None:
        static = report.static
        changed = f"outputs change by {100 * static.error:.2f} %"
        yield Line("static", f"{static.frozen} of {len(static.sites)} statistics became constants; {changed}")


def _target(report: "Report") -> Iterator[Line]:
    """Nothing for a portable file that was not chosen among others."""
    if report.target != "portable" or report.tuning:
        yield Line("target", report.target)
    if report.blocked:
        normalizers = "1 normalizer" if report.blocked == 1 else f"{report.blocked} normalizers"
        yield Line(
            "",
            f"{normalizers} in the blocked layout: for onnxruntime "
            f"{report.versions.get('onnxruntime', '')} on CPUs of this kind only; others refuse the file",
        )
    few = sum(note.code == "PN219" for note in report.notes)
    if few:
        yield Line("normalized", f"{few} normalizers work on fewer channels, before an expansion")
    if report.tuning:
        times = sorted(report.tuning.items(), key=lambda item: item[1])
        yield Line("measured", ", ".join(f"{name} {time:.2f} ms" for name, time in times))
    if report.norms:
        yield Line("norms", report.norms)


def _fidelity(report: "Report") -> Iterator[Line]:
    if report.fidelity is not None:
        yield Line("fidelity", f"to the original: {report.fidelity}")


def _verdict(report: "Report") -> Iterator[Line]:
    if not report.path:
        return
    if not report.checks:
        yield Line("verified", "no: the file was not compared with PyTorch", "warning")
        return
    batches = sorted({check.batch for check in report.checks})
    others = sorted({check.sizes for check in report.checks} - {""})
    yield Line(
        "verified",
        f"largest error {report.max_error:.1e} (relative, limit {report.tolerance:.1e}) to "
        f"{report.reference} PyTorch at batch {' and '.join(map(str, batches))}"
        f"{''.join(f', and at {sizes}' for sizes in others)}; "
        f"PyTorch's own in {report.dtype}: {report.float32_error:.1e}"
        + ("" if report.runtime == "onnxruntime" else f"; run in {report.runtime}, for onnxruntime cannot"),
        "good",
    )


def _speed(report: "Report") -> Iterator[Line]:
    if report.benchmark is not None:
        yield Line("speed", str(report.benchmark))


def _written(report: "Report") -> Iterator[Line]:
    if not report.path:
        return
    data = f" and {size(report.data_bytes)} in {report.path}.data" if report.data_bytes else ""
    trained = f"{report.parameters_before:,} -> {report.parameters_after:,} parameters"
    yield Line(
        "wrote",
        f"{report.path} ({size(report.file_bytes)}{data}, opset {report.opset_version}, "
        f"IR {report.ir_version}, {trained})",
        "good",
    )
    if report.repository:
        yield Line("repository", f"{report.repository} ({report.batching})", "good")


def _next(report: "Report") -> Iterator[Line]:
    if report.fidelity is not None:
        yield Line("next", report.fidelity.advice, "next")
    elif report.path and not report.checks:
        yield Line("next", "leave out --no-verify (verify=False), or compare outputs yourself", "next")
    elif report.path:
        yield Line("next", "measure accuracy on data of your own before you replace what is deployed", "next")
