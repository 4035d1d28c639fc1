"""Configuration: everything wrong in one message, nothing changed afterwards, and a hash of what shapes results."""

from __future__ import annotations

import re
from datetime import date
from importlib import resources
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gpl_core.cli import main
from gpl_core.config import Config, date_range, load_config, shipped_configs
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import UsageError
from gpl_core.graph.planner import STEPS, find_step
from tests.support import config_file, small_config

ROOT = Path(__file__).parents[2]


# ---- what is shipped -------------------------------------------------------------------------------------------


def test_the_three_shipped_configurations_are_there():
    assert set(shipped_configs()) == {"quickstart", "amazon", "production"}


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_loads_and_plans_every_step(name, tmp_path, capsys):
    assert main(["plan", "--config", name, "--set", f"lakehouse.root={tmp_path}", "--isolated"]) == 0
    printed = capsys.readouterr().out
    for step in STEPS:
        assert re.search(rf"{step.script} .*--config {name} --set lakehouse\.root={tmp_path} ", printed), step.name
    assert list(tmp_path.iterdir()) == [], "planning writes nothing"


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_names_its_launch_commands_in_its_header(name):
    text = (resources.files("gpl_core.conf") / f"{name}.yaml").read_text(encoding="utf-8")
    header = [line.lstrip("# ") for line in text.split("\nlakehouse:")[0].splitlines()]
    commands = [line for line in header if re.match(r"gpl |spark-submit |deepspeed ", line)]
    assert {c.split()[0] for c in commands} >= {"spark-submit", "deepspeed"}
    for command in commands:
        assert re.search(rf"--config {name}(\.yaml)?\b", command), command
        for script in re.findall(r"(?:spark_jobs|gpu_workers)/(\w+)\.py", command):
            step = find_step(script)
            assert step.script in command
            assert ("spark-submit" in command) == (step.launcher == "spark")
    if name != "production":
        assert {"gpl run --config " + name} <= set(commands)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_states_no_default_and_no_secret(name):
    text = (resources.files("gpl_core.conf") / f"{name}.yaml").read_text(encoding="utf-8")
    assert not re.search("(?i)secret|password|token:|access_key", text)
    assert set(yaml.safe_load(text)) <= set(Config.model_fields)


def test_every_setting_that_the_graph_names_exists(tmp_path):
    config = small_config(tmp_path)
    for step in STEPS:
        assert len(config.hash_of(*step.sections)) == 16
        keys = [r.days for r in step.reads if r.days] + [r.when[0] for r in step.reads if r.when[0]]
        for key in [*keys, *([step.refresh] if step.refresh else [])]:
            value = config
            for part in key.split("."):
                value = getattr(value, part)


# ---- refusals --------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, body: dict | None = None, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        small_config(tmp_path, body, overrides)
    return str(caught.value)


def test_everything_wrong_is_in_one_message(tmp_path):
    message = refusal(
        tmp_path,
        {
            "tokeniser": {"codes": 3},
            "samples": {"unexposed_per_requests": 5, "scored_exposed_share": 1.5},
            "labels": {"calibrator": {"kind": "magic"}},
            "feed": {"passthrough": {"price": "money"}},
            "prerank": {"lambda": -1},
        },
        ("anchors.count=0", "no-equals-sign", "run.end_date.deeper=1", "interest.lora_rank=[1", "sequences.typo=3"),
    )
    for part in (
        "test.yaml", "tokeniser: unknown key", "samples.unexposed_per_requests: unknown key",
        "samples.scored_exposed_share", "1.5", "labels.calibrator.kind", "'magic'", "feed.passthrough.price",
        "prerank.lambda", "anchors.count", "--set no-equals-sign: expected section.key=value",
        "--set run.end_date.deeper=1", "--set interest.lora_rank=[1", "sequences.typo: unknown key",
    ):  # fmt: skip
        assert part in message, f"'{part}' is not in:\n{message}"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.end_date=2025-01-01", "lies before start_date"),
        ("run.history_start=2027-01-01", "lies after start_date"),
        ("run.start_date=yesterday", "run.start_date"),
        ("labels.calibrator.target_rate=1.0", "must lie in (0, 1)"),
        ("labels.calibrator.target_rate=sometimes", "target_rate"),
        ("tokenizer.codes=1", "tokenizer.codes"),
        ("tokenizer.learning_rate=.nan", "tokenizer.learning_rate"),
        ("tokenizer.learning_rate=.inf", "tokenizer.learning_rate"),
        ("prerank.steps=true", "prerank.steps"),
        ('prerank.steps="12"', "prerank.steps"),
        ("prerank.seeds=[]", "prerank.seeds"),
        ("prerank.propensity=shown_with", "feed.passthrough.shown_with: double"),
        ("prerank.pair_features=[price]", "feed.passthrough.price: double"),
        ("encoder.parts=[]", "encoder.parts"),
        ("encoder.parts=[{name: minilm, weight: 0}]", "encoder.parts.0.weight"),
        ("lakehouse.tables={raw_itmes: /x}", "no such table: raw_itmes"),
        ("lakehouse.tables={items: catalog://shop.items}", "items: catalog://shop.items: only raw tables"),
        ("lakehouse.tables={raw_items: catalog://items}", "expected catalog://database.table"),
        ("lakehouse=here", "lakehouse"),
        ("=3", "expected section.key=value"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(tmp_path, override, named):
    message = refusal(tmp_path, None, (override,))
    assert named in message
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert all(override.split("=")[0].split(".")[0] in line for line in lines), "no follow-up errors elsewhere"


def test_three_exponents_of_zero_are_refused(tmp_path):
    zeros = {"coherence": 0, "consistency": 0, "llm_confidence": 0}
    assert "at least one factor" in refusal(tmp_path, {"labels": {"weights": zeros}})


@pytest.mark.parametrize(("text", "named"), [("[1, 2]", "expected a mapping"), ("a: [", "not valid YAML"), ("", "run")])
def test_a_file_of_another_shape_is_refused(tmp_path, text, named):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=named):
        load_config(str(path))


def test_an_unknown_configuration_names_the_shipped_ones():
    with pytest.raises(UsageError, match=r"'quickstrat': no such file.*quickstart"):
        load_config("quickstrat")


# ---- values ----------------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth_and_pass_as_yaml(tmp_path):
    config = small_config(
        tmp_path, {"prerank": {"lambda": 3}},
        ("labels.weights.scale=raw", "prerank.seeds=[1, 2]", "run.start_date=2026-01-02", "launch.env.A=b=c"),
    )  # fmt: skip
    assert config.labels.weights.scale == "raw"
    assert config.prerank.seeds == (1, 2)
    assert config.prerank.lambda_ == 3.0
    assert config.run.start_date == date(2026, 1, 2)
    assert config.launch.env == {"DS_ACCELERATOR": "cpu", "A": "b=c"}


def test_a_configuration_does_not_change(tmp_path):
    config = small_config(tmp_path)
    for section, key in ((config, "run"), (config.run, "seed"), (config.labels.calibrator, "kind")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_relative_locations_are_fixed_where_the_configuration_is_read(tmp_path, monkeypatch):
    path = config_file(tmp_path, {"lakehouse": {"root": "here/lake", "tables": {"raw_items": "../raw"}}})
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    config = load_config(str(path))
    monkeypatch.chdir("/")
    assert config.lakehouse.root == str(tmp_path / "sub" / "here" / "lake")
    assert Path(config.lakehouse.tables["raw_items"]).resolve() == tmp_path / "raw"


@pytest.mark.parametrize("root", ["s3://bucket/prefix", "file:///data/lake", "/data/lake"])
def test_absolute_locations_stay(tmp_path, root):
    assert small_config(tmp_path, {"lakehouse": {"root": root}}).lakehouse.root == root


# ---- the hash --------------------------------------------------------------------------------------------------

SHAPES = [
    ("tokenizer", "tokenizer.codes=99"), ("tokenizer", "tokenizer.ema_decay=0.5"), ("encoder", "encoder.batch_size=9"),
    ("encoder", "encoder.parts=[{name: minilm, options: {a: 1}}]"), ("interest", "interest.prompt=hello"),
    ("interest", "interest.tiny.layers=1"), ("samples", "samples.unexposed_per_request=3"), ("run.seed", "run.seed=4"),
    ("labels.calibrator", "labels.calibrator.spread=2"), ("labels.weights", "labels.weights.scale=raw"),
    ("prerank", "prerank.lambda=0"), ("feed", "feed.passthrough={a: int}"), ("anchors.count", "anchors.count=3"),
    ("ingest", "ingest.text_max_chars=7"), ("sequences", "sequences.max_length=4"),
    ("feed.passthrough", "feed.passthrough={a: int}"),
]  # fmt: skip
DOES_NOT_SHAPE = [
    ("tokenizer", "tokenizer.refresh_days=30"), ("tokenizer", "tokenizer.gates.max_dead_share=0.9"),
    ("interest", "interest.refresh_days=30"), ("ingest", "ingest.max_quarantine_share=0.9"),
    ("labels", "labels.users_per_batch=3"), ("tokenizer", "prerank.steps=3"),
    ("feed.passthrough", "feed.rows_per_file=9"), ("run.seed", "run.end_date=2026-02-01"),
    ("labels.calibrator", "labels.block_size=4"),
    ("ingest", "launch.env.A=b"), ("ingest", "lakehouse.root=/elsewhere"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "override"), SHAPES)
def test_the_hash_of_a_section_sees_what_shapes_its_results(tmp_path, section, override):
    assert small_config(tmp_path).hash_of(section) != small_config(tmp_path, None, (override,)).hash_of(section)


@pytest.mark.parametrize(("section", "override"), DOES_NOT_SHAPE)
def test_the_hash_of_a_section_ignores_what_does_not(tmp_path, section, override):
    assert small_config(tmp_path).hash_of(section) == small_config(tmp_path, None, (override,)).hash_of(section)


def test_the_hash_is_the_same_in_another_process_and_tells_sections_apart(tmp_path):
    config = small_config(tmp_path)
    assert config.hash_of("samples") == small_config(tmp_path / "again").hash_of("samples")
    assert len({config.hash_of(s) for s in ("samples", "sequences", "feed", "prerank", "tokenizer")}) == 5
    assert config.hash_of("samples", "feed") == config.hash_of("feed", "samples")


# ---- dimensions ------------------------------------------------------------------------------------------------


def test_every_named_array_length_is_known_from_the_configuration_or_the_data(tmp_path):
    dims = small_config(tmp_path).dims(d=384)
    for contract in all_contracts().values():
        for column in contract.columns:
            if column.length:
                assert column.expected_length(dims), f"{contract.name}.{column.name}: {column.length}"
    assert dims["H"] == 20
    assert load_config("quickstart").dims()["L"] == 3


def test_date_range_holds_both_ends():
    assert date_range(date(2025, 12, 31), date(2026, 1, 2)) == [date(2025, 12, 31), date(2026, 1, 1), date(2026, 1, 2)]
    assert date_range(date(2026, 1, 1), date(2026, 1, 1)) == [date(2026, 1, 1)]
    assert date_range(date(2026, 1, 2), date(2026, 1, 1)) == []
