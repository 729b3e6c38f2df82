"""Tables for people: of sites, and any other, as text for a terminal and as HTML for a notebook."""

import html
from collections.abc import Sequence

from pn_compiler.base.diagnostics import Site


class SiteTable(tuple[Site, ...]):
    """The sites of a conversion: a tuple, whose ``str`` is a table, as is what a notebook shows of it."""

    __slots__ = ()

    def __str__(self) -> str:
        return format_sites(self)

    def _repr_html_(self) -> str:
        return html_table(*site_rows(self))


def site_rows(sites: Sequence[Site]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header of a table of `sites`, and a row for each; a column that would be empty is left out."""
    columns = {
        "site": [s.name for s in sites],
        "kind": [s.kind for s in sites],
        "norm": [_norm(s) for s in sites],
        "groups": [str(s.num_groups or "-") for s in sites],
        "activation": [s.activation or "-" for s in sites],
    }
    if any(s.residual is not None for s in sites):
        columns["residual"] = [percent(s.residual) for s in sites]
    if any(s.error is not None for s in sites):
        columns["error"] = [percent(s.error) for s in sites]
    if any(s.affine for s in sites):
        columns["scale and shift"] = [s.affine or "-" for s in sites]
    if any(s.narrow for s in sites):
        columns["normalizes"] = [s.narrow or "all" for s in sites]
    columns["remark"] = [f"{s.code} {s.reason}" if s.code else "" for s in sites]
    return tuple(columns), list(zip(*columns.values(), strict=True))


def _norm(site: Site) -> str:
    anchor = f", anchor {site.anchor:g}" if site.anchor else ""
    return f"{site.norm or '-'}{anchor}{', static' if site.static else ''}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def short_percent(share: float, digits: int = 2) -> str:
    """With so many `digits`, and more only before the point, so that large ones are no powers of ten."""
    value = 100 * share
    return f"{value:,.0f} %" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g} %"


def size(count: int) -> str:
    """Of a file with so many bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def format_sites(sites: Sequence[Site]) -> str:
    """A table of `sites` for a terminal, one line a BatchNorm."""
    return format_table(*site_rows(sites))


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """`rows` under `header` in columns as wide as their widest cell; the last column is ragged."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header) - 1)]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as an HTML table; names may hold what would be markup."""
    head = _html_row(header, "th")
    body = "".join(_html_row(row, "td") for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _html_row(cells: Sequence[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
