"""`gpl evaluate`: the least biased slice is chosen, caveats are printed, missing figures stay missing."""

import io
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console

from gpl_core.cli import main
from gpl_core.commands import evaluate as module
from gpl_core.commands.evaluate import judged_slice, paired_difference, print_evaluation
from gpl_core.errors import MissingInputError
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, config_file, put, small_config

SEEDS = (0, 1, 2)


def _row(model: str, part: str, metric: str, value: float | None, seed: int = 0, note: str = "") -> dict:
    return {
        "run_id": "r", "model": model, "seed": seed, "slice": part, "metric": metric, "value": value, "low": None,
        "high": None, "candidate_set_size": 5.0 if "@" in metric else None, "rows": 40, "note": note, "dt": DAY,
    }  # fmt: skip


def _printed(root: Path, rows: list[dict]) -> str:
    config = small_config(root)
    put(Lake.of(config.lakehouse), "evaluations", rows)
    out = io.StringIO()
    print_evaluation(config, DAY, Console(file=out, width=160))
    return out.getvalue()


def test_uniform_traffic_is_preferred_and_differences_are_paired_by_seed(tmp_path) -> None:
    rows = [
        _row(model, part, metric, base + lift * (model == "gpl") + 0.01 * seed, seed)
        for model in ("exposed_only", "gpl") for seed in SEEDS
        for part, lift in (("uniform", 0.02), ("exposed", -0.5)) for metric, base in (("auc", 0.6), ("hr@3", 0.3))
    ]  # fmt: skip
    text = _printed(tmp_path, rows)
    assert "slice uniform" in text
    assert "Caveat" not in text
    assert text.count("+0.0200 ± 0.0000") == 2  # the seeds differ by .01, the pairs do not
    assert "5.0" in text  # candidate-set size beside the list metric
    assert "No off-policy estimate" in text


def test_without_uniform_traffic_the_exposed_slice_comes_with_its_caveat(tmp_path) -> None:
    rows = [_row(m, "uniform", "auc", None, note="no rows") for m in ("exposed_only", "gpl")]
    rows += [_row("exposed_only", "exposed", "auc", 0.6), _row("gpl", "exposed", "auc", 0.61)]
    rows += [_row(m, "exposed", "gauc", None, note="one class only") for m in ("exposed_only", "gpl")]
    rows += [_row(m, "exposed", "snips_auc", 0.6) for m in ("exposed_only", "gpl")]
    text = _printed(tmp_path, rows)
    assert "slice exposed" in text
    assert "Caveat" in text
    assert "(no rows)" in text
    assert "One training seed" in text
    assert "+0.0100" in text
    assert "absent: one class only" in text
    assert "No off-policy estimate" not in text


def test_a_sweep_over_lambda_is_shown_beside_it(tmp_path) -> None:
    rows = [_row(m, "uniform", "auc", v) for m, v in (("exposed_only", 0.6), ("gpl", 0.61), ("gpl@4", 0.58))]
    text = _printed(tmp_path, rows)
    assert "gpl@4 - exposed_only" in text
    assert "-0.0200" in text


def test_slices_that_are_not_there() -> None:
    assert judged_slice([_row("gpl", "exposed", "auc", 0.5)])[0] == "exposed"
    assert judged_slice([_row("gpl", "uniform", "auc", 0.5)]) == ("uniform", "")


def test_the_interval_is_students() -> None:
    assert paired_difference([]) == "-"
    assert paired_difference([0.5]) == "+0.5000"
    assert paired_difference([0.0, 0.2]) == "+0.1000 ± 1.2706"  # t = 12.706, standard error 0.1


def test_nothing_to_judge_is_exit_4_and_says_what_is_missing(tmp_path, monkeypatch, capsys) -> None:
    started = []
    monkeypatch.setattr(module, "run_launches", lambda launches, source, config: started.extend(launches) or 0)
    assert main(["evaluate", "--config", str(config_file(tmp_path)), "--run-date", DAY.isoformat()]) == 4
    assert [(launch.label, launch.dates) for launch in started] == [("train_preranker", (DAY,))]
    assert "impressions of" in capsys.readouterr().err
    with pytest.raises(MissingInputError, match="nothing for 2020"):
        print_evaluation(small_config(tmp_path), date(2020, 1, 1), Console())
