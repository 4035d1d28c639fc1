"""Views for analysts: one SQL file each in `schemas/views/`, in SQL that both Spark and delta-rs' engine understand.

A file opens with comment lines: a description, then `--   column: meaning` for every column; a SELECT follows. Tables
and other views are named without a database.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib import resources
from itertools import takewhile

from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, UsageError
from gpl_core.lakehouse.statements import names_in, parse_query

_COLUMN = re.compile(r"--   (\w+): (.+)")


@dataclass(frozen=True)
class View:
    """One view."""

    name: str
    description: str
    columns: tuple[tuple[str, str], ...]  # (name, meaning) in the order of the SELECT
    sql: str  # the SELECT alone
    reads: tuple[str, ...]  # tables and views that it reads, in name order


@cache
def all_views() -> dict[str, View]:
    """Every shipped view by name, in an order in which a view comes after those it reads."""
    files = [f for f in (resources.files("gpl_core") / "schemas" / "views").iterdir() if f.name.endswith(".sql")]
    texts = {f.name.removesuffix(".sql"): f.read_text(encoding="utf-8") for f in files}
    found = {name: parse_view(texts[name], name, texts.keys()) for name in sorted(texts)}
    order = TopologicalSorter({v.name: [n for n in v.reads if n in found] for v in found.values()})
    return {name: found[name] for name in order.static_order()}


def parse_view(text: str, name: str, views: Iterable[str] = ()) -> View:
    """Parse one view's file; ContractError without a description, columns or one SELECT. `views`: what it may read."""
    head = list(takewhile(lambda line: line.startswith("--"), text.splitlines()))
    columns = tuple((m[1], m[2]) for line in head if (m := _COLUMN.fullmatch(line)))
    description = " ".join(line.removeprefix("--").strip() for line in head if not _COLUMN.fullmatch(line))
    sql = "\n".join(text.splitlines()[len(head) :]).strip()
    try:
        names = names_in(parse_query(sql))
    except UsageError:
        names = None
    if not description or not columns or names is None:
        raise ContractError(
            f"view {name}: expected a description, '--   column: meaning' lines and one SELECT in "
            f"schemas/views/{name}.sql"
        )
    known = names & {*all_contracts(), *views}
    return View(name, description, columns, sql, tuple(sorted(known)))
