"""`letheon serve`: what it shows, and what a folder or a stranger cannot make it do."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest

from letheon.errors import InputError
from letheon.eval.report.write import write_report
from letheon.launch.serving import walk
from letheon.launch.serving.serve import HEADERS, Server, Settings, is_own_host
from letheon.launch.serving.site import Answer, Site
from letheon.regular import open_folder, read_regular
from tests.launch_tools import Scripts
from tests.patience import PATIENCE
from tests.served import EVIL, log_passes, rows, write_folder, write_run


class Tags(HTMLParser):
    """The scripts, handlers and addresses of a page, and its words."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.scripts: list[str | None] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(body.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        assert not [name for name in of if name.startswith("on") or name == "style"]
        assert tag not in ("iframe", "object", "embed", "base", "form", "style")
        if tag == "script":
            self.scripts.append(of.get("src"))
        self.addresses += [str(of[key]) for key in ("href", "src") if key in of]

    def handle_data(self, data: str) -> None:
        self.words += f" {' '.join(data.split())}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("served") / "runs")


def at(site: Site, path: str, number: int = 0) -> Answer:
    return site.answer(f"{site.base}at/{number}/{quote_from_bytes(os.fsencode(path))}")


def index(site: Site) -> Tags:
    answer = site.answer(site.base)
    assert answer.status == 200
    return Tags(answer.body)


def test_the_list_has_every_run_with_its_state_and_the_numbers_of_the_table(folder: Path) -> None:
    site = Site([folder])
    words = index(site).words
    for name in ("near", "middle", "far", "now"):
        assert words.count(f" {name} ") >= 1
    assert words.count(" finished") == 4 and words.count(" unfinished") == 1  # the table, too
    assert "node7" in words and "2/4" in words and "class:3" in words
    assert " 20.00 " in words  # FA of `near`, found by the digest of its weights
    assert at(site, "now").status == 200
    assert "from 2 to 1" in Tags(at(site, "now").body).words


def test_a_table_is_the_report_with_its_examples(folder: Path) -> None:
    body = at(Site([folder]), "table").body.decode()
    report = (folder / "table" / "report.html").read_text()
    start = report.index("<table>")
    summary = report[start : report.index("</table>", start)]
    assert summary in body  # one source, the same cells
    assert "61%" in body and "What is left" in body and body.count("<circle") == 2 * 5
    assert report.count("<circle") == 10 and "<script" not in report


def test_a_table_is_drawn_again_when_it_changes(tmp_path: Path) -> None:
    """Two tables of one name and one time, then one that a newer page lies beside."""
    for name in ("a", "b"):
        (tmp_path / name / "table").mkdir(parents=True)
        path = tmp_path / name / "table" / "metrics.json"
        path.write_text(json.dumps({"rows": [{"name": f"model-{name}", "FA": 0.5}]}))
        os.utime(path, (1, 1))
    site = Site([tmp_path / "a", tmp_path / "b"])
    for number, name in enumerate(("a", "b")):
        assert f"model-{name}" in Tags(at(site, "table", number).body).words
    (path.parent / "page.json").write_text("{}")
    assert at(site, "table", 1).status == 200
    path.write_text(json.dumps({"rows": [{"name": "model-c", "FA": 0.5}]}))
    os.utime(path, (2, 2))
    assert "model-c" in Tags(at(site, "table", 1).body).words


def test_a_file_is_read_once_and_a_page_reads_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 300 runs and a table of them: counted are the files that are opened."""
    for k in range(300):
        (tmp_path / f"run-{k}").mkdir()
        (tmp_path / f"run-{k}" / "run.json").write_text("{}")
    of = [{"name": f"run-{k}", "role": "retrained", "FA": k / 300} for k in range(300)]
    write_report(of, tmp_path / "table", page=False)
    names: list[str] = []
    real = os.open

    def count(path: str, flags: int, *more: int, **options: int) -> int:
        if not flags & os.O_DIRECTORY and "dir_fd" in options:
            names.append(str(path))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", count)

    def files_of(path: str | None) -> list[str]:
        names.clear()
        assert (site.answer(site.base) if path is None else at(site, path)).status == 200
        return [*names]

    site = Site([tmp_path])
    assert files_of("table") == ["metrics.json"] and files_of("table") == []
    run = ["run.json", "metrics.jsonl"]  # there is no log: it is asked for
    assert files_of("run-7") == run
    assert files_of(None) == run * 299 and files_of(None) == []
    (tmp_path / "run-9" / "run.json").write_text('{"seed": 1}')
    assert files_of("run-8") == [] and files_of(None) == run


def test_points_that_tell_lie_on_their_markers(folder: Path) -> None:
    """Against the places of the markers in the SVG that matplotlib wrote."""
    text = (folder / "table" / "report.html").read_text()
    figure = text[text.index("trade-off</h3>") :]
    svg = base64.b64decode(re.search(r"svg\+xml;base64,([^\"]+)", figure)[1]).decode()  # type: ignore[index]
    wide = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    used = re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"', svg)
    markers = [(float(x) / wide, float(y) / wide) for x, y in used]
    drawn = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', figure[: figure.index("</figure>")])
    spots = [(float(x), float(y)) for x, y in drawn]
    assert len(set(spots)) == 5
    assert all(any(math.dist(spot, of) < 1e-3 for of in markers) for spot in spots)


def test_progress_is_that_of_the_log(tmp_path: Path) -> None:
    run = write_run(tmp_path / "job", passes=1, run=None)
    site = Site([tmp_path])
    assert "1/4" in index(site).words
    log_passes(run, range(1, 3))
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b'{"kind": "phase", "epoch": 3, "lo')  # half a line, as it is written
    assert "3/4" in index(site).words and 'value="0.75"' in at(site, "job").body.decode()
    (run / "failed.json").write_text(json.dumps({"message": "loss is <not> finite"}))
    assert "failed loss is <not> finite" in index(site).words


def test_a_job_runs_as_long_as_it_holds_its_lock(tmp_path: Path) -> None:
    write_run(tmp_path / "job", passes=1, run=None)
    (tmp_path / "job.rows").mkdir()  # as an evaluation keeps them
    (tmp_path / "job.rows" / "1.json").touch()
    code = (
        "import sys\nfrom pathlib import Path\nfrom letheon.folders import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "job")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        site = Site([tmp_path])
        told = f"running process {process.pid} on {socket.gethostname()}, 1 rows are finished"
        assert told in index(site).words
        process.kill()
        process.wait()
    assert (tmp_path / ".job.lock").exists()
    assert "unfinished" in index(site).words and "running" not in index(site).words


# ------------------------------------------------------------------------------- hostile folders


def test_no_name_or_text_of_a_folder_brings_markup(tmp_path: Path) -> None:
    name = EVIL.replace("/", "∕")
    texts = {"name": EVIL, "recipe": {"epochs": 3}}
    run = write_run(
        tmp_path / name, settings={"method": texts, "data": EVIL, "seed": EVIL},
        run={"method": EVIL, "model": EVIL}, request={"text": EVIL},
        versions={"nodes": [{"host": EVIL}], "packages": {"letheon": EVIL}},
    )  # fmt: skip
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "phase", "phase": EVIL, "loss": 1.0, EVIL: EVIL}))
    tile = {"image": "javascript:alert(1)", "name": EVIL}
    answer = {"tile": tile, "kind": EVIL, "models": [{"model": EVIL, "name": EVIL}]}
    examples = {"sentence": EVIL, "answers": [answer], "domain": EVIL, "neighbors": []}
    bad = [row | {"name": f"{EVIL}{k}", "classes": [EVIL], "why": {"knn": EVIL}, "knn": None}
           for k, row in enumerate(rows())]  # fmt: skip
    table = tmp_path / f"table {name}"
    write_report(bad, table, heading=EVIL, facts={EVIL: EVIL}, examples=examples)
    site = Site([tmp_path])
    pages = [site.answer(site.base), at(site, name), at(site, table.name)]
    for page in pages:
        assert page.status == 200
        tags = Tags(page.body)  # refuses handlers and frames
        assert tags.scripts == [f"{site.base}serve.js"]
        assert "<script>alert(1)</script>" in tags.words and "{{ 7 * 7 }}" in tags.words
    kinds = ("data:", "#", site.base, "javascript:alert(1)")  # as an image's source it runs nowhere
    assert all(a.startswith(kinds) for page in pages for a in Tags(page.body).addresses)
    assert "img-src data:" in HEADERS["Content-Security-Policy"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Folders with what no run writes, beside a secret that must not be read."""
    secret = tmp_path / "secret"
    write_run(secret, request={"text": "SECRET"})
    runs = tmp_path / "runs"
    write_run(runs / "good")
    (runs / "linked").symlink_to(secret)
    (runs / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("settings", "request", "run", "failed"):
        run = write_run(runs / f"link-{name}", **{name: None})
        (run / f"{name}.json").symlink_to(secret / "request.json")
    log = write_run(runs / "link-log") / "metrics.jsonl"
    log.unlink()
    log.symlink_to(secret / "request.json")
    (runs / "table-link").mkdir()
    (runs / "table-link" / "metrics.json").symlink_to(secret / "request.json")
    os.mkfifo(write_run(runs / "fifo", settings=None) / "settings.json")
    with (write_run(runs / "giant") / "settings.json").open("wb") as file:
        file.truncate(2**40)
    broken: dict[str, str] = {
        "half": '{"method": ', "list": "[1]", "deep": "[" * 10**5, "text": '{"method": "text"}',
        "numbers": '{"method": {"recipe": 7}}', "digits": '{"seed": ' + "9" * 10**5 + "}",
    }  # fmt: skip
    for name, text in broken.items():
        (write_run(runs / f"broken-{name}") / "settings.json").write_text(text)
    tables = {
        "rows": {"rows": 3}, "row": {"rows": [1]}, "none": {}, "empty": {"rows": []},
        "nan": {"rows": [{"name": "x", "FA": 97.0}]}, "unnamed": {"rows": [{"FA": 0.5}]},
        "curve": {"rows": [{"name": "x", "FA": 0.5, "relearn": {"a": 3}}]},
        "digest": {"rows": [{"name": "x", "conditions": 3}]},
        "long": {"rows": [{"name": f"{k}", "role": "retrained", "FA": 0.5} for k in range(301)]},
        "wide": {"rows": [{"name": "x", **{f"m{k}": 0.5 for k in range(200)}}]},
        "many": {"rows": [[]] * 10**4},
        "bands": {"rows": [{"name": "x", "role": "retrained"}], "reference": {"bands": [3]}},
        "seeds": {"rows": [{"name": "x"}], "reference": {"bands": {}, "seeds": math.inf}},
    }  # fmt: skip
    for name, table in tables.items():
        (runs / f"table-{name}").mkdir()
        (runs / f"table-{name}" / "metrics.json").write_text(json.dumps(table))
    odd = runs / "table-page"
    write_report(rows(), odd, page=False)
    (odd / "page.json").write_text(json.dumps({"facts": 3, "examples": {"answers": [1]}}))
    os.mkfifo(runs / ".good.lock")
    os.mkdir(os.fsencode(runs) + b"/caf\xe9")
    os.mkdir(os.fsencode(runs) + b"/caf\xe9/sub")
    write_run(Path(os.fsdecode(os.fsencode(runs) + b"/caf\xe9/run")))
    return runs


def test_what_is_damaged_is_a_row_with_the_reason(hostile: Path) -> None:
    site = Site([hostile])
    of = index(site)
    assert "SECRET" not in of.words and "Traceback" not in of.words
    known = site.lists[0].entries
    states = {name: getattr(entry, "state", "table") for name, entry in known.items()}
    damaged = {name for name, state in states.items() if state == "damaged"}
    assert damaged == {
        "link-settings", "link-request", "link-run", "link-failed", "link-log", "fifo", "giant",
        "broken-half", "broken-list", "broken-deep", "broken-text", "broken-numbers",
        "broken-digits",
    }  # fmt: skip
    assert all(known[name].note for name in damaged)
    assert states["linked"] == states["dangling"] == "not read"
    assert "link-log/metrics.jsonl" not in known and states["good"] == "finished"
    assert "a FIFO" in known["fifo"].note and "over" in known["giant"].note
    for name in known:
        answer = at(site, name)
        words = Tags(answer.body).words
        assert "SECRET" not in words and "Traceback" not in words and answer.status in (200, 422)
    assert "Left out: " in Tags(at(site, "table-curve").body).words
    for name, reason in (("long", "301 rows"), ("wide", "201 columns"), ("many", "10000 rows")):
        assert f"got {reason}; expected at most" in Tags(at(site, f"table-{name}").body).words
    for name in ("nan", "page", "bands", "seeds"):
        assert at(site, f"table-{name}").status == 422


def test_no_more_names_are_read_than_are_looked_at(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "MOST", 5)
    with contextlib.closing(walk.walk(open_folder(hostile))) as folders:
        assert next(folders).listing.count == 6
    assert "There is more" in index(Site([hostile])).words


def test_no_address_leads_out_of_the_folder(hostile: Path) -> None:
    site = Site([hostile])
    paths = (
        "../secret", "good/../../secret", "%2e%2e/secret", "..%2fsecret", "%2e%2e%2fsecret", "/etc",
        "//etc/passwd", "%2Fetc%2Fpasswd", "linked", "linked/", "good%00", "good/.", "./good",
        "caf%C3%A9/run", "..\\secret", "%252e%252e/secret", "good?../secret",
    )  # fmt: skip
    for path in paths:
        answer = site.answer(f"{site.base}at/0/{path}")
        assert b"SECRET" not in answer.body and b"root:" not in answer.body
        assert answer.status == (200 if path in ("linked", "good?../secret") else 404), path
    for address in ("", "/", "/x", f"/x{site.base}", site.base[:-1], "*", "http://a/", "/é"):
        assert site.answer(address).status == HTTPStatus.NOT_FOUND
    for rest in ("at/1/good", "at/-1/good", "at//good", "run.html", "../page.css", "page.css/"):
        assert site.answer(site.base + rest).status == HTTPStatus.NOT_FOUND
    assert at(site, os.fsdecode(b"caf\xe9/run")).status == 200


def test_a_link_is_not_followed_even_where_it_was_a_folder(hostile: Path) -> None:
    """What `RunList` opens is opened by descriptors: a change in between leads nowhere."""
    above = open_folder(hostile)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, above)
        for name in ("linked", "good/settings.json", "fifo/settings.json"):
            with pytest.raises(OSError):
                open_folder(name, above)
        link = open_folder("link-run", above)
        stack.callback(os.close, link)
        with pytest.raises(OSError, match="symbolic"):
            read_regular("run.json", 10**6, link)


# -------------------------------------------------------------------------------- strangers


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(Settings(folders=(folder,), port=0)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, method: str, address: str, *hosts: str) -> http.client.HTTPResponse:
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
    line.putrequest(method, address, skip_host=True)
    for host in hosts:
        line.putheader("Host", host)
    line.endheaders()
    return line.getresponse()


def test_only_who_asks_this_machine_by_number_is_answered(server: Server) -> None:
    base, port = server.site.base, server.server_port
    for host in (f"127.0.0.1:{port}", "localhost:9000", "[::1]:80", "LOCALHOST"):
        answer = ask(server, "GET", base, host)
        assert answer.status == 200 and b"near" in answer.read()
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    strange = (
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "8.8.8.8", "", "[",
        "evil.example:80@localhost", "localhost@evil.example", "localhost/evil.example",
    )  # fmt: skip
    for host in strange:
        answer = ask(server, "GET", base, host)
        assert answer.status == 421 and b"near" not in answer.read(), host
    assert ask(server, "GET", base).status == 421
    assert ask(server, "GET", base, "localhost", "evil.example").status == 421
    assert is_own_host("10.0.0.7:80", "0.0.0.0") and not is_own_host("evil.example", "0.0.0.0")


def test_nothing_but_reading_is_answered(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        answer = ask(server, method, server.site.base, "localhost")
        assert answer.status == 501
        assert answer.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    answer = ask(server, "HEAD", server.site.base, "localhost")
    assert answer.status == 200 and answer.read() == b"" and int(answer.headers["Content-Length"])
    for name, kind in (("page.css", "text/css"), ("serve.js", "text/javascript")):
        answer = ask(server, "GET", server.site.base + name, "localhost")
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind)
    assert "Server" not in answer.headers or answer.headers["Server"] == "letheon "


def test_serving_writes_nothing(folder: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))

    before = state()
    site = Site([folder])
    for name in ("", "near", "now", "table"):
        at(site, name)
    index(site)
    assert state() == before


def test_mistakes_are_one_line(scripts: Scripts, tmp_path: Path, server: Server) -> None:
    ended = scripts("serve", tmp_path / "none")
    assert ended.code == 2 and ended.err.startswith("error: ") and "expected a folder" in ended.err
    assert scripts("serve").code == 2
    ended = scripts("serve", tmp_path, "--port", server.server_port)
    assert ended.code == 2 and "cannot be listened on" in ended.err
    assert scripts("serve", tmp_path, "--port", 70000).code == 2
    with pytest.raises(InputError):
        Server(Settings(folders=(tmp_path,), port=0, address="a name"))


def test_it_starts_with_an_address_and_ends_with_a_signal(folder: Path) -> None:
    command = [sys.executable, "-m", "letheon.launch.serving.serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None and it.stderr is not None
        url = it.stdout.readline().split()[0]
        port, base = url.removeprefix("http://127.0.0.1:").split("/", 1)
        line = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE)
        line.request("GET", f"/{base}")
        assert line.getresponse().status == 200
        it.terminate()
        assert it.wait(PATIENCE) == 0 and it.stderr.read() == ""
