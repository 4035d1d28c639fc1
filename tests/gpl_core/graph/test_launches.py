"""Launcher commands: what an orchestrator would call, made from the graph and the configuration."""

from __future__ import annotations

import shlex
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gpl_core.errors import UsageError
from gpl_core.graph.arguments import parse_arguments
from gpl_core.graph.launches import (
    DELTA_PACKAGE,
    Launch,
    Source,
    command,
    environment,
    pending,
    plan,
    script_path,
    shell,
    tool,
    with_free_port,
)
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS, find_step
from tests.gpl_core.toy import Toy
from tests.support import DAY, ONE, config_file, put, small_config

DATES = (DAY, DAY + ONE)
NAMES = [s.name for s in STEPS]


@pytest.fixture
def planner(tmp_path) -> Planner:
    return Planner(small_config(tmp_path))


def steps_of(launches: list[Launch]) -> list[str]:
    return [s.name for launch in launches for s in launch.steps]


# ---- which launches --------------------------------------------------------------------------------------------


def test_a_plan_holds_every_step_once_in_order(planner):
    launches = plan(planner, DATES)
    assert steps_of(launches) == NAMES
    assert all(launch.dates == DATES for launch in launches)
    for launch in launches:
        assert {s.launcher for s in launch.steps} in ({"spark"}, {"deepspeed"})


def test_consecutive_steps_of_one_launcher_share_a_launch_unless_isolated(planner):
    launches = plan(planner, DATES)
    assert [launch.label for launch in launches if len(launch.steps) > 1] == [
        "encode_items, train_tokenizer, assign_sids", "samples, sequences",
        "fit_calibrator, pseudo_labels, training_feed",
    ]  # fmt: skip
    assert all(a.launcher != b.launcher for a, b in pairwise(launches)), "no two of them could be one"
    assert [len(launch.steps) for launch in plan(planner, DATES, isolated=True)] == [1] * len(STEPS)


@pytest.mark.parametrize("first", NAMES)
def test_from_begins_with_the_step_and_only_keeps_the_order(planner, first):
    assert steps_of(plan(planner, DATES, first=first)) == NAMES[NAMES.index(first) :]
    assert steps_of(plan(planner, DATES, only=["samples", first])) == sorted({"samples", first}, key=NAMES.index)


@pytest.mark.parametrize("given", [{"first": "evaluate_truth"}, {"only": ["evaluate_truth"]}])
def test_the_judge_is_not_of_the_graph(planner, given):
    with pytest.raises(UsageError, match="gpl judge"):
        plan(planner, DATES, **given)


@pytest.mark.parametrize("given", [{"first": "smaples"}, {"only": ["samples", "smaples"]}])
def test_an_unknown_step_is_refused(planner, given):
    with pytest.raises(UsageError, match="no step 'smaples'"):
        plan(planner, DATES, **given)


def test_history_is_ingested_in_one_go_before_the_first_date(tmp_path):
    planner = Planner(small_config(tmp_path, {"run": {"history_start": (DAY - 3 * ONE).isoformat()}}))
    first, *rest = plan(planner, DATES)
    assert (first.label, first.bulk_through) == ("ingest", DAY - ONE)
    assert first.dates == (*(DAY - i * ONE for i in (3, 2, 1)), *DATES)
    assert not any(launch.bulk_through for launch in rest)
    assert "--bulk-through" not in command(first, DATES, Source("quickstart"), planner.config), "history is done"
    later = plan(planner, DATES[1:])
    assert (later[0].dates[0], later[0].bulk_through) == (DAY - 3 * ONE, DAY), "nothing was ingested before"
    put(planner.lake, "quarantine", 0, day=DAY)
    put(planner.lake, "impressions", 1, day=DAY)
    later = plan(Planner(planner.config), DATES[1:])
    assert later[0].bulk_through == DAY, "a run that failed midway leaves it to the next one"
    put(planner.lake, "interactions", 1, day=DAY)
    later = plan(Planner(planner.config), DATES[1:])
    assert (later[0].dates, later[0].bulk_through) == (DATES[1:], None), "a later date has its history already"


def test_the_day_after_is_ingested_when_it_is_there(planner):
    assert plan(planner, DATES)[0].dates == DATES
    put(planner.lake, "raw_impressions", 1, day=DATES[-1] + ONE)
    launches = plan(Planner(planner.config), DATES)
    assert launches[0].dates == (*DATES, DATES[-1] + ONE)
    assert {launch.dates for launch in launches[1:]} == {DATES}


def test_pending_are_the_dates_with_a_step_that_is_not_done(tmp_path):
    toy = Toy(small_config(tmp_path))
    toy.raw([DAY, DAY + ONE])
    toy.run("ingest", DAY)
    toy.run("ingest", DAY + ONE)
    toy.run("samples", DAY)
    both = Launch((find_step("ingest"), find_step("samples")), DATES)
    assert pending(toy.planner, both) == (DAY + ONE,)
    assert pending(toy.planner, Launch((find_step("ingest"),), DATES)) == ()
    assert pending(toy.planner, both, force=True) == DATES
    toy.write("raw_candidates", DAY)
    assert pending(toy.planner, both) == DATES


# ---- their commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [True, False])
def test_every_command_starts_with_its_launcher_and_its_arguments_parse(tmp_path, isolated):
    path = config_file(tmp_path, {"run": {"history_start": (DAY - 2 * ONE).isoformat()}})
    config = small_config(tmp_path, {"run": {"history_start": (DAY - 2 * ONE).isoformat()}})
    source = Source(str(path), ("anchors.count=3", "prerank.seeds=[1, 2]"))
    for launch in plan(Planner(config), DATES, isolated=isolated):
        arguments = command(launch, launch.dates, source, config, run_id="r1", force=True)
        spark = launch.steps[0].launcher == "spark"
        assert Path(arguments[0]).name == ("spark-submit" if spark else "deepspeed")
        at = next(i for i, a in enumerate(arguments) if a.endswith(".py"))
        assert Path(arguments[at]).is_file()
        parsed = parse_arguments("x", arguments[at + 1 :], several=len(launch.steps) > 1)
        assert (parsed.dates, parsed.run_id, parsed.force) == (launch.dates, "r1", True)
        assert parsed.bulk_through == launch.bulk_through
        assert (parsed.config.anchors.count, parsed.config.prerank.seeds) == (3, (1, 2))
        if len(launch.steps) > 1:
            assert parsed.steps == tuple(s.name for s in launch.steps)
            assert Path(arguments[at]).name == "run.py"
        else:
            assert Path(arguments[at]).name == f"{launch.steps[0].name}.py"
        between = arguments[1:at]
        assert between == (
            ["--master", "local[1]", "--packages", DELTA_PACKAGE] if spark else ["--num_accelerators", "1"]
        )  # fmt: skip


@pytest.mark.parametrize(
    "given", [["--packages", "mine"], ["--jars", "mine"], ["--packages=mine"], ["--conf", "spark.jars.packages=mine"]]
)
def test_jars_that_the_configuration_names_are_left_alone(tmp_path, given):
    config = small_config(tmp_path, {"launch": {"spark_submit": given}})
    arguments = command(Launch((find_step("samples"),), (DAY,)), (DAY,), Source("quickstart"), config)
    assert DELTA_PACKAGE not in arguments
    assert arguments[1 : 1 + len(given)] == given


@pytest.mark.parametrize(
    "given",
    [["--conf", "spark.jars.ivy=/cache"], ["--conf=spark.jars.ivy=/cache"], ["--conf", "spark.jars.repositories=mine"]],
)
def test_a_setting_that_names_no_jars_leaves_deltas_package(tmp_path, given):
    config = small_config(tmp_path, {"launch": {"spark_submit": given}})
    arguments = command(Launch((find_step("samples"),), (DAY,)), (DAY,), Source("quickstart"), config)
    assert arguments[1 : 3 + len(given)] == [*given, "--packages", DELTA_PACKAGE]


def test_one_date_is_a_run_date_several_are_a_range(tmp_path):
    config, launch = small_config(tmp_path), Launch((find_step("samples"),), DATES)
    one = command(launch, (DAY,), Source("quickstart"), config)
    assert one[one.index("--run-date") + 1] == "2026-01-03"
    many = command(launch, DATES, Source("quickstart"), config)
    assert many[-4:] == ["--start-date", "2026-01-03", "--end-date", "2026-01-04"]
    assert {"--force", "--bulk-through", "--run-id"} & {*one, *many} == set()


def test_a_printed_command_is_one_that_a_shell_reads_back():
    arguments = ["spark-submit", "--master", "local[2]", "--set", "prerank.seeds=[1, 2]", "--set", "a=it's $HOME"]
    line = shell(arguments, {"B": "two words", "A": "1"})
    assert shlex.split(line) == ["A=1", "B=two words", *arguments]


def test_the_environment_is_this_python_and_the_configurations(tmp_path):
    config = small_config(tmp_path)
    ours = {"PYSPARK_PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE", "SPARK_LOCAL_IP": "127.0.0.1"}
    assert environment(config) == {"DS_ACCELERATOR": "cpu", **ours}
    config = small_config(tmp_path, {"launch": {"env": {"OMP_WAIT_POLICY": "ACTIVE"}}})
    assert environment(config)["OMP_WAIT_POLICY"] == "ACTIVE", "the configuration wins"


@pytest.mark.parametrize(
    ("master", "local"),
    [(["--master", "local[2]"], True), (["--master=local[*]"], True), (["--master", "yarn"], False), ([], False),
     (["--master", "spark://localhost:7077"], False), (["--master", "yarn", "--jars", "local:/delta.jar"], False)],
)  # fmt: skip
def test_with_a_local_master_sparks_ports_are_for_this_machine_alone(tmp_path, master, local):
    config = small_config(tmp_path, {"launch": {"spark_submit": master}})
    assert ("SPARK_LOCAL_IP" in environment(config)) is local


def test_a_local_deepspeed_gets_a_port_that_is_free():
    arguments = with_free_port(["/bin/deepspeed", "--num_gpus", "8", "x.py"])
    assert [arguments[0], *arguments[3:]] == ["/bin/deepspeed", "--num_gpus", "8", "x.py"]
    assert arguments[1] == "--master_port"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(arguments[2])))


@pytest.mark.parametrize(
    "arguments",
    [["spark-submit", "x.py"], ["deepspeed", "--master_port", "5", "x.py"], ["deepspeed", "--hostfile", "h", "x.py"],
     ["deepspeed", "--master_port=5", "x.py"], ["deepspeed", "--hostfile=h", "x.py"], ["deepspeed", "-H", "h", "x.py"]],
)  # fmt: skip
def test_a_port_or_hosts_that_were_chosen_stay(arguments):
    assert with_free_port(arguments) == arguments


def test_launchers_are_those_of_this_environment():
    assert Path(tool("deepspeed")).parent == Path(sys.executable).parent
    assert tool("no-such-launcher") == "no-such-launcher"


def test_entry_points_are_found_where_the_package_is():
    assert Path(script_path("spark_jobs/session.py")).is_file()
    with pytest.raises(UsageError, match=r"package nowhere is not installed.*wheel"):
        script_path("nowhere/x.py")
