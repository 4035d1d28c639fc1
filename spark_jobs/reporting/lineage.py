"""The lineage of a run date as a drawing: the versions that its steps read and wrote, by their rows in `job_runs`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gpl_core.contracts.contract import load_contract
from gpl_core.graph.steps import STEPS, Step

PLATFORM = "platform"
_WIDTH, _LINE, _HEAD, _GAP = 350, 18, 32, 26  # pixels: of a box, a line in it, its head, and between boxes
# The page styles it by these classes, so that it follows the page's theme.
_SVG = """<svg class="lineage" role="img" viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" \
height="{{ height }}"><title>Lineage</title>
<defs><marker id="lineage-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0 L8 4 L0 8 z"></path></marker></defs>
{% for path in paths %}
<path class="edge" d="{{ path }}" marker-end="url(#lineage-tip)"></path>
{% endfor %}
{% for box in boxes %}
<g transform="translate({{ box.x }} {{ box.y }})"><rect width="{{ box.width }}" height="{{ box.height }}" rx="6"></rect>
<text class="name" x="12" y="21">{{ box.node.name }}</text>
{% for name, version in box.node.outputs %}
<text x="12" y="{{ box.line * loop.index + 22 }}">{{ name }}</text>
<text x="{{ box.width - 12 }}" y="{{ box.line * loop.index + 22 }}" text-anchor="end">{{ version }}</text>
{% endfor %}
</g>
{% endfor %}
</svg>"""


@dataclass(frozen=True)
class Node:
    """One step, or the platform.

    Attributes:
        outputs: (table or artifact, version): the one that this date's steps read, or that was written if none did.
        parents: the nodes it reads from, but those that a longer way leads to as well.
    """

    name: str
    outputs: tuple[tuple[str, str], ...]
    parents: tuple[str, ...] = ()


def inputs_of(run: Mapping[str, Any]) -> dict[str, str]:
    """Input -> version of one run of `report_data.step_runs`: of a table as `@4`, of an artifact as it is called."""
    return {k.removeprefix("artifact:"): _told(v["version"]) for k, v in sorted(json.loads(run["inputs"]).items())}


def _told(version: int | str) -> str:
    return f"@{version}" if isinstance(version, int) else version


def nodes(runs: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> list[Node]:
    """The graph's steps with the versions of one date, in the graph's order; steps without any are left out.

    Args:
        runs: the date's runs, one per step.
        known: output -> version, where the runs do not tell: `encoder_version`, `preranker`.
    """
    found = {
        name.removeprefix("artifact:"): {_told(entry.get("version", entry.get("after")))}
        for run in runs for name, entry in json.loads(run["outputs"]).items()
    }  # fmt: skip
    read: dict[str, set[str]] = {}
    for run in runs:
        for name, version in inputs_of(run).items():
            read.setdefault(name, set()).add(version)
    found |= read | {name: {version} for name, version in known.items()}

    def outputs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
        return tuple((n, ", ".join(sorted(found[n], key=lambda v: (len(v), v)))) for n in names if n in found)

    raw = dict.fromkeys(r.table for s in STEPS for r in s.reads if load_contract(r.table).owner == PLATFORM)
    made = [Node(PLATFORM, outputs(list(raw)))]
    above: dict[str, set[str]] = {PLATFORM: set()}
    for step in STEPS:
        inputs = {*(r.table for r in step.reads), *step.uses}
        # What a later step writes is looked up in a cache: that is no lineage, and would be a circle.
        parents = {n.name for n in made if inputs & {name for name, _ in n.outputs}}
        above[step.name] = parents.union(*(above[p] for p in parents))
        near = [n.name for n in made if n.name in parents and not any(n.name in above[p] for p in parents)]
        made.append(Node(step.name, outputs(_outputs(step)), tuple(near)))
    return [n for n in made if n.outputs]


def _outputs(step: Step) -> list[str]:
    tables = [t for t in (*step.writes, *step.also_writes) if load_contract(t).owner == step.name]
    return [*tables, *filter(None, (step.stamp, step.publishes))]


def draw(found: Sequence[Node]) -> Markup:
    """The nodes as inline SVG, from the top down; a node stands below all it reads from, a long arrow keeps its lane.

    Args:
        found: in an order where every parent stands before its children.
    """
    layer: dict[str, int] = {}
    for node in found:
        layer[node.name] = 1 + max((layer[p] for p in node.parents), default=-1)
    last = {n.name: max((layer[c.name] for c in found if n.name in c.parents), default=layer[n.name]) for n in found}
    lane: dict[str, int] = {}
    for node in sorted(found, key=lambda n: layer[n.name]):
        here = layer[node.name]
        taken = {lane[n] for n in lane if layer[n] == here or layer[n] < here < last[n]}
        lane[node.name] = next(i for i in range(len(found)) if i not in taken)

    tall = [
        max(_HEAD + _LINE * len(n.outputs) for n in found if layer[n.name] == i) for i in range(max(layer.values()) + 1)
    ]
    top = [sum(tall[:i]) + _GAP * i for i in range(len(tall))]
    boxes = [
        {"node": n, "x": 1 + lane[n.name] * (_WIDTH + _GAP), "y": 1 + top[layer[n.name]], "width": _WIDTH,
         "height": _HEAD + _LINE * len(n.outputs), "line": _LINE}
        for n in found
    ]  # fmt: skip
    place = {b["node"].name: b for b in boxes}

    def path(parent: str, child: str) -> str:
        """Straight down the parent's lane, then over to the child in the gap above it."""
        start, end = place[parent], place[child]
        x, to = start["x"] + _WIDTH / 2, end["x"] + _WIDTH / 2
        y = end["y"]
        return f"M{x} {start['y'] + start['height']} V{y - _GAP} C{x} {y - 6} {to} {y - _GAP} {to} {y}"

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.from_string(_SVG).render(
        boxes=boxes, paths=[path(p, n.name) for n in found for p in n.parents],
        width=2 + (max(lane.values()) + 1) * (_WIDTH + _GAP) - _GAP, height=2 + top[-1] + tall[-1],
    )  # fmt: skip
    return Markup(text)
