"""`letheon serve` over time: what a poll costs, and what it leaves as it is."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from letheon.eval.report.write import write_report
from letheon.launch.serving.serve import HEADERS, Server, Settings
from letheon.launch.serving.site import Answer, Site
from tests.browser import needs_chromium, open_browser
from tests.patience import PATIENCE, wait_for
from tests.served import log_passes, rows, write_folder, write_run
from tests.test_serve import Tags
from tests.test_serve_browser import COLUMN

TOUCHED = """
window.touched = [];
new MutationObserver((list) => touched.push(...list
  .filter((one) => !one.target.closest("output, time"))
  .map((one) => one.target.closest("tr")?.dataset.key ?? one.target.tagName)
)).observe(document.querySelector("main"), {subtree: true, childList: true});
"""
"""Keeps the rows in which an element came or went."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(Settings(folders=(write_folder(tmp_path / "runs"),), port=0)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def settle(folder: Path) -> None:
    """Set the times of all folders to a moment that is past, and differs from call to call."""
    for k, path in enumerate(sorted({folder, *(one.parent for one in folder.rglob("*"))})):
        os.utime(path, (1e9 + k, path.stat().st_mtime - 1000))


def test_a_poll_looks_at_what_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 300 finished runs and one that is not: counted are listings and looks at files."""
    for k in range(300):
        (tmp_path / f"run-{k}").mkdir()
        (tmp_path / f"run-{k}" / "run.json").write_text('{"method": "finetune"}')
    job = write_run(tmp_path / "job", passes=1, run=None)
    settle(tmp_path)
    listed: list[str] = []
    stats: list[str] = []
    scandir, stat = os.scandir, os.stat

    def list_names(folder: int) -> Any:
        listed.append(Path(os.readlink(f"/proc/self/fd/{folder}")).name)
        return scandir(folder)

    def look_at(path: str, *more: Any, **options: Any) -> os.stat_result:
        stats.append(path)
        return stat(path, *more, **options)

    site = Site([tmp_path])
    tag = site.answer(site.base).tag

    def poll(known: str) -> Answer:
        listed.clear()
        stats.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", list_names)
            patch.setattr(os, "stat", look_at)
            return site.answer(site.base, known)

    of_job = ["metrics.jsonl", "settings.json", "request.json", "versions.json"]
    assert poll(tag) == Answer(HTTPStatus.NOT_MODIFIED, b"", tag=tag)
    assert (listed, stats) == ([], of_job)
    # The job writes on: its log alone has changed, and no folder.
    log_passes(job, range(1, 3))
    answer = poll(tag)
    assert answer.status == 200 and "3/4" in Tags(answer.body).words and listed == []
    assert answer.tag != tag
    # Runs come, end and go: seen at once, and what was not touched is not listed.
    write_run(tmp_path / "new")
    (tmp_path / "run-7" / "run.json").unlink()
    (tmp_path / "run-7").rmdir()
    part = job / "run.json.part"
    part.write_text('{"method": "finetune"}')
    part.rename(job / "run.json")
    words = Tags((answer := poll(answer.tag)).body).words.split()
    assert sorted(listed) == sorted([tmp_path.name, "new", "job"])
    for name in ("new", "job"):
        assert words[words.index(name) + 1] == "finished"
    assert "run-7" not in words and "run-8" in words
    # What no run of ours does, a file that is written over in its place, is seen by a whole look.
    settle(tmp_path)
    poll(answer.tag)
    (tmp_path / "run-9" / "run.json").write_text('{"method": "other"}')
    looks = [poll(answer.tag) for _ in range(15)]
    assert looks[0].status == 304 and any(b"other" in look.body for look in looks)
    assert b"other" in site.answer(site.base).body


def test_the_times_of_a_folder_that_is_new_are_not_trusted(tmp_path: Path) -> None:
    """A file that comes within the same tick of the clock leaves the folder's time as it was."""
    settle(write_folder(tmp_path / "runs"))
    site = Site([tmp_path / "runs"])
    tag = site.answer(site.base).tag
    job = write_run(tmp_path / "runs" / "job", run=None)
    now = os.stat(job).st_mtime_ns
    tag = site.answer(site.base, tag).tag
    (job / "run.json").write_text('{"method": "finetune"}')
    os.utime(job, ns=(now, now))
    words = Tags(site.answer(site.base, tag).body).words.split()
    assert words[words.index("job") + 1] == "finished"


def test_what_was_sent_is_not_sent_again(server: Server) -> None:
    for address in ("", "page.css", "at/0/near", "at/0/table"):
        line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
        line.request("GET", server.site.base + address)
        first = line.getresponse()
        body, tag = first.read(), first.headers["ETag"]
        again = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
        again.request("GET", server.site.base + address, headers={"If-None-Match": tag})
        second = again.getresponse()
        assert (second.status, second.read(), second.headers["ETag"]) == (304, b"", tag)
        assert body and {name: second.headers[name] for name in HEADERS} == HEADERS
        again.request("GET", server.site.base + address, headers={"If-None-Match": '"other"'})
        assert again.getresponse().read() == body


@pytest.mark.slow
@needs_chromium
def test_chromium_keeps_what_a_person_does_when_the_runs_change(tmp_path: Path) -> None:
    """Focus, selection, scroll, filter and order over answers that change one row of 300."""
    folder = tmp_path / "runs"
    for k in range(300):
        write_run(folder / f"run-{k:03}")
    job = write_run(folder / "run-150-job", passes=1, run=None)
    with (
        Server(Settings(folders=(folder,), port=0)) as server,
        open_browser(tmp_path / "profile") as browser,
    ):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        browser.open(server.url, 1000)
        browser.wait("document.querySelectorAll('.sort').length > 0")
        browser.run(TOUCHED)
        # A filter, a place in the table, a link that has the focus, and a text that is selected.
        browser.run("filter.value = 'run-1'; show()")
        link = f"{server.site.base}at/0/run-150"
        browser.run(f"document.querySelector('a[href=\"{link}\"]').focus()")
        browser.run("document.querySelector('.scroll').scrollLeft = 40")
        browser.run(f"getSelection().selectAllChildren(document.querySelector('[data-key=\"{link}\"]"
                    "').cells[3])")  # fmt: skip
        state = (
            "[document.activeElement.getAttribute('href'), String(getSelection()), scrollY, "
            "document.querySelector('.scroll').scrollLeft, document.querySelector('input').value]"
        )
        before = browser.run(state)
        assert before[:2] == [link, "class:3"] and before[2] > 1000 and before[3:] == [40, "run-1"]
        log_passes(job, range(1, 3))
        browser.wait("document.body.innerText.includes('3/4')")
        assert browser.run(state) == before
        assert set(browser.run("touched")) == {f"{server.site.base}at/0/run-150-job"}
        shown = "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).length"
        assert browser.run(shown) == 101
        # A run that comes, where the filter shows it, and one that goes.
        write_run(folder / "run-1000")
        (folder / "run-299").rename(tmp_path / "gone")
        browser.wait("document.body.innerText.includes('run-1000')")
        assert browser.run(state)[:2] == before[:2] and browser.run(shown) == 102
        assert browser.run("document.querySelectorAll('tbody tr').length") == 301
        names = browser.run(COLUMN)
        assert names.index("run-1000") == names.index("run-100") + 1, "the server's order"
        # The row that moves by its new number takes the focus with it; no other is moved.
        browser.run("document.querySelector('[aria-label=\"Sort by Epoch\"]').click()")
        assert browser.run(COLUMN)[0] == "run-150-job"
        browser.run("touched.length = 0")
        browser.run(f"document.querySelector('a[href=\"{link}-job\"]').focus()")
        log_passes(job, range(3, 5))
        browser.wait("document.querySelector('tbody').lastElementChild.innerText.includes('5/4')")
        assert browser.run("document.activeElement.getAttribute('href')") == f"{link}-job"
        assert set(browser.run("touched")) == {"TBODY", f"{link}-job"}
        # A table gives the list columns that it did not have: the order stays, by its name.
        write_report(rows(), folder / "table")
        write_run(folder / "near")
        browser.wait("document.querySelector('thead').innerText.includes('FA %')")
        browser.run("filter.value = ''; show()")
        assert browser.run(COLUMN)[301] == "run-150-job"
        assert "ascending" in browser.run(
            "[...document.querySelectorAll('th')].map(h => h.ariaSort + h.firstChild.data)"
            ".find(t => t.includes('Epoch'))"
        )
        assert browser.run("document.querySelectorAll('section')[1].querySelectorAll('td').length")
        # Nothing that is new: the answer is empty.
        start = len(browser.events)

        def is_unchanged() -> bool:
            browser.run("0")
            got = [e["params"]["response"]["status"] for e in browser.events[start:]
                   if e["method"] == "Network.responseReceived"]  # fmt: skip
            return 304 in got

        wait_for(is_unchanged, "answer that nothing changed")
        assert browser.problems == []
        server.shutdown()
