"""Ways to forget, one file each, and the catalogue that the command line is made from."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import get_type_hints

from letheon.engine.method import Method
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
        # Fine-tuning, of a part or from disturbed weights.
        CfK,
        EuK,
        WeightNegation,
        WeightDistortion,
        WeightDistance,
        # The forget set alone, or in a joint loss.
        NegGradPlus,
        PseudoLabel,
        Delete,
        BoundaryShrink,
        BoundaryExpanding,
        SalUnSoft,
        Unsir,
        # Distillation.
        Scrub,
        BadTeacher,
        Lotus,
        Kd,
        Akd,
        Rkd,
        PlSpkd,
        # Contrasts.
        Cola,
        Contrastive,
        # One-shot edits, by statistics of the sets.
        Ssd,
        Lfssd,
        Fisher,
        GolatkarFisher,
        Influence,
        Kodge,
        Esc,
        # Two gradients, joined.
        Munba,
        GdrGma,
        PcGrad,
        Hamu,
        Sfron,
        # Features and images of other classes.
        Duck,
        Scar,
        Cmf,
        Amun,
        L2ul,
        Spotter,
        Jit,
        # Around other methods, or of several trainings.
        DualOptim,
        TaskVector,
        NegMerge,
        # Controls.
        HeadDistillation,
        OnePoint,
        NoOp,
        RandomNetwork,
    )
}
"""Our methods by their name on the command line."""


def catalogue() -> dict[str, type[Method]]:
    """List our methods and those other packages announce as entry points of `letheon.methods`.

    A plug-in that cannot be used is left out and named in one warning: one that cannot be imported,
    that is no frozen dataclass of `Method`, or that has the name of another method.
    """
    found = dict(METHODS)
    for point in entry_points(group="letheon.methods"):
        if point.name in found:
            _warn(point, f"the name is that of {found[point.name].__name__}; rename it")
        elif (method := _load(point)) is not None:
            found[point.name] = method
    return found


def inner_fields(method: type[Method]) -> list[str]:
    """List the fields in which a method holds another one it wraps: those annotated `Method`."""
    hints = get_type_hints(method)
    assert is_dataclass(method)
    return [field.name for field in fields(method) if hints[field.name] is Method]


@cache
def _load(point: EntryPoint) -> type[Method] | None:
    try:
        method = point.load()
    except Exception as error:  # whatever another package's code raises at its import
        text = " ".join(str(error).split())
        _warn(point, f"importing it ended in {type(error).__name__}: {text}; mend or remove it")
        return None
    if isinstance(method, type) and issubclass(method, Method) and is_dataclass(method):
        method.name = method.name or point.name
        return method
    _warn(point, "it is no dataclass derived from letheon.Method; make it one")
    return None


@cache
def _warn(point: EntryPoint, reason: str) -> None:
    """Name the plug-in that is left out, once a process and on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        package = f" of {point.dist.name}" if point.dist is not None else ""
        line = f"warning: left out the method {point.name!r}{package} ({point.value}): {reason}"
        print(line, file=sys.stderr)
