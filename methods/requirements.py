"""What methods ask of their settings and of a run, refused in one line where it is not there."""

from __future__ import annotations

import math

from letheon.engine.method import Run
from letheon.errors import InputError


def require_positive(option: str, value: float) -> None:
    """Refuse a setting that is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"got {option} {value}; expected a finite number above 0", option=option)


def require_between(
    option: str, value: float, lowest: float = 0.0, highest: float = math.inf
) -> None:
    """Refuse a setting that is not a finite number from `lowest` to `highest`."""
    if not (math.isfinite(value) and lowest <= value <= highest):
        limits = f"{lowest:g} or more" if highest == math.inf else f"{lowest:g} to {highest:g}"
        raise InputError(f"got {option} {value}; expected {limits}", option=option)


def require_samples(run: Run, method: str, forget: bool = True, retain: bool = True) -> None:
    """Refuse a request that leaves no sample of a set that the method reads."""
    count = int(run.forget.sum())
    for needed, samples, name in (
        (forget, count, "forget"),
        (retain, len(run.forget) - count, "retain"),
    ):
        if needed and not samples:
            raise InputError(
                f"got no {name} samples; {method} reads some; change the forget request",
                option="forget",
            )


def require_whole_batches(run: Run, method: str) -> None:
    """Refuse micro-batches where a loss looks at all samples of a batch at once."""
    if run.recipe.grad_accum_steps > 1:
        raise InputError(
            f"got {run.recipe.grad_accum_steps} micro-batches; {method} weighs the samples of a "
            "whole batch against each other; use one micro-batch and a smaller batch",
            option="grad_accum_steps",
        )


def require_two_classes(run: Run, method: str, retained: int) -> None:
    """Refuse a request that leaves fewer than two classes to move a sample between."""
    if retained < 2:
        raise InputError(
            f"got {retained} classes with retain samples; {method} moves each forget sample to "
            "another class and needs 2 or more; forget fewer classes",
            option="forget",
        )
