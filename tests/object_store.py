"""A bucket on moto's S3 server, a process of its own on loopback: `make test-slow` installs it into .venv-moto."""

from __future__ import annotations

import os
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.documented import ROOT

SERVER = ROOT / ".venv-moto" / "bin" / "moto_server"
BUCKET = "lakes"


@contextmanager
def bucket(requests: list[str] | None = None) -> Iterator[str]:
    """`s3://lakes`, reached by what the environment says inside; skips without moto. Its log goes to `requests`."""
    if not SERVER.exists():
        pytest.skip(f"{SERVER} is not there: make .venv-moto")
    process = subprocess.Popen([SERVER, "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(line.split()[-1] for line in process.stderr if "Running on" in line)
        keep = [] if requests is None else requests
        threading.Thread(target=keep.extend, args=(process.stderr,), daemon=True).start()  # a full pipe would stop it
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(address).items():
                patch.setenv(name, value)
            yield f"s3://{BUCKET}"
    finally:
        process.terminate()
        process.wait()


def environment(address: str) -> dict[str, str]:
    """What delta-rs, pyarrow and Spark need to reach the server; moto asks nobody who they are."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "NO_PROXY": f"{os.environ.get('NO_PROXY', '')},127.0.0.1",
    }  # fmt: skip
