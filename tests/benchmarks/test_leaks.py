"""Leaks of known size, before they are trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from power.__main__ import list_leaks

from letheon.errors import InputError


def test_leaks_of_no_sample_or_of_all_are_refused() -> None:
    of: Any = SimpleNamespace(forget_mask=lambda key: np.arange(50) < 10)

    def count_unseen(*samples: int) -> list[int]:
        settings: Any = SimpleNamespace(shares=(), samples=samples, count=1)
        return [len(leak.samples) for leak in list_leaks(settings, of)]

    assert count_unseen(1, 9) == [9, 1]
    for odd in (0, 10, -1):
        with pytest.raises(InputError, match=f"got a leak of {odd} sample.*; expected 1 to 9"):
            count_unseen(3, odd)


@pytest.mark.parametrize("odd", [0.04, 0.0, -0.2, 0.97, 1.0, float("nan"), float("inf")])
def test_shares_that_are_no_image_or_all_of_them_are_refused(odd: float) -> None:
    of: Any = SimpleNamespace(forget_mask=lambda key: np.arange(50) < 10)
    settings: Any = SimpleNamespace(shares=(0.06, 0.94), samples=(), count=1)
    assert [len(leak.samples) for leak in list_leaks(settings, of)] == [9, 1]
    settings.shares = (0.5, odd)
    with pytest.raises(InputError, match=r"expected (1 to 9|0 < share < 1)") as error:
        [*list_leaks(settings, of)]
    assert error.value.option == "shares"


def test_no_leaks_at_all_are_refused() -> None:
    of: Any = SimpleNamespace(forget_mask=lambda key: np.arange(50) < 10)
    for settings in (
        SimpleNamespace(shares=(), samples=(), count=1),
        SimpleNamespace(shares=(0.5,), samples=(), count=0),
    ):
        with pytest.raises(InputError, match="expected a leak"):
            [*list_leaks(settings, of)]  # type: ignore[arg-type]
