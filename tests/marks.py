"""Which cases of a test are slow tests."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(quick: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases of a parameter; those that are not among `quick` are slow tests."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
