"""The table of sites, as text and in a notebook."""

import pickle

import torch
from torch import nn

import pn_compiler
from pn_compiler import Site, SiteTable
from pn_compiler.base.tables import size
from pn_compiler.testing import randomize_batch_norms

SITES = SiteTable([Site("a", "pn", "layer", 1, "relu"), Site("<b>", "skipped", code="PN104", reason="x & y")])


def test_printing_the_sites_is_a_table() -> None:
    net = randomize_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    found = pn_compiler.sites(pn_compiler.transform(net, norm="layer"))
    header, row = str(found).splitlines()
    assert header.split() == ["site", "kind", "norm", "groups", "activation", "remark"]
    assert row.split()[:5] == ["1", "norm_only", "layer", "1", "relu"]
    assert [site.name for site in found] == ["1"]


def test_it_is_still_a_tuple() -> None:
    assert isinstance(SITES, tuple)
    assert tuple(SITES) == SITES
    assert SITES[0].kind == "pn"
    assert pickle.loads(pickle.dumps(SITES)) == SITES


def test_a_notebook_shows_a_table_in_which_names_are_no_markup() -> None:
    shown = SITES._repr_html_()
    assert shown.count("<tr>") == 3
    assert "<td>&lt;b&gt;</td>" in shown
    assert "<td>PN104 x &amp; y</td>" in shown
    assert "<b>" not in shown


def test_a_column_that_would_be_empty_is_left_out() -> None:
    assert "residual" not in str(SITES)
    assert "residual" in str(SiteTable([Site("a", "pn", "layer", 1, residual=0.5)]))


def test_sizes() -> None:
    assert (size(1234), size(44_751_234)) == ("1.2 kB", "44.75 MB")


def test_sites_of_a_converted_model_survive_a_copy(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    converted = pn_compiler.transform(net)
    torch.save(converted, tmp_path / "converted.pt")
    loaded = torch.load(tmp_path / "converted.pt", weights_only=False)
    assert pn_compiler.sites(loaded) == pn_compiler.sites(converted)
