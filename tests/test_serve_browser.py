"""`letheon serve` and the report in a headless Chromium: keys, contrast, what it asks for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from letheon.eval.report.write import write_report
from letheon.launch.serving.serve import Server, Settings
from tests.browser import needs_axe, needs_chromium, open_browser
from tests.house import ROOT
from tests.served import EVIL, log_passes, rows, write_folder, write_run

CONTRAST = """
(() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) =>
    0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || e.closest("title, script, style")) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${walker.currentNode.data}`);
  }
  return found;
})()
"""
"""Texts with less than 4.5 to 1 of contrast with what is behind them (WCAG 2.2, 1.4.3)."""
NAMES = """
[...document.querySelectorAll("a[href], button, input, select, summary, [tabindex]")].filter((e) =>
  !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)).length
"""
COLUMN = "[...document.querySelectorAll('tbody tr:not(.group)')].map(r => r.cells[0].innerText)"


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_sorts_filters_tells_and_follows(width: int, tmp_path: Path) -> None:
    """With keys alone but for the pointer over a point; no error, no other host, no overflow."""
    folder = write_folder(tmp_path / "runs")
    job = write_run(folder / f"job-{width}", passes=1, run=None)
    with (
        Server(Settings(folders=(folder,), port=0)) as server,
        open_browser(tmp_path / "profile") as browser,
    ):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def look(url: str) -> None:
            browser.open(url, width)
            browser.wait("document.querySelectorAll('.sort').length > 0")
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run(CONTRAST) == [] and browser.run(NAMES) == 0
            assert browser.run("[...document.images].every(i => i.naturalWidth > 0)")

        look(server.url)
        # Tab goes to the filter, to the region of the table, and from head to head.
        browser.press("Tab")
        for key in "near":
            browser.press(key)
        browser.wait("document.querySelector('output').value.startsWith('1 of ')")
        assert (
            browser.run("[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).length")
            == 1
        )
        browser.run("document.querySelector('input').value = ''")
        browser.press(" ")  # an input event
        focus = []
        for _ in range(12):
            browser.press("Tab")
            focus.append(browser.run("document.activeElement.ariaLabel"))
        assert focus[:4] == ["Runs, table", "Sort by Run", "Sort by State", "Sort by Method"]
        while "FA %" not in str(focus[-1]):
            browser.press("Tab")
            focus.append(browser.run("document.activeElement.ariaLabel"))
        browser.press("Enter")
        order = [name for name in browser.run(COLUMN) if name in ("near", "middle", "far")]
        assert order == ["near", "middle", "far"]
        browser.press(" ")  # the same button: the other way
        order = [name for name in browser.run(COLUMN) if name in ("near", "middle", "far")]
        assert order == ["far", "middle", "near"]
        assert browser.run("document.querySelector('th[aria-sort]').ariaSort") == "descending"
        # What the job writes comes by itself, and leaves the order.
        log_passes(job, range(1, 3))
        browser.wait("document.body.innerText.includes('3/4')")
        order = [name for name in browser.run(COLUMN) if name in ("near", "middle", "far")]
        assert order == ["far", "middle", "near"]

        look(f"{server.url}at/0/table")
        browser.point("circle[data-row='2']")
        browser.wait("document.querySelector('output').value.includes('near: TFA 25.00 %')")
        assert browser.run("document.querySelectorAll('tr.at').length") > 0
        browser.run("document.querySelector('circle[data-row=\"4\"]').focus()")
        browser.wait("document.querySelector('output').value.includes('far: TFA 50.00 %')")
        look_run = f"{server.url}at/0/{job.name}"
        browser.open(look_run, width)
        assert browser.run(CONTRAST) == []
        log_passes(job, range(3, 4))
        browser.wait("document.querySelector('progress').value === 1")
        # The judge of contrast finds what is faint.
        browser.run("document.querySelector('h1').style.color = 'rgb(160, 160, 160)'")
        assert len(browser.run(CONTRAST)) == 1
        assert browser.problems == []
        hosts = {url.split("/")[2] for url in browser.requests}
        assert hosts == {f"127.0.0.1:{server.server_port}"}
        browser.open((folder / "table" / "report.html").as_uri(), width)
        assert browser.run(CONTRAST) == [] and browser.run(NAMES) == 0
        server.shutdown()


@pytest.mark.slow
@needs_chromium
def test_chromium_runs_nothing_of_a_hostile_table(tmp_path: Path) -> None:
    """The policy holds even where a name gets through: a script that is put in does not run."""
    bad = [row | {"name": f"{EVIL}{k}"} for k, row in enumerate(rows())]
    write_report(bad, tmp_path / "runs" / "table", heading=EVIL)
    settings = Settings(folders=(tmp_path / "runs",), port=0)
    with Server(settings) as server, open_browser(tmp_path / "profile") as browser:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for url in (server.url, f"{server.url}at/0/table"):
            browser.open(url, 1280)
            browser.run("window.ran = 0; window.alert = () => { window.ran = 1; }")
            browser.wait("document.querySelectorAll('.sort').length > 0")
            assert browser.run("document.querySelectorAll('script').length") == 1
        assert browser.problems == []
        browser.run("document.body.setAttribute('onclick', 'alert(1)'); document.body.click()")
        browser.run("document.body.append(Object.assign(document.createElement('script'), "
                    "{textContent: 'alert(1)'}))")  # fmt: skip
        browser.run("document.body.append(Object.assign(document.createElement('img'), "
                    "{src: 'http://127.0.0.2/x'}))")  # fmt: skip
        refusals = ("inlineSecurityPolicy", "contentSecurityPolicy", "violat")
        assert browser.run("window.ran") == 0
        assert any(word in str(browser.problems) for word in refusals)
        assert browser.expect("Network.loadingFailed")["blockedReason"] == "csp"
        server.shutdown()


def write_many(out: Path) -> None:
    """Write the page of a table with as many models as a search leaves."""
    first, *_, last = rows()
    many = [last | {"name": f"salun-lr{k}", "FA": k / 50, "seconds": k + 1.0} for k in range(40)]
    write_report([first, *many], out, heading="Many")


@pytest.mark.slow
@needs_chromium
@needs_axe
def test_axe_finds_nothing_wrong_with_any_page(tmp_path: Path) -> None:
    """axe-core 4, every rule of its own choice, on each kind of page, wide and narrow."""
    folder = write_folder(tmp_path / "runs")
    write_many(folder / "many")
    with (
        Server(Settings(folders=(folder,), port=0)) as server,
        open_browser(tmp_path / "profile") as browser,
    ):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        served = [f"{server.url}{path}" for path in ("", "at/0/table", "at/0/many", "at/0/now")]
        files = [(folder / name / "report.html").as_uri() for name in ("table", "many")]
        for url in (*served, f"{server.url}at/0/nothing", *files):
            for width in (1280, 390):
                browser.open(url, width)
                browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
                assert browser.violations() == [], (url, width)
        # The judge does judge.
        browser.run("document.querySelector('h1').style.color = 'rgb(160, 160, 160)'")
        browser.run("document.querySelector('table').tabIndex = 3")
        found = {line.partition(":")[0] for line in browser.violations()}
        assert found == {"serious color-contrast", "serious tabindex"}
        server.shutdown()


SITE = ROOT / "build" / "site"


@pytest.mark.slow
@needs_chromium
@needs_axe
@pytest.mark.skipif(not SITE.is_dir(), reason="needs the site: make docs")
def test_axe_finds_nothing_wrong_with_the_site_of_the_docs(tmp_path: Path) -> None:
    """Pages of each kind, light and dark."""
    with open_browser(tmp_path / "profile") as browser:
        for name in ("index", "first-run", "methods", "reference", "notebooks/own-model-and-data"):
            url = (SITE / f"{name}.html").as_uri()
            for width, scheme in ((1280, "light"), (390, "light"), (1280, "dark")):
                colors = [{"name": "prefers-color-scheme", "value": scheme}]
                browser.call("Emulation.setEmulatedMedia", features=colors)
                browser.open(url, width)
                browser.run("localStorage.clear()")  # the color of the page before is kept
                browser.open(f"{url}?{width}-{scheme}", width)
                # The theme adds its parts between the runs of axe, in the thread that both share.
                tries = 300
                while (found := browser.violations()) and (tries := tries - 1):
                    time.sleep(0.1)
                assert found == [], (name, width, scheme)
