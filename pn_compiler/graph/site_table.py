"""The table of sites during a conversion: one record per BatchNorm, written by the passes."""

import dataclasses
from typing import Any

from torch import fx

from pn_compiler.base.diagnostics import Diagnostic, Site

_KEY = "pn_compiler.graph.site_table"


def put_site(gm: fx.GraphModule, site: Site) -> None:
    """Adds `site`, or replaces the one with its name."""
    gm.meta.setdefault(_KEY, {})[site.name] = site


def update_site(gm: fx.GraphModule, name: str, remark: Diagnostic | None = None, **changes: Any) -> None:
    """Changes fields of the record `name`; `remark` adds a code and a reason."""
    if remark is not None:
        changes |= {"code": remark.code, "reason": remark.message}
    put_site(gm, dataclasses.replace(gm.meta[_KEY][name], **changes))


def site_table(gm: fx.GraphModule) -> dict[str, Site]:
    """Name -> record, in insertion order."""
    table: dict[str, Site] = gm.meta.get(_KEY, {})
    return table


def take_sites(gm: fx.GraphModule) -> dict[str, Site]:
    """Removes the finished table from the graph and returns it."""
    table: dict[str, Site] = gm.meta.pop(_KEY, {})
    return table
