"""What methods ask of their settings and of a run, refused in one line where it is not there."""

from __future__ import annotations

import math

from letheon.engine.method import Run
from letheon.errors import InputError
from letheon.methods.distillation import require_range


def require_positive(option: str, value: float) -> None:
    """Refuse a setting that is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"got {option} {value}; expected a finite number above 0", option=option)


def require_between(
    option: str, value: float, lowest: float = 0.0, highest: float = math.inf
) -> None:
    """Refuse a setting that is not a finite number from `lowest` to `highest`."""
    require_range(**{option: (value, lowest, highest)})


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


def require_retained_class(run: Run, method: str) -> None:
    """Refuse a request of all classes, which leaves none to answer with."""
    if len(run.forget_classes) == run.model.classes:
        raise InputError(
            f"got a request of all classes; {method} answers with one that is kept; forget fewer "
            "classes",
            option="forget",
        )


def require_two_classes(run: Run, method: str, retained: int) -> None:
    """Refuse a request that leaves fewer than two classes to move a sample between."""
    if retained < 2:
        raise InputError(
            f"got {retained} classes with retain samples; {method} moves each forget sample to "
            "another class and needs 2 or more; forget fewer classes",
            option="forget",
        )


def require_encoder(run: Run, method: str) -> None:
    """Refuse a network that trains no weight but its last layer's."""
    head = {id(parameter) for parameter in run.model.head.parameters()}
    if all(id(parameter) in head for parameter in run.parameters):
        raise InputError(
            f"got {run.model.name}, which trains no weights before its last layer; {method} moves "
            "features by them; use a deeper network or finetune"
        )
