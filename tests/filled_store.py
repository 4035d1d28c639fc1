"""moto's S3 server where each folder of FOLDER is a bucket; .venv-moto's Python runs it, as a process of its own.

An object takes the server 12 ms when it is sent and .1 ms when it is put here, and years of daily runs are 100,000.
"""

import sys
from pathlib import Path

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import main

store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
for folder in Path(sys.argv[1]).iterdir():
    store.create_bucket(folder.name, "us-east-1")
    for file in folder.rglob("*"):
        if file.is_file():
            key = file.relative_to(folder).as_posix()
            store.put_object(folder.name, key, file.read_bytes(), disable_notification=True)
main(["-H", "127.0.0.1", "-p", "0"])
