"""`gpl evaluate`: says what it will train on what, shows the largest slice first, missing figures stay missing."""

import io
import json
import re
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from rich.console import Console

from gpl_core.cli import main
from gpl_core.commands import evaluate as module
from gpl_core.commands.evaluate import announcement, print_evaluation, sources
from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import MissingInputError
from gpl_core.graph.steps import WITH_CONTROLS, find_step
from gpl_core.labels.controls import CONTROLS
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, ONE, config_file, legal_rows, put, small_config


def _row(
    model: str, part: str, metric: str, value: float | None, against: str = "", half: float | None = None, **more
) -> dict:
    ends = (None, None) if half is None or value is None else (value - half, value + half)
    return {
        "run_id": "r", "model": model, "against": against, "seed": -1, "slice": part, "metric": metric, "value": value,
        "low": ends[0], "high": ends[1], "candidate_set_size": 5.0 if "@" in metric else None, "rows": 40,
        "clicks": 500.0, "note": "", "dt": DAY, **more,
    }  # fmt: skip


def _printed(root: Path, rows: list[dict], table: str = "evaluations") -> str:
    config = small_config(root)
    put(Lake.of(config.lakehouse), table, rows)
    out = io.StringIO()
    print_evaluation(config, DAY, Console(file=out, width=200), table)
    return out.getvalue()


def test_slices_in_order_with_intervals_and_a_verdict(tmp_path) -> None:
    rows = []
    for part, lift, clicks in (("exposed", 0.02, 500.0), ("tail", -0.02, 150.0), ("uniform", 0.001, 900.0)):
        for metric in ("auc", "hr@3"):
            for model in ("exposed_only", "gpl"):
                rows.append(_row(model, part, metric, 0.6, half=0.01, clicks=clicks))
                rows.append({**rows[-1], "seed": 0, "value": 0.9})  # of one seed: in the table, not shown
            rows.append(_row("gpl", part, metric, lift, "exposed_only", half=0.01, clicks=clicks))
    text = _printed(tmp_path, rows)
    assert text.index("slice uniform") < text.index("slice exposed") < text.index("slice tail (too small: 150 clicks")
    assert "Caveat" not in text
    assert "0.6000 [0.5900, 0.6100]" in text
    assert text.count("+0.0200 [+0.0100, +0.0300]*") == text.count("-0.0200 [-0.0300, -0.0100]*") == 2
    assert text.count("+0.0010 [-0.0090, +0.0110]\n") == 2
    assert "* better or worse: the interval of the difference excludes 0" in text
    assert "0.9" not in text
    assert "40 rows                  lists of 5.0 candidates" in text
    assert "No off-policy estimate" in text


def test_without_uniform_traffic_the_exposed_slice_comes_with_its_caveat(tmp_path) -> None:
    rows = [_row(m, "uniform", "auc", None, note="no rows") for m in ("exposed_only", "gpl")]
    rows += [_row(m, "exposed", "auc", 0.6) for m in ("exposed_only", "gpl")]
    rows += [_row(m, "exposed", "gauc", None, note="one class only") for m in ("exposed_only", "gpl")]
    rows += [_row(m, "exposed", "snips_auc", 0.6) for m in ("exposed_only", "gpl")]
    text = _printed(tmp_path, rows)
    assert "Caveat: that day has too little uniformly exposed traffic to evaluate on (no rows)" in text
    assert "list several seeds" in text
    assert "absent: auc (uniform): no rows\nabsent: gauc (exposed): one class only\n" in text
    assert "slice uniform" not in text, "it has no figure"
    assert "No off-policy estimate" not in text


def test_too_little_uniform_traffic_stands_last_with_the_caveat(tmp_path) -> None:
    rows = [
        _row(m, p, "auc", 0.6, clicks=c)
        for m in ("exposed_only", "gpl")
        for p, c in (("uniform", 20.0), ("exposed", 900.0))
    ]
    text = _printed(tmp_path, rows)
    assert "(too small: 20 clicks, fewer than 200)" in text
    assert text.index("slice exposed") < text.index("slice uniform (too small")


def test_controls_are_compared_with_ours(tmp_path) -> None:
    models = ("exposed_only", "gpl", "constant", "cosine")
    rows = [_row(m, "uniform", "auc", 0.6, half=0.01) for m in models]
    rows += [_row(m, "uniform", "auc", 0.005, "exposed_only", half=0.01) for m in models[1:]]
    rows += [_row("gpl", "uniform", "auc", v, m, half=0.01) for m, v in (("constant", 0.03), ("cosine", -0.001))]
    lines = [re.sub(r" {2,}", " | ", x.strip()) for x in _printed(tmp_path, rows, "control_evaluations").splitlines()]
    start = lines.index("minus exposed_only | gpl minus it")
    assert lines[start + 1 : start + 6] == [
        "auc | 40 rows",
        "exposed_only | 0.6000 [0.5900, 0.6100]",
        "gpl | 0.6000 [0.5900, 0.6100] | +0.0050 [-0.0050, +0.0150]",
        "constant | 0.6000 [0.5900, 0.6100] | +0.0050 [-0.0050, +0.0150] | +0.0300 [+0.0200, +0.0400]*",
        "cosine | 0.6000 [0.5900, 0.6100] | +0.0050 [-0.0050, +0.0150] | -0.0010 [-0.0110, +0.0090]",
    ]


def test_all_controls_fit_a_hundred_columns_and_a_reason_is_said_once(tmp_path) -> None:
    models = ("exposed_only", "gpl", *CONTROLS)
    rows, note = [], "10 is half of a list's 18.4 candidates or more"
    for part in ("exposed", "tail"):
        for metric, value in (("auc", -0.6), ("hr@3", -0.6), ("hr@10", None), ("ndcg@10", None)):
            rows += [_row(m, part, metric, value, half=0.01, note=note if value is None else "") for m in models]
            rows += [_row(m, part, metric, value, "exposed_only", half=0.01) for m in models[1:] if value]
            rows += [_row("gpl", part, metric, value, m, half=0.01) for m in CONTROLS if value]
    text = _printed(tmp_path, rows, "control_evaluations")
    assert max(len(line) for line in text.splitlines() if "[" in line and "brackets" not in line) <= 100
    assert text.count("is half of") == 1
    assert f"absent: hr@10, ndcg@10 (exposed, tail): {note}\n" in text


def test_it_says_what_it_will_train_and_how_long_that_takes(tmp_path) -> None:
    config = small_config(tmp_path, {"prerank": {"steps": 1000, "seeds": [0, 1, 2], "lambda_sweep": [0.5]}})
    plain, controls = find_step("train_preranker"), WITH_CONTROLS
    assert "9 pre-rankers (3 variants, 3 seeds) of 1,000 steps" in announcement(config, plain, DAY)
    assert "not known yet" in announcement(config, plain, DAY)
    _trained(config, ("train_preranker", 1, 1), ("train_preranker", 2, 6000), ("encode_items", 3, 1))
    # 3 seeds x 1,000 steps x (1 + 2 + 2) batches at .01 s, and 8 s to start
    assert "; about 3 minutes if this machine is as busy as" in announcement(config, plain, DAY)
    assert "21 pre-rankers (7 variants" in announcement(config, controls, DAY)
    assert "; about 7 minutes if" in announcement(config, controls, DAY)
    assert sources(config, plain, DAY).startswith(f"{DAY}: trained on no rows of training_feed (")
    put(Lake.of(config.lakehouse), "impressions", 3, day=DAY + ONE)
    said = sources(config, controls, DAY)
    assert f"evaluated on 3 rows of impressions@1 ({DAY + ONE}); the results are in table control_evaluations" in said


def _trained(config: Config, *runs: tuple[str, int, int]) -> None:
    """Rows of job_runs that took a minute: step, hour of its start, batches."""
    blank = legal_rows(load_contract("job_runs"), len(runs), partition={})
    rows = [
        {**row, "step": step, "started_at": datetime(2026, 1, 5, hour, tzinfo=UTC), "run_id": f"r{hour}",
         "status": "done", "seconds": 60.0, "details": json.dumps({"trained_batches": batches})}
        for row, (step, hour, batches) in zip(blank, runs)
    ]  # fmt: skip
    put(Lake.of(config.lakehouse), "job_runs", rows)


@pytest.mark.parametrize(
    ("more", "step", "day"),
    [((), "train_preranker", date(2026, 1, 4)), (("--controls",), "evaluate_controls", date(2026, 1, 4)),
     (("--run-date", "2020-01-01"), "train_preranker", date(2020, 1, 1))],
)  # fmt: skip
def test_one_date_is_trained_unless_more_are_asked_for(tmp_path, monkeypatch, capsys, more, step, day) -> None:
    """Nothing to judge is exit 4 and says what is missing."""
    started = []
    monkeypatch.setattr(module, "run_launches", lambda launches, source, config: started.extend(launches) or 0)
    path = config_file(tmp_path)
    assert main(["evaluate", "--config", str(path), *more]) == 4
    assert [(launch.label, launch.dates) for launch in started] == [(step, (day,))]
    said = capsys.readouterr()
    assert f"{day}: " in said.out
    assert "pre-rankers" in said.out
    assert "impressions of" in said.err
    with pytest.raises(MissingInputError, match="no rows for 2020"):
        print_evaluation(small_config(tmp_path), date(2020, 1, 1), Console())
