"""The one table of methods in the tests: each of ours with small settings, under names of cases.

A method that is added gets a line here; the tests of ranks, of compiled graphs, of steps that read
nothing back and of runs fed together then hold it to what they promise.
"""

from __future__ import annotations

from dataclasses import replace

from letheon.engine.method import Method
from letheon.engine.recipe import Recipe
from letheon.methods.amun import Amun
from letheon.methods.dual_optim import DualOptim
from letheon.methods.duck import Duck
from letheon.methods.esc import Esc
from letheon.methods.finetune import Finetune
from letheon.methods.fisher import Fisher, GolatkarFisher
from letheon.methods.gdr_gma import GdrGma
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.hamu import Hamu
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.influence import Influence
from letheon.methods.jit import Jit
from letheon.methods.kodge import Kodge
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.munba import Munba
from letheon.methods.random_label import RandomLabel
from letheon.methods.retrain import Retrain
from letheon.methods.salun import SalUn
from letheon.methods.scar import Scar
from letheon.methods.sfron import Sfron
from letheon.methods.spkd import Spkd
from letheon.methods.ssd import Lfssd, Ssd
from letheon.methods.task_vectors import NegMerge, TaskVector


def cases(recipe: Recipe, gentle: Recipe | None = None) -> dict[str, Method]:
    """Every method by the name of its case; `gentle` is for those that climb a loss."""
    gentle = gentle or recipe
    once = replace(recipe, epochs=0)
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
        # One-shot edits, by statistics of the sets.
        "ssd": Ssd(once, alpha=1.2),
        "lfssd": Lfssd(once, alpha=1.05),
        "fisher": Fisher(once),
        "fisher-golatkar": GolatkarFisher(once),
        "influence": Influence(once, samples=20),
        "influence-published": Influence(once, samples=20, solver="published"),
        "kodge": Kodge(once, samples=20),
        "esc": Esc(once, share=0.2),
        # Two gradients, joined.
        "munba": Munba(recipe),
        "gdr-gma": GdrGma(gentle, gamma=1.0, epsilon=1.0),
        "hamu": Hamu(gentle),
        "sfron": Sfron(gentle, alpha=2.0, every=3),
        # Features and images of other classes.
        "duck": Duck(recipe, until=0.0),
        "scar": Scar(gentle, until=0.0),
        "amun": Amun(recipe, radius=1.0, doublings=2, steps=3),
        "jit": Jit(gentle, copies=3),
        # Around other methods, or of several trainings.
        "dual-optim": DualOptim(RandomLabel(recipe, order="sequential"), forget_lr=1e-3),
        "task-vector": TaskVector(gentle),
        "negmerge": NegMerge(gentle, rates=(0.5,) * recipe.epochs),
        "head-distillation": HeadDistillation(recipe),
    }
