"""Views for analysts: one SQL file each in `schemas/views/`, in words that Spark and delta-rs' engine both read.

A file opens with comment lines: a description, then `--   column: meaning` for every column; a SELECT follows. Tables
and other views are named without a database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError

_QUOTED_OR_COMMENT = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?\*/""", re.S)


@dataclass(frozen=True)
class View:
    """One view.

    Attributes:
        columns: (name, meaning) in the order of the SELECT.
        sql: the SELECT alone.
    """

    name: str
    description: str
    columns: tuple[tuple[str, str], ...]
    sql: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Tables and views that it reads, in name order."""
        return tuple(sorted(words(self.sql) & (set(all_contracts()) | _view_names())))


def words(sql: str) -> set[str]:
    """The words of `sql` in lower case, strings and comments left out; quoted identifiers count."""
    return {w.lower() for w in re.findall(r"[A-Za-z_]\w*", code_of(sql))}


def code_of(sql: str) -> str:
    """`sql` without comments, its strings empty, its quoted identifiers as they are."""
    return _QUOTED_OR_COMMENT.sub(lambda m: {"'": "''", "-": " ", "/": " "}.get(m[0][0], m[0]), sql)


@cache
def all_views() -> dict[str, View]:
    """Every shipped view by name; a view stands after those it reads."""
    folder = resources.files("schemas") / "views"
    found = {n: parse_view((folder / f"{n}.sql").read_text(encoding="utf-8"), n) for n in sorted(_view_names())}
    ordered: dict[str, View] = {}

    def place(view: View) -> None:
        for name in view.reads:
            if name in found and name not in ordered:
                place(found[name])
        ordered.setdefault(view.name, view)

    for view in found.values():
        place(view)
    return ordered


@cache
def _view_names() -> frozenset[str]:
    folder = resources.files("schemas") / "views"
    return frozenset(p.name.removesuffix(".sql") for p in folder.iterdir() if p.name.endswith(".sql"))


def parse_view(text: str, name: str) -> View:
    """Parse one view's file.

    Raises:
        ContractError: no description, no columns, or no SELECT.
    """
    lines = text.splitlines()
    head = 0
    while head < len(lines) and lines[head].startswith("--"):
        head += 1
    description: list[str] = []
    columns: list[tuple[str, str]] = []
    for line in lines[:head]:
        column = re.fullmatch(r"--   (\w+): (.+)", line)
        if column:
            columns.append((column[1], column[2]))
        else:
            description.append(line.removeprefix("--").strip())
    sql = "\n".join(lines[head:]).strip()
    if not description or not columns or not re.match(r"(?i)(select|with)\b", sql):
        raise ContractError(
            f"view {name}: expected a description, '--   column: meaning' lines and one SELECT in "
            f"schemas/views/{name}.sql"
        )
    return View(name, " ".join(description), tuple(columns), sql)
