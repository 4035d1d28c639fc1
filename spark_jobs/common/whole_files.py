"""Small files beside the tables, written completely or not at all."""

from __future__ import annotations

import uuid

from gpl_core.lakehouse.storage import filesystem


def write_whole(uri: str, data: bytes) -> None:
    """Write `data` to `uri` so that no reader ever sees part of it."""
    fs, path = filesystem(uri)
    if "file" not in fs.protocol:
        fs.pipe_file(path, data)  # an object store shows an object only when it is complete
        return
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    fs.pipe_file(part, data)
    fs.mv(part, path)


def read_text(uri: str) -> str | None:
    """The file's text, None when it does not exist."""
    fs, path = filesystem(uri)
    return fs.cat_file(path).decode() if fs.exists(path) else None
