"""The life of one run of one step: arguments, state, body, and a record of whatever happened."""

from __future__ import annotations

import json
import threading
from datetime import date
from pathlib import Path

import pytest

from gpl_core.errors import ConflictError, ContractError, GateError, MissingInputError, UsageError
from gpl_core.graph.arguments import StepArguments, new_run_id, parse_arguments
from gpl_core.graph.job_runs import Counts, JobRun
from gpl_core.graph.origins import settings_of
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.step_run import StepContext, exit_with, run_step, run_steps
from gpl_core.graph.steps import STEPS, find_step
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.marks import SliceMark
from tests.gpl_core.toy import Toy
from tests.support import DAY, DIMS, ONE, config_file, data_table, legal_rows, put, small_config

STEP = "encode_items"  # reads `items` whole


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture
def ready(config):
    """A lakehouse in which encode_items has something to do."""
    put(Planner(config).lake, "items", 3)
    return config


def arguments(config, **given) -> StepArguments:
    return StepArguments(config, (DAY,), given.pop("run_id", "run-1"), **given)


def encode(context: StepContext) -> None:
    """A body that writes one row with the mark of its step."""
    contract = context.contract("item_embeddings")
    with context.lake.writer(contract, {"encoder_version": "v1"}, dims=DIMS) as writer:
        writer.write(data_table(contract, legal_rows(contract, 1)))
    mark, since = context.mark("item_embeddings"), context.state.outputs["item_embeddings"]
    commit = context.lake.commit(contract, writer.parts, mark=mark, mode="append", since=since)
    context.committed("item_embeddings", commit)
    context.counts.rows_in = 3
    context.counts.rows_dropped = 2


def job_runs(config) -> list[dict]:
    return sorted(Planner(config).lake.open("job_runs").read().to_pylist(), key=lambda r: r["attempt"])


def tree(root: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*")}


# ---- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--run-date", "2026-01-03", "--epochs", "5"], "unknown argument --epochs"),
        (["--run-dat", "2026-01-03"], "--run-dat"),
        (["--run-date", "03.01.2026"], r"--run-date: '03\.01\.2026' is not a date"),
        (["--run-date", "2026-02-30"], "2026-02-30"),
        (["--run-date"], "--run-date"),
        ([], "steps never assume today"),
        (["--start-date", "2026-01-03"], "belong together"),
        (["--end-date", "2026-01-03"], "belong together"),
        (["--start-date", "2026-01-05", "--end-date", "2026-01-03"], "2026-01-03 is before"),
        (["--run-date", "2026-01-03", "--start-date", "2026-01-03", "--end-date", "2026-01-04"], "either --run-date"),
        (["--run-date", "2026-01-03", "--local_rank", "x"], "local_rank"),
        (["--run-date", "2026-01-03", "--set", "anchors.cuont=3"], "anchors.cuont"),
        (["--run-date", "2026-01-03", "--steps", "samples"], "--steps"),
    ],
)
def test_wrong_arguments_are_a_usage_error_that_names_them(tmp_path, given, named):
    with pytest.raises(UsageError, match=named):
        parse_arguments("samples.py", ["--config", str(config_file(tmp_path)), *given])


def test_the_configuration_is_required(tmp_path):
    with pytest.raises(UsageError, match="--config"):
        parse_arguments("samples.py", ["--run-date", "2026-01-03"])


def test_arguments_come_out_typed(tmp_path):
    args = parse_arguments(
        "generate_anchors.py",
        ["--config", str(config_file(tmp_path)), "--start-date", "2026-01-03", "--end-date", "2026-01-05", "--force",
         "--set", "anchors.count=3", "--set", "run.seed=9", "--run-id", "abc", "--local_rank=1"],
    )  # fmt: skip
    assert args.dates == (date(2026, 1, 3), date(2026, 1, 4), date(2026, 1, 5))
    assert (args.config.anchors.count, args.config.run.seed, args.run_id) == (3, 9, "abc")
    assert (args.force, args.dry_run, args.bulk_through, args.steps) == (True, False, None, ())


def test_several_steps_are_named_and_checked(tmp_path):
    common = ["--config", str(config_file(tmp_path)), "--run-date", "2026-01-03"]
    args = parse_arguments("run.py", [*common, "--steps", "samples, sequences"], several=True)
    assert args.steps == ("samples", "sequences")
    with pytest.raises(UsageError, match="no step 'sample'"):
        parse_arguments("run.py", [*common, "--steps", "sample"], several=True)
    with pytest.raises(UsageError, match="--steps"):
        parse_arguments("run.py", common, several=True)


def test_run_ids_differ():
    assert len({new_run_id() for _ in range(50)}) == 50


# ---- one run ---------------------------------------------------------------------------------------------------


def test_a_run_is_done_recorded_and_then_a_noop(ready, capsys):
    assert run_step(Planner(ready), STEP, DAY, arguments(ready), encode) == "done"
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["status"], line["rows_in"], line["rows_out"], line["rows_dropped"]) == ("done", 3, 1, 2)
    assert line["outputs"] == {"item_embeddings": {"before": 0, "after": 1, "rows": 1}}
    assert line["inputs"]["items"]["version"] == 1
    assert line["seconds"] > 0
    assert line["bytes_out"] > 0

    def never(context: StepContext) -> None:
        raise AssertionError("a step that is done must not run")

    assert run_step(Planner(ready), STEP, DAY, arguments(ready, run_id="run-2"), never) == "noop"
    assert run_step(Planner(ready), STEP, DAY, arguments(ready, force=True), encode) == "done"
    rows = job_runs(ready)
    assert [(r["attempt"], r["status"], r["run_id"]) for r in rows] == [
        (1, "done", "run-1"), (2, "noop", "run-2"), (3, "done", "run-1"),
    ]  # fmt: skip
    assert {r["fingerprint"] for r in rows} == {Planner(ready).snapshot("item_embeddings").marks()[0][1].slices["*"]}


def test_a_run_that_is_under_way_or_was_killed_stands_in_job_runs(ready):
    """Its row is replaced by the final one; a killed process never gets that far."""

    def look(context: StepContext) -> None:
        (row,) = job_runs(ready)
        assert (row["status"], row["attempt"], row["step"], row["run_date"]) == ("running", 1, STEP, DAY)
        encode(context)

    run_step(Planner(ready), STEP, DAY, arguments(ready), look)
    (row,) = job_runs(ready)
    assert (row["status"], row["attempt"]) == ("done", 1)
    JobRun(Planner(ready).lake, STEP, DAY, "killed").begin()
    run_step(Planner(ready), STEP, DAY, arguments(ready, force=True), encode)
    assert [(r["attempt"], r["status"]) for r in job_runs(ready)] == [(1, "done"), (2, "running"), (3, "done")]


def test_what_a_run_cost_stands_in_its_row(ready):
    def costly(context: StepContext) -> None:
        context.counts.bytes_in = context.input_bytes
        context.counts.core_seconds, context.counts.gpu_seconds = 2.5, 8.0

    run_step(Planner(ready), STEP, DAY, arguments(ready), costly)
    (row,) = job_runs(ready)
    size = sum(f.size for f in Planner(ready).lake.open("items").files)
    assert (row["core_seconds"], row["gpu_seconds"], row["bytes_in"]) == (2.5, 8.0, size)


def test_attempts_count_per_step_and_date(ready):
    for day in (DAY, DAY + ONE, DAY):
        run_step(Planner(ready), STEP, day, arguments(ready, force=True), encode)
    assert sorted((r["run_date"], r["attempt"]) for r in job_runs(ready)) == [(DAY, 1), (DAY, 2), (DAY + ONE, 1)]


@pytest.mark.parametrize("error", [GateError("too many dead codes"), ValueError("odd"), KeyboardInterrupt()])
def test_a_failure_is_recorded_and_passes_through(ready, capsys, error):
    def fails(context: StepContext) -> None:
        context.counts.rows_in = 7
        raise error

    with pytest.raises(type(error)) as caught:
        run_step(Planner(ready), STEP, DAY, arguments(ready), fails)
    assert caught.value is error
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = job_runs(ready)
    for found in (line, row):
        assert found["status"] == "failed"
        assert (found["error_class"], found["error_message"]) == (type(error).__name__, str(error))
        assert (found["rows_in"], found["rows_out"], found["attempt"]) == (7, 0, 1)
    assert run_step(Planner(ready), STEP, DAY, arguments(ready), encode) == "done"
    assert [r["attempt"] for r in job_runs(ready)] == [1, 2]


@pytest.mark.parametrize("error", [ContractError("a row twice"), OSError(28, "disk full"), KeyboardInterrupt()])
def test_what_a_run_refused_after_its_commit_is_stale_and_made_again(config, error):
    """A second attempt must not take it for done; what was interrupted after its commit is done."""
    put(Planner(config).lake, "impressions", 3)
    put(Planner(config).lake, "candidates", 3)
    step = find_step("samples")

    def refuses(context: StepContext) -> None:
        for table in context.step.writes:
            mark = context.mark(table)
            (fingerprint,) = mark.slices.values()
            context.committed(table, put(context.lake, table, 2, fingerprint=fingerprint, details=mark.details))
        raise error

    with pytest.raises(type(error)):
        run_step(Planner(config), "samples", DAY, arguments(config, run_id="by-hand"), refuses)
    state = Planner(config).state(step, DAY)
    if not isinstance(error, ContractError):
        assert state.status == "done"
        return
    assert state.status == "stale"
    assert state.reason.endswith("was refused by run by-hand (ContractError): see job_runs")
    assert "a row twice" not in str(Planner(config).lake.open("exposed_samples").marks()), "a message may quote rows"
    table = Planner(config).lake.open("exposed_samples")
    assert table.read().num_rows == 2
    with pytest.raises(ContractError, match="a row twice"):
        run_step(Planner(config), "samples", DAY, arguments(config, run_id="by-hand"), refuses)


def test_a_window_that_holds_a_refused_slice_blocks_its_readers(tmp_path):
    config = small_config(tmp_path, {"samples": {"exposure_window_days": 2}})
    for table in ("impressions", "candidates"):
        for day in (DAY - ONE, DAY):
            put(Planner(config).lake, table, 3, day=day)
    step, lake = find_step("samples"), Planner(config).lake
    assert Planner(config).state(step, DAY).status == "absent"
    lake.refuse("impressions", "by-hand", 1, "ContractError")
    state = Planner(config).state(step, DAY)
    assert state.status == "blocked"
    assert f"reads the slice dt={DAY - ONE} of impressions, which the run of step ingest that" in state.reason
    put(Planner(config).lake, "impressions", 3, day=DAY - ONE)
    assert Planner(config).state(step, DAY).status == "absent"


def test_a_blocked_step_says_what_is_missing_and_is_recorded(config, capsys):
    with pytest.raises(MissingInputError, match="table items, but there is no Delta table"):
        run_step(Planner(config), STEP, DAY, arguments(config), encode)
    (row,) = job_runs(config)
    assert (row["status"], row["error_class"], row["fingerprint"]) == ("failed", "MissingInputError", "")
    assert json.loads(capsys.readouterr().out)["error_message"] == row["error_message"]


def test_a_table_of_another_contract_is_recorded_too(ready):
    """The failure happens while the state is evaluated, before there is a context."""
    planner = Planner(ready)
    planner.lake.overrides["items"] = planner.lake.uri("job_runs")
    put(planner.lake, "job_runs", 1)
    with pytest.raises(ContractError, match="holds table 'job_runs', not items"):
        run_step(planner, STEP, DAY, arguments(ready), encode)
    assert "ContractError" in {r["error_class"] for r in job_runs(ready)}


def test_a_dry_run_writes_nothing_and_says_what_it_would(ready, tmp_path, capsys):
    before = tree(tmp_path)

    def never(context: StepContext) -> None:
        raise AssertionError("a dry run runs nothing")

    assert run_step(Planner(ready), STEP, DAY, arguments(ready, dry_run=True), never) == "planned"
    assert tree(tmp_path) == before
    said = json.loads(capsys.readouterr().out)
    assert said["state"] == "absent"
    items = Planner(ready).lake.open("items")
    assert said["would_read"]["items"]["version"] == 1
    assert said["would_read"]["items"]["rows"] == rows_in(items.files) > 0
    assert said["would_read"]["items"]["bytes"] == sum(f.size for f in items.files)
    nothing = {"version": None, "files": 0, "rows": 0, "bytes": 0}
    assert said["would_write"] == {
        "item_embeddings": {"how": "merge", "where": "all rows", **nothing},
        "worker_rejects": {"how": "replace", "where": f"dt = '{DAY}' AND step = '{STEP}'", **nothing},
    }


def test_a_dry_run_tells_the_size_of_what_it_would_replace_and_what_it_keeps(config, capsys):
    planner = Planner(config)
    for day, rows in ((DAY, 3), (DAY + ONE, 5)):
        put(planner.lake, "pair_scores", rows, day=day)
    put(planner.lake, "raw_items", 2)
    for table in ("raw_impressions", "raw_candidates"):
        put(planner.lake, table, 4)
    for table in ("impressions", "candidates"):
        mark = Planner(config).state(find_step("ingest"), DAY).fingerprint_of(table)
        put(planner.lake, table, 2, fingerprint=mark if table == "candidates" else "of other inputs")

    def written(step: str, force: bool = False) -> dict:
        run_step(Planner(config), step, DAY, arguments(config, dry_run=True, force=force), encode)
        return json.loads(capsys.readouterr().out)["would_write"]

    scores = planner.lake.open("pair_scores")
    (old,) = scores.select(start=DAY, end=DAY)
    assert written("score_candidates")["pair_scores"] == {
        "how": "replace", "where": f"dt = '{DAY}'", "version": scores.version, "files": 1, "rows": 3, "bytes": old.size,
    }  # fmt: skip
    assert {t: w["how"] for t, w in written("ingest").items()} == {
        "quarantine": "replace", "impressions": "replace", "candidates": "keep", "interactions": "replace",
        "items": "merge",
    }  # fmt: skip
    assert written("ingest", force=True)["candidates"]["how"] == "replace"
    assert written("generate_anchors")["interest_anchors"]["how"] == "merge"
    assert written("optimize")["candidates"]["how"] == "keep"  # one file
    put(planner.lake, "items", 4, file_rows=2)
    assert written("optimize")["items"]["how"] == "compact"
    assert [*written("report").values()] == [{"how": "replace", "bytes": 0}]


def test_a_dry_run_of_a_blocked_step_is_an_answer_not_a_failure(config, tmp_path, capsys):
    before = tree(tmp_path)
    assert run_step(Planner(config), STEP, DAY, arguments(config, dry_run=True), encode) == "planned"
    assert json.loads(capsys.readouterr().out)["state"] == "blocked"
    assert tree(tmp_path) == before


# ---- the context -----------------------------------------------------------------------------------------------


def test_the_context_reads_what_the_state_pinned(ready):
    planner = Planner(ready)
    state = planner.state(__import__("gpl_core.graph.steps", fromlist=["x"]).find_step(STEP), DAY)
    context = StepContext(planner, STEP, DAY, state, "run-1")
    put(planner.lake, "items", 2, seed=1)
    assert context.snapshot("items").read().num_rows == 3
    assert context.has("items")
    assert not context.has("truth")
    with pytest.raises(MissingInputError, match="table truth does not exist"):
        context.snapshot("truth")


def test_marks_name_the_slice_of_a_dated_table_and_all_of_another(ready):
    state = StepState("absent", "", "fp", {}, "afp")
    context = StepContext(Planner(ready), STEP, DAY, state, "run-1")
    settings = settings_of(find_step(STEP), ready)

    def mark(name: str, **details: object) -> SliceMark:
        origin = {"settings": settings, "inputs": {name: {}}}
        return SliceMark(STEP, {name: "fp"}, "run-1", {**details, "origin": origin})

    assert context.mark("pair_scores") == mark("2026-01-03")
    assert context.mark("item_embeddings", {"a": 1}) == mark("*", a=1)
    context.states = {d: StepState("absent", "", f) for d, f in ((date(2026, 1, 1), "x"), (date(2026, 1, 2), "y"))}
    assert context.mark("pair_scores").slices == {"2026-01-01": "x", "2026-01-02": "y"}
    assert context.mark("item_sids").slices == {"*": "fp"}


def test_a_forced_artifact_gets_a_version_of_its_own(ready):
    state = StepState("done", "", "fp", {}, "afp")
    given = (Planner(ready), "train_tokenizer", DAY, state)
    assert StepContext(*given, "run-1").artifact_digest == "afp"
    forced = {StepContext(*given, r, force=True).artifact_digest for r in ("run-1", "run-2")}
    assert len(forced | {"afp"}) == 3


def test_what_a_forced_run_published_is_in_force_and_done(tmp_path):
    toy = Toy(small_config(tmp_path))
    days = [DAY + i * ONE for i in range(-1, 3)]
    toy.raw(days)
    toy.run("ingest", days[0])
    toy.run_pending(days[1:3])
    for step in reversed([s for s in STEPS if s.publishes]):  # each before what it is built on changes
        planner = toy.planner
        state = planner.state(step, DAY)
        before = planner.artifacts.in_force(step.publishes, step.trained_through(DAY) + ONE)
        forced = StepContext(planner, step.name, DAY, state, "run-1", force=True)
        (tmp_path / "bundle").mkdir(exist_ok=True)
        (tmp_path / "bundle" / "weights.json").write_text("1")
        lineage = {key: forced.artifact(kind).version for kind, key in step.follows.items()}
        made = forced.publish(tmp_path / "bundle", lineage, {})
        assert made.version == forced.artifact_version != before.version
        assert toy.planner.artifacts.in_force(step.publishes, made.trained_through + ONE).version == made.version
        assert (found := toy.state(step.name, DAY)).status == "done", found.reason


# ---- the record ------------------------------------------------------------------------------------------------


def note(config, status: str = "done", error: BaseException | None = None, run_id: str = "r") -> None:
    JobRun(Planner(config).lake, STEP, DAY, run_id).end(status, Counts(), error)


def test_two_runs_of_the_same_step_and_date_are_both_recorded(config):
    note(config)
    threads = [threading.Thread(target=note, args=(config,), kwargs={"run_id": f"r{i}"}) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = job_runs(config)
    assert [r["attempt"] for r in rows] == [1, 2, 3, 4, 5]
    assert {r["run_id"] for r in rows} == {"r", "r0", "r1", "r2", "r3"}


@pytest.mark.parametrize(
    ("meanwhile", "force", "conflict"),
    [
        pytest.param(0, False, False, id="the same work"),
        pytest.param(1, False, True, id="from newer inputs"),
        pytest.param(0, True, True, id="forced, so that a fingerprint proves nothing"),
    ],
)
def test_a_run_that_another_has_overtaken_ends_as_a_noop_or_says_so(ready, meanwhile, force, conflict):
    def overtaken(context: StepContext) -> None:
        if meanwhile:
            put(context.lake, "items", 2, seed=1)
        assert run_step(Planner(ready), STEP, DAY, arguments(ready, run_id="other", force=force), encode) == "done"
        encode(context)

    def run() -> str:
        return run_step(Planner(ready), STEP, DAY, arguments(ready, force=force), overtaken)

    if conflict:
        with pytest.raises(ConflictError, match=r"item_embeddings: slice \* was written by another run"):
            run()
    else:
        assert run() == "noop"
    assert Planner(ready).snapshot("item_embeddings").version == 1
    ends = {(r["run_id"], r["status"], r["error_class"]) for r in job_runs(ready)}
    lost = ("run-1", "failed", "ConflictError") if conflict else ("run-1", "noop", "")
    assert ends == {("other", "done", ""), lost}


def test_a_record_that_cannot_be_written_does_not_hide_the_error_of_the_step(ready, monkeypatch, capsys):
    planner = Planner(ready)

    def full(*given, **more):
        raise OSError("disk full")

    monkeypatch.setattr(planner.lake, "create", full)

    def fails(context: StepContext) -> None:
        raise GateError("the real reason")

    with pytest.raises(GateError, match="the real reason"):
        run_step(planner, STEP, DAY, arguments(ready), fails)
    assert json.loads(capsys.readouterr().out)["error_message"] == "the real reason"


def test_a_record_that_cannot_be_written_fails_a_run_that_went_well(ready, monkeypatch):
    planner = Planner(ready)
    with pytest.raises(OSError, match="disk full"):
        run_step(planner, STEP, DAY, arguments(ready), lambda context: monkeypatch.setattr(
            planner.lake, "create", lambda *given: (_ for _ in ()).throw(OSError("disk full"))))  # fmt: skip


@pytest.mark.parametrize("message", ["", "ключ ☕\nsecond line", "x" * 10_000])
def test_any_error_message_fits_the_table(config, message):
    note(config, "failed", ValueError(message))
    (row,) = job_runs(config)
    assert row["error_message"] == message[:4000]


# ---- dates that fail -------------------------------------------------------------------------------------------


def test_failures_are_passed_by_until_there_is_one_too_many(capsys, tmp_path):
    errors = {DAY: MissingInputError("no slice"), DAY + ONE: GateError("dead codes")}
    tried = []

    def run_one(name, dates):
        tried.append((name, *dates))
        if dates[0] in errors:
            raise errors[dates[0]]

    days = (DAY, DAY + ONE, DAY + 2 * ONE)
    args = StepArguments(small_config(tmp_path), days, "r", max_failures=2)
    assert run_steps(("a", "b"), args, run_one) == 4, "the first one's code"
    assert tried == [*(("a", d) for d in days), ("b", days[2])]
    assert capsys.readouterr().err == "error: no slice\nerror: dead codes\n"
    errors[days[2]] = ValueError("third")
    with pytest.raises(ValueError, match="third"):
        run_steps(("a",), args, run_one)
    assert run_steps((), args, run_one) == 0


def test_a_range_leaves_out_the_dates_to_skip(tmp_path):
    given = ["--config", str(config_file(tmp_path)), "--start-date", "2026-01-03", "--end-date", "2026-01-06"]
    args = parse_arguments("x", [*given, "--skip-date", "2026-01-04", "--max-failures", "2"])
    assert ([d.day for d in args.dates], args.max_failures) == ([3, 5, 6], 2)
    with pytest.raises(UsageError, match=r"--max-failures: '-1' is not a number; expected 0 or more"):
        parse_arguments("x", [*given, "--max-failures=-1"])


# ---- leaving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("u"), 2), (GateError("g"), 3), (MissingInputError("m"), 4), (ValueError("v"), 1)]
)
def test_the_exit_code_and_the_message_for_people(error, code, capsys):
    assert exit_with(error) == code
    said = capsys.readouterr()
    assert said.out == ""
    if code > 1:
        assert said.err == f"error: {error}\n"
