"""What the documents say: links lead somewhere, commands can be typed, generated pages are those of today."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gpl_core.cli import make_parser
from gpl_core.config import Config, load_config
from gpl_core.contracts import all_contracts
from gpl_core.pipeline import STEPS
from gpl_core.settings_page import settings_page
from gpl_core.views import all_views

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
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


def commands(page: Path) -> list[str]:
    """`gpl …` command lines in code blocks, continued lines joined, and inline ones that are whole."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in blocks.splitlines()]
    inline = [code.replace("\n", " ") for code in re.findall(r"`(gpl [^`]+)`", text) if " --config" in code]
    return [c for c in [*lines, *inline] if re.match(r"(\.venv/bin/)?gpl ", c)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_gpl_command_of_the_documents_can_be_typed(page):
    for command in commands(page):
        words = shlex.split(command.split(" > ")[0].split(" | ")[0])[1:]
        # Stand-ins of the documents: D, U, I, N, STEP, START, LAST.
        days = {"D": "2026-01-03", "START": "2026-01-03", "LAST": "2026-01-04", "N": "1", "STEP": "samples"}
        args = make_parser().parse_args([days.get(w, w) for w in words])
        for step in getattr(args, "only", []):
            assert step in {s.name for s in STEPS}, command


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


def test_every_setting_says_what_it_means():
    silent = [line for line in settings_page().splitlines() if line.startswith("| ") and line.endswith("|  |")]
    assert silent == []
