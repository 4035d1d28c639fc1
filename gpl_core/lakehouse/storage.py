"""File systems by location: local paths, `s3://…` through pyarrow's own client, other schemes by their fsspec drivers.

Endpoint and credentials come from the environment, under the names that delta-rs reads too: `AWS_ENDPOINT_URL`,
`AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, or from AWS' default chain.
"""

import os
import tempfile
import uuid
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import S3FileSystem

from gpl_core.errors import UsageError


class ObjectStore(ArrowFSWrapper):
    """S3 for fsspec: an object appears when it is complete; there are no folders, and no listing is cached."""

    protocol = ("s3", "s3a")
    cachable = False  # the client is cached; this follows the environment

    def __init__(self, **kwargs: Any) -> None:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        super().__init__(_client(os.environ.get("AWS_ENDPOINT_URL"), region), **kwargs)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: pyarrow would leave an empty object in each folder's place."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write one object; a page under its type, or a browser would download it."""
        page = {"Content-Type": "text/html; charset=utf-8"} if path.endswith(".html") else None
        with self.fs.open_output_stream(path, compression=None, metadata=page) as out:
            out.write(value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The object, or its bytes `start` to `end`."""
        # For `start` 0 fsspec opens a stream and asks for its position, which a stream does not know.
        found: bytes = super().cat_file(path, start, end, seekable=(start, end) != (None, None), **kwargs)
        return found

    def rm(self, path: str | Sequence[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete one object, several, or all under a prefix."""
        for one in [path] if isinstance(path, str) else path:
            super().rm(one, recursive)


@cache
def _client(endpoint: str | None, region: str | None) -> S3FileSystem:
    return S3FileSystem(endpoint_override=endpoint, region=region)


# Also for readers that open files through fsspec alone: Petastorm, pictures.
fsspec.register_implementation("s3", ObjectStore, clobber=True)


def filesystem(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `location` and the path inside it; UsageError without a driver for its scheme."""
    try:
        # Never from a cached listing: other processes write at the same time.
        return fsspec.core.url_to_fs(location, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UsageError(f"location {location}: {error}; pip install its driver, or correct lakehouse.root") from None


def open_parquet(uri: str) -> Any:
    """A handle for reading; of a local file Arrow's own, because its threads may outlive the interpreter."""
    fs, path = filesystem(uri)
    return pa.OSFile(path) if "file" in fs.protocol else fs.open(path, "rb")


def write_whole(uri: str, data: bytes) -> None:
    """Write `data` to `uri` so that no reader ever sees part of it."""
    fs, path = filesystem(uri)
    if "file" not in fs.protocol:
        fs.pipe_file(path, data)  # an object store shows an object only when it is complete
        return
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        fs.pipe_file(part, data)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def read_text(uri: str) -> str | None:
    """The file's text, None when it does not exist."""
    fs, path = filesystem(uri)
    return fs.cat_file(path).decode(errors="replace") if fs.exists(path) else None


def local_folder(root: str, *parts: str) -> Path:
    """A folder on this machine for what need not outlive it: under work/ of the lakehouse `root` if that is local."""
    if "://" in root:
        name = sha256(root.rstrip("/").encode()).hexdigest()[:16]
        root = os.path.join(tempfile.gettempdir(), f"gpl-{os.getuid()}", name)
    return Path(root, "work", *parts)


def log_folder(root: str) -> Path:
    """Where the output of launches is kept: under the lakehouse `root` if that is local, else the working directory."""
    return Path.cwd() / "logs" if "://" in root else Path(root, "logs")
