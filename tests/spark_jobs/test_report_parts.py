"""The report's parts without Spark: figures, plots and the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import date
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup, escape
from pyspark.sql import Row

from gpl_core.contracts.contract import all_contracts
from spark_jobs.report import dictionary
from spark_jobs.reporting import plots as report_plots
from spark_jobs.reporting.changes import changes, feed_figures, warnings
from spark_jobs.reporting.evaluations import compare
from spark_jobs.reporting.lineage import lineage_rows
from spark_jobs.reporting.page import PageSection, Plot, Table, figure, render, style
from spark_jobs.reporting.reliability import LabelCalibration, WeightBin, weight_bins, weight_sentence


def page(**changes) -> str:
    values = {"title": "Day", "fingerprint": "f" * 24, "origin": "{}", "run_id": "r", "banners": [], "sections": []}
    return render(**{**values, **changes})


def test_every_value_is_escaped():
    evil = '<script>alert("x")</script>'
    text = page(
        title=evil, banners=[evil],
        sections=[PageSection(evil, [evil], [Table((evil,), [[evil]])], [Plot(Markup("<svg></svg>"), evil)])],
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
    checker.feed(page(sections=[PageSection("s", ["t"], [table], [Plot(Markup(plot), "c")])]))
    assert checker.open == []


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: make browser")
@pytest.mark.parametrize("width", [420, 1280])
def test_a_browser_shows_titles_as_text_says_nothing_and_asks_for_nothing(tmp_path, width):
    evil = "<script>document.title = 'taken'; fetch('http://127.0.0.1:9/x')</script><img src=http://127.0.0.1:9/y>"
    plots = [
        report_plots.histograms("one", evil, [(evil, np.arange(50.0), (0.0, 1.0))] * 3),
        report_plots.heat_maps("two", "t", [("x", "y", np.eye(4), (0, 1, 0, 1))]),
    ]
    table = Table(("a", "b"), [(evil, 1), ("w" * 400, 12_345)])
    text = page(
        title="Day",
        banners=[evil],
        sections=[PageSection(evil, [evil], [table], [Plot(Markup(p), evil) for p in plots])],
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
    cells = [
        Row(rows=rows, weights=rows * weight, labels=rows * 0.2, clicks=rows * 0.1, squares=rows * 0.05)
        for rows, weight in zip(n, np.linspace(0, 1, 200), strict=True)
    ]
    bins = weight_bins(cells)
    assert sum(b.rows for b in bins) == n.sum()
    assert [b.mean_weight for b in bins] == sorted(b.mean_weight for b in bins)
    assert all(b.calibration_error == pytest.approx(0.1) and b.squared_error == pytest.approx(0.05) for b in bins)
    assert weight_bins([]) == ()


@pytest.mark.parametrize(
    ("errors", "rows", "says"),
    [
        (range(10, 0, -1), 5000, "smaller errors"), (range(10), 5000, "larger errors"),
        ((5, 1, 4, 2, 3, 5, 1, 4, 2, 3), 5000, "do not predict"), (range(10), 999, "too little to tell"),
    ],
)  # fmt: skip
def test_what_the_weights_are_said_to_tell(errors, rows, says):
    bins = tuple(WeightBin(rows // 10, i / 10, 0.1, float(e)) for i, e in enumerate(errors))
    assert says in weight_sentence(LabelCalibration("uniform", rows, 10, (), 0.1, bins))


def test_models_and_their_differences_side_by_side():
    row = {"slice": "tail", "metric": "auc", "low": 0.5, "high": 0.7, "candidate_set_size": 8.0, "rows": 9, "note": "n",
           "seed": -1, "against": "", "clicks": 300.0}  # fmt: skip
    found = [{**row, "model": "gpl", "value": 0.62}, {**row, "model": "base", "value": None}]
    found += [{**row, "model": "gpl", "against": "base", "value": 0.6, "low": 0.55}]
    found += [{**row, "model": "gpl", "seed": 4, "value": 0.99}]  # one seed: not shown
    absent = {**row, "metric": "gauc", "model": "base", "value": None}
    small = {**row, "slice": "uniform", "model": "gpl", "value": 0.5, "low": None, "clicks": 20.0}
    table = compare([*found, small, absent])
    assert table.columns == ("slice", "metric", "base", "gpl", "gpl - base", "candidate-set size", "pairs", "note")
    assert table.rows == [
        ("tail", "auc", "absent: n", "0.6200 [0.5000, 0.7000]", "+0.6000 [+0.5500, +0.7000] better", 8.0, 9, "n"),
        ("tail", "gauc", "absent: n", "absent: not measured", "-", 8.0, 9, ""),
        ("uniform (too small: 20 clicks, fewer than 200)", "auc", "absent: not measured", "0.5000", "-", 8.0, 9, "n"),
    ]


def test_coverage_and_means_come_from_what_the_commit_recorded():
    """Two exposed pairs of weight one, four labeled ones of mean weight 0.5, one without a label."""
    sums = {"pseudo_label_sum": 0.4, "weight_sum": 4.0, "exposed": 2, "labeled": 4}
    found = feed_figures({**sums, "left_out": {"no history": 1}})
    assert found == pytest.approx({"coverage": 0.8, "mean pseudo_label": 0.1, "mean weight": 0.5})
    assert set(feed_figures({}).values()) == {None}


@pytest.mark.parametrize(
    ("name", "before", "quiet", "alarming"),
    [
        ("training_feed", 1000, 2000, 2001), ("candidates", 1000, 500, 499), ("impressions", 10, 10, 0),
        ("unexposed_samples", 0, 0, 1), ("coverage", 0.9, 0.86, 0.84), ("mean pseudo_label", 0.04, 0.049, 0.0501),
        ("mean pseudo_label", 0.05, 0.041, 0.039), ("mean weight", 1.0, 1.2, 1.3),
        ("quarantine_share", 0.001, 0.010, 0.012), ("encoder_version", "a", "a", "b"), ("sid_version", "a", "a", "b"),
        ("model_version", "a", "a", "b"),
    ],
)  # fmt: skip
def test_a_figure_beyond_its_bound_is_warned_of_by_name(name, before, quiet, alarming):
    assert warnings({name: quiet}, {name: before}) == []
    (said,) = warnings({name: alarming}, {name: before})
    assert said.startswith(f"{name} is {figure(alarming)}, was {figure(before)}")


def test_the_folded_data_dictionary_explains_every_column():
    text = page(sections=[dictionary(), PageSection("open")])
    assert text.count("<details>") == text.count("</details>") == 1
    assert text.index("<summary>Data dictionary</summary>") < text.index("</details>") < text.index("<h2>open</h2>")
    for name, contract in all_contracts().items():
        for column in contract.columns:
            assert re.search(
                rf"<tr><td>{name}</td><td>{column.name}</td>.*{re.escape(escape(column.comment))}</td></tr>", text
            )


@pytest.mark.parametrize(
    ("value", "name"),
    [("2026-01-02-877ac4f234", "word"), ("auc", ""), ("two words", ""), ("x " * 20, "long"), ("array<" * 8, "long"),
     ("fail", "alarm")],
)  # fmt: skip
def test_a_version_is_not_broken_and_an_endless_type_pushes_nothing_out(value, name):
    assert style(value, False) == (f' class="{name}"' if name else "")


def test_what_no_warning_is_given_for():
    now = {
        "coverage": 0.99,
        "quarantine_share": 0.0,
        "calibrator_version": "b",
        "anchor_requests": 0,
        "items": 5,
        "x": 1,
    }
    before = {"coverage": 0.5, "quarantine_share": 0.5, "calibrator_version": "a", "anchor_requests": 9, "items": None}
    assert warnings(now, before) == []


def test_figures_of_both_dates_stand_side_by_side():
    now = {"training_feed": 3, "coverage": 0.5, "impressions": None, "candidates": 4, "sid_version": "b"}
    before = {"training_feed": 2, "coverage": 0.5, "impressions": 1, "candidates": 0, "sid_version": "a"}
    section = changes(now, before, date(2026, 1, 4), date(2026, 1, 2))
    rows, versions = section.tables
    assert rows.columns == ("figure", "2026-01-04", "2026-01-02", "change")
    assert rows.rows == [
        ("training_feed", 3, 2, "+50.0%"), ("coverage", 0.5, 0.5, "same"), ("impressions", None, 1, None),
        ("candidates", 4, 0, "from none"),
    ]  # fmt: skip
    assert versions.rows == [("sid_version", "b", "a", "changed")]
    assert section.warnings == warnings(now, before)
    assert len(section.warnings) == 2
    assert section.text == ["Compared with 2026-01-02, the run date before.", *section.warnings]
    assert "nothing to compare with" in changes(now, {}, date(2026, 1, 4), None).text[0]


def run_of(step: str, inputs: dict, outputs: dict) -> dict:
    versions = {k: {"version": v} for k, v in inputs.items()}
    return {"step": step, "inputs": json.dumps(versions), "outputs": json.dumps(outputs)}


def test_lineage_has_the_versions_that_were_read_and_written():
    runs = [
        run_of("ingest", {"raw_items": 7, "raw_impressions": 3}, {"items": {"after": 9}, "impressions": {"after": 4}}),
        run_of("encode_items", {"items": 9}, {"item_embeddings": {"after": 1}}),
        run_of("train_tokenizer", {"item_embeddings": 1}, {}),
        run_of("assign_sids", {"artifact:tokenizer": "t1", "item_embeddings": 2}, {"item_sids": {"after": 1}}),
        run_of("sequences", {"artifact:tokenizer": "t1", "impressions": 12, "item_sids": 1},
               {"user_sequences": {"after": 5}}),
    ]  # fmt: skip
    assert lineage_rows(runs, {"encoder_version": "e1"}) == [
        ("ingest", "raw_impressions @3, raw_items @7", "impressions @12, items @9"),  # as read, not as written
        ("encode_items", "items @9", "item_embeddings @1, @2, encoder_version e1"),
        ("train_tokenizer", "item_embeddings @1", "tokenizer t1"),
        ("assign_sids", "item_embeddings @2, tokenizer t1", "item_sids @1"),
        ("sequences", "impressions @12, item_sids @1, tokenizer t1", "user_sequences @5"),
    ]
    assert lineage_rows([], {}) == []


def test_a_step_that_did_not_run_is_listed_with_what_others_read_of_it():
    runs = [run_of("anchor_requests", {"interest_anchors": 1}, {"anchor_requests": {"after": 3}})]
    assert lineage_rows(runs, {}) == [
        ("anchor_requests", "interest_anchors @1", "anchor_requests @3"),
        ("generate_anchors", "", "interest_anchors @1"),
    ]
