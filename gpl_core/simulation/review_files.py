"""Reading the two files of a review data set; anything unexpected is refused with file, line and field."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpl_core.errors import ContractError, MissingInputError

SPLITS = ("train", "valid", "test")
_SHOWN_PROBLEMS = 20
_REQUIRED = ("item_id", "title")


@dataclass(frozen=True)
class ReviewItem:
    """One item as the file has it; empty texts stay empty."""

    item_id: str
    title: str
    description: str
    brand: str
    category: str


@dataclass(frozen=True)
class ReviewUser:
    """One user's events, oldest first: (number of the item, split) with splits in the order train, valid, test."""

    user_id: str
    items: tuple[int, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Reviews:
    """Both files, checked. `digest` is a hash of their contents."""

    items: tuple[ReviewItem, ...]
    users: tuple[ReviewUser, ...]
    digest: str


def read_reviews(items_path: str | Path, sequences_path: str | Path) -> Reviews:
    """Read and check `items_path` and `sequences_path` (JSON lines, gzipped when the name ends in .gz).

    Items need item_id (unique) and title; description, brand and category may be empty. Sequences need user_id
    (unique) and events of known items, each with its split, train before valid before test. Unknown fields are let be.

    Raises:
        MissingInputError: a file is absent.
        ContractError: lists up to twenty problems, each with file, line and field; nothing of the input is used.
    """
    items_path, sequences_path = Path(items_path), Path(sequences_path)
    problems: list[str] = []
    items = tuple(_items(items_path, problems))
    if not items and not problems:
        problems.append(f"{items_path}: no items")
    numbers = {item.item_id: number for number, item in enumerate(items)}
    users = tuple(_users(sequences_path, numbers, problems))
    if not users and not problems:
        problems.append(f"{sequences_path}: no users")
    if problems:
        more = f"\n… and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ContractError(
            f"the review files have {len(problems)} bad line(s); correct them and import again, nothing was written:\n"
            + "\n".join(problems[:_SHOWN_PROBLEMS])
            + more
        )
    digest = hashlib.sha256(items_path.read_bytes() + b"|" + sequences_path.read_bytes()).hexdigest()[:16]
    return Reviews(items, users, digest)


def _items(path: Path, problems: list[str]) -> Iterator[ReviewItem]:
    seen: dict[str, int] = {}
    for number, record in _records(path, problems):
        found = {name: record.get(name) for name in ("item_id", "title", "description", "brand", "category")}
        texts = {name: value for name, value in found.items() if isinstance(value, str)}
        bad = [name for name in found if name not in texts or (name in _REQUIRED and not texts[name])]
        if bad:
            for name in bad:
                expected = "text, not empty" if name in _REQUIRED else "text"
                problems.append(_problem(path, number, name, found[name], expected))
            continue
        item_id = texts["item_id"]
        if item_id in seen:
            problems.append(_problem(path, number, "item_id", item_id, f"unique; line {seen[item_id]} has it too"))
            continue
        seen[item_id] = number
        yield ReviewItem(**texts)


def _users(path: Path, numbers: dict[str, int], problems: list[str]) -> Iterator[ReviewUser]:
    seen: dict[str, int] = {}
    for line, record in _records(path, problems):
        user, events = record.get("user_id"), record.get("events")
        if not isinstance(user, str) or not user:
            problems.append(_problem(path, line, "user_id", user, "text, not empty"))
            continue
        if user in seen:
            problems.append(_problem(path, line, "user_id", user, f"unique; line {seen[user]} has it too"))
            continue
        seen[user] = line
        if not isinstance(events, list) or not events:
            problems.append(_problem(path, line, "events", events, "a list of at least one event"))
            continue
        items, splits, latest = [], [], 0
        before = len(problems)
        for position, event in enumerate(events):
            field = f"events[{position}]"
            if not isinstance(event, dict):
                problems.append(_problem(path, line, field, event, "an object with item_id and split"))
                continue
            item, split = event.get("item_id"), event.get("split")
            if not isinstance(item, str) or item not in numbers:
                problems.append(_problem(path, line, f"{field}.item_id", item, "an item_id of the items file"))
            elif split not in SPLITS:
                problems.append(_problem(path, line, f"{field}.split", split, f"one of {', '.join(SPLITS)}"))
            elif SPLITS.index(split) < latest:
                problems.append(
                    _problem(path, line, f"{field}.split", split, f"no earlier split after '{SPLITS[latest]}'")
                )
            else:
                latest = SPLITS.index(split)
                items.append(numbers[item])
                splits.append(split)
        if len(problems) == before:
            yield ReviewUser(user, tuple(items), tuple(splits))


def _records(path: Path, problems: list[str]) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of every line that is a JSON object; the others become problems."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; pass the JSON-lines file of the review data set")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line.decode("utf-8"))
                except ValueError as error:
                    problems.append(f"{path}:{number}: not a line of JSON in UTF-8 ({error})")
                    continue
                if isinstance(record, dict):
                    yield number, record
                else:
                    problems.append(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
    except (OSError, EOFError) as error:  # a broken or cut gzip file
        problems.append(f"{path}:{number + 1}: cannot be read on from here ({error})")


def _problem(path: Path, line: int, field: str, value: object, expected: str) -> str:
    return f"{path}:{line}: field '{field}' is {str(value)[:60]!r}, expected {expected}"
