"""The plan in a scheduler's format: JSON, a shell script, or a file with an Airflow DAG."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources

from gpl_core.config import Config, date_range
from gpl_core.errors import UsageError
from gpl_core.graph.launches import Launch, Source, command, environment, shell
from gpl_core.graph.steps import ONE_DAY

FORMATS = ("shell", "json", "airflow")
_LOGICAL_DATE = "%RUN_DATE%"  # placeholder for the run date in a task's command


def render(form: str, launches: Sequence[Launch], source: Source, config: Config, *, force: bool = False) -> str:
    """The plan as text in `form`, one of FORMATS."""
    if form == "airflow":
        return _airflow(launches, source, config, force)
    commands = [command(launch, launch.dates, source, config, force=force) for launch in launches]
    env = environment(config)
    if form == "shell":
        lines = [(f"# {one.label}", shell(argv, env)) for one, argv in zip(launches, commands, strict=True)]
        return "\n".join(text for pair in lines for text in pair)
    body = [
        {
            "steps": [s.name for s in launch.steps],
            "launcher": launch.launcher,
            "dates": [d.isoformat() for d in launch.dates],
            "argv": argv,
            "env": env,
        }
        for launch, argv in zip(launches, commands, strict=True)
    ]
    return json.dumps(body, indent=1)


def _airflow(launches: Sequence[Launch], source: Source, config: Config, force: bool) -> str:
    """A DAG with one task per launch; Airflow decides the dates, from the first date of the plan on."""
    from jinja2 import Environment, StrictUndefined  # few commands need it

    if not launches:
        raise UsageError("gpl plan --format airflow: no step is left to schedule")
    if force:
        raise UsageError("gpl plan --format airflow: --force would repeat every step in each run; clear tasks instead")
    steps = [step for launch in launches for step in launch.steps]
    # Ingest may start earlier, with history.
    first = max(n.bulk_through + ONE_DAY if n.bulk_through else n.dates[0] for n in launches)
    if all(step.takes_history for step in steps):
        first = max(first, config.run.start_date)
    tasks = {}
    for launch in launches:
        words = command(Launch(launch.steps, (first,)), (first,), source, config)
        words = [_LOGICAL_DATE if word == first.isoformat() else word for word in words]
        tasks["-".join(s.name for s in launch.steps)] = shlex.join(words)
    history = ""
    start = config.run.history_start
    if start is not None and start < first and steps[0].takes_history:
        through = first - ONE_DAY
        dates = tuple(date_range(start, through))
        history = shlex.join(command(Launch((steps[0],), dates, through), dates, source, config))
    name = source.config.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    jinja.filters |= {"repr": repr, "dict": _dict_literal}
    template = (resources.files("gpl_core.graph") / "airflow_dag.jinja").read_text(encoding="utf-8")
    return jinja.from_string(template).render(
        first=(first.year, first.month, first.day), environment=environment(config), history=history, tasks=tasks,
        date=_LOGICAL_DATE, name="gpl_" + re.sub(r"\W", "_", name),
    )  # fmt: skip


def _dict_literal(values: Mapping[str, str]) -> str:
    return "{\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in values.items()) + "}"
