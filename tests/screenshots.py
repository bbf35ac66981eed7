"""Make the screenshots of the docs from a folder of runs, with a headless Chromium.

make forget
python -m tests.screenshots runs
"""

from __future__ import annotations

import io
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image

from letheon import durable
from letheon.launch.serving.run_list import Table
from letheon.launch.serving.serve import Server, Settings
from tests.browser import Browser, open_browser
from tests.house import ROOT

PICTURES = ROOT / "docs" / "pictures"
WIDTH = 1100
HEIGHT = 700


def save(browser: Browser, name: str, section: str = "") -> None:
    """Write a picture of the open page, from the section of that id on."""
    if section:
        bar = "(document.getElementById('tools')?.offsetHeight ?? 0)"
        place = f"document.getElementById('{section}').getBoundingClientRect().top + scrollY"
        browser.run(f"scrollTo(0, {place} - {bar})")
    content = io.BytesIO()
    Image.open(io.BytesIO(browser.picture())).convert("RGB").save(content, "PNG", optimize=True)
    durable.write(PICTURES / f"{name}.png", content.getvalue())


def main(folder: Path) -> None:
    """Serve the folder and picture its list, a table with a point that is asked, and a report."""
    with (
        tempfile.TemporaryDirectory() as profile,
        Server(Settings(folders=(folder,), port=0)) as server,
        open_browser(Path(profile)) as browser,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(server.url, WIDTH, HEIGHT)
        browser.wait("document.querySelectorAll('.sort').length > 0")
        save(browser, "serve-runs")
        entries = server.site.lists[0].entries
        table = next(path for path, of in sorted(entries.items()) if isinstance(of, Table))
        browser.open(f"{server.url}at/0/{table}", WIDTH, HEIGHT)
        browser.wait("document.querySelectorAll('.sort').length > 0")
        browser.run("document.querySelectorAll('.plot circle')[3].focus()")
        save(browser, "serve-table", "pictures")
        browser.open((folder / table / "report.html").resolve().as_uri(), WIDTH, HEIGHT)
        save(browser, "report", "table-summary")
        server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
