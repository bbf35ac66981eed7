"""The one table of methods in the tests: each of ours with small settings, under names of cases.

A method that is added gets a line here; the tests of ranks, of compiled graphs, of steps that read
nothing back and of runs fed together then hold it to what they promise.
"""

from __future__ import annotations

from dataclasses import replace

from letheon.engine.method import Method
from letheon.engine.recipe import Recipe
from letheon.methods.akd import Akd
from letheon.methods.amun import Amun
from letheon.methods.bad_teacher import BadTeacher
from letheon.methods.boundary_expanding import BoundaryExpanding
from letheon.methods.boundary_shrink import BoundaryShrink
from letheon.methods.cf_k import CfK
from letheon.methods.cmf import Cmf
from letheon.methods.cola import Cola
from letheon.methods.contrastive import Contrastive
from letheon.methods.delete import Delete
from letheon.methods.dual_optim import DualOptim
from letheon.methods.duck import Duck
from letheon.methods.esc import Esc
from letheon.methods.eu_k import EuK
from letheon.methods.finetune import Finetune
from letheon.methods.fisher import Fisher, GolatkarFisher
from letheon.methods.gdr_gma import GdrGma
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.hamu import Hamu
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.influence import Influence
from letheon.methods.jit import Jit
from letheon.methods.kd import Kd
from letheon.methods.kodge import Kodge
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.l2ul import L2ul
from letheon.methods.lotus import Lotus
from letheon.methods.munba import Munba
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.no_op import NoOp
from letheon.methods.one_point import OnePoint
from letheon.methods.pcgrad import PcGrad
from letheon.methods.pl_spkd import PlSpkd
from letheon.methods.pseudo_label import PseudoLabel
from letheon.methods.random_label import RandomLabel
from letheon.methods.random_network import RandomNetwork
from letheon.methods.retrain import Retrain
from letheon.methods.rkd import Rkd
from letheon.methods.salun import SalUn
from letheon.methods.salun_soft import SalUnSoft
from letheon.methods.scar import Scar
from letheon.methods.scrub import Scrub
from letheon.methods.sfron import Sfron
from letheon.methods.spkd import Spkd
from letheon.methods.spotter import Spotter
from letheon.methods.ssd import Lfssd, Ssd
from letheon.methods.task_vectors import NegMerge, TaskVector
from letheon.methods.unsir import Unsir
from letheon.methods.weight_distance import WeightDistance
from letheon.methods.weight_distortion import WeightDistortion
from letheon.methods.weight_negation import WeightNegation


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
        "cf-k": CfK(recipe, k=1),
        "eu-k": EuK(recipe, k=1),
        "not": WeightNegation(recipe),
        "weight-distortion": WeightDistortion(recipe),
        "weight-distance": WeightDistance(recipe),
        "neg-grad-plus": NegGradPlus(recipe),
        "pseudo-label": PseudoLabel(recipe),
        "delete": Delete(recipe),
        "boundary-shrink": BoundaryShrink(recipe),
        "boundary-expanding": BoundaryExpanding(recipe),
        "salun-soft": SalUnSoft(recipe, origin="epoch"),
        "unsir": Unsir(recipe, noise_images=3, noise_steps=2, retain_share=0.6),
        "scrub": Scrub(gentle, max_epochs=1, forget_batch_size=5),
        "bad-teacher": BadTeacher(recipe),
        "lotus": Lotus(recipe),
        "kd": Kd(gentle, ce_weight=1.0, kd_weight=1.0),
        "akd": Akd(gentle, ce_weight=1.0, kd_weight=1.0, forget_pass="pseudo-label"),
        "rkd": Rkd(gentle, ce_weight=1.0, kd_weight=1.0),
        "pl-spkd": PlSpkd(gentle, ce_weight=1.0, sp_weight=100.0),
        "cola": Cola(recipe, collapse_epochs=1),
        "cu": Contrastive(recipe),
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
        "pcgrad": PcGrad(gentle),
        "hamu": Hamu(gentle),
        "sfron": Sfron(gentle, alpha=2.0, every=3),
        # Features and images of other classes.
        "duck": Duck(recipe, until=0.0, second_epochs=1),
        "scar": Scar(gentle, until=0.0),
        "amun": Amun(recipe, radius=1.0, doublings=2, steps=3),
        "cmf": Cmf(recipe, scale=4.0),
        "l2ul": L2ul(gentle, images=3, beside=2, radius=1.0, steps=3, until=0.0),
        "spotter": Spotter(gentle, radius=0.3, step=0.1),
        "jit": Jit(gentle, copies=3),
        # Around other methods, or of several trainings.
        "dual-optim": DualOptim(RandomLabel(recipe, order="sequential"), forget_lr=1e-3),
        "task-vector": TaskVector(gentle),
        "negmerge": NegMerge(gentle, rates=(0.5,) * recipe.epochs),
        "head-distillation": HeadDistillation(recipe),
        "one-point-contraction": OnePoint(recipe),
        "no-op": NoOp(replace(recipe, epochs=0)),
        "random-network": RandomNetwork(replace(recipe, epochs=0)),
    }
