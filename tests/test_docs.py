"""What the documents say: links lead somewhere, commands can be typed, generated pages are those of today."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from contextlib import nullcontext
from pathlib import Path

import jsonschema
import pytest
import yaml

from gpl_core.cli import make_parser
from gpl_core.commands.settings import json_schema, settings_page
from gpl_core.config import Config, load_config, shipped_configs
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import UsageError
from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.views import all_views
from tests.bench import table
from tests.bench.overview import Interval
from tests.documented import ELSEWHERE, LAUNCHERS, PAGES, ROOT, commands, runner, typed

NAMES = [str(p.relative_to(ROOT)) for p in PAGES]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_is_run_by_something_that_is_there(page):
    for command in commands(page.read_text(encoding="utf-8")):
        by = runner(command)
        assert by, f"{page.name}: nobody runs '{command}': see tests/documented.py"
        path, _, name = by.partition("::")
        assert path == "house" or (ROOT / path).exists(), f"{command}: {path} is not there"
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{command}: no {by}"


def test_what_is_said_to_run_elsewhere_stands_in_a_document():
    shown = [c for page in PAGES for c in commands(page.read_text(encoding="utf-8"))]
    lines = {" ".join(shlex.split(c)) for c in shown} | {
        f"{program} {script}" for c in shown for program in LAUNCHERS for script in shlex.split(c) if program in c
    }
    assert [c for c in ELSEWHERE if c not in lines] == []


def test_a_new_command_is_found_wherever_it_stands():
    page = """Run `gpl run` or `gpl frob --now`, `make x`; `spark-submit --py-files` is a word, `gpl.zip` too.

```
A=1 B=2 deepspeed --num_accelerators 1 \\
    gpu_workers/new.py --x            # does it
docker run it
f = x + 1
```

`gpl a
--b`
"""
    assert [c.split() for c in commands(page)] == [
        ["A=1", "B=2", "deepspeed", "--num_accelerators", "1", "gpu_workers/new.py", "--x"], ["docker", "run", "it"],
        ["gpl", "frob", "--now"], ["make", "x"], ["gpl", "a", "--b"],
    ]  # fmt: skip
    assert [runner(c) for c in commands(page)] == ["", "", "house", "", "house"]


def test_every_gpl_command_of_the_documents_can_be_typed():
    for command in (c for page in PAGES for c in commands(page.read_text(encoding="utf-8"))):
        if re.match(r"(\.venv/bin/)?gpl \w", command) and "--help" not in command:
            args = make_parser().parse_args(
                typed(command, config="c", first="2026-01-03", last="2026-01-04", user="U", item="I")
            )
            for step in getattr(args, "only", []):
                assert step in {s.name for s in STEPS}, command


def test_every_make_target_of_the_documents_can_be_planned():
    shown = {c for page in PAGES for c in commands(page.read_text(encoding="utf-8")) if c.startswith("make ")}
    assert len(shown) > 5
    for command in shown:
        done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", table.PAGES, ids=lambda p: p.name)
def test_readme_and_the_benchmarks_say_what_the_results_say(path):
    """Figures, tables and plots are those of tests/bench/results, figure by figure."""
    assert path.read_text(encoding="utf-8") == table.PAGES[path](), "out of date: python -m tests.bench.table"


def test_a_difference_is_only_called_one_when_its_interval_leaves_out_zero():
    assert [Interval(1, a, b).verdict for a, b in ((0.5, 2), (-2, -0.5), (-1, 2), (0, 2))] == [
        "**better**", "**worse**", "no difference shown", "no difference shown",
    ]  # fmt: skip
    assert Interval(0.02, 0.01, 0.03).compared == "better than"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_scripts_and_settings_that_the_documents_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"(?<![\w/])((?:spark_jobs|gpu_workers|docs|gpl_core)/[\w/]+\.(?:py|yaml))", text):
        assert (ROOT / script).exists(), f"{page.name}: {script}"
    sections = "|".join(Config.model_fields)
    for key in set(re.findall(rf"`((?:{sections})(?:\.\w+)+)`", text)):
        if key.endswith(".py"):
            continue
        value: object = load_config("quickstart")
        for part in key.split("."):
            if isinstance(value, dict):  # a map of the user's own names
                break
            part = "lambda_" if part == "lambda" else part
            assert hasattr(value, part), f"{page.name}: no setting {key}"
            value = getattr(value, part)


def test_grants_name_what_exists_and_give_analysts_no_view_of_single_users():
    text = (ROOT / "docs" / "grants.sql").read_text(encoding="utf-8")
    granted = re.findall(r"GRANT SELECT ON (TABLE|VIEW) gpl\.(\w+) TO `(\w+)`", text)
    assert len(granted) == text.count("GRANT SELECT")
    for kind, name, group in granted:
        assert name in (all_views() if kind == "VIEW" else all_contracts()), name
        columns = [c for c, _ in all_views()[name].columns] if kind == "VIEW" else all_contracts()[name].column_names
        assert group != "analysts" or "user_id" not in columns, name
    assert {n for kind, n, _ in granted if kind == "VIEW"} == set(all_views())


def test_the_configuration_reference_is_up_to_date():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == settings_page() + "\n", (
        "docs/configuration.md is out of date: gpl settings > docs/configuration.md"
    )


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("", ""),
        ("anchors: {count: 5}", ""),
        ("anchors: {cuont: 5}", "cuont"),
        ("anchors: {count: five}", "five"),
        ("labels: {calibrator: {kind: quantiles}}", "quantiles"),
        ("prerank: {lambda: 0.5}", ""),
    ],
)
def test_the_json_schema_of_a_configuration_accepts_and_refuses_what_gpl_does(body, wrong, tmp_path):
    schema = jsonschema.Draft202012Validator(json.loads(json_schema()))
    text = f"lakehouse: {{root: x}}\nrun: {{start_date: 2026-01-03, end_date: 2026-01-04}}\n{body}\n"
    (tmp_path / "c.yaml").write_text(text)
    found = [e.message for e in schema.iter_errors(json.loads(json.dumps(yaml.safe_load(text), default=str)))]
    assert bool(found) == bool(wrong)
    assert all(wrong in message for message in found)
    with pytest.raises(UsageError, match=wrong) if wrong else nullcontext():
        load_config(str(tmp_path / "c.yaml"))
    for name in shipped_configs():
        shipped = (ROOT / "gpl_core" / "conf" / f"{name}.yaml").read_text(encoding="utf-8")
        assert schema.is_valid(json.loads(json.dumps(yaml.safe_load(shipped), default=str))), name


def test_the_pages_that_show_the_graph_name_every_step():
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [s.name for s in STEPS if s.name not in text] == [], page


def test_every_setting_says_what_it_means():
    silent = [line for line in settings_page().splitlines() if line.startswith("| ") and line.endswith("|  |")]
    assert silent == []
