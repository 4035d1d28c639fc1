"""The report's parts without Spark: figures, plots and the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup

from spark_jobs import report_plots
from spark_jobs.report import compare
from spark_jobs.report_data import Calibration, WeightBin, weight_bins, weight_sentence
from spark_jobs.report_page import Plot, Section, Table, figure, render


def page(**changes) -> str:
    values = {"title": "Day", "fingerprint": "f" * 24, "run_id": "r", "banners": [], "sections": []}
    return render(**{**values, **changes})


def test_every_value_is_escaped():
    evil = '<script>alert("x")</script>'
    text = page(
        title=evil, banners=[evil],
        sections=[Section(evil, [evil], [Table((evil,), [[evil]])], [Plot(Markup("<svg></svg>"), evil)])],
    )  # fmt: skip
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 8


def test_fingerprint_is_where_the_planner_looks():
    assert 'name="gpl-fingerprint" content="' + "f" * 24 + '"' in page(title="t" * 5000)[:2000]


def test_page_is_well_formed_and_asks_for_nothing():
    class Checker(HTMLParser):
        void = ("meta", "link", "path", "use", "rect", "image", "stop")

        def __init__(self):
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                if name in ("src", "href", "xlink:href"):
                    assert value.startswith(("#", "data:")), (tag, value)
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in self.void:
                assert self.open.pop() == tag

    plot = report_plots.heat_maps("h", "t", [("x", "y", np.eye(4), (0, 1, 0, 1))])
    checker = Checker()
    table = Table(("a", "b"), [(1, None), (2, "x")])
    checker.feed(page(sections=[Section("s", ["t"], [table], [Plot(Markup(plot), "c")])]))
    assert checker.open == []


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium to run this")
@pytest.mark.parametrize("width", [420, 1280])
def test_a_browser_shows_titles_as_text_says_nothing_and_asks_for_nothing(tmp_path, width):
    evil = "<script>document.title = 'taken'; fetch('http://127.0.0.1:9/x')</script><img src=http://127.0.0.1:9/y>"
    plots = [
        report_plots.histograms("one", evil, [(evil, np.arange(50.0), (0.0, 1.0))] * 3),
        report_plots.heat_maps("two", "t", [("x", "y", np.eye(4), (0, 1, 0, 1))]),
    ]
    table = Table(("a", "b"), [(evil, 1), ("w" * 400, 12_345)])
    text = page(
        title="Day", banners=[evil], sections=[Section(evil, [evil], [table], [Plot(Markup(p), evil) for p in plots])]
    )
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    log = tmp_path / "net.json"
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>Day</title>" in done.stdout
    assert "&lt;script&gt;document.title" in done.stdout
    assert "<script" not in done.stdout
    assert "CONSOLE" not in done.stderr
    assert "127.0.0.1:9" not in log.read_text(encoding="utf-8", errors="replace")


def test_figures():
    assert [figure(v) for v in (None, 1234567, 0.123456, 123456.7, "a", True, 0)] == [
        "–", "1,234,567", "0.1235", "123,457", "a", "True", "0",
    ]  # fmt: skip
    assert Table(("a", "b", "c"), [(1, "x", None), (None, 2, None)]).numeric == {0}


def test_plots_follow_the_page_and_repeat_byte_for_byte():
    def draw() -> str:
        return report_plots.histograms("one", "title", [("x", np.arange(50.0), (0.0, 1.0))])

    text = draw()
    assert text == draw()
    assert "currentColor" in text
    assert "#010203" not in text
    assert not re.search(r"\d{4}-\d\d-\d\dT", text)
    other = report_plots.histograms("two", "title", [("x", np.arange(50.0), (0.0, 1.0))])
    ids = [set(re.findall(r' id="(m?p?[0-9a-f]{9,})"', t)) for t in (text, other)]
    assert not ids[0] & ids[1]


def test_weight_bins_keep_every_row():
    rng = np.random.default_rng(0)
    n = rng.integers(1, 50, 200).astype(float)
    cells = {"rows": n, "weights": n * np.linspace(0, 1, 200), "labels": n * 0.2, "clicks": n * 0.1}
    cells["squares"] = n * 0.05
    bins = weight_bins(cells)
    assert sum(b.rows for b in bins) == n.sum()
    assert [b.mean_weight for b in bins] == sorted(b.mean_weight for b in bins)
    assert all(b.calibration_error == pytest.approx(0.1) and b.squared_error == pytest.approx(0.05) for b in bins)
    assert weight_bins({k: np.zeros(0) for k in cells}) == ()


@pytest.mark.parametrize(
    ("errors", "rows", "says"),
    [
        (range(10, 0, -1), 5000, "smaller errors"), (range(10), 5000, "larger errors"),
        ((5, 1, 4, 2, 3, 5, 1, 4, 2, 3), 5000, "do not predict"), (range(10), 999, "cannot be said"),
    ],
)  # fmt: skip
def test_what_the_weights_are_said_to_tell(errors, rows, says):
    bins = tuple(WeightBin(rows // 10, i / 10, 0.1, float(e)) for i, e in enumerate(errors))
    assert says in weight_sentence(Calibration("uniform", rows, 10, (), 0.1, bins))


def test_models_side_by_side():
    row = {"slice": "tail", "metric": "auc", "low": 0.5, "high": 0.7, "candidate_set_size": 8.0, "rows": 9, "note": "n"}
    found = [{**row, "model": "gpl", "value": v} for v in (0.61, 0.63)] + [{**row, "model": "base", "value": None}]
    table = compare([*found, {**row, "slice": "uniform", "model": "gpl", "value": 0.5, "low": None}])
    assert table.columns == ("slice", "metric", "base", "gpl", "candidate-set size", "pairs", "note")
    assert table.rows == [
        ("tail", "auc", "absent: n", "0.6200 [0.5000, 0.7000], 2 seeds", 8.0, 9, "n"),
        ("uniform", "auc", "absent: not measured", "0.5000", 8.0, 9, "n"),
    ]
