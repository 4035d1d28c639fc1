"""What `gpl plan` prints and `gpl run` starts: launcher commands, built from the graph and the configuration."""

import importlib.util
import os
import shlex
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from gpl_core.config import Config, date_range
from gpl_core.errors import UsageError
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import ONE_DAY, STEPS, Step, find_step

DELTA_PACKAGE = "io.delta:delta-spark_4.0_2.13:4.2.0"
_NAMES_JARS = {"--packages", "--jars", "spark.jars", "spark.jars.packages"}  # spark.jars.ivy and others do not


@dataclass(frozen=True)
class Launch:
    """One process to start, for one step or several consecutive steps of the same launcher."""

    steps: tuple[Step, ...]
    dates: tuple[date, ...]
    bulk_through: date | None = None  # the dates up to this one are history, ingested in one commit per table

    @property
    def label(self) -> str:
        """Its name in progress lines."""
        return ", ".join(s.name for s in self.steps)

    @property
    def launcher(self) -> str:
        """What starts it."""
        return self.steps[0].launcher


@dataclass(frozen=True)
class Source:
    """Where the configuration came from: repeated in every command."""

    config: str
    overrides: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command-line form."""
        return ["--config", self.config, *[a for o in self.overrides for a in ("--set", o)]]


def plan(
    planner: Planner,
    dates: Sequence[date],
    *,
    first: str | None = None,
    only: Sequence[str] = (),
    isolated: bool = False,
) -> list[Launch]:
    """The launches that cover `dates`, in order; consecutive steps of one launcher share one unless `isolated`.

    History is ingested in one commit before run.start_date, or before any first date of a new lakehouse; the day after
    the last date too when its raw slice exists: evaluation of D needs D + 1. UsageError for an unknown step in `first`
    or `only`.
    """
    names = [s.name for s in STEPS]
    for name in [*only, *([first] if first else [])]:
        if command := find_step(name).command:
            raise UsageError(f"{name} is not part of the graph: run it with `{command}`")
    chosen = [s for s in STEPS if not only or s.name in only]
    if first:
        chosen = [s for s in chosen if names.index(s.name) >= names.index(first)]
    launches: list[Launch] = []
    for step in chosen:
        run, covered, bulk_through = planner.config.run, tuple(dates), None
        history = run.history_start if step.takes_history else None
        if history is not None and history < dates[0] and _is_first(planner, step, dates[0]):
            bulk_through = dates[0] - ONE_DAY
            covered = (*date_range(history, bulk_through), *covered)
        if step.takes_day_after:
            covered = (*covered, *_day_after(planner, dates[-1]))
        last = launches[-1] if launches else None
        if last and not isolated and (last.launcher, last.dates) == (step.launcher, covered):
            launches[-1] = Launch((*last.steps, step), covered)
        else:
            launches.append(Launch((step,), covered, bulk_through))
    return launches


def _is_first(planner: Planner, step: Step, day: date) -> bool:
    """Whether `day` is the first run date, or nothing before it is in the output that `step` writes last.

    A run that failed midway has written the others. History that is there is planned once more and found done.
    """
    written = planner.snapshot(step.writes[-1])
    return day == planner.config.run.start_date or written is None or min(written.slices(), default=day) >= day


def _day_after(planner: Planner, last: date) -> tuple[date, ...]:
    following = last + ONE_DAY
    snapshot = planner.snapshot("raw_impressions")
    return (following,) if snapshot is not None and snapshot.may_have(following) else ()


def pending(planner: Planner, launch: Launch, force: bool = False) -> tuple[date, ...]:
    """The dates of `launch` for which at least one of its steps is not done."""
    if force:
        return launch.dates
    return tuple(d for d in launch.dates if any(planner.state(s, d).status != "done" for s in launch.steps))


def command(
    launch: Launch, dates: Sequence[date], source: Source, config: Config, *, run_id: str = "", force: bool = False,
    log_level: str = "", max_failures: int = 0, without: Collection[date] = (),
) -> list[str]:  # fmt: skip
    """The launcher command of `launch` for `dates`, as an argument list.

    `dates` become a range: steps skip what is done in between, and the dates of `without` are excluded by name.
    """
    arguments = source.arguments()
    if len(dates) == 1:
        arguments += ["--run-date", dates[0].isoformat()]
    else:
        arguments += ["--start-date", dates[0].isoformat(), "--end-date", dates[-1].isoformat()]
        left_out = sorted(d for d in without if dates[0] < d < dates[-1])
        arguments += [a for d in left_out for a in ("--skip-date", d.isoformat())]
    arguments += ["--run-id", run_id] if run_id else []
    arguments += ["--force"] if force else []
    arguments += ["--log-level", log_level] if log_level else []
    arguments += ["--max-failures", str(max_failures)] if max_failures and len(dates) > 1 else []
    if launch.bulk_through is not None and dates[0] <= launch.bulk_through:
        arguments += ["--bulk-through", launch.bulk_through.isoformat()]
    script = launch.steps[0].script
    if len(launch.steps) > 1:
        script = f"{script.split('/')[0]}/run.py"
        arguments = ["--steps", ",".join(s.name for s in launch.steps), *arguments]
    if launch.launcher == "spark":
        return spark_submit(config, script, arguments)
    return [tool("deepspeed"), *config.launch.deepspeed, script_path(script), *arguments]


def spark_submit(config: Config, script: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts `script` on Spark, with Delta's package unless the configuration names jars."""
    given = config.launch.spark_submit
    named = _NAMES_JARS & {text.removeprefix("--conf=").partition("=")[0] for text in given}
    jars = [] if named else ["--packages", DELTA_PACKAGE]
    return [tool("spark-submit"), *given, *jars, script_path(script), *arguments]


def _option(given: Sequence[str], name: str) -> str:
    """The value of `--name value` or `--name=value` among `given`; "" without it."""
    for at, text in enumerate(given):
        option, _, value = text.partition("=")
        if option == name:
            return value or "".join(given[at + 1 : at + 2])
    return ""


def shell(arguments: Sequence[str], env: Mapping[str, str]) -> str:
    """The command as one shell line, environment variables first."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in sorted(env.items())), shlex.join(arguments)])


def environment(config: Config) -> dict[str, str]:
    """Environment variables added to ours: this Python for Spark's driver, then those of the configuration.

    By default idle OpenMP threads busy-wait. On shared cores that made training the interest model take four times the
    CPU time, so they sleep. With a local master Spark's ports, its UI's too, are for this machine alone.
    """
    local = _option(config.launch.spark_submit, "--master").startswith("local")
    ours = {"PYSPARK_PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE"}
    return {**ours, **({"SPARK_LOCAL_IP": "127.0.0.1"} if local else {}), **config.launch.env}


def with_free_port(arguments: Sequence[str]) -> list[str]:
    """A local deepspeed command with a free rendezvous port, so that two runs on one machine do not collide."""
    given = {text.partition("=")[0] for text in arguments}
    if Path(arguments[0]).name != "deepspeed" or {"--master_port", "--hostfile", "-H"} & given:
        return list(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [arguments[0], "--master_port", str(port), *arguments[1:]]


def tool(name: str) -> str:
    """The launcher `name`: the one next to the running Python if there is one, otherwise the one on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def script_path(script: str) -> str:
    """Absolute path of an entry point, in the source tree or in the installed package."""
    package, _, name = script.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"package {package} is not installed; pip install the gpl-prerank wheel")
    return os.path.join(next(iter(spec.submodule_search_locations)), name)
