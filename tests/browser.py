"""A headless Chromium, driven over a pipe by its DevTools protocol: no package is needed.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE, wait_for

_AXE = find_spec("axe_playwright_python")  # whose driver is not used, nor imported
AXE = Path(str(_AXE.origin)).with_name("axe.min.js") if _AXE else None
"""axe-core, the judge of accessibility: `make extras` brings it, inside a package of its own."""
needs_axe = pytest.mark.skipif(AXE is None, reason="needs axe-core: make extras")
needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on PATH")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads commands from descriptor 3 and writes to 4.
_START = (
    "import os, sys; [os.dup2(int(n), k) for k, n in zip((3, 4), sys.argv[1:3])]; "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
_CODES = {"Enter": 13, "Tab": 9, " ": 32}


class Browser:
    """One tab; what went wrong in it and what it asked for is kept."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], PATIENCE)[0], "the browser says nothing"
            part = os.read(self._read, 2**20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true."""
        wait_for(lambda: self.run(script), script)

    def expect(self, method: str) -> dict[str, Any]:
        """Wait until an event has come, and return what it says; the first of its kind."""

        def said() -> list[dict[str, Any]]:
            self.run("0")  # events come before its answer
            return [event["params"] for event in self.events if event["method"] == method]

        wait_for(said, method)
        return said()[0]

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page at a width in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 500,
        )  # fmt: skip
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"Enter": "\r", " ": " "}.get(key, "" if key in _CODES else key)
        of = {"key": key, "windowsVirtualKeyCode": _CODES.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **of)
        self.call("Input.dispatchKeyEvent", type="keyUp", **of)

    def point(self, selector: str) -> None:
        """Move the mouse over an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def violations(self) -> list[str]:
        """What axe-core finds wrong in the open page: impact, rule and the first place of each."""
        assert AXE is not None
        self.run(f"{AXE.read_text(encoding='utf-8')}; 0")
        found: list[str] = self.run(
            "axe.run(document, {resultTypes: ['violations']}).then((of) => of.violations.map((v) =>"
            " `${v.impact} ${v.id}: ${v.nodes[0].html.slice(0, 200)}`))"
        )
        return found

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser, its helpers too."""
        self._session = ""
        self.call("Browser.close")

    @property
    def problems(self) -> list[dict[str, Any]]:
        """What the page has thrown, logged or violated."""
        kinds = (
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Runtime.consoleAPICalled",
            "Audits.issueAdded",
        )
        return [event["params"] for event in self.events if event["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for; pictures within the page are no requests."""
        of = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [str(event["params"]["request"]["url"]) for event in of]
        return [url for url in urls if not url.startswith("data:")]


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile; it ends with the block."""
    pairs = [os.pipe(), os.pipe()]
    (their_read, write), (read, their_write) = [
        [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pair] for pair in pairs
    ]
    for pair in pairs:
        for fd in pair:
            os.close(fd)
    command = [sys.executable, "-c", _START, str(their_read), str(their_write)]
    process = subprocess.Popen(
        [*command, "chromium", *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(their_read, their_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for fd in (their_read, their_write):
        os.close(fd)
    try:
        browser = Browser(read, write)
        yield browser
        browser.close()
        process.wait(PATIENCE)
    finally:
        for fd in (read, write):
            os.close(fd)
        process.terminate()
        process.wait()
