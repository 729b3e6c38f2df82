"""The report as one HTML page that loads nothing: for people, with tables to sort and pictures."""

import datetime
import math
import re
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe

from pn_compiler.base.diagnostics import CODES
from pn_compiler.base.tables import short_percent, size
from pn_compiler.base.user_warnings import gathered
from pn_compiler.export.summary import OWN_LINES, operator_counts, summary
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
    environment.filters |= {"percent": percent, "size": size, "unbroken": unbroken, "steps": steps}
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
        "notes": gathered([note for note in report.notes if note.code not in OWN_LINES]),
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
    return short_percent(share, 3) if math.isfinite(share) else str(share)


def steps(path: str) -> markupsafe.Markup:
    """A path of a module, which may go on in the next line behind a dot."""
    return markupsafe.Markup(str(markupsafe.escape(path)).replace(".", ".<wbr>"))


def unbroken(text: str) -> markupsafe.Markup:
    """`text` whose flags, and figures with their unit, stay on one line."""
    kept = _FIGURE.sub("\\1\N{NO-BREAK SPACE}\\2", str(markupsafe.escape(text)))
    return markupsafe.Markup(_FLAG.sub('<span class="flag">\\1</span>', kept))  # escaped above


_FIGURE = re.compile(r"(\d) (%|ms|MB|kB|GB|B|nats)(?!\w)")
_FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")
