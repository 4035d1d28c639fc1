"""The graph: what the tables say is done, absent, stale or blocked, and who notices which change."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest

from gpl_core.cli import main
from gpl_core.commands.optimize import compact
from gpl_core.contracts.contract import all_contracts, load_contract
from gpl_core.errors import UsageError
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.steps import JUDGE, OPTIMIZE, RETRY, STEPS, WITH_CONTROLS, Read, Step, engine_of, find_step
from tests.gpl_core.toy import RAW, Toy
from tests.support import DAY, ONE, config_file, small_config
from tests.vectors import delete_by_vector

D0, D1, D2, D3 = (DAY + i * ONE for i in range(-1, 3))
RUN = (D1, D2)
SETTINGS = {
    "run": {"start_date": D1.isoformat(), "end_date": D2.isoformat()},
    "samples": {"exposure_window_days": 2},
    "sequences": {"history_days": 1, "stats_days": 2},
    "interest": {"refresh_days": 3},
    "prerank": {"train_days": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Everything run once for D1 and D2; raw slices from D0 to D3."""
    root = tmp_path_factory.mktemp("finished")
    toy = Toy(small_config(root, SETTINGS))
    toy.raw([D0, D1, D2, D3])
    toy.run("ingest", D0)
    toy.run_pending(RUN)
    return root


@pytest.fixture
def toy(finished, tmp_path) -> Toy:
    """A copy of the finished lakehouse to change."""
    shutil.copytree(finished / "lake", tmp_path / "lake")
    return Toy(small_config(tmp_path, SETTINGS))


# ---- the graph -------------------------------------------------------------------------------------------------


def test_every_table_that_a_step_reads_is_written_by_an_earlier_one():
    """Except the platform's; look-ups of a cache may go round, they never make a step run again."""
    written = {n for n, c in all_contracts().items() if c.owner == "platform"}
    published: set[str] = set()
    for step in STEPS:
        for read in step.reads:
            if read.scope != "lookup":
                assert read.table in written, f"{step.name} reads {read.table} before it is written"
            else:
                assert read.table in all_contracts()
        assert set(step.uses) <= published, f"{step.name} uses an artifact that no earlier step publishes"
        assert set(step.follows) <= set(step.uses), f"{step.name} follows an artifact that it does not use"
        written |= {*step.writes, *step.also_writes}
        published |= {step.publishes} - {""}
    truth = {"truth", "truth_metrics"}
    assert not truth & {t for s in STEPS for t in (*(r.table for r in s.reads), *s.writes)}, "no step reads the truth"


def test_every_table_has_one_data_writer_and_that_is_its_owner():
    writers = Counter((t, s.name) for s in (*STEPS, JUDGE, WITH_CONTROLS) for t in (*s.writes, *s.also_writes))
    assert set(writers.values()) == {1}
    by_table: dict[str, set[str]] = {}
    for table, step in writers:
        by_table.setdefault(table, set()).add(step)
    rejects = by_table.pop("worker_rejects")
    assert load_contract("worker_rejects").partition_by == ("dt", "step"), "each worker its own slice"
    assert {find_step(s).launcher for s in rejects} == {"deepspeed"}
    for table, steps in by_table.items():
        assert steps == {load_contract(table).owner}, table
    elsewhere = {
        n
        for n, c in all_contracts().items()
        if c.owner in ("platform", "simulation", "every step", "gpl promote", "gpl score")
    }
    assert set(by_table) | elsewhere | {"worker_rejects"} == set(all_contracts())


def test_every_entry_point_of_the_graph_exists():
    root = Path(__file__).parents[3]
    for step in (*STEPS, JUDGE, WITH_CONTROLS, OPTIMIZE, RETRY):
        assert (root / step.script).is_file(), step.script


def test_what_workers_write_and_what_is_shared_by_all_is_never_written_by_spark():
    """Spark steps write their own tables through Spark, but for a handful of rows of monitors."""
    by_spark = {t for s in STEPS if s.launcher == "spark" for t in (*s.writes, *s.also_writes)}
    found = {n for n in all_contracts() if engine_of(n) == "spark"}
    assert found == by_spark - {"monitors"}
    assert {"job_runs", "artifact_decisions", "interest_anchors"}.isdisjoint(found)


def test_slices_are_asked_of_dated_tables_only_and_days_where_needed():
    for step in (*STEPS, JUDGE, WITH_CONTROLS):
        for read in step.reads:
            dated = "dt" in load_contract(read.table).partition_by
            if read.scope in ("slice", "next", "before", "through", "window"):
                assert dated, f"{step.name}: {read.table} has no dates"
            assert bool(read.days) == (read.scope in ("before", "window")), f"{step.name}: {read}"
            assert bool(read.column) == (read.scope == "as_of")


def test_an_unknown_step_names_one_like_it_or_all():
    with pytest.raises(UsageError, match=r"no step 'smaples'; did you mean samples\?$"):
        find_step("smaples")
    with pytest.raises(UsageError, match=r"no step 'x'; the steps are ingest, .*samples"):
        find_step("x")


def test_only_the_preranker_sees_the_run_date_itself():
    assert find_step("train_preranker").trained_through(D1) == D1
    assert {s.trained_through(D1) for s in STEPS if s.publishes and s.publishes != "preranker"} == {D0}


# ---- from nothing to done --------------------------------------------------------------------------------------


def test_without_tables_every_step_is_blocked_and_says_by_what(tmp_path):
    toy = Toy(small_config(tmp_path))
    for step in STEPS:
        state = toy.state(step.name, D1)
        assert state.status == "blocked"
        assert state.fingerprint == ""
        assert step.name in state.reason or "artifact" in state.reason
    assert "raw_impressions, but there is no Delta table" in toy.state("ingest", D1).reason
    assert "platform's input" in toy.state("ingest", D1).reason
    assert "run the step ingest first" in toy.state("encode_items", D1).reason
    assert list(tmp_path.glob("lake/*")) == [], "looking writes nothing"


def test_a_step_turns_from_blocked_to_absent_to_done(tmp_path):
    toy = Toy(small_config(tmp_path, SETTINGS))
    toy.raw([D0, D1])
    assert toy.states([D1], ["ingest", "samples"]) == {("ingest", D1): "absent", ("samples", D1): "blocked"}
    toy.run("ingest", D0)
    assert toy.state("samples", D1).status == "blocked"
    assert f"needs the slice dt={D1} of candidates" in toy.state("samples", D1).reason
    toy.run("ingest", D1)
    assert toy.states([D1], ["ingest", "samples"]) == {("ingest", D1): "done", ("samples", D1): "absent"}


def test_a_finished_run_has_nothing_to_do(toy):
    assert toy.not_done(RUN) == {}
    assert toy.run_pending(RUN) == []


def test_a_later_date_is_not_done_by_the_earlier_ones(toy):
    states = toy.states([D3])
    assert states["ingest", D3] == "done"
    assert states["samples", D3] == "absent"
    assert states["score_requests", D3] == "blocked"
    assert states["train_interest_model", D3] in ("blocked", "done")


def test_the_first_table_alone_does_not_make_a_step_done(toy):
    """The commit of the last table may be missing: a killed run is finished, not skipped."""
    step = find_step("samples")
    shutil.rmtree(Path(toy.planner.lake.uri(step.writes[-1])))
    assert toy.state("samples", D1).status == "absent"


# ---- who notices what ------------------------------------------------------------------------------------------


def test_rewriting_one_dates_raw_slice_is_noticed_by_that_date_only(toy):
    toy.write("raw_candidates", D1)
    assert toy.not_done([D0, D1, D2, D3]).keys() & {("ingest", d) for d in (D0, D1, D2, D3)} == {("ingest", D1)}
    assert toy.not_done(RUN) == {("ingest", D1): "stale"}
    before = toy.states([D2])
    toy.write("candidates", D1, step="ingest", fingerprint=toy.state("ingest", D1).fingerprint_of("candidates"))
    assert toy.state("samples", D1).status == "stale"
    assert toy.states([D2]) == before


def test_a_compacted_raw_table_makes_nothing_stale_until_its_rows_change(tmp_path):
    toy = Toy(small_config(tmp_path, SETTINGS), files=3)
    toy.raw([D1, D2])
    for day in RUN:
        toy.run("ingest", day)

    def states() -> list[str]:
        return [toy.state("ingest", day).status for day in RUN]

    def compact(table: str, files: int) -> None:
        done = deltalake.DeltaTable(toy.planner.lake.uri(table)).optimize.compact()
        assert done["numFilesRemoved"] == files

    for table, files in (("raw_candidates", 6), ("raw_impressions", 6), ("raw_items", 3)):
        compact(table, files)
        assert states() == ["done", "done"]
    toy.write("raw_items", D1)  # no statistics here: of any date
    assert states() == ["stale", "stale"]
    toy.run("ingest", D1)
    toy.run("ingest", D2)
    compact("raw_items", 4)
    toy.write("raw_candidates", D2)
    assert states() == ["done", "stale"]
    compact("raw_candidates", 3)
    assert states() == ["done", "stale"]  # the files it was read from are no more, whatever has regrouped the new ones
    log = sorted((tmp_path / "lake/tables/raw_items/_delta_log").glob("*.json"))
    deltalake.DeltaTable(toy.planner.lake.uri("raw_items")).create_checkpoint()
    for commit in log[:-1]:
        commit.unlink()
    assert states()[0] == "stale"  # a log that was cleaned tells nothing


def test_rows_that_somebody_removes_by_hand_are_noticed_by_who_reads_that_slice(toy):
    """Another engine's commit carries no mark of ours."""
    deltalake.DeltaTable(toy.planner.lake.uri("candidates")).delete(f"dt = '{D1}'")
    assert toy.not_done(RUN) == {("samples", D1): "stale"}


def test_a_table_that_was_deleted_and_written_again_is_another_one(toy):
    """Its log counts from the start: the version of a slice may be the same as before."""
    before = toy.planner.snapshot("candidates")
    marks = {name: mark for _, mark in before.marks() for name in mark.slices}
    shutil.rmtree(before.uri)
    for day in (D0, D1, D2, D3):
        toy.write("candidates", day, step="ingest", fingerprint=marks[str(day)].slices[str(day)])
    assert toy.planner.snapshot("candidates").version == before.version
    assert toy.not_done(RUN) == {("samples", D1): "stale", ("samples", D2): "stale"}


def test_a_rewritten_raw_slice_is_rebuilt_through_that_date_and_through_no_other(tmp_path):
    """Late candidates of D1: everything made from them is made again, for D1 alone, and then all is done."""
    one_day = {**SETTINGS, "prerank": {"train_days": 1}}
    toy = Toy(small_config(tmp_path, one_day))
    toy.raw([D0, D1, D2, D3])
    toy.run("ingest", D0)
    toy.run_pending(RUN)
    toy.write("raw_candidates", D1)
    ran = toy.run_pending(RUN)
    assert {day for _, day in ran} == {D1}, ran
    steps = [name for name, _ in ran]
    assert steps[:2] == ["ingest", "samples"]
    assert {"anchor_requests", "score_requests", "score_candidates", "pseudo_labels", "training_feed"} <= set(steps)
    assert not {"encode_items", "sequences", "train_tokenizer"} & set(steps)
    assert toy.run_pending(RUN) == []


CHANGES = {
    # scope: table, slice that is rewritten -> exactly these turn stale
    "slice": ("candidates", D1, {("samples", D1)}),
    "window, last day": ("impressions", D2, {("samples", D2), ("train_preranker", D1)}),
    "window, earlier day, and before": ("impressions", D1, {
        ("samples", D1), ("samples", D2), ("sequences", D2), ("fit_calibrator", D2)}),
    "before": ("interactions", D0, {("sequences", D1)}),
    "before does not see the date itself": ("interactions", D2, set()),
    "through": ("user_sequences", D1, {
        ("train_interest_model", D1), *((s, d) for s in ("anchor_requests", "score_requests") for d in RUN)}),
    "through does not see later dates": ("user_sequences", D2, {("anchor_requests", D2), ("score_requests", D2)}),
    "next": ("impressions", D3, {("train_preranker", D2)}),
    "window of the feed": ("training_feed", D1, {("train_preranker", D1), ("train_preranker", D2), ("report", D1)}),
    "whole": ("item_embeddings", D1, {("assign_sids", D1), ("assign_sids", D2)}),
    "whole, no dates": ("items", D1, {("encode_items", D1), ("encode_items", D2)}),
    "lookup": ("item_sids", D1, set()),
    "lookup of the cache": ("interest_anchors", D1, set()),
    "optional": ("raw_interactions", D2, {("ingest", D2)}),
}  # fmt: skip


@pytest.mark.parametrize("scope", CHANGES)
def test_a_change_is_noticed_by_exactly_the_steps_that_read_it(toy, scope):
    table, day, expected = CHANGES[scope]
    marks = toy.planner.snapshot(table).marks()
    dated = "dt" in load_contract(table).partition_by
    name = day.isoformat() if dated else "*"
    mine = next((m for _, m in marks if name in m.slices), None)
    # The owner's mark stays what it was: only the rows change, as when someone rewrites them.
    toy.write(table, day, step=mine and mine.step, fingerprint=mine.slices[name] if mine else "x")
    assert {key for key, status in toy.not_done(RUN).items() if status == "stale"} == expected
    assert set(toy.not_done(RUN).values()) <= {"stale"}


def test_an_as_of_read_does_not_see_updates_of_later_dates(tmp_path):
    """Raw items with statistics, as a platform writes them: an update on D2 is none for D1."""
    toy = Toy(small_config(tmp_path, SETTINGS))
    toy.raw([D1, D2])
    shutil.rmtree(toy.planner.lake.uri("raw_items"))

    def update(day: date) -> None:
        at = pa.array([datetime(day.year, day.month, day.day, 23, tzinfo=UTC)], pa.timestamp("us", tz="UTC"))
        rows = pa.table({"item_id": [str(day)], "updated_at": at})
        deltalake.write_deltalake(toy.planner.lake.uri("raw_items"), rows, mode="append")

    update(D1)
    prints = {d: toy.state("ingest", d).fingerprint for d in RUN}
    update(D2)
    assert toy.state("ingest", D1).fingerprint == prints[D1]
    assert toy.state("ingest", D2).fingerprint != prints[D2]


def test_an_opt_out_is_noticed_from_its_day_on_and_a_table_that_is_named_must_be_there(toy, tmp_path):
    where = str(tmp_path / "opt_outs")
    toy.config = small_config(tmp_path, SETTINGS, [f"lakehouse.tables.raw_opt_outs={where}"])
    assert f"raw_opt_outs, but there is no Delta table at {where}" in toy.state("samples", D1).reason

    def opt_out(*times: datetime | None) -> set:
        kind = pa.timestamp("us", tz="UTC")
        rows = pa.table({"user_id": ["u"] * len(times), "opted_out_at": pa.array(times, kind)})
        deltalake.write_deltalake(where, rows, mode="append")
        return {key for key, status in toy.not_done(RUN).items() if status == "stale"}

    noon = datetime(D2.year, D2.month, D2.day, 12, tzinfo=UTC)
    steps = ("samples", "anchor_requests", "score_requests")
    assert opt_out(noon + timedelta(days=9)) == set()
    assert opt_out(noon) == {(s, D2) for s in steps}
    # A row without a time holds always, whatever the smallest time of its file.
    assert opt_out(noon, None) == {(s, d) for s in steps for d in RUN}
    toy.run_pending(RUN)
    assert toy.not_done(RUN) == {}
    delete_by_vector(where, 1)  # that row, of a file that stays
    assert toy.not_done(RUN).keys() == {(s, d) for s in steps for d in RUN}


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("samples", {"unexposed_per_request": 3}, {("samples", d) for d in RUN}),
        ("labels", {"calibrator": {"spread": 2.0}}, {("fit_calibrator", d) for d in RUN}),
        ("labels", {"users_per_batch": 3}, set()),
        ("tokenizer", {"codes": 99}, {("train_tokenizer", d) for d in RUN}),
        ("tokenizer", {"gates": {"max_dead_share": 0.9}}, set()),
        ("prerank", {"train_days": 2, "steps": 3}, {("train_preranker", d) for d in RUN}),
        ("launch", {"env": {"A": "b"}}, set()),
        ("ingest", {"max_quarantine_share": 1.0}, set()),
    ],
)
def test_a_setting_is_noticed_by_exactly_the_steps_that_it_shapes(toy, tmp_path, section, values, expected):
    changed = Toy(small_config(tmp_path, {**SETTINGS, section: {**SETTINGS.get(section, {}), **values}}))
    assert changed.not_done(RUN) == dict.fromkeys(expected, "stale")


def test_status_names_the_table_the_setting_and_the_artifact_that_made_something_stale(toy, tmp_path, capsys):
    def status(*overrides: str) -> dict[str, str]:
        """step -> reason, of what is stale on D1; a reason may fill several lines of the table."""
        config = ["--config", str(tmp_path / "test.yaml"), *[a for o in overrides for a in ("--set", o)]]
        assert main(["status", *config, "--run-date", D1.isoformat()]) == 0
        said: list[list[str]] = []
        for line in capsys.readouterr().out.splitlines():
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            if len(cells) == 4 and cells[1]:
                said.append(cells)
            elif len(cells) == 4:
                said[-1][3] += f" {cells[3]}"
        return {step: reason for _, step, state, reason in said if state == "stale"}

    def in_force(kind: str, day: date = D1) -> str:
        return toy.planner.artifacts.in_force(kind, day).version

    outdated = "is out of date:"
    assert status("samples.unexposed_per_request=3", "labels.users_per_batch=3") == {
        "samples": f"unexposed_samples@1 {outdated} setting samples.unexposed_per_request is 3, was 20"
    }
    assert status("encoder.parts=[{name: minilm, weight: 2.0}]", "prerank.lambda=8", "feed.rows_per_file=7") == {
        "encode_items": f"item_embeddings@1 {outdated} setting encoder.parts has changed",
        "train_tokenizer": f"tokenizer {in_force('tokenizer')} {outdated} setting encoder.parts has changed",
        "training_feed": f"training_feed@1 {outdated} setting feed.rows_per_file is 7, was 500000",
        "train_preranker": f"preranker {in_force('preranker', D2)} {outdated} setting prerank.lambda is 8.0, was 4.0",
    }

    toy.write("pair_scores", D1, step="score_candidates", fingerprint=toy.state("score_candidates", D1).fingerprint)
    fitted, changed = in_force("calibrator"), "table pair_scores has changed"
    assert status() == {
        "fit_calibrator": f"calibrator {fitted} {outdated} {changed}",
        "pseudo_labels": f"pseudo_labels@1 {outdated} {changed}",
    }
    toy.run("fit_calibrator", D1)
    what = f"artifact calibrator is {in_force('calibrator')}, was {fitted}"
    assert status()["pseudo_labels"] == f"pseudo_labels@1 {outdated} {what}; {changed}"
    toy.run("pseudo_labels", D1)
    found = status()
    assert found.keys() == {"training_feed", "report"}
    assert found["training_feed"] == f"training_feed@1 {outdated} table pseudo_labels has changed"
    assert found["report"].endswith(f"{outdated} {what}; table pseudo_labels has changed")
    toy.write("training_feed", D1, step="training_feed", fingerprint="of an earlier release")
    assert status()["training_feed"].endswith(" was made from other inputs or settings")


def test_a_setting_that_is_set_back_takes_back_what_it_made(toy, tmp_path):
    """The artifact that it makes is there already, and the one of the other setting newer: that must not serve on."""
    made = toy.planner.artifacts.in_force("calibrator", D1).version
    section = {"labels": {"calibrator": {"spread": 2.0}}}
    other = Toy(small_config(tmp_path, {**SETTINGS, **section}))
    other.run_pending([D1])
    assert other.planner.artifacts.in_force("calibrator", D1).version != made
    ran = toy.run_pending([D1])
    assert toy.planner.artifacts.in_force("calibrator", D1).version == made
    assert [s for s, _ in ran] == ["fit_calibrator", "pseudo_labels", "training_feed", "train_preranker", "report"]
    assert toy.not_done([D1]) == {}
    other.run("fit_calibrator", D1)
    assert other.planner.artifacts.in_force("calibrator", D1).version != made
    toy.run("fit_calibrator", D1)
    assert toy.planner.artifacts.in_force("calibrator", D1).version == made, "a second time too"


def test_an_input_that_comes_and_a_contract_that_moves_on_are_named_too(toy, monkeypatch):
    from gpl_core.graph import planner as planning

    fingerprint = toy.state("ingest", D3).fingerprint_of("impressions")
    toy.write("impressions", D3, rows=0, step="ingest", fingerprint=fingerprint)
    reason = toy.state("train_preranker", D2).reason
    assert reason.endswith("is out of date: table impressions has changed"), reason
    load = planning.load_contract
    monkeypatch.setattr(planning, "load_contract", lambda name: replace(load(name), version=99))
    assert toy.state("samples", D1).reason.endswith("is out of date: a contract of its step has another version")


@pytest.mark.parametrize("name", ["samples", "train_interest_model"])
def test_what_another_release_makes_in_another_way_is_stale_and_says_so(toy, name):
    step = find_step(name)
    newer = replace(step, method=step.method + 1)
    state = toy.planner.state(newer, D1)
    assert (toy.state(name, D1).status, state.status) == ("done", "stale")
    assert state.reason.endswith("is out of date: this release makes it in another way")
    assert state.artifact_fingerprint != toy.state(name, D1).artifact_fingerprint or not step.publishes


def test_a_compacted_raw_table_is_not_named_beside_the_one_that_changed(tmp_path):
    toy = Toy(small_config(tmp_path, SETTINGS), files=2)
    toy.raw([D1])
    toy.run("ingest", D1)
    deltalake.DeltaTable(toy.planner.lake.uri("raw_items")).optimize.compact()
    toy.write("raw_candidates", D1)
    assert toy.state("ingest", D1).reason == "quarantine@1 is out of date: table raw_candidates has changed"


def test_a_contract_version_is_part_of_the_fingerprint(toy, monkeypatch):
    from dataclasses import replace

    from gpl_core.contracts import contract as contracts
    from gpl_core.graph import planner as pipeline

    print_before = toy.state("samples", D1).fingerprint
    load = contracts.load_contract

    def newer(name: str):
        return replace(load(name), version=2) if name == "exposed_samples" else load(name)

    monkeypatch.setattr(pipeline, "load_contract", newer)
    assert Planner(toy.config)._hash(find_step("samples"), {}) != ""
    planner = Planner(toy.config)
    monkeypatch.setattr(planner, "_table_state", lambda *given: ("done", ""))
    assert planner.state(find_step("samples"), D1).fingerprint != print_before


# ---- artifacts in the graph ------------------------------------------------------------------------------------


def days_from(day: date, count: int) -> list[date]:
    return [day + timedelta(days=i) for i in range(count)]


def test_an_artifact_is_trained_anew_when_it_is_old_enough(toy):
    """interest.refresh_days = 3, trained for D1 (through D0): stale again for D1 + 3; the tokenizer after 7 days."""
    for day in days_from(D3, 2):
        for table in ("user_sequences", "item_stats"):
            toy.write(table, day)
    toy.write("item_embeddings", D3)
    assert [toy.state("train_interest_model", d).status for d in days_from(D1, 4)] == ["done", "done", "done", "stale"]
    ages = [toy.state("train_tokenizer", d).status for d in days_from(D1, 9)]
    assert ages == ["done"] * 7 + ["stale"] * 2


def test_a_day_without_new_items_starts_no_worker_that_learns_of_items(toy):
    """The workers that are left go by the day's users and pairs."""
    for table in RAW:
        toy.write(table, D3 + ONE)
    ran = {step for step, _ in toy.run_pending([D3])}
    workers = {s.name for s in STEPS if s.launcher == "deepspeed"}
    assert workers & ran == {"generate_anchors", "score_candidates", "train_preranker"}


def test_a_tokenizer_is_kept_beyond_its_age_while_the_catalog_is_as_it_saw_it(toy):
    last = D1 + timedelta(days=9)
    state = toy.state("train_tokenizer", last)
    assert (state.status, state.reason.partition(", ")[2]) == (
        "done", "kept after 9 days: it would see the same item_embeddings"
    )  # fmt: skip
    compact(toy.planner.lake, load_contract("item_embeddings"), [], 2**30)
    assert toy.state("train_tokenizer", last).status == "done", "the same rows in other files"
    other = Toy(small_config(Path(toy.config.lakehouse.root).parent, {**SETTINGS, "tokenizer": {"levels": 4}}))
    assert other.state("train_tokenizer", last).status == "stale", "other settings"
    toy.write("item_embeddings", D3)
    assert "is 9 days old" in toy.state("train_tokenizer", last).reason


def test_a_model_is_kept_beyond_its_age_while_catalog_and_events_are_as_it_saw_them(toy):
    """By what the commits of user_sequences say: dates without events have come into the window or left it."""

    def sequences(day: date, events: dict[date, str], settings: str = "s") -> None:
        details = {"events": {str(d): rows for d, rows in events.items()}, "settings": settings, "sid_version": "v"}
        toy.write("user_sequences", day, details={**details, "snapshot": day == D2, "base": str(day)})
        toy.write("item_stats", day)

    def state(day: date) -> tuple[str, str]:
        found = toy.state("train_interest_model", day)
        return found.status, found.reason.partition(" is ")[2] or found.reason.partition(", ")[2]

    later = D2 + timedelta(days=3)
    kept = ("done", "kept after 3 days: it would see the same item_sids, item_embeddings, events")
    old = ("stale", "3 days old, refreshed every 3")
    sequences(D2, {D0: "aa", D1: ""})
    toy.publish("train_interest_model", D2, toy.state("train_interest_model", D2))
    sequences(later, {D0: "aa", D1: "", D2: ""})
    assert state(later) == kept
    sequences(later, {D0: "aa", D1: "", D2: "bb"})
    assert state(later) == old, "an event more"
    sequences(later, {D1: "", D2: ""})
    assert state(later) == old, "an event has left the window"
    sequences(later, {D0: "aa"}, settings="other")
    assert state(later) == old
    sequences(later, {D0: "aa"})
    assert state(later) == kept
    toy.write("items", later)
    assert state(later) == kept, "the model reads no title"


def test_no_date_uses_what_was_trained_later(toy):
    """A model published for D2 changes nothing for D1: the backfill does not see the future."""
    before = toy.states([D1])
    state = toy.state("train_interest_model", D2)
    toy.publish("train_interest_model", D2, state)
    assert toy.states([D1]) == before
    versions = {d: toy.state("anchor_requests", d).inputs["artifact:interest_model"]["version"] for d in RUN}
    assert versions[D1] < versions[D2]
    assert {k for k in toy.not_done(RUN) if k[0] == "anchor_requests"} == {("anchor_requests", D2)}


def test_a_model_of_another_tokenizer_is_stale_and_names_both(toy):
    state = toy.state("train_tokenizer", D1)
    changed = StepState(**{**state.__dict__, "artifact_fingerprint": "f" * 24})
    old = toy.planner.artifacts.in_force("tokenizer", D1).version
    toy.publish("train_tokenizer", D1, changed)
    new = toy.planner.artifacts.in_force("tokenizer", D1).version
    state = toy.state("train_interest_model", D1)
    assert state.status == "stale"
    assert old in state.reason
    assert new in state.reason
    assert "sid_version" in state.reason


def test_a_second_tokenizer_leaves_the_dates_of_the_first_one_done(toy):
    """item_sids has no dates: commits for D2's tokenizer must not make D1 stale, nor the reverse, for ever."""
    state = toy.state("train_tokenizer", D2)
    toy.publish("train_tokenizer", D2, state)
    versions = {d: toy.planner.artifacts.in_force("tokenizer", d).version for d in RUN}
    assert versions[D1] != versions[D2]
    assert toy.states(RUN, ["assign_sids"]) == {("assign_sids", D1): "done", ("assign_sids", D2): "stale"}
    toy.run("assign_sids", D2)
    assert toy.states(RUN, ["assign_sids"]) == {("assign_sids", D1): "done", ("assign_sids", D2): "done"}


def test_requests_are_not_scored_before_the_anchors_that_they_ask_for_now(toy):
    """The cache is looked up: without this, pairs of users who were asked for last would be missing for good."""
    toy.run_pending([D1])
    assert toy.state("score_requests", D1).status == "done"
    print_ = toy.state("anchor_requests", D1).fingerprint
    toy.write("anchor_requests", D1, step="anchor_requests", fingerprint=print_)
    assert toy.state("generate_anchors", D1).status == "stale"
    found = toy.state("score_requests", D1)
    assert found.status == "blocked"
    assert f"run generate_anchors for {D1} first" in found.reason
    assert ("score_requests", D1) in toy.run_pending([D1])
    assert toy.state("score_requests", D1).status == "done"


def test_a_rollback_turns_stale_what_used_the_version_and_nothing_is_trained_that_would_be_passed_by(toy):
    """D2 has a model of its own; without it D2 uses the one of D1, and its training does not run for ever."""
    toy.publish("train_interest_model", D2, toy.state("train_interest_model", D2))
    toy.run_pending([D1, D2])
    store = toy.planner.artifacts
    before, bad = store.in_force("interest_model", D1).version, store.in_force("interest_model", D2).version
    assert toy.not_done(RUN) == {}

    store.decide("interest_model", bad, "rollback")
    assert toy.states([D1]) == dict.fromkeys(toy.states([D1]), "done"), "D1 never used it"
    assert toy.state("train_interest_model", D2).reason == f"interest_model {before}; {bad} was rolled back"
    assert ("train_interest_model", D2) not in toy.not_done(RUN)
    assert {"anchor_requests", "score_requests", "fit_calibrator"} <= {s for s, _ in toy.not_done(RUN)}
    toy.run_pending([D1, D2])
    assert toy.not_done(RUN) == {}
    assert toy.state("anchor_requests", D2).inputs["artifact:interest_model"]["version"] == before

    toy.planner.artifacts.decide("interest_model", bad, "promote")
    toy.run_pending([D1, D2])
    assert toy.state("anchor_requests", D2).inputs["artifact:interest_model"]["version"] == bad


def test_without_another_version_a_rollback_blocks_and_only_force_trains(toy):
    store = toy.planner.artifacts
    version = store.in_force("interest_model", D1).version
    store.decide("interest_model", version, "rollback")
    state = toy.state("train_interest_model", D1)
    assert state.status == "blocked"
    assert version in state.reason
    assert "gpl promote" in state.reason
    assert (state.may_run(force=False), state.may_run(force=True)) == (False, True)


def test_the_day_after_changes_the_evaluation_but_not_the_preranker(toy):
    before = toy.state("train_preranker", D2)
    toy.write("impressions", D3, step="ingest")
    after = toy.state("train_preranker", D2)
    assert (before.status, after.status) == ("done", "stale")
    assert before.artifact_fingerprint == after.artifact_fingerprint
    assert "evaluations" in after.reason


def test_a_missing_artifact_blocks_and_names_who_trains_it(toy):
    shutil.rmtree(Path(toy.planner.artifacts.root) / "calibrator")
    state = toy.state("pseudo_labels", D1)
    assert state.status == "blocked"
    assert "artifact calibrator" in state.reason
    assert toy.state("fit_calibrator", D1).status == "absent"


def test_a_damaged_artifact_is_passed_by_and_trained_again_where_no_other_serves(toy):
    """D2 has a model of its own: when it is damaged D2 uses the one of D1; when that is too, it is trained."""
    toy.publish("train_interest_model", D2, toy.state("train_interest_model", D2))
    folder = Path(toy.planner.artifacts.root) / "interest_model"
    before, own = (toy.planner.artifacts.in_force("interest_model", d).version for d in (D1, D2))
    (folder / own / "weights.json").write_bytes(b"")
    assert toy.state("anchor_requests", D2).inputs["artifact:interest_model"]["version"] == before
    (folder / before / "weights.json").unlink()
    state = toy.state("generate_anchors", D2)
    assert (state.status, "(damaged)" in state.reason) == ("blocked", True)
    assert toy.state("train_interest_model", D2).status == "absent"
    toy.run("train_interest_model", D2)
    assert toy.planner.artifacts.in_force("interest_model", D2).version == own


# ---- days on which there is nothing ----------------------------------------------------------------------------


def test_an_empty_slice_is_a_slice(toy):
    toy.write("raw_candidates", D2, rows=0)
    assert toy.state("ingest", D2).status == "stale"
    toy.write("candidates", D2, rows=0, step="ingest", fingerprint="x")
    assert toy.state("samples", D2).status == "stale", "written and empty is not blocked"


def test_without_requests_there_are_no_anchors_to_generate(toy):
    toy.write("anchor_requests", D2, rows=0, step="anchor_requests")
    state = toy.state("generate_anchors", D2)
    assert state.status == "done"
    assert "nothing to do" in state.reason


def test_scores_wait_for_the_dates_anchors_unless_none_were_asked_for(toy):
    """The cache is looked up by key: without this check its reader would find nothing and be done for ever."""
    toy.write("score_requests", D3, step="score_requests")
    for table in ("exposed_samples", "unexposed_samples", "user_sequences"):
        toy.write(table, D3)
    toy.write("anchor_requests", D3)
    state = toy.state("score_requests", D3)
    assert state.status == "blocked"
    assert f"slice dt={D3} of interest_anchors" in state.reason
    assert "generate_anchors" in state.reason
    toy.write("anchor_requests", D3, rows=0)
    assert toy.state("score_requests", D3).status == "stale"
    shutil.rmtree(Path(toy.planner.lake.uri("interest_anchors")))
    assert toy.state("score_requests", D3).status == "stale", "a first day on which nobody has a history"


def test_a_report_is_done_when_it_carries_the_fingerprint(toy):
    path = Path(toy.planner.report_path(D1))
    path.write_text(path.read_text().replace("content=", "content=x"))
    assert toy.not_done(RUN) == {("report", D1): "stale"}
    path.unlink()
    assert toy.not_done(RUN) == {("report", D1): "absent"}


# ---- states ----------------------------------------------------------------------------------------------------


def test_a_state_survives_its_json_and_pins_versions(toy):
    state = toy.state("samples", D1)
    assert StepState.from_json(state.to_json()) == state
    assert state.version("impressions") == toy.planner.snapshot("impressions").version
    toy.write("impressions", D1)
    assert toy.planner.lake.open("impressions", state.version("impressions")).version == state.version("impressions")


def test_a_read_that_a_setting_switches_on_counts_only_then(toy, tmp_path):
    step = find_step("fit_calibrator")
    assert any(not r.when(toy.config) for r in step.reads)
    assert "item_stats" in toy.state("fit_calibrator", D1).inputs
    settings = {**SETTINGS, "labels": {"calibrator": {"kind": "platt"}}}
    assert "item_stats" not in Toy(small_config(tmp_path, settings)).state("fit_calibrator", D1).inputs


def test_a_table_read_twice_is_noticed_through_either_read(toy):
    twice = Step(
        "samples", "spark",
        reads=(Read("candidates", "slice"), Read("candidates", "before", days=lambda c: c.sequences.history_days)),
        writes=("exposed_samples",),
    )  # fmt: skip
    prints = [toy.planner.state(twice, D2).fingerprint]
    for day in (D2, D1, D0):
        toy.write("candidates", day, step="ingest")
        prints.append(toy.planner.state(twice, D2).fingerprint)
    assert len({*prints[:3]}) == 3
    assert prints[3] == prints[2]


def test_the_configuration_file_of_the_tests_is_the_one_that_is_loaded(tmp_path):
    assert config_file(tmp_path, SETTINGS).is_file()
    assert small_config(tmp_path, SETTINGS).samples.exposure_window_days == 2
