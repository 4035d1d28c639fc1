"""The report's parts without Spark: figures, plots and the page."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from datetime import date
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from markupsafe import Markup, escape
from pyspark.sql import Row

from gpl_core.contracts.contract import all_contracts
from gpl_core.labels.calibration import Calibrator, FittedOn
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.views import all_views
from spark_jobs.common.calibrators import band_error, reliability_bins
from spark_jobs.reporting import plots as report_plots
from spark_jobs.reporting import site
from spark_jobs.reporting.changes import changes, feed_figures, warnings
from spark_jobs.reporting.evaluations import compare
from spark_jobs.reporting.examples import reason
from spark_jobs.reporting.labels import ranked_by
from spark_jobs.reporting.lineage import lineage_rows
from spark_jobs.reporting.page import PageSection, Plot, Table, figure, link, render, style, whole

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def page(**changes) -> str:
    marks = {"gpl-fingerprint": "f" * 24, "gpl-origin": "{}"}
    values = {"title": "Day", "marks": marks, "dates": site.links(None, ()), "banners": [], "sections": [],
              "note": "Made by run r."}  # fmt: skip
    return render(**{**values, **changes})


def hostile() -> list[Markup]:
    """One of each plot, with markup wherever a value of the tables may stand."""
    ends = (0.0, 1.0)
    return [
        report_plots.histogram(EVIL, EVIL, [1, 0, 2], ends, EVIL),
        report_plots.heat_map(EVIL, EVIL, EVIL, np.eye(4), (ends, ends)),
        report_plots.reliability(EVIL, [(EVIL, [0.1, 0.2], [0.1, 0.3])]),
        report_plots.code_usage(EVIL, 1, [3.0, 1.0]),
        report_plots.popularity(EVIL, [EVIL, "2-3"], [0.4, 0.6], [0.5, 0.5]),
        report_plots.trend(EVIL, [(EVIL, 0.1), ("2", None), ("3", 0.2)], figure),
    ]


def test_every_value_is_escaped():
    table = Table((EVIL,), [[EVIL], [link(EVIL, EVIL)]])
    sections = [PageSection(EVIL, [EVIL], [table], [Plot(hostile(), EVIL)])]
    text = page(title=EVIL, banners=[EVIL], note=EVIL, sections=sections)
    assert text.count("<script") == 1, "the page's own"
    assert "<img" not in text
    assert text.count("&lt;script&gt;") > 20


def test_a_table_as_csv_has_all_digits_and_no_formula():
    rows = [("a, b", 0.123456789, None), ('=HYPERLINK("x")', 1234567, "-6.9%"), ("-1+2", 1, link("d.html", "50 % #1")),
            ("@x", 2, None), ("zeile\nzwei", 3, "ü")]  # fmt: skip
    text = page(sections=[PageSection("The t&ble", tables=[Table(("x", "y", "z"), rows)])])
    name, target = re.search(r'<a download="([^"]*)" href="data:text/csv;charset=utf-8,([^"]*)">', text).groups()
    assert name == "the-t-ble.csv"
    assert not re.search(r"[\t\r\n#]", unescape(target))
    assert list(csv.reader(io.StringIO(unquote(unescape(target))))) == [
        ["x", "y", "z"], ["a, b", "0.123456789", ""], ["'=HYPERLINK(\"x\")", "1234567", "-6.9%"],
        ["'-1+2", "1", "50 % #1"], ["'@x", "2", ""], ["zeile\nzwei", "3", "ü"],
    ]  # fmt: skip


def test_fingerprint_is_where_the_planner_looks():
    assert 'name="gpl-fingerprint" content="' + "f" * 24 + '"' in page(title="t" * 5000)[:2000]


def test_page_is_well_formed_and_asks_for_nothing():
    class Checker(HTMLParser):
        void = ("meta", "link")

        def __init__(self):
            super().__init__()
            self.open: list[str] = []
            self.anchors: list[str] = []
            self.targets: list[str] = []

        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                assert name not in ("src", "xlink:href", "action"), (tag, value)
                assert not name.startswith("on"), (tag, name)
                if name == "href":
                    assert value.startswith(("#", "data:", "index.html", "dictionary.html", "2026-")), (tag, value)
                    self.targets += [value[1:]] * value.startswith("#")
                self.anchors += [value] * (name == "id")
            if tag not in self.void:
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            assert tag in ("polyline", "rect"), tag

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    table = Table(("a", "b"), [(1, None), (2, "x")])
    sections = [PageSection(f"Section {n}", ["t"], [table], [Plot(hostile(), "c")]) for n in range(2)]
    checker.feed(page(sections=sections, dates=site.links(date(2026, 1, 4), [date(2026, 1, 3), date(2026, 1, 6)])))
    assert checker.open == []
    assert checker.anchors == checker.targets == ["section-0", "section-1"], "contents lead to every section"


def test_a_page_names_its_neighbors_and_is_named_by_them(tmp_path):
    lake, days = Lake(str(tmp_path)), [date(2026, 1, d) for d in (2, 4, 7)]
    folder = tmp_path / "reports"
    folder.mkdir()
    assert site.pages(lake) == set()
    for name in ("index.html", "2026-01-04.html.1a.part", "old"):
        (folder / name).write_text("")

    def targets(day):
        found = re.search(r'<nav class="dates".*?</nav>', (folder / f"{day}.html").read_text(), re.S)
        return re.findall(r'href="([^"]*)"', found[0])

    for day in (days[0], days[2], days[1]):
        site.link_neighbors(lake, day)
        written = page(dates=site.links(day, site.pages(lake) | {day}), banners=[Markup('<nav class="dates">2</nav>')])
        (folder / f"{day}.html").write_text(written)
    assert site.pages(lake) == set(days)
    ends = ("index.html", "dictionary.html")
    assert targets(days[0]) == [ends[0], "2026-01-04.html", ends[1]]
    assert targets(days[1]) == [ends[0], "2026-01-02.html", "2026-01-07.html", ends[1]]
    assert targets(days[2]) == [ends[0], "2026-01-04.html", ends[1]]
    texts = {day: (folder / f"{day}.html").read_text() for day in days}
    assert all('<nav class="dates">2</nav>' in text for text in texts.values()), "only the page's own links change"
    site.link_neighbors(lake, days[1])
    assert texts == {day: (folder / f"{day}.html").read_text() for day in days}
    (folder / "2026-01-02.html").write_text("of an earlier release")
    site.link_neighbors(lake, days[1])
    assert (folder / "2026-01-02.html").read_text() == "of an earlier release"


def test_the_index_has_a_line_and_a_trend_per_date():
    names = list(site.FIGURES)
    lines = [
        site.Line(date(2026, 1, d), 10 * d, dict(zip(names, (0.06, 0.9, drift, None, 0.61, 0.64))), "+0.03", alarms)
        for d, drift, alarms in ((2, None, ""), (3, 0.3, EVIL))
    ]
    trends, dates = site.overview(lines, "exposed", {date(2026, 1, 3)})
    said = [re.findall("<title>(.*?)</title>", panel) for panel in trends.plots[0].panels]
    assert said[0] == ["2026-01-02: 0.06", "2026-01-03: 0.06"]
    assert said[2] == ["2026-01-03: 0.3"], "no figure, no point"
    assert len(said) == len(names) - 1, "no line without a point"
    assert [row[:3] for row in dates.tables[0].rows] == [
        (link("2026-01-03.html", "2026-01-03"), EVIL, 30), ("2026-01-02", "none", 20),
    ]  # fmt: skip
    assert dates.tables[0].rows[0][3:] == (0.06, 0.9, 0.3, 0.61, 0.64, "+0.03")
    assert "slice exposed, the largest" in trends.plots[0].caption
    assert trends.plots[0].caption.endswith("Not measured on any date: calibration error.")


@pytest.mark.parametrize(
    ("doubtful", "said"),
    [(False, "the model is sure of the anchor (llm_confidence 0.30, mean 0.20), it is like an item of the history "
             "(history_similarity 0.90, mean 0.50)"),
     (True, "it is far from every anchor (similarity 0.20, mean 0.60), the user's anchors scatter (coherence 0.40, "
            "mean 0.60)")],
)  # fmt: skip
def test_what_stands_out_most_among_the_pairs_of_the_date_is_the_reason(doubtful, said):
    usual = {"coherence": 0.6, "consistency": 0.8, "llm_confidence": 0.2, "similarity": 0.6, "history_similarity": 0.5}
    pair = {**usual, "llm_confidence": 0.3, "similarity": 0.2, "history_similarity": 0.9, "coherence": 0.4}
    usual |= {f"{name}_deviation": 0.2 for name in usual} | {"llm_confidence_deviation": 0.01}
    assert reason(pair, usual, doubtful=doubtful) == said
    assert reason(dict.fromkeys(usual, 0.0), dict.fromkeys(usual, 0.0), doubtful=doubtful), "all alike"


@pytest.mark.parametrize(
    ("ends", "texts"),
    [((0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]), ((-1, 1), ["-1", "-0.5", "0", "0.5", "1"]),
     ((0, 23456), ["0", "5000", "10k", "15k", "20k"]), ((0.25, 0.31), ["0.26", "0.28", "0.3"]), ((3, 3), ["3"])],
)  # fmt: skip
def test_ticks_are_round_and_within_the_axis(ends, texts):
    found = report_plots.ticks(*ends)
    assert [text for _, text in found] == texts
    assert all(ends[0] <= value <= ends[1] + 1e-12 for value, _ in found)


def test_figures():
    assert [figure(v) for v in (None, 1234567, 0.123456, 123456.7, "a", True, 0)] == [
        "–", "1,234,567", "0.1235", "123,457", "a", "True", "0",
    ]  # fmt: skip
    assert Table(("a", "b", "c"), [(1, "x", None), (None, 2, None)]).numeric == {0}


def test_plots_follow_the_page_tell_their_values_and_repeat_byte_for_byte():
    text = report_plots.histogram("title", "x", [0, 1234, 5], (0.0, 1.5))
    assert text == report_plots.histogram("title", "x", [0, 1234, 5], (0.0, 1.5))
    assert re.findall("<title>(.*?)</title>", text) == ["0.5 to 1: 1,234 pairs", "1 to 1.5: 5 pairs"]
    assert not re.search(r"#[0-9a-f]{3}| id=|style=", text), "colors and fonts are the page's"
    low, high = (float(re.search(rf'height="([^"]*)"><title>{t}', text)[1]) for t in ("1 to", "0.5"))
    assert low / high == pytest.approx(5 / 1234, abs=0.001)


def test_gaps_of_labels_in_one_band_cancel_and_those_of_two_do_not():
    """Two bands per doubling: 0.30 and 0.31 lie in one, 0.9 in another."""
    cells = [Row(rows=1, labels=0.30, clicks=1, band=-4), Row(rows=1, labels=0.31, clicks=0, band=-4),
             Row(rows=2, labels=1.8, clicks=1, band=-1)]  # fmt: skip
    assert band_error(cells) == pytest.approx((abs(0.61 - 1) + 0.8) / 4)
    assert band_error([]) is None


def test_reliability_bins_keep_every_row_in_label_order():
    rng = np.random.default_rng(0)
    n = rng.integers(1, 50, 200)
    cells = [
        Row(rows=rows, labels=rows * label, clicks=rows * 0.1)
        for rows, label in zip(n.tolist(), np.linspace(0, 1, 200).tolist(), strict=True)
    ]
    bins = reliability_bins(cells)
    assert len(bins) == 10
    assert sum(b.rows for b in bins) == n.sum()
    assert [b.mean_label for b in bins] == sorted(b.mean_label for b in bins)
    assert max(b.rows for b in bins) < 2 * min(b.rows for b in bins)
    assert all(b.click_rate == pytest.approx(0.1) for b in bins)
    assert reliability_bins([]) == ()


def test_what_labels_rank_by_names_every_weight_and_the_language_models_own_share():
    on = FittedOn("exposed", 9, 1, "2026-01-01", "2026-01-02", 0.1)
    two = Calibrator("quantile", on, features=("similarity", "prefix_log_prob"), weights=(0.5, 0.25))
    said = "a regression fitted on exposed clicks of earlier dates (weights: similarity +0.5, prefix_log_prob +0.25"
    assert (
        ranked_by(two, {"prefix_weight": 0.125}) == f"{said}; of the weight of prefix_log_prob, 0.125 is its own share)"
    )
    assert ranked_by(two, {}) == ranked_by(two, {"prefix_weight": 0.0}) == f"{said})"
    assert ranked_by(replace(two, features=("similarity",), weights=(1.0,)), {}) == "similarity"


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
        ("tail", "auc", "absent", "0.6200 [0.5000, 0.7000]", "+0.6000 [+0.5500, +0.7000] better", 8.0, 9, "n"),
        ("tail", "gauc", "absent", "absent", "-", 8.0, 9, "n"),
        (
            "uniform (too small: 20 clicks, fewer than 200)",
            "auc",
            "absent",
            "0.5000 (no interval)",
            "-",
            8.0,
            9,
            "n",
        ),
    ]


def test_coverage_and_means_come_from_what_the_commit_recorded():
    """Two exposed pairs of weight one, four labeled ones of mean weight 0.5, one without a label."""
    sums = {"pseudo_label_sum": 0.4, "weight_sum": 4.0, "exposed": 2, "labeled": 4}
    found = feed_figures({**sums, "left_out": {"no history": 1}})
    assert found == pytest.approx({"coverage": 0.8, "mean pseudo_label": 0.1, "mean weight": 0.5})
    earlier = {name.replace("labeled", "labelled"): value for name, value in sums.items()}
    assert feed_figures({**earlier, "left_out": {"no history": 1}}) == found
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


def test_the_data_dictionary_explains_every_column():
    text = page(sections=site.dictionary())
    for name, contract in all_contracts().items():
        part = text[text.index(f'<h2 id="{name}">') :]
        part = part[: part.index("</section>")]
        for column in contract.columns:
            assert re.search(rf"<tr><td[^>]*>{column.name}</td>.*{re.escape(escape(column.comment))}</td></tr>", part)
    assert all(f'<h2 id="{name}">' in text for name in all_views())
    assert len(text) < 1_000_000


@pytest.mark.parametrize(
    ("value", "name"),
    [("2026-01-02-877ac4f234", "word"), ("auc", ""), ("two words", ""), ("x " * 20, "long"), ("array<" * 8, "long"),
     ("0.6450 [0.6280, 0.6629]", "word"), ("fail", "alarm")],
)  # fmt: skip
def test_a_version_is_not_broken_and_an_endless_type_pushes_nothing_out(value, name):
    assert style(value, False) == (f' class="{name}"' if name else "")


def test_dates_are_kept_whole_and_nothing_else_becomes_markup():
    span = '<span class="word">{}</span>'
    assert whole("2026-01-03 <b>") == span.format("2026-01-03") + " &lt;b&gt;"
    assert whole("of 2026-01-02-877ac4f234, 12026-01-02") == f"of {span.format('2026-01-02-877ac4f234')}, 12026-01-02"
    assert whole(link("2026-01-03.html", "2026-01-03")) == link("2026-01-03.html", "2026-01-03")


def test_an_artifact_that_is_made_daily_is_no_news():
    rows = [("calibrator_version", "a", "b"), ("preranker_version", "a", "b"), ("sid_version", "a", "b")]
    now, before = ({name: values[n] for name, *values in rows} for n in (0, 1))
    table = changes(now, before, date(2026, 1, 4), date(2026, 1, 3)).tables[1]
    assert [style(row[3], False) for row in table.rows] == ["", "", ' class="alarm"']


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
    assert section.text[:-1] == ["Compared with 2026-01-02, the run date before.", *section.warnings]
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
