"""What is shown of the runs: a list of them, a run, a table; whatever an address leads to."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from jinja2 import Environment, FileSystemLoader, TemplateError

from letheon.engine.runs.loggers import PREVIOUS
from letheon.errors import InputError, LetheonError
from letheon.eval.report import page as report
from letheon.eval.report.definitions import format_value, summary_columns
from letheon.eval.report.pictures import Picture, draw_pictures
from letheon.eval.report.rows import Prepared, prepare
from letheon.launch.serving.run_list import Run, RunList, Table, as_number, as_text
from letheon.progress import format_seconds
from letheon.sealed import expect_shape

Row = dict[str, Any]
HTML, CSS, SCRIPT = (f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript"))
_HEADS = ("State", "Method", "Forgets")  # before the numbers
_MORE = ("Data", "Network", "Seed", "Host")  # behind them: mostly equal for all
_TEXTS = {*_HEADS, *_MORE} - {"Seed"}  # on the left; numbers on the right
_IN_THE_TEXT = (PREVIOUS, "kind", "at", "phase", "epoch", "text")
_PAGES = 20  # tables that stay drawn
_WHOLE = 15  # of so many polls one looks at every file: half a minute at the pace of a page
_FOLDER = Path(__file__).parent
_REPORT = Path(report.__file__).parent


class Answer(NamedTuple):
    """What is sent for an address."""

    status: HTTPStatus
    body: bytes
    kind: str = HTML
    tag: str = ""
    """Differs when the body does; sent as ETag."""


class Missing(Exception):
    """There is nothing at an address."""


class Site:
    """The pages of the runs below some folders.

    Attributes:
        base: the address of the list; its random part is known to whoever started the server alone.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        """`roots` are the folders."""
        self.lists = [RunList(root) for root in roots]
        self.base = f"/{secrets.token_urlsafe(16)}/"
        self._looking, self._drawing = threading.Lock(), threading.Lock()
        self._pages: dict[Any, str] = {}
        self._polls = 0
        self._list: tuple[Any, str] = (None, "")  # revisions of what is drawn, and the page
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True
        )
        self._files = {
            "page.css": (_REPORT / "page.css", CSS),
            "serve.js": (_FOLDER / "serve.js", SCRIPT),
        }

    def look(self, whole: bool = True) -> bool:
        """Look at the folders again; whether a run or a table is there.

        Args:
            whole: as of `RunList.look`.
        """
        with self._looking:
            for of in self.lists:
                of.look(whole)
            return any(of.entries for of in self.lists)

    def answer(self, address: str, tag: str = "") -> Answer:
        """Answer a request for an address; what cannot be shown is a page that says why.

        Args:
            address: the path that is asked for.
            tag: of the body that is there already, which is not sent again (RFC 9110, 13.1.2). A
                page that polls has one, and is answered without a look at every file.
        """
        answer = self._answer(address, bool(tag))
        if answer.status != HTTPStatus.OK:
            return answer
        fresh = f'"{hashlib.sha256(answer.body).hexdigest()}"'
        if hmac.compare_digest(fresh.encode(), tag.encode()):
            return Answer(HTTPStatus.NOT_MODIFIED, b"", answer.kind, fresh)
        return answer._replace(tag=fresh)

    def _answer(self, address: str, poll: bool) -> Answer:
        path = address.partition("?")[0]
        start, rest = path[: len(self.base)], path[len(self.base) :]
        try:
            if not hmac.compare_digest(start.encode(), self.base.encode()):
                raise Missing("Nothing is here; the address that letheon serve printed is longer.")
            if rest in self._files:
                file, kind = self._files[rest]
                return Answer(HTTPStatus.OK, file.read_bytes(), kind)
            return Answer(HTTPStatus.OK, self._page(rest, poll).encode("utf-8", "replace"))
        except Missing as error:
            return self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except (LetheonError, TemplateError) as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, f"It cannot be shown: {error}")
        except Exception as error:  # a folder's content may be anything; the server stays
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"It cannot be shown: {as_text(reason)}"
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, text)

    def _refuse(self, status: HTTPStatus, text: str) -> Answer:
        page = self._render("frame.html", heading=status.phrase, text=text)
        return Answer(status, page.encode("utf-8", "replace"))

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(site=self.base, **values)

    def _page(self, rest: str, poll: bool) -> str:
        if not rest:
            self._polls += poll
            self.look(whole=not poll or self._polls % _WHOLE == 0)
            return self._index()
        kind, _, place = rest.partition("/")
        number, _, path = place.partition("/")
        known = {str(n): of for n, of in enumerate(self.lists)}
        if kind != "at" or number not in known:
            raise Missing("Nothing is here.")
        of, name = known[number], _decode(path)
        with self._looking:
            entry = of.find(name)
        if entry is None:
            raise Missing("No run and no table is here.")
        title = name or of.root.name
        if isinstance(entry, Table):
            return self._table((number, name, entry.stamp), title, entry)
        return self._run(title, entry)

    def _index(self) -> str:
        """Show the list; it is drawn once for what was found."""
        with self._looking, self._drawing:
            revisions = [of.revision for of in self.lists]
            if self._list[0] != revisions:
                page = self._render(
                    "index.html", at_top=True, heading="Runs of Letheon", texts=_TEXTS,
                    tables=_lay_out(self.lists, self.base),
                    places=", ".join(str(of.root) for of in self.lists),
                    more=any(of.more for of in self.lists),
                )  # fmt: skip
                self._list = revisions, page
            return self._list[1]

    def _run(self, title: str, run: Run) -> str:
        facts = {"State": f"{run.state} {run.note}".strip(), **run.facts, **_last_pass(run)}
        lines = [_log_line(line) for line in reversed(run.lines)]
        curves = [_curve(name, values) for name, values in run.losses.items()]
        share = min(_epoch(run) / run.epochs, 1.0) if run.epochs else None
        return self._render(
            "run.html", heading=title, facts=facts, share=share, curves=curves, lines=lines
        )

    def _table(self, key: Any, title: str, table: Table) -> str:
        """Show a table as the report does; it is drawn once for a key."""
        with self._drawing, expect_shape(Path(title)):
            if key not in self._pages:
                if not table.rows:
                    raise InputError(table.note or "no rows")
                prepared = prepare(table.rows, table.left_out, table.reference)
                more = table.page
                heading = f"{title}: {more.get('heading', 'a table')}"
                text = report.page(
                    prepared, _draw(prepared), heading, more.get("facts"), more.get("examples"),
                    self.base,
                )  # fmt: skip
                self._pages = {**dict(list(self._pages.items())[-_PAGES:]), key: text}
            return self._pages[key]


def _lay_out(lists: Sequence[RunList], base: str) -> list[Row]:
    """Lay out the tables of the list: of runs, and of tables."""
    found = [
        (number, of, path, entry)
        for number, of in enumerate(lists)
        for path, entry in of.entries.items()
    ]
    measured = _by_weights([entry for *_, entry in found if isinstance(entry, Table)])
    shown = [pair for pair in summary_columns() if any(pair[0] in r for r in measured.values())]
    keys = [key for key, _ in shown]
    lines: dict[str, list[Row]] = {"Runs": [], "Tables": []}
    for number, of, path, entry in found:
        several = len(lists) > 1
        name = f"{of.root.name}/{path}".rstrip("/") if several else path or of.root.name
        address = f"{base}at/{number}/{quote_from_bytes(os.fsencode(path))}"
        if isinstance(entry, Run):
            cells = _run_cells(entry, measured.get(entry.weights, {}), keys)
        else:
            state = "damaged" if not entry.rows else "running" if entry.note else "finished"
            cells = [
                _cell(state, entry.note),
                _cell(str(len(entry.rows))),
                _when(entry.last_change),
            ]
        part = "Runs" if isinstance(entry, Run) else "Tables"
        lines[part].append({"name": name, "address": address, "cells": cells})
    heads = {
        "Runs": [
            "Run",
            *_HEADS,
            "Epoch",
            "Loss",
            *(of.head for _, of in shown),
            "Last sign",
            *_MORE,
        ],
        "Tables": ["Table", "State", "Models", "Last sign"],
    }
    return [{"title": name, "heads": heads[name], "rows": lines[name]} for name in lines]


def _decode(path: str) -> str:
    """Turn the last part of an address into a path; a folder's name may be any bytes."""
    return os.fsdecode(unquote_to_bytes(path))


def _draw(prepared: Prepared) -> list[Picture]:
    """Draw the pictures, or say why there are none: numbers need no picture."""
    try:
        return draw_pictures(prepared)
    except Exception as error:  # rows may hold anything
        return [Picture("Pictures", f"Left out: {as_text(error)}")]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)


def _by_weights(tables: Sequence[Table]) -> dict[str, Row]:
    """Digest of weights -> the numbers that the newest table has of them."""
    found: dict[str, Row] = {}
    for table in sorted(tables, key=lambda one: one.last_change):
        for row in table.rows:
            conditions = row.get("conditions")
            digest = conditions.get("digest") if isinstance(conditions, dict) else None
            known = {key: as_number(value) for key, value in row.items()}
            if isinstance(digest, str) and digest:
                found[digest] = {key: value for key, value in known.items() if value is not None}
    return found


def _cell(text: str, below: str = "", sort: float | None = None) -> Row:
    return {"text": text or "–", "below": below, "sort": sort}


def _run_cells(run: Run, row: Row, keys: Sequence[str]) -> list[Row]:
    loss = as_number(run.last_pass.get("loss"))
    return [
        _cell(run.state, run.note),
        *(_cell(run.facts.get(name, "")) for name in _HEADS[1:]),
        _cell(_last_pass(run).get("Epoch", ""), sort=_epoch(run)),
        _cell("" if loss is None else f"{loss:.4g}", as_text(run.last_pass.get("phase"))),
        *(_cell(format_value(key, row.get(key))) for key in keys),
        _when(run.last_change),
        *(_cell(run.facts.get(name, "")) for name in _MORE),
    ]


def _log_line(line: Mapping[str, Any]) -> Row:
    """Lay out a report of a log: when it was written, and what it says."""
    at, epoch = as_number(line.get("at")), as_number(line.get("epoch"))
    words = [as_text(line[key]) for key in ("kind", "phase", "text") if key in line]
    head = " ".join([*words, *([] if epoch is None else [f"of epoch {epoch + 1:.0f}"])])
    rest = [
        f"{as_text(key).replace('_', ' ')} {_plain(value)}"
        for key, value in line.items()
        if key not in _IN_THE_TEXT
    ]
    return {"at": "" if at is None else format_seconds(at), "text": ", ".join([head, *rest])}


def _epoch(run: Run) -> float:
    """Epochs that have a finished pass."""
    return (as_number(run.last_pass.get("epoch")) or 0.0) + 1 if run.last_pass else 0.0


def _last_pass(run: Run) -> dict[str, str]:
    """Write how far a run is, by its last finished pass."""
    last, of = run.last_pass, f"/{run.epochs:.0f}" if run.epochs else ""
    if not last:
        return {}
    losses = {name: f"{values[-1]:.4g}" for name, values in run.losses.items()}
    speed, at = as_number(last.get("images_per_second")), as_number(last.get("at"))
    return {
        "Epoch": f"{_epoch(run):.0f}{of}",
        "Loss": ", ".join(f"{name} {loss}" for name, loss in losses.items()),
        **({"Images/s": f"{speed:,.0f}"} if speed is not None else {}),
        **({"Time": format_seconds(at)} if at is not None else {}),
    }


def _when(moment: float) -> Row:
    """Lay out a moment; the script writes how long ago it was, so the page stays the same."""
    try:
        at = f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC" if moment else ""
    except (ValueError, OverflowError, OSError):  # a file's time may be any
        at = "in no known year"
    return _cell(at, sort=-round(moment)) | {"time": round(moment)}


def _curve(name: str, losses: Sequence[float]) -> Row:
    """Lay out the losses of a phase in a field of 100 by 40."""
    low, high = min(losses), max(losses)
    step, span = 100 / max(len(losses) - 1, 1), high - low or 1.0
    points = [f"{k * step:.2f},{38 - 36 * (v - low) / span:.2f}" for k, v in enumerate(losses)]
    text = f"{len(losses)} passes, from {losses[0]:.4g} to {losses[-1]:.4g}, lowest {low:.4g}"
    return {"name": name, "points": " ".join(points), "text": text}
