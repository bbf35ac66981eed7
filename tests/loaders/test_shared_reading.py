"""Two ranks read each image once before a start, and the first shows how far both are."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np

from letheon.engine.distributed import Ranks
from letheon.errors import UnreadableImage
from letheon.launch.command import together
from letheon.loaders import views
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.views import drop_unreadable
from letheon.progress import Line
from tests.pool import on_ranks

BROKEN = [3, 17, 36]


class Worn(ArrayImages):
    """Images of which a few are broken; notes which were read."""

    def __init__(self) -> None:
        super().__init__("worn", np.zeros((37, 2, 2, 3), np.uint8), np.arange(37) % 2, ["a", "b"])
        self.seen: list[int] = []

    def encoded_image(self, i: int) -> EncodedImage:
        """Image i, or the news that it is broken."""
        self.seen.append(i)
        if i in BROKEN:
            raise UnreadableImage(f"worn[{i}]")
        return super().encoded_image(i)


def read(ranks: Ranks) -> tuple[Any, ...]:
    """Drop what is broken, in spans of five images."""
    images, line = Worn(), Line("reading", 37, False)
    shown: list[int] = []
    advance = line.advance

    def note(done: int, count: int) -> None:
        advance(done, count)
        shown.append(line.done)

    with (
        mock.patch.object(views, "SPAN", 5),
        mock.patch.object(views, "Line", return_value=line),
        mock.patch.object(line, "advance", note),
    ):
        good = together(ranks, lambda: drop_unreadable(images))
    return list(good.left_out), good.labels.tolist(), sorted(images.seen), shown


def test_ranks_read_each_image_once_and_count_those_of_all() -> None:
    first, second = on_ranks(2, read)
    (alone,) = on_ranks(1, read)
    assert first[:2] == second[:2] == alone[:2]
    assert alone[0] == [f"worn[{i}]" for i in BROKEN]
    assert sorted(first[2] + second[2]) == alone[2] == list(range(37))
    assert len(first[2]) == 5 + 5 + 5 + 5 and first[3] == [5, 15, 25, 35, 37]
    assert alone[3] == [5, 10, 15, 20, 25, 30, 35, 37, 37]


def test_a_span_has_work_for_every_thread() -> None:
    for count, threads in ((1024, 1), (1024, 64), (1024, 2000), (7, 4), (1, 4)):
        parts = views._cut(range(5, 5 + count), threads)
        assert [i for part in parts for i in part] == list(range(5, 5 + count))
        assert len(parts) >= min(count, 4 * threads) and max(map(len, parts)) <= views.CHUNK
