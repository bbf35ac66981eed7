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
        with pytest.raises(InputError, match=f"got a leak of {odd} samples; expected 1 to 9"):
            count_unseen(3, odd)
