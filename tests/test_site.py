"""The documents as a site: whole, without another host, readable in both color schemes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.documented import ROOT

pytestmark = pytest.mark.slow
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LEAST = 4.5  # WCAG AA, text of normal size
# Contrast of every element that holds text itself, with what is behind it; the worst few, as text of the page's title.
MEASURE = """
<style>* { transition: none !important; }</style>
<script>
addEventListener("load", () => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const over = (t, b) => [0, 1, 2].map(i => t[i] * (t[3] ?? 1) + b[i] * (1 - (t[3] ?? 1)));
  const behind = e => {
    if (!e) return [255, 255, 255];
    const c = parse(getComputedStyle(e).backgroundColor);
    return (c[3] ?? 1) === 1 ? c : over(c, behind(e.parentElement));
  };
  const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => {
    const v = c[i] / 255;
    return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  }, 0);
  setTimeout(() => {  // after the theme's own script has chosen a scheme
    document.body.setAttribute("data-md-color-scheme", "SCHEME");
    const found = [];
    for (const e of document.querySelectorAll("main *, header *, footer *")) {
      const text = [...e.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data.trim()).join(" ");
      if (!text || e.matches(".headerlink, script, style, label, button") || !e.getClientRects().length) continue;
      const b = behind(e), t = over(parse(getComputedStyle(e).color), b);
      const [x, y] = [light(t), light(b)].sort((p, q) => q - p);
      found.push([(x + .05) / (y + .05), e.tagName + "." + e.className + " " + text.slice(0, 30)]);
    }
    found.sort((p, q) => p[0] - q[0]);
    document.title = "measured " + found.length + ": " + found.filter(f => f[0] < LEAST).slice(0, 5)
      .map(f => f[0].toFixed(2) + " " + f[1]).join("; ");
  }, 1000);
});
</script>
"""


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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: make browser")
@pytest.mark.parametrize("scheme", ["default", "slate"])
@pytest.mark.parametrize("name", ["benchmarks", "api", "roles"])
def test_all_text_has_enough_contrast(site, name, scheme, tmp_path):
    page = site / name / "index.html"
    script = MEASURE.replace("SCHEME", scheme).replace("LEAST", str(LEAST))
    measured = page.with_name(f"measured-{scheme}.html")
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    try:
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom",
             f"--user-data-dir={tmp_path}", "--window-size=1280,900", measured.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    finally:
        measured.unlink()
    found = re.search(r"<title>measured (\d+): (.*?)</title>", done.stdout)
    assert found, done.stdout[:500]
    assert int(found[1]) > 50
    assert found[2] == ""
