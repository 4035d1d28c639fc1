"""The documents as a site: whole, without another host, readable in both color schemes."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import CONTRASTS, PROGRAM, Browser
from tests.documented import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mkdocs in its strict mode refuses links that lead nowhere, pages outside the menu, unknown names of the API."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Assets(HTMLParser):
    """What a page makes a browser fetch, without a click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.found.append(given["src"] or "")
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.found.append(given.get("href") or "")


def test_the_site_holds_every_page_and_asks_no_other_host(site):
    pages = {p.parent.name for p in site.rglob("index.html")} | {"index"}
    assert {p.stem for p in (ROOT / "docs").rglob("*.md")} <= pages
    for page in site.rglob("*.html"):
        assets = Assets()
        text = page.read_text(encoding="utf-8")
        assets.feed(text)
        assert len(assets.found) > 3
        assert [a for a in assets.found if re.match(r"(https?:)?//", a)] == [], page
        assert 'class="mermaid"' not in text, f"{page}: the theme would fetch mermaid from another host"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[ \"']*(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_code_can_be_copied_examples_are_shown_and_the_api_has_its_docstrings(site):
    examples = (site / "examples" / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", examples)
    for script in (ROOT / "docs" / "examples").glob("*.py"):
        assert script.read_text(encoding="utf-8").splitlines()[-1].strip().split("(")[0] in text, script.name
    assert "content.code.copy" in examples
    api = (site / "api" / "index.html").read_text(encoding="utf-8")
    import gpl_core

    assert [name for name in gpl_core.__all__ if f">{name}</span>" not in api] == []
    assert "Rows of one of our tables" in api


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: make browser")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["benchmarks", "api", "roles"])
def test_all_text_has_enough_contrast(site, name, theme, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(site / name / "index.html", theme=theme)
        found = browser.value(CONTRASTS)
    finally:
        browser.close()
    assert len(found) > 50
    # WCAG AA, text of normal size; what shows only when it is pointed at aside.
    assert [f for f in found if f[0] < 4.5 and not f[1].startswith(("BUTTON", "LABEL", "A: ¶"))] == []
