"""Work on every image is cut into spans that the ranks share out."""

from __future__ import annotations

from letheon.loaders.shared_work import spans


def test_spans_cover_everything_once() -> None:
    assert [*map(len, spans(10, 4))] == [4, 4, 2] and spans(0, 4) == []
    assert [n for span in spans(10, 4) for n in span] == [*range(10)]
