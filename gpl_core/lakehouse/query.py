"""Read-only SQL over the lakehouse without Spark: delta-rs' own engine over pinned versions, views included."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltalake import QueryBuilder
from deltalake.exceptions import DeltaError

from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, GplError, MissingInputError, UsageError, classified, did_you_mean, plain
from gpl_core.lakehouse.engine import register
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.log import open_table
from gpl_core.lakehouse.snapshot import absence
from gpl_core.lakehouse.statements import check_reads
from gpl_core.lakehouse.views import all_views


@dataclass(frozen=True)
class Result:
    """Column names and rows of a query; rows can be taken once."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


class Query:
    """Runs SELECTs over one lakehouse; each table is opened once, when a query first names it."""

    def __init__(self, lake: Lake, versions: Mapping[str, int] | None = None):
        for name in versions or {}:
            if name not in all_contracts():
                raise UsageError(f"--version {name}: no such table{_alike(name, all_contracts())}")
        self.lake = lake
        self.versions: dict[str, int] = {}  # table -> version that it was read at
        self._wanted = dict(versions or {})
        self._views: set[str] = set()
        self._engine = QueryBuilder()

    def run(self, sql: str) -> Result:
        """Run one statement: SELECT, WITH, VALUES, EXPLAIN, DESCRIBE name or SHOW TABLES.

        UsageError when it is something else, or the engine does not understand it; MissingInputError when a table that
        it names, or that its views read, has not been written.
        """
        sql = sql.strip().rstrip(";").strip()
        statement = check_reads(sql)
        if statement.kind == "show":
            return self._tables()
        if statement.kind == "describe":
            return self._columns(*statement.names)
        self._prepare(statement.names)
        try:
            reader: Any = self._engine.execute(sql)
            columns = tuple(f.name for f in reader.schema)
        except DeltaError as error:
            raise self._explained(error) from None
        return Result(columns, self._rows(reader))

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a query as dicts, in memory: for bounded results."""
        result = self.run(sql)
        return [dict(zip(result.columns, row, strict=True)) for row in result.rows]

    def _rows(self, reader: Any) -> Iterator[tuple[Any, ...]]:
        try:
            for batch in reader:
                yield from zip(*(batch.column(i).to_pylist() for i in range(batch.num_columns)), strict=True)
        except Exception as error:  # the engine raises plain ones while it runs
            raise self._explained(error) from None

    def _prepare(self, names: Iterable[str], view: str = "") -> None:
        """Make tables and views known to the engine, a view after what it reads; all that a `view` reads must exist."""
        for name in sorted(names):
            if name in all_views():
                if name not in self._views:
                    self._prepare(all_views()[name].reads, name)
                    self._engine.execute(f"CREATE VIEW {name} AS {all_views()[name].sql}")
                    self._views.add(name)
            elif name in all_contracts() and name not in self.versions and not self.open(name) and view:
                raise MissingInputError(f"view {view} reads table {name}: {self._absence(name)}")

    def open(self, table: str) -> bool:
        """Pin `table` for the queries; False when it does not exist, UnreadableError when Spark alone reads it."""
        if not self.lake.exists(table):
            return False
        wanted = self._wanted.get(table)
        try:
            found = open_table(self.lake.uri(table), wanted)
        except ContractError:
            if wanted is None:
                raise
            uri = self.lake.uri(table)
            newest = open_table(uri).version()
            raise UsageError(
                f"table {table}: version {wanted} cannot be read at {uri}; the newest is {newest}"
            ) from None
        register(self._engine, table, self.lake.uri(table), found)
        self.versions[table] = found.version()
        return True

    def _absence(self, table: str) -> str:
        return absence(all_contracts()[table], self.lake.uri(table))

    def _explained(self, error: Exception) -> Exception:
        message, known = plain(error), classified(error)
        if isinstance(known, GplError):
            return type(known)(f"SQL on {', '.join(sorted(self.versions))}: {known}")
        if missing := re.search(r"table '(?:[\w$]+\.)*(\w+)' not found", message):
            name = missing[1]
            if name in all_contracts():
                return MissingInputError(f"table {name}: {self._absence(name)}")
            return _unknown(name)
        return UsageError("SQL: " + " ".join(message.split())[:2000])

    def _tables(self) -> Result:
        rows: list[tuple[Any, ...]] = []
        for name, contract in all_contracts().items():
            if self.lake.exists(name):
                version = open_table(self.lake.uri(name)).version()
                rows.append((name, "table", version, contract.owner, contract.description))
        rows += [(v.name, "view", None, "", v.description) for v in all_views().values()]
        return Result(("name", "kind", "version", "written_by", "description"), iter(rows))

    def _columns(self, name: str) -> Result:
        if name in all_views():
            return Result(("column", "meaning"), iter(all_views()[name].columns))
        if name not in all_contracts():
            raise _unknown(name)
        columns = all_contracts()[name].columns
        return Result(
            ("column", "type", "null", "meaning", "unit"),
            ((c.name, c.type, "yes" if c.nullable else "no", c.comment, c.unit) for c in columns),
        )


def _unknown(name: str) -> UsageError:
    return UsageError(f"no table or view '{name}'{_alike(name, [*all_contracts(), *all_views()])}")


def _alike(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    return did_you_mean(name, known, 3) or "; `gpl sql 'SHOW TABLES'` lists them"
