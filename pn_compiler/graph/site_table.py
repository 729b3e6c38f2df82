"""The table of sites while a conversion is under way: one record a BatchNorm, written by the passes."""

import dataclasses
from typing import Any

from torch import fx

from pn_compiler.base.diagnostics import Diagnostic, Site

_KEY = "pn_compiler.graph.site_table"


def put_site(gm: fx.GraphModule, site: Site) -> None:
    """Adds `site`, or puts it in the place of the one with its name."""
    gm.meta.setdefault(_KEY, {})[site.name] = site


def update_site(gm: fx.GraphModule, name: str, remark: Diagnostic | None = None, **changes: Any) -> None:
    """Changes fields of the record `name`; `remark` gives it a code and reason."""
    if remark is not None:
        changes |= {"code": remark.code, "reason": remark.message}
    put_site(gm, dataclasses.replace(gm.meta[_KEY][name], **changes))


def site_table(gm: fx.GraphModule) -> dict[str, Site]:
    """Name -> record, in the order in which they were added."""
    table: dict[str, Site] = gm.meta.get(_KEY, {})
    return table


def take_sites(gm: fx.GraphModule) -> dict[str, Site]:
    """The finished table, removed from the graph."""
    table: dict[str, Site] = gm.meta.pop(_KEY, {})
    return table
