"""Temporary folders that the next process removes if their owner was killed, and on-disk arrays with reserved space."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_PREFIX = "gpl-scratch-"


def scratch_path(name: str) -> Path:
    """Where `scratch_folder(name)` lies, for other processes of this machine."""
    return Path(tempfile.gettempdir(), _PREFIX + name)


@contextmanager
def scratch_folder(name: str = "", parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder, locked while this process lives; those that nobody holds any more are removed first.

    It may be renamed: then it stays.
    """
    folder = scratch_path(name or os.urandom(8).hex())
    if parent is not None:
        folder = parent / folder.name
    for left in folder.parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):  # held, or of another account
            shutil.rmtree(left)
    with ExitStack() as held:
        while True:  # until it is locked and still there: another process may take it for one that was left
            folder.mkdir(mode=0o700, exist_ok=True)
            with suppress(FileNotFoundError), ExitStack() as tried:
                tried.enter_context(_locked(folder, fcntl.LOCK_EX))
                held.push(tried.pop_all())
                break
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the lock of `folder`; FileNotFoundError when another one has taken its place."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, how)
        if not os.path.samestat(os.fstat(handle), folder.lstat()):
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(handle)


def scratch_array(path: Path, kind: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new array in the file `path`, in memory as far as it is used.

    All of its blocks are allocated at once (OSError if there is no space): if the disk filled up later, a signal would
    kill the process without an error message.
    """
    try:
        made = np.lib.format.open_memmap(path, "w+", kind, shape)
        with path.open("rb+") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    except OSError as error:
        error.filename = str(path)
        raise
    return made
