"""Finds and removes a person's id: in columns, in rows stored as JSON, and in messages."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from html import escape

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpl_core.contracts.contract import Contract
from gpl_core.errors import UsageError
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.rewrite import Keep, Mask, Removal, all_but
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem

FORGOTTEN = "[forgotten]"
_MESSAGES: Mapping[str, tuple[str, ...]] = {"job_runs": ("error_message", "details"), "artifact_decisions": ("reason",)}


@dataclass(frozen=True)
class Traces:
    """How a table holds a person: in which columns, which rows, and what comes in their place."""

    columns: list[str]
    mask: Mask
    keep: Keep

    def removals(self, snapshot: Snapshot) -> list[Removal]:
        """The files that hold the person; only the columns concerned are read."""
        counted = [Removal(file, self._rows(snapshot, file), self.keep) for file in snapshot.files]
        return [removal for removal in counted if removal.rows]

    def count(self, snapshot: Snapshot) -> int:
        """The person's rows in any Delta table."""
        return sum(pc.sum(self.mask(rows)).as_py() or 0 for rows in snapshot.scan(self.columns))

    def _rows(self, snapshot: Snapshot, file: DataFile) -> int:
        return sum(pc.sum(self.mask(rows)).as_py() or 0 for rows in snapshot.row_groups([file], self.columns))

    def stand_in(self, uri: str) -> bool:
        """Whether the data file at `uri` holds the person; true for one that cannot be read, as of a killed writer."""
        fs, path = filesystem(uri)
        try:
            with fs.open(path, "rb") as handle:
                groups = pq.ParquetFile(handle)
                return any(
                    pc.any(self.mask(groups.read_row_group(g, columns=self.columns))).as_py()
                    for g in range(groups.num_row_groups)
                )
        except (OSError, pa.ArrowException, KeyError):
            return True


class Person:
    """A user id in every form that tables and messages give it."""

    def __init__(self, user_id: str):
        """Raises UsageError when `user_id` is empty."""
        if not user_id:
            raise UsageError("--user is empty; expected the platform's user id")
        self.user_id = user_id
        forms = {user_id}
        for _ in range(3):  # a row as JSON, in a message, in a JSON line or on a page
            forms |= {write(f) for f in forms for write in (escape, _quoted, partial(_quoted, ascii_only=False))}
        self._forms = frozenset(forms)
        spelled = "|".join(re.escape(f) for f in sorted(forms, key=len, reverse=True))
        # What may as well be a number or a word of JSON is an id only after the name of its column.
        start = r"user_id(?:\W|&#?\w+;){1,20}" if _is_json(user_id) else r"(?<!\w)|(?<=\\[bfnrt])"
        self._pattern = re.compile(rf"({start})(?:{spelled})(?!\w)")

    def is_in(self, text: str) -> bool:
        """Whether `text` names the person."""
        return any(form in text for form in self._forms) and self._pattern.search(text) is not None

    def removed_from(self, text: str) -> str:
        """`text` with something else in the id's place."""
        return self._pattern.sub(rf"\1{FORGOTTEN}", text)

    def traces(self, contract: Contract) -> Traces | None:
        """How the table of `contract` holds the person; None for a table that names nobody."""
        if "user_id" in contract.column_names:
            return _rows_where("user_id", self._is_id)
        if contract.name == "worker_rejects":
            return _rows_where("key", lambda keys: pc.equal(keys, f"user_id={self.user_id}"))
        if contract.name == "quarantine":
            return _rows_where("row_json", lambda rows: _flags(map(self._is_of, rows.to_pylist())))
        if contract.name in _MESSAGES:
            columns = list(_MESSAGES[contract.name])
            return Traces(columns, partial(self._quoting, columns), partial(self._unquoted, columns))
        return None

    def _is_id(self, ids: pa.ChunkedArray) -> pa.Array:
        """Compared as ingest casts an id to text, of any type that a platform's table may have."""
        wanted, is_decimal = pa.scalar(self.user_id), pa.types.is_decimal(ids.type)
        if is_decimal or pa.types.is_floating(ids.type):
            try:
                number = int(self.user_id)
                wanted = pa.scalar(Decimal(number) if is_decimal else number).cast(ids.type)
            except ValueError:  # no whole number, or none that the column can hold
                return _flags([False] * len(ids))
        else:
            ids = ids.cast(pa.string())
        return pc.fill_null(pc.equal(ids, wanted), False)

    def _is_of(self, row: str) -> bool:
        """Whether a row kept as JSON is the person's; so is broken JSON that names them."""
        try:
            found = json.loads(row, parse_int=str, parse_float=_whole).get("user_id")
            return (json.dumps(found) if isinstance(found, bool) else found) == self.user_id
        except (ValueError, AttributeError):
            return self.is_in(row)

    def _quoting(self, columns: list[str], rows: pa.Table) -> pa.Array:
        texts = zip(*(rows[name].to_pylist() for name in columns))
        return _flags(any(self.is_in(text or "") for text in row) for row in texts)

    def _unquoted(self, columns: list[str], rows: pa.Table) -> pa.Table:
        for name in columns:
            texts = [text and self.removed_from(text) for text in rows[name].to_pylist()]
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, rows.schema.field(at), pa.array(texts, rows.schema.field(at).type))
        return rows


def _whole(number: str) -> str:
    """A number of JSON as ingest makes an id of it: `1.2345701E7` is 12345701."""
    exact = Decimal(number)
    return format(exact, ".0f") if exact == exact.to_integral_value() else number


def _rows_where(column: str, which: Callable[[pa.ChunkedArray], pa.Array]) -> Traces:
    def mask(rows: pa.Table) -> pa.Array:
        return which(rows[column])

    return Traces([column], mask, all_but(mask))


def _flags(values: Iterable[bool]) -> pa.Array:
    return pa.array(list(values), pa.bool_())


def _quoted(text: str, ascii_only: bool = True) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
