"""File systems by location: local paths, or `scheme://…` where the scheme's driver is installed."""

from __future__ import annotations

import fsspec

from gpl_core.errors import UsageError


def filesystem(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `location` and the path inside it.

    Raises:
        UsageError: the driver of its scheme is not installed, or there is no such scheme.
    """
    try:
        return fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UsageError(f"location {location}: {error}; pip install its driver, or correct lakehouse.root") from None
