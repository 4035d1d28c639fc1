"""The origin of a result, stored with it: a fingerprint shows that something has changed since, an origin shows what.

An origin has the identity of every input and the value of every setting, both short, because every commit's mark
contains it.
"""

import json
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from gpl_core.config import Config, shaping
from gpl_core.graph.steps import Step
from gpl_core.lakehouse.files import hash_text

Inputs = Mapping[str, Mapping[str, str | int]]
Origin = Mapping[str, Mapping[str, str]]  # "inputs" and "settings": name -> what it is known by
ARTIFACT = "artifact:"
_METHOD = "method"  # in place of a setting's name
_LONGEST = 40  # characters of a setting's value; of a longer one a hash is kept


def shaping_inputs(step: Step, inputs: Inputs, output: str) -> Inputs:
    """Those of `inputs` that shape `output`: one of its tables, or its artifact, which the day after only judges."""
    if output == step.publishes:
        judging = {r.table for r in step.reads if r.scope == "next"}
        return {k: v for k, v in inputs.items() if k not in judging}
    return {k: v for k, v in inputs.items() if k in step.shaped_by.get(output, inputs)}


def identities(inputs: Inputs) -> dict[str, str | int]:
    """What the inputs that make a step stale are known by: neither look-ups nor tables without rows in the scope."""
    return {k: v.get("digest", v["version"]) for k, v in inputs.items() if k.startswith(ARTIFACT) or v.get("digest")}


def settings_of(step: Step, config: Config) -> dict[str, str]:
    """Every setting that shapes the result of `step`, under the name that a configuration gives it; and its method."""
    found = (leaf for path in step.settings for leaf in _leaves(path, attrgetter(path)(config)))
    method = {_METHOD: str(step.method)} if step.method > 1 else {}
    return {name: _short(value) for name, value in found} | method


def origin_of(step: Step, config: Config, inputs: Inputs, output: str) -> dict[str, dict[str, str]]:
    """The origin of `output` of `step`: a table, or the artifact that it publishes."""
    known = identities(shaping_inputs(step, inputs, output))
    short = {k: str(v) if k.startswith(ARTIFACT) else hash_text(str(v))[:8] for k, v in known.items()}
    return {"inputs": short, "settings": settings_of(step, config)}


def changes(then: Origin, now: Origin, *parts: str) -> str:
    """What is different, in words, by input and setting (`parts`: "inputs", "settings"); "" when that is unknown."""
    if not then:
        return ""
    said = []
    for part in parts:
        for name in sorted(then[part].keys() | now[part].keys()):
            was, is_now = then[part].get(name), now[part].get(name)
            if was != is_now:
                said.append((_input if part == "inputs" else _setting)(name, was, is_now))
    return "; ".join(said)


def _input(name: str, then: str | None, now: str | None) -> str:
    if name.startswith(ARTIFACT):
        return f"artifact {name.removeprefix(ARTIFACT)} is {now}, was {then}"
    if then is None or now is None:
        return f"table {name} has {'rows now' if then is None else 'no rows now'}"
    return f"table {name} has changed"


def _setting(name: str, then: str | None, now: str | None) -> str:
    if name == _METHOD:
        return "this release makes it in another way"
    if "#" in ((then or "")[:1], (now or "")[:1]):
        return f"setting {name} has changed"
    return f"setting {name} is {now or 'not set'}, was {then or 'not set'}"


def _leaves(name: str, value: object) -> Iterator[tuple[str, Any]]:
    value = shaping(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key.rstrip('_')}", inner)  # `lambda_` is a setting's name in Python alone
    else:
        yield name, value


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"#{hash_text(text)}"
