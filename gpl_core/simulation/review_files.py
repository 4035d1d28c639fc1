"""Reads the two files of a review data set; anything unexpected is refused, naming file, line and field."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from gpl_core.errors import ContractError, MissingInputError, counted
from gpl_core.simulation.rows import CatalogItem, NotEmpty

SPLITS = ("train", "valid", "test")
_SHOWN_PROBLEMS = 20

Record = TypeVar("Record")


@dataclass(frozen=True)
class ReviewUser:
    """One user's events, oldest first: (number of the item, split) with splits in the order train, valid, test."""

    user_id: str
    items: tuple[int, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Reviews:
    """Both files, checked. `digest` is a hash of their contents."""

    items: tuple[CatalogItem, ...]
    users: tuple[ReviewUser, ...]
    digest: str


@dataclass(frozen=True)
class _Event:
    item_id: str
    split: Literal["train", "valid", "test"]


@dataclass(frozen=True)
class _Sequence:
    """One line of the sequences file."""

    user_id: NotEmpty
    events: Annotated[list[_Event], Field(min_length=1)]


def read_reviews(items_path: str | Path, sequences_path: str | Path) -> Reviews:
    """Read and check `items_path` and `sequences_path` (JSON lines, gzipped when the name ends in .gz).

    Items need item_id (unique) and title; description, brand and category may be empty. Sequences need user_id
    (unique) and events of known items, each with its split, train before valid before test. Unknown fields are ignored.
    ContractError lists up to twenty problems, each with file, line and field; MissingInputError without a file.
    """
    items_path, sequences_path = Path(items_path), Path(sequences_path)
    problems: list[str] = []
    items = tuple(item for _, item in _records(items_path, CatalogItem, "item_id", problems))
    numbers = {item.item_id: number for number, item in enumerate(items)}
    users = tuple(_users(sequences_path, numbers, problems))
    if not problems and not (items and users):
        problems.append(f"{sequences_path if items else items_path}: no line, expected at least one")
    if problems:
        more = f"\n… and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ContractError(
            f"the review files have {counted(len(problems), 'bad line')}; correct them and import "
            "again, nothing was written:\n" + "\n".join(problems[:_SHOWN_PROBLEMS]) + more
        )
    digest = hashlib.sha256(items_path.read_bytes() + b"|" + sequences_path.read_bytes()).hexdigest()[:16]
    return Reviews(items, users, digest)


def _users(path: Path, numbers: dict[str, int], problems: list[str]) -> Iterator[ReviewUser]:
    for line, sequence in _records(path, _Sequence, "user_id", problems):
        before, latest = len(problems), 0
        for position, event in enumerate(sequence.events):
            order, field = SPLITS.index(event.split), f"events[{position}]"
            if event.item_id not in numbers:
                expected = "expected an item_id of the items file"
                problems.append(_problem(path, line, f"{field}.item_id", event.item_id, expected))
            if order < latest:
                expected = f"expected no earlier split after '{SPLITS[latest]}'"
                problems.append(_problem(path, line, f"{field}.split", event.split, expected))
            latest = max(latest, order)
        if len(problems) == before:
            items = tuple(numbers[event.item_id] for event in sequence.events)
            yield ReviewUser(sequence.user_id, items, tuple(event.split for event in sequence.events))


def _records(path: Path, kind: type[Record], key: str, problems: list[str]) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of every line that holds a `kind` with a `key` of its own; others are problems."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; pass the JSON-lines file of the review data set")
    reader, seen, number = TypeAdapter(kind), dict[str, int](), 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = reader.validate_json(line, strict=True)
                except ValidationError as error:
                    for fault in error.errors():
                        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"])
                        problems.append(_problem(path, number, field.lstrip("."), fault["input"], fault["msg"]))
                    continue
                value = getattr(record, key)
                if value in seen:
                    problems.append(_problem(path, number, key, value, f"expected unique; line {seen[value]} has it"))
                    continue
                seen[value] = number
                yield number, record
    except (OSError, EOFError, zlib.error) as error:  # a broken or cut gzip file
        problems.append(f"{path}:{number + 1}: cannot be read on from here ({error})")


def _problem(path: Path, line: int, field: str, value: object, message: str) -> str:
    return f"{path}:{line}: field '{field}' is {str(value)[:60]!r}: {message}"
