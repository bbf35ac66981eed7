"""The one table of methods in the tests: each of ours with small settings, under names of cases.

A method that is added gets a line here; the tests of ranks, of compiled graphs, of steps that read
nothing back and of runs fed together then hold it to what they promise.
"""

from __future__ import annotations

from letheon.engine.method import Method
from letheon.engine.recipe import Recipe
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.random_label import RandomLabel
from letheon.methods.retrain import Retrain
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd


def cases(recipe: Recipe, gentle: Recipe | None = None) -> dict[str, Method]:
    """Every method by the name of its case; `gentle` is for those that climb a loss."""
    gentle = gentle or recipe
    return {
        "retrain": Retrain(recipe),
        "finetune": Finetune(recipe),
        "grad-ascent": GradAscent(gentle),
        "l1-sparse": L1Sparse(recipe, alpha=1e-2),
        "random-label": RandomLabel(recipe),
        "random-label-paired": RandomLabel(recipe, order="paired", alpha=0.5),
        "random-label-sequential": RandomLabel(recipe, order="sequential", draw="retained"),
        "salun": SalUn(RandomLabel(recipe), density=0.3),
        "spkd": Spkd(gentle, ce_weight=1.0, sp_weight=100.0),
        "head-distillation": HeadDistillation(recipe),
    }
