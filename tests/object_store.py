"""A bucket on moto's S3 server, a process of its own on loopback: `make test-slow` installs it into .venv-moto."""

from __future__ import annotations

import os
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.documented import ROOT

PROGRAMS = ROOT / ".venv-moto" / "bin"
BUCKET = "lakes"


@contextmanager
def bucket() -> Iterator[str]:
    """`s3://lakes`, empty."""
    with served([PROGRAMS / "moto_server", "-H", "127.0.0.1", "-p", "0"], []) as address:
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
        yield f"s3://{BUCKET}"


@contextmanager
def served(command: list[str | Path], log: list[str]) -> Iterator[str]:
    """The address of the server that `command` starts, which the environment names inside; skips without moto."""
    if not Path(command[0]).exists():
        pytest.skip(f"{command[0]} is not there: make .venv-moto")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "Running on" in line)
        threading.Thread(target=log.extend, args=(process.stderr,), daemon=True).start()  # a full pipe would stop it
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(address).items():
                patch.setenv(name, value)
            yield address
    finally:
        process.terminate()
        process.wait()


def environment(address: str) -> dict[str, str]:
    """What delta-rs, pyarrow and Spark need to reach the server; moto asks nobody who they are."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "NO_PROXY": f"{os.environ.get('NO_PROXY', '')},127.0.0.1",
    }  # fmt: skip
