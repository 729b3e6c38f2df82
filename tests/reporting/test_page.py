"""The page of a report: complete, escaped, and without anything to load; and as a browser shows it."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pn_compiler import Diagnosis, Diagnostic, Site, SitePower, SiteTable
from pn_compiler.export import Check, Report
from pn_compiler.export.report import Benchmark
from pn_compiler.graph.pass_log import PassRun
from pn_compiler.pipeline.fidelity import Fidelity
from pn_compiler.reporting.charts import error_chart
from pn_compiler.reporting.outcome import Outcome
from pn_compiler.reporting.page import page, unbroken

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_BROWSER = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None


def outcome() -> Outcome:
    """Everything that a page can show."""
    sites = [
        Site("stem.bn", "pn", "layer", 1, "relu", error=0.1, affine="into stem.conv"),
        Site("body.0.bn", "norm_only", "layer", 1, code="PN201", reason="no activation follows", error=0.9),
        Site("body.1.bn", "norm_only", "rms", 1, code="PN202", reason="add reads it", error=0.4, anchor=0.5),
        Site(EVIL, "skipped", code="PN104", reason=EVIL),
    ]
    fidelity = Fidelity("8 samples", True, 0.25, 0.034, 0.875, sites={s.name: s.error for s in sites[:3]})
    report = Report(
        path=f"{EVIL}.onnx", opset_version=20, ir_version=9,
        inputs=[{"name": EVIL, "shape": ["batch"], "dtype": "float"}],
        sites=SiteTable(sites), notes=(Diagnostic("PN104", EVIL, EVIL), Diagnostic("PN110", "", "a branch")),
        operators_before={"Conv2d": 3}, operators_after={"Conv": 4, "InstanceNormalization": 3},
        checks=(Check(1, False, "output", 1e-7), Check(3, True, "output", 3e-7)),
        tolerance=1e-4, float32_error=1e-7, reference="float64", fidelity=fidelity,
        file_bytes=5_000_000, seconds={"trace": 1.5},
        benchmark=Benchmark({"BatchNorm": 2.0, "converted": 3.0}, 1.5, 1, 2, 4_900_000, {"Conv": 3}),
        passes=(PassRun("convert", "ReplaceBatchNorm", "Replaces <each>.", 3, 0.01),),
    )  # fmt: skip
    power = [SitePower("stem.bn", "LN", 8, 4, 0.5, 0.001, 1, 0.2), SitePower(EVIL, "LN", 8, 4, 1, 0, 0, 0)]
    return Outcome(report, {"converted": Diagnosis(tuple(power))}, EVIL, f"pn-compile '{EVIL}'")


class Tags(HTMLParser):
    """Collects the tags of a page, and complains of attributes that run code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attributes if name.startswith("on")]
        assert not [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.seen.append(tag)
        if tag not in ("meta", "input", "img", "br", "wbr", "line", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_names_are_escaped_wherever_they_stand() -> None:
    text = page(outcome())
    tags = Tags(text)
    assert tags.seen.count("script") == 1
    assert "img" not in tags.seen
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert") >= 8


def test_nothing_is_loaded() -> None:
    text = page(outcome())
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "found",
    [
        Outcome(),
        Outcome(Report()),
        Outcome(Report(path="m.onnx")),
        Outcome(diagnoses={"as given": Diagnosis(())}),
    ],
)
def test_what_was_not_measured_is_left_out(found: Outcome) -> None:
    tags = Tags(page(found))
    assert "svg" not in tags.seen


def test_errors_that_are_no_numbers() -> None:
    sites = SiteTable(
        [Site("a", "pn", "layer", 1, error=float("inf")), Site("b", "pn", "layer", 1, error=float("nan"))]
    )
    fidelity = Fidelity("x", False, float("nan"), float("inf"), 0.0)
    Tags(page(Outcome(Report(sites=sites, fidelity=fidelity))))


def test_the_ending_decides(tmp_path: Path) -> None:
    outcome().write([tmp_path / "a.html", tmp_path / "b.HTM", tmp_path / "c.json", tmp_path / "d"])
    begins = [(tmp_path / name).read_text()[:1] for name in ("a.html", "b.HTM", "c.json", "d")]
    assert begins == ["<", "<", "{", "{"]


def test_lines_of_a_chart_are_round_numbers() -> None:
    """And one above the highest bar, whose height is its share of that."""
    for error in (3e-7, 0.0146, 0.1, 0.37, 0.999, 12.0):
        chart = error_chart([("site", "low", error)])
        assert chart is not None
        figures = [float(text.removesuffix(" %").replace(",", "")) for _, text in chart.lines]
        assert figures[0] == 0
        assert figures[-2] < 100 * error <= figures[-1] < 250 * error
        assert np.diff(figures) == pytest.approx([figures[1]] * 4)
        assert all(len(text) <= 9 for _, text in chart.lines)
        assert chart.bars[0].height / chart.bottom == pytest.approx(100 * error / figures[-1])


@pytest.mark.parametrize(("count", "width"), [(1, 40), (52, 1080), (400, 5600)])
def test_bars_fill_a_wide_page_and_stay_thin(count: int, width: float) -> None:
    chart = error_chart([(f"layer.{k}", "low", 0.1) for k in range(count)])
    assert chart is not None
    assert chart.width - chart.left == pytest.approx(width)
    assert len(chart.names) <= 150


def test_flags_and_figures_are_not_broken() -> None:
    text = unbroken("1.5 % in 3.2 ms with --norm layer, a--b <b>, 8 samples")
    assert "1.5\xa0% in 3.2\xa0ms" in text
    assert text.count('<span class="flag">--norm</span>') == text.count("<span") == 1
    assert "8 samples" in text
    assert "&lt;b&gt;" in text


def test_notes_do_not_say_again_what_the_summary_says() -> None:
    found = Fidelity("8 samples", True, 0.25, 0.034, 0.875)
    report = Report(fidelity=found, notes=(Diagnostic("PN212", "", str(found)),))
    text = page(Outcome(report))
    assert "PN212" not in text
    assert text.count("relative L2") == 2  # in the summary, and on a card


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not HAS_BROWSER:
        pytest.skip("needs chromium, of the system, and `pip install playwright`, which the extra dev brings")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in the browser, in a scheme and of a width; whatever it asks the network for is an error."""
    scheme, width = getattr(request, "param", ("light", 1280))
    outcome().write([tmp_path / "report.html"])
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    failures: list[str] = []
    shown.on("pageerror", lambda error: failures.append(str(error)))
    shown.on("console", lambda message: failures.append(message.text))
    shown.on("dialog", lambda dialog: failures.append("a dialog"))
    shown.on(
        "request", lambda asked: failures.append(asked.url) if not asked.url.startswith("file:") else None
    )
    shown.goto((tmp_path / "report.html").as_uri())
    yield shown
    assert failures == []
    shown.close()


# texts of charts beyond the edges of their picture, which nobody can scroll to
_CUT_OFF = """[...document.querySelectorAll("svg text")].filter(text => {
  const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
  return inner.left < outer.left || inner.bottom > outer.bottom || inner.top < outer.top - 1;
}).map(text => text.textContent)"""


@pytest.mark.parametrize("opened", [(s, w) for s in ("light", "dark") for w in (375, 1280)], indirect=True)
def test_it_fits_light_and_dark_narrow_and_wide(opened: Any, tmp_path: Path) -> None:
    wide, shown = opened.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= shown
    colours = opened.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (sum(ink) > sum(paper)) == dark
    assert abs(sum(ink) - sum(paper)) > 400  # enough to read
    boxes = opened.evaluate(_CUT_OFF)
    assert boxes == []
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_table_of_sites_can_be_filtered_and_sorted(opened: Any) -> None:
    def shown() -> list[str]:
        rows = opened.locator("#table tbody tr:visible td:nth-child(2)").all_inner_texts()
        return [row.split(".bn")[0][:6] for row in rows]

    assert shown() == ["stem", "body.0", "body.1", "<scrip"]
    opened.fill("#filter", "BODY")
    assert shown() == ["body.0", "body.1"]
    assert opened.inner_text("#shown") == "2 of 4"
    opened.select_option("#code", "PN202")
    assert shown() == ["body.1"]
    opened.fill("#filter", "")
    opened.select_option("#code", "")
    opened.select_option("#kind", "norm_only")
    assert shown() == ["body.0", "body.1"]
    opened.select_option("#kind", "")
    error = opened.locator("#table th", has_text="error").locator("button")
    error.click()
    assert shown() == ["<scrip", "stem", "body.1", "body.0"]
    error.click()
    assert shown() == ["body.0", "body.1", "stem", "<scrip"]
    assert opened.locator("#table th[aria-sort=descending]").count() == 1


def test_bars_are_as_long_as_what_they_stand_for(opened: Any) -> None:
    before, after = (bar.bounding_box()["width"] for bar in opened.locator("#latency .bar").all())
    assert after / before == pytest.approx(1.5, rel=0.01)
    heights = [bar.bounding_box()["height"] for bar in opened.locator("#depth rect").all()]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 9, 4], rel=0.01)
    assert opened.locator("#depth rect title").nth(1).text_content() == "body.0.bn: 90 %"
