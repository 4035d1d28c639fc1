"""Helpers of the core's tests: legal rows of any contract, small configurations, tables with marks made by hand."""

from __future__ import annotations

import json
import os
import pickle
import pwd
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from gpl_core.config import Config, load_config
from gpl_core.contracts.contract import Column, Contract, load_contract
from gpl_core.contracts.types import arrow_type, spark_type
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.launches import DELTA_PACKAGE
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import Body, run_step
from gpl_core.lakehouse.lake import Commit, Lake
from gpl_core.lakehouse.marks import SliceMark

DIMS = {"H": 2, "L": 3, "K": 2, "B": 4, "E": 2, "d": 4}
DAY = date(2026, 1, 3)
ONE = timedelta(days=1)
# A test JVM lives for minutes: the first compiler tier and the plain collector win on two cores. That tier's own 48 MB
# of code are too few for all of Spark's tests: the JVM would throw code out and compile it again.
JVM = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC -Xss4m"
# Delta's jars where `make setup` downloaded them: resolving them again costs each launch two CPU seconds.
_IVY = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ivy2.5.2" / "jars"
DELTA_JARS = sorted(_IVY.glob(f"io.delta_*-{DELTA_PACKAGE.rpartition(':')[2]}.jar"))
# A folder whose name engines, globs and shells could read differently.
ODD = "a b {y}(z) *,&+=;:@~!$'é ключ"
WORDS = ("", "a", "None", "ключ", "naïve ☕", 'it\'s "quoted"\n, ok', "0")


def started(arguments: list[str], ready: str) -> subprocess.Popen:
    """Start one of Spark's own daemons and return once it has said `ready`."""
    env = {**os.environ, "PYSPARK_PYTHON": sys.executable}  # by which Spark finds its home
    process = subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if ready in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            return process
    raise AssertionError(f"{arguments} ended before it said '{ready}':\n{''.join(said[-20:])}")


@contextmanager
def web_server() -> Iterator[HTTPServer]:
    """It keeps what is posted to it; paths that begin with /no get an error, /away one elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response({"/no": 500, "/aw": 302}.get(self.path[:3], 204))
            self.send_header("Location", "/hook")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *given: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.received = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def legal_value(column: Column, rng: random.Random, dims: Mapping[str, int] = DIMS) -> Any:
    """A random value that the contract allows, null now and then where it may be."""
    if column.nullable and rng.random() < 0.3:
        return None
    if column.allowed:
        value = rng.choice(column.allowed)
        return value if column.type == "string" else int(value)
    length = column.expected_length(dims)
    return _value(spark_type(arrow_type(column.type)), column, rng, 3 if length is None else length)


def _value(kind: Any, column: Column, rng: random.Random, length: int) -> Any:
    if isinstance(kind, dict):
        if kind["type"] == "array":
            return [_value(kind["elementType"], column, rng, 2) for _ in range(length)]
        return {field["name"]: _value(field["type"], column, rng, 2) for field in kind["fields"]}
    low = 0 if column.min is None else column.min
    high = low + 100 if column.max is None else column.max
    match kind:
        case "string":
            return rng.choice(WORDS) + str(rng.randrange(99))
        case "integer":
            return rng.randint(int(low), int(high))
        case "long":
            return rng.randint(int(low), int(high)) if column.max is not None else int(low) + rng.randrange(2**53)
        case "float":
            return float(pa.scalar(rng.uniform(low, high), pa.float32()).as_py())
        case "double":
            return rng.uniform(low, high)
        case "boolean":
            return rng.random() < 0.5
        case "date":
            return DAY + timedelta(days=rng.randrange(-400, 400))
        case "timestamp":
            return datetime(2026, 1, 3, tzinfo=UTC) + timedelta(microseconds=rng.randrange(-(10**15), 10**15))
        case "binary":
            return rng.randbytes(rng.randrange(5))
    raise AssertionError(f"no value for {kind}")


def legal_rows(
    contract: Contract, count: int, *, seed: int = 0, partition: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """`count` legal rows; the partition columns hold `partition` (default: one value for all rows)."""
    rng = random.Random(f"{contract.name}:{seed}")
    given = dict(partition if partition is not None else default_partition(contract))
    return [
        {c.name: given[c.name] if c.name in given else legal_value(c, rng) for c in contract.columns}
        for _ in range(count)
    ]


def default_partition(contract: Contract) -> dict[str, Any]:
    """A value for each partition column: the test's date, or a word."""
    return {n: DAY if contract.column(n).type == "date" else "v1" for n in contract.partition_by}


def partition_text(partition: Mapping[str, Any]) -> dict[str, str]:
    """Partition values as the log holds them."""
    return {k: v.isoformat() if isinstance(v, date) else str(v) for k, v in partition.items()}


def data_table(contract: Contract, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`rows` as the data columns of `contract`."""
    schema = contract.arrow_schema(partitions=False)
    return pa.Table.from_pylist([{n: r[n] for n in schema.names} for r in rows], schema=schema)


def small_config(root: Path, body: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """A configuration whose lakehouse lies under `root`; `body` holds further sections."""
    return load_config(str(config_file(root, body)), overrides)


def config_file(root: Path, body: Mapping[str, Any] | None = None) -> Path:
    """The YAML file of `small_config`."""
    text: dict[str, Any] = {
        "lakehouse": {"root": str(root / "lake")},
        "run": {"start_date": DAY.isoformat(), "end_date": (DAY + ONE).isoformat()},
        "launch": {
            "spark_submit": ["--master", "local[1]"],
            "deepspeed": ["--num_accelerators", "1"],
            "env": {"DS_ACCELERATOR": "cpu"},
        },
    }
    for section, values in (body or {}).items():
        text[section] = {**text.get(section, {}), **values}
    path = root / "test.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    return path


def run_of(config: Config, step: str, day: date, body: Body, run_id: str = "run", *, force: bool = False) -> str:
    """Run one step as an entry point does; returns done or noop."""
    return run_step(Planner(config), step, day, StepArguments(config, (day,), run_id, force=force), body)


def doubled(lake: Lake, table: str) -> list[tuple]:
    """The primary keys that occur more than once in `table`."""
    rows = lake.open(table).read(columns=list(load_contract(table).primary_key)).to_pylist()
    counts = Counter(tuple(row.values()) for row in rows)
    return sorted(key for key, count in counts.items() if count > 1)


def put(
    lake: Lake,
    table: str,
    rows: int | Sequence[Mapping[str, Any]],
    *,
    day: date = DAY,
    partition: Mapping[str, Any] | None = None,
    step: str | None = None,
    fingerprint: str = "by-hand",
    mode: str | None = None,
    slice_name: str | None = None,
    contract: Contract | None = None,
    seed: int = 0,
    file_rows: int = 1_000_000,
    details: Mapping[str, Any] | None = None,
) -> Commit:
    """Commit `rows` (or so many legal ones) to one partition of `table`, marked as `step` would mark it."""
    contract = contract or load_contract(table)
    dated = {"dt": day} if "dt" in contract.partition_by else {}
    values = {**default_partition(contract), **dated, **(partition or {})}
    body = legal_rows(contract, rows, seed=seed, partition=values) if isinstance(rows, int) else rows
    texts = partition_text(values)
    with lake.writer(contract, texts, dims=DIMS, file_rows=file_rows) as writer:
        writer.write(data_table(contract, body))
    name = slice_name or (day.isoformat() if "dt" in contract.partition_by else "*")
    mark = SliceMark(step or contract.owner, {name: fingerprint}, "by-hand", details or {})
    chosen = mode or ("overwrite" if contract.partition_by else "append")
    return lake.commit(
        contract, writer.parts, mark=mark, mode=chosen, partition=texts if chosen == "overwrite" else None
    )


@contextmanager
def spark_conf(spark: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """The Spark session with other settings."""
    before = {key: spark.conf.get(key) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            spark.conf.set(key, value)


def listening(pid: int) -> set[str]:
    """Addresses on which the process listens for TCP connections; `::ffff:` before those of IPv4 is left out."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:  # LISTEN
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(str(ip_address(packed.removeprefix(b"\0" * 10 + b"\xff\xff"))))
    return found


def truncated(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bit_flipped(path: Path) -> None:
    """Turn one bit in the last third of a file."""
    content = bytearray(path.read_bytes())
    content[-1 - len(content) // 3] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    """Leave a file of no bytes."""
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": emptied,
    "truncated": truncated,
    "bit flipped": bit_flipped,
}


class _Planted:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self._ran = str(ran)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._ran,)


def planted_pickle(path: Path, ran: Path) -> None:
    """Write a pickle to `path` that makes the folder `ran` when somebody reads it as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(_Planted(ran)))
