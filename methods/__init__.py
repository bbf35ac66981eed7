"""Ways to forget, one file each, and the catalogue that the command line is made from."""

from __future__ import annotations

from importlib.metadata import entry_points

from letheon.engine.method import Method
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.random_label import RandomLabel
from letheon.methods.retrain import Retrain
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Retrain,
        Finetune,
        GradAscent,
        L1Sparse,
        RandomLabel,
        SalUn,
        Spkd,
        HeadDistillation,
    )
}
"""Our methods by their name on the command line."""


def catalogue() -> dict[str, type[Method]]:
    """Our methods and those other packages announce as entry points of `letheon.methods`."""
    found = dict(METHODS)
    for point in entry_points(group="letheon.methods"):
        method = point.load()
        method.name = method.name or point.name
        found.setdefault(method.name, method)
    return found
