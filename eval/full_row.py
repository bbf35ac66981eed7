"""All that a full evaluation adds to the row of `measure`, under the keys of the catalogue.

What has no ingredients is None, and the row's "why" says what is missing. Distances to the
retrained models are means over them; a retrained model is compared with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.evaluator import MOST, membership
from letheon.eval.metrics.divergence import activation_distance, completeness, js, zrf
from letheon.eval.probes.evaluator import BALANCED, SHOTS, index, probes, told_by_layer
from letheon.eval.probes.linear import weight_distance
from letheon.eval.row_builder import Findings, needed
from letheon.spans import span

NO_ORIGINAL = "got no original model; name it: --original"
NO_RETRAINED = "got no retrained model besides this one; name one: --retrained"


@dataclass(frozen=True)
class Subject:
    """A model and its passes."""

    passes: Passes
    model: Classifier


@dataclass(frozen=True)
class Beside:
    """The models that a row compares with, and what is known of the request."""

    original: Subject | None
    retrained: tuple[Subject, ...]
    random: Passes | None  # of an untrained network
    forgotten: tuple[int, ...]  # class numbers; empty where single samples were forgotten
    names: tuple[str, ...]  # of all classes

    def references(self, subject: Subject) -> list[Subject]:
        """The retrained models but for the subject itself.

        Raises:
            InputError: there is none.
        """
        others = [other for other in self.retrained if other is not subject]
        if not others:
            raise InputError(NO_RETRAINED)
        return others


@span("statistics")
def audit(subject: Subject, beside: Beside, ranks: Ranks | None = None) -> dict[str, Any]:
    """Membership, divergences, probes, IDI, weight distances and confusions of one model.

    Args:
        subject: what is measured; IDI needs the "balanced" set with taps among its passes.
        beside: what it is compared with, prepared in the same way.
        ranks: then every rank must call, computes its share, and gets the same.

    Returns:
        Additions to the row of `measure`, with "audit" (sample limits) and "why".

    Raises:
        InputError: logits or features that are not numbers.
    """
    model, found = subject.passes, Findings(ranks or Ranks())
    others = [other.passes for other in beside.retrained if other is not subject]
    membership(model, others, found)
    probes(model, beside.forgotten, beside.names, found)
    _divergences(subject, beside, found)

    def information() -> dict[str, Any]:
        original = needed(beside.original, NO_ORIGINAL)
        references = [other.passes for other in beside.references(subject)]
        return {"idi": index(model, original.passes, references)}

    layered = "information_by_layer"
    found.add((layered,), lambda: {layered: told_by_layer(model)})
    found.add(("idi",), information)
    for label, of in (
        ("original", lambda: [needed(beside.original, NO_ORIGINAL)]),
        ("retrained", lambda: beside.references(subject)),
    ):
        _moved(label, subject, of, found)
    found.share()
    limits = {"membership_rows": MOST, "few_shot": SHOTS}
    if BALANCED in model.outputs:
        limits["information_rows"] = len(model.outputs[BALANCED])
    return {**found.values, "audit": limits, "why": found.why}


def _divergences(subject: Subject, beside: Beside, found: Findings) -> None:
    model = subject.passes

    def mean(of: Callable[[Tensor, Tensor], float], ours: Tensor, pick: Any) -> float:
        return fmean(of(ours, pick(other.passes)) for other in beside.references(subject))

    def on_forget(side: Passes) -> Tensor:
        train = side.outputs["train"]
        return train.logits[train.forget]

    def on_test(side: Passes) -> Tensor:
        return side.outputs["test"].logits

    def distances() -> dict[str, Any]:
        return {
            "js": mean(js, on_forget(model), on_forget),
            "activation_distance": mean(activation_distance, on_forget(model), on_forget),
            "completeness": mean(completeness, on_test(model), on_test),
        }

    def to_untrained() -> dict[str, Any]:
        untrained = needed(beside.random, "got no untrained network; add --random-control")
        if untrained is model:
            raise InputError("this is the untrained network itself")
        return {"zrf": zrf(on_forget(model), on_forget(untrained))}

    found.add(("js", "activation_distance", "completeness"), distances)
    found.add(("zrf",), to_untrained)


def _moved(
    label: str, subject: Subject, others: Callable[[], Sequence[Subject]], found: Findings
) -> None:
    """Relative distance of all weights, and of each tensor, to the mean over `others`."""
    total, layered = f"weight_distance_{label}", f"weight_distance_{label}_by_layer"

    def distances() -> dict[str, Any]:
        ours = dict(subject.model.named_parameters())
        each, whole = [], []
        for other in others():
            theirs = dict(other.model.named_parameters())
            moved = weight_distance(ours, theirs)
            size = torch.stack([p.detach().double().norm() for p in theirs.values()]).norm()
            length = torch.tensor([of.l2 for of in moved.values()]).double().norm()
            each.append(moved)
            whole.append(float(length / size))
        layers = {name: fmean(moved[name].l2 for moved in each) for name in ours}
        return {total: fmean(whole), layered: layers}

    found.add((total, layered), distances)
