"""Read-only SQL over the lakehouse without Spark: delta-rs' own engine over pinned versions, views included."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import DeltaError

from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import MissingInputError, UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.views import all_views, code_of, words

_SHOWN_ROWS = 1000
# Words that begin something that writes, or hide inside something that reads (`EXPLAIN ANALYZE COPY …` does write).
_WRITES = {
    "insert", "update", "delete", "merge", "copy", "create", "drop", "alter", "truncate", "set", "into", "vacuum",
    "optimize", "prepare", "execute", "begin", "commit", "load", "unload", "call", "grant", "revoke",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Column names and rows of a query; rows can be taken once."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


class Query:
    """Runs SELECTs over one lakehouse; each table is opened once, when a query first names it.

    Attributes:
        versions: table -> version that it was read at.
    """

    def __init__(self, lake: Lake, versions: Mapping[str, int] | None = None):
        for name in versions or {}:
            if name not in all_contracts():
                raise UsageError(f"--version {name}: no such table{_alike(name, all_contracts())}")
        self.lake = lake
        self.versions: dict[str, int] = {}
        self._wanted = dict(versions or {})
        self._views: set[str] = set()
        self._engine = QueryBuilder()

    def run(self, sql: str) -> Result:
        """Run one statement: SELECT, WITH, VALUES, EXPLAIN, DESCRIBE name or SHOW TABLES.

        Raises:
            UsageError: it is something else, or the engine does not understand it.
            MissingInputError: a table that it names, or that its views read, has not been written.
        """
        sql = sql.strip().rstrip(";").strip()
        kind = check_reads(sql)
        if kind == "show":
            return self._tables()
        if kind in ("describe", "desc"):
            return self._columns(code_of(sql).split()[-1].strip('`"'))
        self._prepare(words(sql))
        try:
            reader: Any = self._engine.execute(sql)
            columns = tuple(f.name for f in reader.schema)
        except DeltaError as error:
            raise self._explained(str(error)) from None
        return Result(columns, self._rows(reader))

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a query as dicts, in memory: for bounded results."""
        result = self.run(sql)
        return [dict(zip(result.columns, row, strict=True)) for row in result.rows]

    def _rows(self, reader: Any) -> Iterator[tuple[Any, ...]]:
        try:
            for batch in reader:
                yield from zip(*(batch.column(i).to_pylist() for i in range(batch.num_columns)), strict=True)
        except (DeltaError, OSError) as error:
            raise self._explained(str(error)) from None

    def _prepare(self, named: set[str]) -> None:
        for name in sorted(named & set(all_contracts()) - set(self.versions)):
            self._register(name)
        for view in all_views().values():  # in the order of their dependencies
            if view.name in named | _read_by(named) and view.name not in self._views:
                for table in view.reads:
                    if table in all_contracts() and table not in self.versions and not self._register(table):
                        raise MissingInputError(f"view {view.name} reads table {table}: {self._absent(table)}")
                self._engine.execute(f"CREATE VIEW {view.name} AS {view.sql}")
                self._views.add(view.name)

    def _register(self, table: str) -> bool:
        if not self.lake.exists(table):
            return False
        wanted = self._wanted.get(table)
        try:
            found = DeltaTable(self.lake.uri(table), version=wanted)
        except DeltaError as error:
            raise UsageError(
                f"table {table}: version {wanted} cannot be read at {self.lake.uri(table)}; the newest is "
                f"{DeltaTable(self.lake.uri(table)).version()} ({str(error).splitlines()[0]})"
            ) from None
        self._engine.register(table, found)
        self.versions[table] = found.version()
        return True

    def _absent(self, table: str) -> str:
        owner = all_contracts()[table].owner
        where = self.lake.uri(table)
        if owner == "platform":
            return f"there is none at {where}; it is the platform's input: write it, or set lakehouse.tables.{table}"
        return f"there is none at {where}; run the step {owner} first, or correct lakehouse.root"

    def _explained(self, message: str) -> Exception:
        if missing := re.search(r"table '(?:[\w$]+\.)*(\w+)' not found", message):
            name = missing[1]
            if name in all_contracts():
                return MissingInputError(f"table {name}: {self._absent(name)}")
            return UsageError(f"no table or view '{name}'{_alike(name, [*all_contracts(), *all_views()])}")
        return UsageError("SQL: " + " ".join(message.split())[:2000])

    # ---- words about tables --------------------------------------------------------------------------------------

    def _tables(self) -> Result:
        rows: list[tuple[Any, ...]] = []
        for name, contract in all_contracts().items():
            if self.lake.exists(name):
                version = DeltaTable(self.lake.uri(name)).version()
                rows.append((name, "table", version, contract.owner, contract.description))
        rows += [(v.name, "view", None, "", v.description) for v in all_views().values()]
        return Result(("name", "kind", "version", "written_by", "description"), iter(rows))

    def _columns(self, name: str) -> Result:
        if name in all_views():
            return Result(("column", "meaning"), iter(all_views()[name].columns))
        if name not in all_contracts():
            raise UsageError(f"no table or view '{name}'{_alike(name, [*all_contracts(), *all_views()])}")
        columns = all_contracts()[name].columns
        return Result(
            ("column", "type", "null", "meaning", "unit"),
            ((c.name, c.type, "yes" if c.nullable else "no", c.comment, c.unit) for c in columns),
        )


def _read_by(named: set[str]) -> set[str]:
    """Views that the named views read, at any depth."""
    found: set[str] = set()
    for view in reversed(all_views().values()):  # readers before what they read
        if view.name in named | found:
            found |= set(view.reads) & set(all_views())
    return found


def _alike(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else "; `gpl sql 'SHOW TABLES'` lists them"


def check_reads(sql: str) -> str:
    """The first word of `sql` in lower case.

    Raises:
        UsageError: it is not one statement, or not one that only reads.
    """
    code = code_of(sql)
    found = re.match(r"[\s(]*(\w+)", code)
    kind = found[1].lower() if found else ""
    if kind not in ("select", "with", "values", "explain", "describe", "desc", "show"):
        raise UsageError(
            f"gpl sql only reads: SELECT, WITH, VALUES, EXPLAIN, DESCRIBE name or SHOW TABLES; found '{kind or sql}'"
        )
    # A quoted identifier is a name, whatever it says.
    bare = re.sub(r'"[^"]*"|`[^`]*`', " ", code)
    if ";" in bare:
        raise UsageError("gpl sql takes one statement; remove what follows the ';'")
    # What the engine reads as a string and this check does not: E'…\'…' and $tag$…$tag$.
    if re.search(r"\b[eE]'", sql) or "$" in bare:
        raise UsageError("gpl sql takes plain strings only: '…' with '' for a quote")
    if writing := sorted({w.lower() for w in re.findall(r"[A-Za-z_]\w*", bare)} & _WRITES):
        raise UsageError(f"gpl sql only reads; '{writing[0].upper()}' writes (a column of that name: put it in quotes)")
    if kind == "show" and not re.fullmatch(r"(?is)\s*show\s+tables\s*", code):
        raise UsageError("of SHOW, gpl sql knows SHOW TABLES; for columns: DESCRIBE name")
    if kind in ("describe", "desc") and not re.fullmatch(r'(?is)\s*desc(ribe)?\s+(table\s+)?[`"]?\w+[`"]?\s*', code):
        raise UsageError("expected DESCRIBE and the name of one table or view")
    return kind


def quoted(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
