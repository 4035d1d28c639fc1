"""One root exception and a few typed subclasses, each with the process exit code it stands for.

| code | meaning |
|---|---|
| 0 | done, or a recorded no-op |
| 1 | unexpected failure |
| 2 | usage or configuration |
| 3 | contract, gate or quarantine breach |
| 4 | an input table or artifact is missing |
"""

from __future__ import annotations

import errno
import os


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


_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def classified(error: BaseException) -> BaseException:
    """`error`, or a GplError in its place: UsageError if a path cannot be used, GplError if a disk is full."""
    # Libraries in other languages have errors of their own for a full disk: only the text says so.
    full = (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error)
    if full and not isinstance(error, GplError):
        return GplError(
            f"{error}; free space there (or move lakehouse.root) and run the same command again: finished work is kept"
        )
    if isinstance(error, OSError) and error.errno in _UNUSABLE and not isinstance(error, GplError):
        return UsageError(
            f"{error.filename}: {error.strerror}; correct lakehouse.root (or the given path), or its permissions"
        )
    return error


def exit_code_of(error: BaseException) -> int:
    """The process exit code for `error`: its own for a GplError, otherwise 1."""
    error = classified(error)
    return error.exit_code if isinstance(error, GplError) else 1
