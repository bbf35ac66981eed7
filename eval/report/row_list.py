"""Rows of a comparison that show themselves: as text, in a notebook, as a frame, as a page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from letheon.errors import InputError, install_extra
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_csv, as_text, legend, summary_grid
from letheon.eval.report.write import write_report


class Rows(list[dict[str, Any]]):
    """Rows of a comparison, one a model; shares are fractions, "why" has the reason of each None.

    Printed, they are the table of the command line; in a notebook the same as HTML.

    Attributes:
        left_out: models that could not be measured, and why.
    """

    def __init__(
        self, rows: Iterable[dict[str, Any]] = (), left_out: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(rows)
        self.left_out = dict(left_out or {})

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame: a line a model, a column a number, as metrics.csv has them.

        Raises:
            InputError: no pandas, or no row.
        """
        try:
            import pandas
        except ImportError:
            raise InputError(
                f"got no pandas; expected it, which makes the frame; {install_extra('pandas')}"
            ) from None
        text = io.StringIO(as_csv(prepare(self, self.left_out)))
        texts = dict.fromkeys(("name", "role", "weights"), str)  # a run may be called 001 or NA
        return pandas.read_csv(text, dtype=texts, keep_default_na=False, na_values=[""])

    def report(self, out: str | Path) -> Path:
        """Write the page and the tables into a folder; call it on one rank.

        Returns:
            The page, report.html.

        Raises:
            InputError: no matplotlib, which draws it, or no row.
            RunFailed: the disk refuses.
        """
        write_report(self, Path(out), self.left_out)
        return Path(out) / "report.html"

    def __str__(self) -> str:
        return as_text(prepare(self, self.left_out)) if self else "no rows"

    def _repr_html_(self) -> str:
        if not self:
            return "<p>no rows</p>"
        prepared = prepare(self, self.left_out)
        head, *body = (list(map(escape, cells)) for cells in summary_grid(prepared))
        lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        for name, *cells in body:
            lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        below = [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        notes = "<br>".join(map(escape, [*below, *legend(prepared)]))
        return f"<table>{''.join(lines)}</table><p>{notes}</p>"
