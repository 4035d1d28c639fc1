"""The report's pages in Chromium: two widths, both themes, with and without script, and markup in every title."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from spark_jobs.reporting import plots, site
from spark_jobs.reporting.page import PageSection, Plot, Table, figure, link
from tests.browser import CONTRASTS, PROGRAM, Browser
from tests.spark_jobs.test_report_parts import hostile, page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: make browser")]
EVIL = "<script>document.title = 'taken'; fetch('http://127.0.0.1:9/x')</script><img src=http://127.0.0.1:9/y>"
CUT = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth + 1).length"
BROKEN = "[...document.querySelectorAll('span.word')].filter((e) => e.getClientRects().length > 1).length"
OVERLAPS = """[...document.querySelectorAll("svg")].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll("text")].map((e) => [e.textContent, e.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], n) => boxes.slice(n + 1)
    .filter(([b, q]) => p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom)
    .map(([b]) => [a, b]));
})"""
GROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 27)"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A date with every kind of content, an index and the dictionary."""
    folder, day = tmp_path_factory.mktemp("reports"), date(2026, 1, 3)
    rows = [
        (EVIL, 1234, 0.5, "warn"),
        ("w" * 400, 7, None, "2026-01-02-877ac4f234"),
        (link("#t", "b"), 25, 0.25, "c d"),
    ]
    said = "label_drift 0.31 is above 0.2: population stability index of the labels against the day before 2026-01-03"
    monitors = Table(("monitor", "status", "value", "threshold", "reason"), [("label_drift", "warn", 0.31, 0.2, said)])
    wide = Table([f"column number {n}" for n in range(20)], [[n / 7 for n in range(20)]] * 60)
    sections = [
        PageSection(EVIL, [EVIL, "w" * 300], [Table(("a", "b", "c", "d"), rows)], [Plot(hostile(), EVIL)]),
        PageSection("Monitors", [said * 3], tables=[monitors]),
        PageSection("Wide and long", tables=[wide]),
    ]
    lines = [
        site.Line(date(2026, 1, n), 44_030, dict.fromkeys(site.FIGURES, n / 31), "+0.0237 [+0.0130, +0.0349] better",
                  f"{EVIL}; coverage 0.2 is below 0.5" * (n == 3)) for n in range(1, 30)
    ]  # fmt: skip
    texts = {
        "2026-01-03": page(title="Day", banners=[EVIL], sections=sections, dates=site.links(day, [date(2026, 1, 2)])),
        "index": page(title="All", banners=[EVIL], sections=site.overview(lines, "exposed", {day})),
        "dictionary": page(title="Words", sections=site.dictionary()),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return [folder / f"{name}.html" for name in texts]


@pytest.mark.parametrize("theme", GROUND)
@pytest.mark.parametrize("width", [400, 1600])
def test_no_page_scrolls_sideways_and_every_text_stands_out(browser, pages, width, theme):
    for path in pages:
        browser.open(path, width=width, theme=theme)
        assert browser.value("[document.documentElement.scrollWidth, innerWidth]") == [width, width], path.name
        contrasts = browser.value(CONTRASTS)
        assert len(contrasts) > 20
        assert [c for c in contrasts if c[0] < 4.5] == [], path.name
        assert browser.value(CUT) == (path.stem == "2026-01-03" and width > 400), "twenty columns"
        assert browser.value(BROKEN) == 0, path.name
    assert browser.value("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'") == (
        theme == "dark"
    )


def test_the_texts_of_a_plot_do_not_cover_each_other(browser, tmp_path):
    bands = ["1", *(f"{2**n}-{2 ** (n + 1) - 1}" for n in range(1, 14))]
    ends = (0.0, 1.0)
    panels = [
        *(plots.popularity("p", bands[:n], [0.4] * n, [0.5] * n) for n in (1, 5, 9, 14)),
        plots.histogram("h", "pseudo_label", [30_000, 12, 2], ends), plots.code_usage("c", 1, [3000.0, 1.0]),
        plots.heat_map("m", "coherence", "consistency", np.eye(4), (ends, ends)),
        plots.reliability("r", [("uniform", [0.1, 0.2], [0.1, 0.3]), ("exposed", [0.01], [0.02])]),
        plots.trend("AUC exposed_only", [("2026-01-03", 0.61234), ("2026-01-04", 0.65)], figure),
    ]  # fmt: skip
    path = tmp_path / "plots.html"
    path.write_text(page(sections=[PageSection("Plots", plots=[Plot(panels, "c")])]), encoding="utf-8")
    browser.open(path)
    assert browser.value("document.querySelectorAll('svg text').length") > 60
    assert browser.value(OVERLAPS) == []


def test_titles_stay_text_and_nothing_is_asked_for(browser, pages):
    for path, title in zip(pages, ("Day", "All", "Words")):
        browser.open(path)
        assert browser.value("document.title") == title
        assert browser.value("document.scripts.length + document.images.length") == 1, "the page's own script"
        assert browser.requests() == [path.as_uri()]
        assert browser.complaints() == []
    browser.open(pages[0])
    browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    assert browser.value("document.title") == "Day", "the page's policy lets no other script run"


def test_tables_sort_and_the_page_reads_whole_without_script(browser, pages):
    read = "document.body.innerText.replace(/\\s+/g, ' ')"
    for path in pages:
        browser.open(path, script=False)
        without = browser.value(read)
        assert browser.value("document.querySelectorAll('th button').length") == 0
        browser.open(path)
        assert browser.value(read) == without
    browser.open(pages[0])
    column = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map((r) => r.cells[{}].textContent)"
    click = "document.querySelectorAll('th button')[{}].click()"
    for at, orders in (
        (1, (["7", "25", "1,234"], ["1,234", "25", "7"])),
        (2, (["0.25", "0.5", "–"], ["0.5", "0.25", "–"])),
    ):
        for order in orders:
            browser.value(click.format(at))
            assert browser.value(column.format(at)) == order
    browser.value(click.format(3))
    assert browser.value(column.format(3)) == ["2026-01-02-877ac4f234", "c d", "warn"]
    assert browser.value("[...document.querySelectorAll('th[aria-sort]')].map((h) => h.ariaSort)") == ["ascending"]
