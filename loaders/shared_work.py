"""Work on every image of a set before a job starts, which its ranks share out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

K = TypeVar("K")
T = TypeVar("T")
Share = Callable[[str, Sequence[Any], Callable[[Any], Any]], list[Any]]
"""(what for, items, what to compute of each) -> the results of all items, on every rank."""
_share: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def share_by(share: Share) -> Iterator[None]:
    """Let `share` deal out what is computed within, where every rank computes the same."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def share_work(name: str, items: Sequence[K], compute: Callable[[K], T]) -> list[T]:
    """Compute something of each item, on one rank each where several start a job together.

    Args:
        name: what it is for, to be named where another rank is elsewhere.
        items: the same on every rank.
        compute: its results must not depend on the rank, and can be pickled.

    Returns:
        The results in the items' order, on every rank.

    Raises:
        LetheonError: the problem of the first item that has one, on every rank.
    """
    share = _share.get()
    return [compute(one) for one in items] if share is None else share(name, items, compute)


def spans(count: int, size: int) -> list[range]:
    """Cut 0, 1, ..., count - 1 into spans of `size` numbers, the last one shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
