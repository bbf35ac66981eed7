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
    "retrain": Retrain,
    "finetune": Finetune,
    "grad-ascent": GradAscent,
    "l1-sparse": L1Sparse,
    "random-label": RandomLabel,
    "salun": SalUn,
    "spkd": Spkd,
    "head-distillation": HeadDistillation,
}
"""Our methods by their name on the command line."""


def catalogue() -> dict[str, type[Method]]:
    """Our methods and those other packages announce as entry points of `letheon.methods`."""
    found = dict(METHODS)
    for point in entry_points(group="letheon.methods"):
        found.setdefault(point.name, point.load())
    return found
