"""`gpl capacity`: an extrapolation that names its measurement, and none without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.commands import capacity as module
from gpl_core.commands.capacity import newest_measurement, read_measurement
from gpl_core.errors import MissingInputError

RATES = {(30, 20): 4000.0, (300, 50): 1500.0}


def result(
    folder: Path, device: str = "nvidia-h100", *, quick: bool = False, when: str = "2026-03-01T00:00:00"
) -> Path:
    """A file as bench_search writes it."""
    figures = {f"P {p}, K {k}: users per second": {"value": r, "unit": "users/s"} for (p, k), r in RATES.items()}
    body = {
        "name": "search", "about": "beam search, 24 layers", "device": device, "commit": "abc123", "when": when,
        "command": "python -m tests.bench.bench_search" + " --quick" * quick,
        "figures": {**figures, "P 300, K 50: time over the floor": {"value": 1.1, "unit": "x"}},
    }  # fmt: skip
    path = folder / f"search{'.quick' * quick}.{device}.json"
    path.write_text(json.dumps(body))
    return path


def run_capacity(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["capacity", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_devices_cost_and_the_measurement_are_named(tmp_path, capsys):
    """300e6 users / 1,500 users/s = 200,000 s = 55.6 h: ten devices in six hours."""
    path = result(tmp_path)
    code, out, err = run_capacity(
        capsys, "--users", "300e6", "--hours", 6, "--gpu-hour-cost", 3, "--measurement", path
    )  # fmt: skip
    assert code == 0
    assert "300,000,000 users in 6 h: 10 devices (55.6 device hours)" in out
    assert "cost: 166.67 at 3 per device hour" in out
    assert "one nvidia-h100, prompt of 300 tokens, 50 beams" in out
    assert path.name in out
    assert "extrapolation" in out
    assert err == ""


def test_a_number_of_devices_gives_hours_and_whether_they_fit(tmp_path, capsys):
    path = result(tmp_path)
    words = ("--users", "300e6", "--hours", 6, "--measurement", path)
    assert "with 10: 5.56 h, which fits" in run_capacity(capsys, *words, "--gpus", 10)[1]
    assert "with 9: 6.17 h, which does not fit" in run_capacity(capsys, *words, "--gpus", 9)[1]


def test_another_measured_point_can_be_asked_for_and_no_unmeasured_one(tmp_path, capsys):
    words = ("--users", "1e6", "--hours", 1, "--measurement", result(tmp_path))
    assert "4,000 users/s" in run_capacity(capsys, *words, "--beams", 20)[1]
    code, _, err = run_capacity(capsys, *words, "--prompt", 30, "--beams", 50)
    assert code == 2
    assert "P 30 K 20, P 300 K 50" in err


def test_without_a_measurement_it_refuses_and_says_what_to_do(tmp_path, capsys, monkeypatch):
    result(tmp_path, quick=True)  # of another model: no substitute
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    code, out, err = run_capacity(capsys, "--users", 1e6, "--hours", 1)
    assert (code, out) == (4, "")
    assert "bench_search" in err
    code, _, err = run_capacity(capsys, "--users", 1e6, "--hours", 1, "--measurement", tmp_path / "none.json")
    assert code == 4
    assert "none.json: no such file" in err


def test_a_newer_result_goes_before_an_older_and_a_cpu_counts_only_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    result(tmp_path, "cpu-2core", when="2026-05-01T00:00:00")
    with pytest.raises(MissingInputError, match="on an accelerator"):
        newest_measurement()
    result(tmp_path, "nvidia-a100", when="2026-01-01T00:00:00")
    result(tmp_path, "nvidia-h100", when="2026-02-01T00:00:00")
    assert newest_measurement().device == "nvidia-h100"


def test_a_cpu_or_quick_measurement_is_warned_of(tmp_path, capsys):
    path = result(tmp_path, "cpu-2core", quick=True)
    code, _, err = run_capacity(capsys, "--users", 1e6, "--hours", 1, "--measurement", path)
    assert code == 0
    assert "not an accelerator" in err
    assert "--quick" in err


@pytest.mark.parametrize("text", ["{", "[]", '{"figures": {}}', '{"figures": {"P 1, K 1: users per second": {}}}'])
def test_what_is_no_measurement_is_refused(tmp_path, capsys, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    code, _, err = run_capacity(capsys, "--users", 1e6, "--hours", 1, "--measurement", path)
    assert code == 3
    assert "broken.json" in err


def test_a_rate_of_zero_is_no_measurement(tmp_path, capsys):
    path = result(tmp_path)
    path.write_text(path.read_text().replace("1500.0", "0.0"))
    assert run_capacity(capsys, "--users", 1e6, "--hours", 1, "--measurement", path)[0] == 3
    assert read_measurement(result(tmp_path)).rates == RATES


@pytest.mark.parametrize(
    ("option", "value"), [("--users", "-1"), ("--hours", "0"), ("--gpus", "0"), ("--gpu-hour-cost", "nan")]
)
def test_impossible_numbers_are_named(tmp_path, capsys, option, value):
    words = {"--users": "1e6", "--hours": "1", option: value, "--measurement": str(result(tmp_path))}
    code, _, err = run_capacity(capsys, *[f"{name}={text}" for name, text in words.items()])
    assert code == 2
    assert option in err
