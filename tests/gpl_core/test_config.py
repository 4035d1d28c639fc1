"""Configuration: everything wrong in one message, nothing changed afterwards, and a hash of what shapes results."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gpl_core.cli import main
from gpl_core.conf.sections import Knob, Section, shapes_results
from gpl_core.config import REMOVED, Config, date_range, hash_of, load_config, shipped_configs
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import UsageError
from gpl_core.graph.steps import STEPS, find_step
from tests.support import JVM, config_file, small_config

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---- what is shipped -------------------------------------------------------------------------------------------


def test_the_shipped_configurations_are_there():
    assert set(shipped_configs()) == {"quickstart", "amazon", "amazon-smollm2"}


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_loads_and_plans_every_step(name, tmp_path, capsys):
    assert main(["plan", "--config", name, "--set", f"lakehouse.root={tmp_path}", "--isolated"]) == 0
    printed = capsys.readouterr().out
    for step in STEPS:
        assert re.search(rf"{step.script} .*--config {name} --set lakehouse\.root={tmp_path} ", printed), step.name
    assert list(tmp_path.iterdir()) == [], "planning writes nothing"


def test_the_quickstarts_jvm_has_the_code_cache_that_lasts_for_all_of_sparks_tests():
    """The first compiler tier's own 48 MB are full after some dozens of dates: then the JVM ends with exit code 50."""
    (size,) = re.findall(r"-XX:ReservedCodeCacheSize=\S+", JVM)
    given = load_config("quickstart").launch.spark_submit
    assert size in given[given.index("--driver-java-options") + 1].split()


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
    assert {"gpl run --config " + name} <= set(commands)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_states_no_default_and_no_secret(name):
    text = (resources.files("gpl_core.conf") / f"{name}.yaml").read_text(encoding="utf-8")
    assert not re.search("(?i)secret|password|token:|access_key", text)
    assert set(yaml.safe_load(text)) <= set(Config.model_fields)


def test_every_configuration_in_the_documents_holds(tmp_path):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [b for p in pages for b in re.findall(r"```yaml\n(.*?)```", p.read_text(encoding="utf-8"), re.DOTALL)]
    shown = [body for b in blocks if isinstance(body := yaml.safe_load(b), dict) and {*body} & {*Config.model_fields}]
    assert len(shown) >= 5
    for body in shown:
        small_config(tmp_path, body)


def test_every_setting_that_the_graph_names_exists(tmp_path):
    config = small_config(tmp_path)
    for step in STEPS:
        assert len(step.config_hash(config)) == 16
        assert step.refresh(config) >= 1
        for read in step.reads:
            assert read.days is None or read.days(config) >= 1
            assert {type(read.when(config)), type(read.may_lack(config))} == {bool}


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
            "feed": {"passthrough": {"price": "money", "item-type": "string"}},
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
        ("run.end_date=2025-01-01", "is before start_date"),
        ("run.history_start=2027-01-01", "is after start_date"),
        ("run.start_date=yesterday", "run.start_date"),
        ("labels.calibrator.target_rate=1.0", "must lie in (0, 1)"),
        ("labels.calibrator.target_rate=sometimes", "target_rate"),
        ("tokenizer.codes=1", "tokenizer.codes"),
        ("interest.learning_rate=.nan", "interest.learning_rate"),
        ("interest.learning_rate=.inf", "interest.learning_rate"),
        ("prerank.steps=true", "prerank.steps"),
        ('prerank.steps="12"', "prerank.steps"),
        ("prerank.seeds=[]", "prerank.seeds"),
        ("prerank.propensity=shown_with", "feed.passthrough.shown_with: double"),
        ("prerank.pair_features=[price]", "feed.passthrough.price: double"),
        ("encoder.parts=[]", "encoder.parts"),
        ("encoder.parts=[{name: minilm, weight: 0}]", "encoder.parts.minilm.weight"),
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


def test_a_removed_key_is_refused_with_what_to_do(tmp_path):
    message = refusal(tmp_path, {"sids": {"drift_warn": 2}}, ("tokenizer.method=rqvae", "labels.weights.scale=raw"))
    assert "tokenizer.method: was removed; every tokenizer is an RQ-VAE: delete the key" in message
    assert "sids: was removed; " in message
    assert "labels.weights: was removed; " in message
    for key in REMOVED:
        assert f"`{key}`" in CHANGELOG, key


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
        ("labels.calibrator.kind=logistic", "prerank.seeds=[1, 2]", "run.start_date=2026-01-02", "launch.env.A=b=c"),
    )  # fmt: skip
    assert config.labels.calibrator.kind == "logistic"
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

# Not the default, where no rule below finds another valid value.
OTHER = {
    "lakehouse.root": "/elsewhere", "lakehouse.database": "shop", "lakehouse.tables": {"raw_items": "/items"},
    "lakehouse.columns": {"raw_items": {"title": "name"}}, "lakehouse.shadow.tables": ["items"],
    "run.start_date": date(2026, 1, 2), "run.end_date": date(2026, 3, 1), "run.history_start": date(2025, 12, 1),
    "launch.spark_submit": ["--master", "yarn"], "launch.deepspeed": ["--num_gpus", "8"],
    "encoder.image_prefixes": ["/pictures"], "encoder.parts": [{"name": "hog_color"}],
    "encoder.parts.name": "hog_color", "tokenizer.codes": 99,
    "labels.calibrator.target_rate": 0.3, "monitors.fail": ["coverage"], "monitors.ignore": ["coverage"],
    "feed.passthrough": {"price": "double"}, "prerank.pair_features": ["price"], "prerank.propensity": "price",
    "prerank.lambda_sweep": [1.0], "prerank.seeds": [1, 2],
}  # fmt: skip
PRICE = {"feed": {"passthrough": {"price": "double"}}}


def leaves(model: type[BaseModel], prefix: str = "", shaping: bool = True) -> Iterator[tuple[str, FieldInfo, bool]]:
    """Dotted name, field, and whether it shapes results, of every setting; the entries of lists of sections too."""
    for name, field in model.model_fields.items():
        kind, shapes = field.annotation, shaping and shapes_results(field)
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.", shapes)
        else:
            yield f"{prefix}{name}", field, shapes


SETTINGS = {name: (field, shapes) for name, field, shapes in leaves(Config)}


def other(name: str) -> object:
    """Another valid value of the setting `name` than its default."""
    field, default = SETTINGS[name][0], SETTINGS[name][0].default
    if name in OTHER:
        return OTHER[name]
    if get_origin(field.annotation) is Literal:
        return next(v for v in get_args(field.annotation) if v != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default * 0.9 if default else 0.5
    return {"a": 1} if name.endswith(("options", "deepspeed")) else {"a": "b"} if default == {} else "other"


def changed(tmp_path: Path, name: str) -> tuple[Config, Config]:
    """Two valid configurations that differ in the setting `name` alone."""
    body: dict = {"encoder": {"parts": [{"name": "minilm"}]}}
    if name.startswith("prerank.") and other(name) in ("price", ["price"]):
        body |= PRICE
    before = small_config(tmp_path, body)
    *parents, last = name.split(".")
    target = body
    for parent in parents:
        target = target.setdefault(parent, {})
        target = target[0] if isinstance(target, list) else target
    target[SETTINGS[name][0].alias or last] = other(name)
    return before, small_config(tmp_path, body)


def stale_steps(before: Config, after: Config) -> set[str]:
    return {s.name for s in STEPS if s.config_hash(before) != s.config_hash(after)}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_turns_a_step_stale_unless_its_field_says_that_it_shapes_nothing(tmp_path, name):
    before, after = changed(tmp_path, name)
    assert before != after
    assert bool(stale_steps(before, after)) == SETTINGS[name][1], stale_steps(before, after)


def test_speed_gates_and_schedules_shape_nothing():
    """What a user may turn at any time; a change in this list is a change of what is recomputed."""
    knobs = {name for name, (_, shapes) in SETTINGS.items() if not shapes}
    whole = {"lakehouse.shadow", "launch", "tokenizer.gates", "monitors"}
    assert {n for n in knobs if not any(n.startswith(f"{w}.") for w in whole)} == {
        "lakehouse.root", "lakehouse.tables", "lakehouse.database", "lakehouse.file_mb",
        "run.start_date", "run.end_date", "run.history_start",
        "ingest.max_quarantine_share", "encoder.batch_size", "tokenizer.refresh_days",
        "interest.refresh_days", "interest.checkpoint_steps", "interest.recompute", "interest.deepspeed",
        "anchors.tokens_per_batch", "anchors.retention_days", "labels.users_per_batch",
        "labels.calibrator.on_rate_change", "feed.publish",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("run.seed", {"train_tokenizer", "samples", "sequences", "train_interest_model", "anchor_requests",
                      "score_requests"}),
        ("encoder.parts.weight", {"encode_items", "train_tokenizer"}),
        ("encoder.batch_size", set()),
        ("encoder.image_prefixes", {"encode_items"}),
        ("tokenizer.batch_size", {"train_tokenizer"}),
        ("interest.tokens_per_batch", {"train_interest_model"}),
        ("anchors.count", {"anchor_requests", "generate_anchors", "score_requests"}),
        ("samples.unexposed_per_request", {"samples"}),
        ("samples.scored_exposed_share", {"anchor_requests", "score_requests"}),
        ("labels.block_size", {"score_requests"}),
        ("labels.item_vectors", {"score_candidates"}),
        ("labels.calibrator.spread", {"fit_calibrator"}),
        ("feed.passthrough", {"ingest", "samples", "training_feed"}),
        ("prerank.lambda_", {"train_preranker"}),
    ],
)  # fmt: skip
def test_a_setting_turns_just_the_steps_stale_that_it_shapes(tmp_path, name, steps):
    assert stale_steps(*changed(tmp_path, name)) == steps


def test_the_hash_reaches_into_mappings_and_lists_of_sections():
    class Inner(Section):
        shaping: int = 0
        speed: int = Knob(0)

    class Outer(Section):
        one: Inner = Inner()
        many: tuple[Inner, ...] = ()
        named: dict[str, Inner] = {}  # noqa: RUF012

    for where in ({"one": Inner(speed=1)}, {"many": (Inner(speed=1),)}, {"named": {"a": Inner(speed=1)}}):
        slow = {k: Inner() if k == "one" else (Inner(),) if k == "many" else {"a": Inner()} for k in where}
        assert hash_of(Outer(**where)) == hash_of(Outer(**slow))
        assert hash_of(Outer(**where)) != hash_of(Outer(one=Inner(shaping=2)))


def test_the_hash_is_the_same_in_another_process(tmp_path):
    assert hash_of(small_config(tmp_path).samples) == hash_of(small_config(tmp_path / "again").samples)
    code = "from gpl_core.config import hash_of, load_config; print(hash_of(load_config('quickstart').encoder))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == hash_of(load_config("quickstart").encoder)


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
