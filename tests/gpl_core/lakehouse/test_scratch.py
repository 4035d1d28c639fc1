"""Temporary folders: what a killed process left is gone after the next run, what is in use stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from gpl_core.lakehouse.scratch import scratch_array, scratch_folder, scratch_path

HOLD = """
from gpl_core.lakehouse.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "vectors.npy").write_text("x")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder, and that folder."""
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert held.stdout is not None
    return held, Path(held.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_lives_is_not(temporary):
    (living, theirs), (killed, left) = holder(temporary), holder(temporary)
    other = temporary / "tmpabc"
    other.mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.is_dir()
    with scratch_folder() as ours:
        assert {p.name for p in temporary.iterdir()} == {theirs.name, ours.name, other.name}
        assert (theirs / "vectors.npy").read_text() == "x"
    living.communicate("\n")
    assert living.returncode == 0
    assert list(temporary.iterdir()) == [other]


def test_an_error_removes_the_folder_and_a_renamed_one_stays(temporary):
    with pytest.raises(ZeroDivisionError), scratch_folder("named"):
        (scratch_path("named") / "x").write_text(str(1 / 0))
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    with scratch_folder(parent=elsewhere) as folder:
        folder.rename(elsewhere / "kept")
    assert [p.name for p in temporary.rglob("*")] == ["elsewhere", "kept"]


def test_many_at_once_all_keep_theirs():
    """Each cleans up while the others begin: a folder that is not locked yet looks like one that was left."""
    lost = []

    def use() -> None:
        for _ in range(50):
            with scratch_folder() as folder:
                (folder / "x").write_text("x")
                lost.extend([folder] * (not (folder / "x").exists()))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []


def test_an_array_takes_its_space_at_once(tmp_path):
    made = scratch_array(tmp_path / "a.npy", np.float32, (1000, 8))
    made[3] = 2.0
    made.flush()
    assert os.stat(tmp_path / "a.npy").st_blocks * 512 >= 32_000
    assert np.load(tmp_path / "a.npy", mmap_mode="r")[3].tolist() == [2.0] * 8
    assert scratch_array(tmp_path / "none.npy", np.float32, (0, 8)).shape == (0, 8)
