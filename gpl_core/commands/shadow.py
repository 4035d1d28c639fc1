"""`gpl shadow`: the configuration of a run with another model or other settings, in tables of its own.

A shadow run is the graph from one step on under `<root>/shadow/<name>`. It reads the results of earlier steps from the
lakehouse itself and never writes there.
"""

import argparse
import re
from collections.abc import Mapping

import yaml

from gpl_core.commands.command import Command, assignments
from gpl_core.conf.sections import Shadow
from gpl_core.config import Config
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import MissingInputError, UsageError
from gpl_core.graph.steps import STEPS, find_step
from gpl_core.lakehouse.artifacts import KINDS, ArtifactStore
from gpl_core.lakehouse.lake import Lake


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="its tables go to lakehouse.root/shadow/NAME")
    parser.add_argument(
        "--from", dest="first", required=True, metavar="STEP", help="first step to run; earlier results are only read"
    )
    parser.add_argument(
        "--use", action="append", default=[], metavar="ARTIFACT=VERSION",
        help="artifact version that the shadow run uses; repeatable",
    )  # fmt: skip


def run(args: argparse.Namespace, config: Config) -> int:
    """Print the configuration as YAML, without the settings that have their default value."""
    expected = f"ARTIFACT=VERSION, ARTIFACT one of {', '.join(KINDS)}"
    use = assignments("--use", args.use, expected)
    if wrong := [kind for kind in use if kind not in KINDS]:
        raise UsageError(f"--use {wrong[0]}: expected {expected}")
    made = shadow_config(config, args.name, args.first, use)
    body = made.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    print(yaml.safe_dump(body, sort_keys=False, allow_unicode=True), end="")
    return 0


def shadow_config(config: Config, name: str, first: str, use: Mapping[str, str]) -> Config:
    """The configuration of a shadow run of the steps from `first` on.

    use: artifact -> the version that is in force in the shadow run, even one that was rolled back.
    """
    house = config.lakehouse
    if house.shadow.of:
        raise UsageError(
            f"{house.root} is a shadow run of {house.shadow.of}; start from the configuration of that lakehouse"
        )
    if not re.fullmatch(r"\w[\w-]*", name):
        raise UsageError(f"--name {name}: expected letters, digits, '_' and '-'")
    if find_step(first) not in STEPS:
        raise UsageError(f"--from {first}: not a step of the graph")
    at = STEPS.index(find_step(first))
    before, own = STEPS[:at], {t for s in STEPS[at:] for t in (*s.writes, *s.also_writes)}
    artifacts = {s.publishes: "" for s in before if s.publishes}
    store = ArtifactStore(house.root)
    for kind, version in use.items():
        user = next((s for s in STEPS if kind in s.uses), None)
        if kind not in artifacts:
            raise UsageError(
                f"--use {kind}: no step before {first} publishes it; those publish {', '.join(artifacts) or 'nothing'}"
            )
        if user in before:
            raise UsageError(f"--use {kind}: the earlier step {user.name} uses it too; begin with --from {user.name}")
        if store.find(kind, version) is None:
            raise MissingInputError(f"artifact {kind}: no version {version}; existing: {store.known(kind)}")
        artifacts[kind] = version
    sources = {"platform", "simulation", *(s.name for s in before)}
    tables = tuple(t for t, c in all_contracts().items() if c.owner in sources and t not in own)
    shadow = Shadow(of=house.root, tables=tables, artifacts=artifacts)
    places = {t: Lake.of(house).uri(t) for t in house.tables if t in tables}
    changed = {"root": f"{house.root}/shadow/{name}", "tables": places, "shadow": shadow}
    return config.model_copy(update={"lakehouse": house.model_copy(update=changed)})


COMMAND = Command(
    "shadow", "print a configuration for a run beside the published one, in separate tables", run, add_arguments,
    examples=("--config shop.yaml --name lower_rate --from fit_calibrator > lower_rate.yaml",),
)  # fmt: skip
