"""Chromium without a driver: the DevTools protocol over a pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--remote-debugging-pipe", "--hide-scrollbars",
)  # fmt: skip
CONTRASTS = """(() => {
  const channels = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const ground = (element) => !element ? [255, 255, 255]
    : over(channels(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(element), shown = element.getClientRects().length;
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !shown || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const behind = ground(element), color = channels(element.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [light(over(color, behind)), light(behind)];
    const text = element.tagName + ": " + element.textContent.trim().slice(0, 60);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
  }
  return found;
})()"""
"""[[contrast by WCAG, tag and text], …] of every element that shows text of its own."""


class Browser:
    """One page of a headless Chromium; `events` holds what it reported since it was opened."""

    def __init__(self, profile: Path):
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        command = [
            "bash",
            "-c",
            f'exec "$0" "$@" 3<&{read} 4>&{write}',
            PROGRAM,
            *_OPTIONS,
            f"--user-data-dir={profile}",
        ]
        with open(profile.with_suffix(".log"), "wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(read, write), stdout=log, stderr=log)
        os.close(read), os.close(write)
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._number:
            self.events.append(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            assert more, "Chromium ended; its log lies beside its profile"
            self._rest += more
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def open(self, path: Path, *, width: int = 1280, theme: str = "light", script: bool = True) -> None:
        """Show a file at a width and in a theme; returns when it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def requests(self) -> list[str]:
        """What the page asked for since it was opened."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[dict[str, Any]]:
        """What stands in the console: errors, refused scripts, messages."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [e for e in self.events if e.get("method") in kinds]

    def close(self) -> None:
        """End the browser."""
        os.close(self._out), os.close(self._in)
        self._process.terminate()
        self._process.wait(timeout=30)
