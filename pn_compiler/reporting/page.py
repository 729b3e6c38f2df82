"""The report as one HTML page that loads nothing: for people, with tables to sort and pictures."""

import datetime
import math
from typing import TYPE_CHECKING, Any

import jinja2

from pn_compiler.base.diagnostics import CODES
from pn_compiler.base.tables import size
from pn_compiler.base.user_warnings import gathered
from pn_compiler.export.summary import operator_counts, summary
from pn_compiler.reporting.charts import error_chart, power_chart

if TYPE_CHECKING:
    from pn_compiler.export import Report
    from pn_compiler.reporting.outcome import Outcome

_LEVELS = ((0.2, "low"), (0.5, "middle"), (math.inf, "high"))  # errors of sites, for colours


def page(outcome: "Outcome") -> str:
    """The page of `outcome`. Whatever names it holds is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pn_compiler.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "size": size}
    report = outcome.report
    charts = {
        title: power_chart(
            f"shares of the power by depth, {title}", [(s.name, s.shares) for s in found.sites]
        )
        for title, found in outcome.diagnoses.items()
    }
    return environment.get_template("report.html.j2").render(
        outcome=outcome,
        report=report,
        made=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        codes=CODES,
        power=charts,
        **({} if report is None else _of_report(report)),
    )


def _of_report(report: "Report") -> dict[str, Any]:
    errors = [(site.name, _level(site.error), site.error) for site in report.sites if site.error is not None]
    return {
        "lines": summary(report),
        "notes": gathered(report.notes),
        "errors": error_chart([(n, level, error) for n, level, error in errors if math.isfinite(error)]),
        "operators": operator_counts(report),
        "kinds": sorted({site.kind for site in report.sites}),
        "remarks": sorted({site.code for site in report.sites if site.code}),
    }


def _level(error: float) -> str:
    return next(level for most, level in _LEVELS if not error > most)


def percent(share: float | None) -> str:
    """For people; a dash where nothing was measured."""
    if share is None:
        return "-"
    return f"{100 * share:.3g} %" if math.isfinite(share) else str(share)
