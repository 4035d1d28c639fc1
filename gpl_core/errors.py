"""One root exception and a few typed subclasses, each with the process exit code it stands for: docs/operations.md."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Sequence


class GplError(Exception):
    """Root of every error that this project raises on purpose; `exit_code` is what its process exits with."""

    exit_code = 1


class UsageError(GplError):
    """Wrong arguments or configuration."""

    exit_code = 2


class ContractError(GplError):
    """Data or a schema that violates the contract of a table."""

    exit_code = 3


class GateError(ContractError):
    """A quality gate refused to publish."""


class QuarantineError(ContractError):
    """More rows were quarantined than the configuration allows."""


class LineageError(ContractError):
    """Two inputs were made with different versions of the same artifact."""


class ConflictError(ContractError):
    """Another run wrote the same slice at the same time."""


class MissingInputError(GplError):
    """An input table, slice or artifact that the step needs does not exist."""

    exit_code = 4


def counted(number: int, noun: str) -> str:
    """`1 problem`, `2 problems`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(values: Sequence[object], most: int = 5) -> str:
    """The first of `values`, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """The end of a message about the unknown `name`: the closest matches among `known`; "" if there are none."""
    close = difflib.get_close_matches(name, list(known), count)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# Faults of the machine or of a file. Native libraries raise their own error types for these, so only the message text
# identifies the cause.
_CAUSES: tuple[tuple[type[GplError], tuple[str, ...], str], ...] = (
    (
        GplError, tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT))),
        "free up space under lakehouse.root and in the temporary folder (TMPDIR), or move them to another disk, then "
        "run the same command again: finished work is kept",
    ),
    (
        UsageError,
        (*map(os.strerror, (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)), "[DELTA_CANNOT_CREATE_LOG_PATH]"),
        "correct lakehouse.root (or the given path), or its permissions",
    ),
    (
        UsageError, ("resolve host", "failed to lookup address", "UnknownHostException"),
        "correct AWS_ENDPOINT_URL, the region or the bucket's name",
    ),
    (UsageError, ("URL scheme is not allowed",), "set AWS_ALLOW_HTTP=true for an AWS_ENDPOINT_URL without TLS"),
    (GplError, ("Generic S3 error", "AWS Error"), "check the object store, its credentials and AWS_ENDPOINT_URL"),
    (
        ContractError, ("[FAILED_READ_FILE", "Parquet error", "Parquet argument error"),
        "restore that file from a copy, or rewrite its slice: run the step that wrote it with --force",
    ),
)  # fmt: skip


def plain(error: BaseException) -> str:
    """The text of `error`, with the colored multi-line chain of causes from delta-rs joined into one line."""
    return re.sub("\\s*\x1b\\[31m↳\x1b\\[0m ", ": ", str(error)).strip()


def classified(error: BaseException) -> BaseException:
    """`error`, or a GplError in its place if its text names one of `_CAUSES`."""
    if isinstance(error, GplError):
        return error
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else plain(error)
    for kind, phrases, remedy in _CAUSES:
        if line := next((line for line in text.splitlines() if any(p in line for p in phrases)), ""):
            return kind(f"{line.strip(' :')}; {remedy}")
    return error


def exit_code_of(error: BaseException) -> int:
    """The process exit code for `error`: its own for a GplError, otherwise 1."""
    error = classified(error)
    return error.exit_code if isinstance(error, GplError) else 1
