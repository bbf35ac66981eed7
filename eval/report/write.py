"""Write a report of any number of models: one self-contained page, and tables in four formats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from letheon.durable import write
from letheon.eval.audit.tables import as_audit, as_audit_json
from letheon.eval.report.page import page as html
from letheon.eval.report.pictures import draw_pictures
from letheon.eval.report.plots import require_matplotlib
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_csv, as_json, as_latex, as_markdown
from letheon.folders import can_replace, clear_new_folder, new_folder, publish, settle
from letheon.sealed import seal
from letheon.spans import span

MARK = "evaluation.json"
"""Written last: a folder without it holds an unfinished evaluation."""
PAGE = "page.json"
"""Heading, facts and example images of the page."""
OWN = (
    MARK, "metrics.csv", "table.md", "metrics.tex", "metrics.json", "report.html", "page.json",
    "audit.md", "audit.json", "*.partial",
)  # fmt: skip
"""Patterns of the files that an evaluation writes."""


def settle_tables(out: Path) -> None:
    """Complete or undo the replacement of tables that was interrupted; call it under the lock."""
    settle(out, MARK, OWN)


@contextmanager
def replace_tables(out: Path) -> Iterator[Path]:
    """Yield a new folder for all files of an evaluation, which then takes the place of `out`.

    The block writes `MARK` last. If it raises, `out` is as it was.

    Raises:
        RunFailed: the disk refuses.
    """
    if not can_replace(out):  # a mount, which was found empty
        yield out
        return
    clear_new_folder(out)
    try:
        yield new_folder(out)
    except BaseException:
        clear_new_folder(out)
        raise
    publish(out, OWN)


@span("saving")
def write_report(
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    left_out: Mapping[str, str] | None = None,
    *,
    heading: str = "What is left: an unlearning report",
    page: bool = True,
    facts: Mapping[str, str] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write report.html, metrics.csv, table.md, metrics.tex and metrics.json into `out`.

    page.json has what the page holds beside the rows, for `letheon serve`. Where there are
    retrained models, audit.md and audit.json too: how often each number accuses one of them.

    A row is what `Row.as_dict` or `measure` returns, with "name" and, as far as known:

    - "role": original, retrained, control or unlearned (the default); "seed"; "seconds".
    - any metric or another number; shares are fractions. Scores against the
      retrained rows' mean are added where their ingredients are there.
    - "classes" (names) and "forgotten" (numbers); "accuracy_by_class": a share a class, held-out.
    - "cka_by_layer" and "cka_floor_by_layer": {layer: value}, to the retrained reference.
    - "domain_matrix": {neighbours' domain: {tested domain: share}}.
    - "knn_confusion": {"rows": names, "columns": names, "shares": rows of shares}.
    - "relearn": {recipe: {"steps": [...], "accuracy": [...]}}.
    - "embedding": what `embedding.embed` returns.

    A picture without ingredients is replaced by a sentence that says what is missing. Call it on
    one rank. Nothing is written where rows are refused; the tables are on disk before a picture is
    drawn, so that no fault of a font or a picture loses the numbers.

    Args:
        rows: one a model, names distinct.
        out: a folder, made where absent; files of these names are replaced.
        left_out: models that could not be measured, and why; the tables name them.
        heading: of the page.
        page: False writes the tables alone, without matplotlib.
        facts: what was measured and when, by name, for the head of the page.
        examples: images to show, as `eval.examples.find_examples` gives them.

    Returns:
        The files written.

    Raises:
        InputError: rows that `prepare` refuses, or `page` without matplotlib.
    """
    prepared = prepare(rows, left_out)
    if page:
        require_matplotlib()
    texts = {
        "metrics.csv": as_csv(prepared),
        "table.md": as_markdown(prepared),
        "metrics.tex": as_latex(prepared),
        "metrics.json": as_json(prepared),
    }
    if prepared.reference is not None:
        texts |= {"audit.md": as_audit(prepared.rows), "audit.json": as_audit_json(prepared.rows)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write(out / name, text)
    if page:
        text = html(prepared, draw_pictures(prepared), heading, facts, examples)
        write(out / "report.html", text.encode("utf-8", "replace"))
        more = {"heading": heading, "facts": facts or {}, "examples": examples or {}}
        write(out / PAGE, seal(json.loads(json.dumps(more, default=asdict))))
    return [out / name for name in (*texts, *(["report.html", PAGE] if page else []))]
