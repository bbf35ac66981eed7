"""What a metric reads: one model's outputs, the models it is compared with, and the conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import torch

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError, NotMeasurable
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics.knn import Space, Weights
from letheon.eval.metrics.knn_splits import Rule
from letheon.eval.metrics.registry import Need
from letheon.eval.outputs import Outputs
from letheon.eval.search.neighbors import Proposer
from letheon.eval.search.scores import Metric as Similarity

T = TypeVar("T")
DOMAIN = "domain/"
"""Prefix of the keys of downstream sets."""
EARLIER = "earlier/"
"""Prefix of the keys of the training images that were forgotten before this request."""
ITSELF = "this is the reference itself"
_REASONS: dict[Need, str] = {
    "original": "got no original model; expected one to compare with",
    "reference": "got no retrained model; expected one to compare with",
    "retrained": "got no retrained model besides this one; expected one trained without the "
    "forget set",
    "untrained": "got no untrained network; expected one to compare with (random control)",
    "test": "nothing is held out: test is the same as train",
    "held-out": "got no test image of a forgotten class; expected at least one",
    "downstream": "got no downstream set; expected one",
    "canaries": "got no canaries; expected an original that was trained with some",
    "whole classes": "got single samples to forget; this is defined for whole classes",
}


@dataclass(frozen=True)
class Conditions:
    """What the representation metrics depend on besides the model and the images."""

    ks: tuple[int, ...] = (5,)
    """Numbers of neighbors; the first is the one of the table."""
    metric: Similarity = "cosine"
    """Nearness of two features in k-NN."""
    weights: Weights = "uniform"
    """Votes of the neighbors: equal, or by exp(cosine / temperature)."""
    temperature: float = 0.07
    """Temperature of these votes."""
    space: Space = "pooled"
    """What k-NN compares: pooled, the input of the last layer; logits as the published scripts of
    Rethinking Unlearning for Transfer Learning do."""
    split: Rule = "keyed"
    """Which images vote and which are asked: keyed by number; legacy as those scripts draw."""
    cka: Literal["exact", "legacy"] = "exact"
    """exact: over all images; legacy: the mean of biased values over batches of 512, of those
    scripts."""
    backend: Proposer = "auto"
    """What proposes the neighbors; faiss-ivf and faiss-cagra may miss some."""

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"got k = {self.ks}; expected at least one k above 0", option="ks")
        if not self.temperature > 0:
            raise InputError(
                f"got temperature {self.temperature}; expected a number above 0",
                option="temperature",
            )


@dataclass(frozen=True)
class Subject:
    """A model and its passes."""

    passes: Passes
    network: Callable[[], Classifier] | None = None  # opens it; weight distances need it
    seconds: float | None = None  # of forgetting
    runs: int = 1  # trained together, whose steps the clock counted too


@dataclass(frozen=True)
class Peers:
    """The models a row compares with, and what is known of the request."""

    original: Subject | None = None
    retrained: tuple[Subject, ...] = ()
    untrained: Passes | None = None
    forgotten: tuple[int, ...] = ()  # class numbers; empty where single samples were forgotten
    names: tuple[str, ...] = ()  # of all classes
    nothing_held_out: bool = False  # test images are the training images
    canaries: Mapping[int, int] = field(default_factory=dict)
    """Number of a training image under a planted label -> its true label."""
    groups: tuple[str, ...] = ()  # of each training image, where groups were named
    request: str = ""  # what was to be forgotten, as it was written


@dataclass(frozen=True)
class Case:
    """One model beside its peers: what a metric's function is given."""

    subject: Subject
    peers: Peers = field(default_factory=Peers)
    conditions: Conditions = field(default_factory=Conditions)
    ranks: Ranks = field(default_factory=Ranks)  # those of the outputs
    _results: dict[Callable[[Case], Any], Any] = field(default_factory=dict, repr=False)

    @property
    def passes(self) -> Passes:
        """Outputs of the model by set."""
        return self.subject.passes

    @property
    def train(self) -> Outputs:
        """Outputs on the training set, forget and retain images."""
        return self.passes.outputs["train"]

    @property
    def true_train(self) -> Outputs:
        """`train` with the classes that the images show for labels; itself without canaries."""
        train, known = self.train, self.peers.canaries
        if not known:
            return train
        labels = train.labels.clone()
        for row in torch.isin(train.index, torch.tensor([*known])).nonzero()[:, 0].tolist():
            labels[row] = known[int(train.index[row])]
        return replace(train, labels=labels)

    @property
    def test(self) -> Outputs:
        """Outputs on the test set."""
        return self.passes.outputs["test"]

    @property
    def domains(self) -> dict[str, Outputs]:
        """Outputs on the downstream sets by name."""
        outputs = self.passes.outputs.items()
        return {key.removeprefix(DOMAIN): o for key, o in outputs if key.startswith(DOMAIN)}

    @property
    def earlier(self) -> dict[str, Outputs]:
        """Outputs on the training images of each earlier request, by its text."""
        outputs = self.passes.outputs.items()
        return {key.removeprefix(EARLIER): o for key, o in outputs if key.startswith(EARLIER)}

    @property
    def original(self) -> Subject:
        """The model before forgetting.

        Raises:
            NotMeasurable: there is none.
        """
        if self.peers.original is None:
            raise NotMeasurable(_REASONS["original"])
        return self.peers.original

    @property
    def reference(self) -> Subject:
        """The first retrained model, which gaps and CKA are to.

        Raises:
            NotMeasurable: there is none, or it is this one and there are others.
        """
        if not self.peers.retrained:
            raise NotMeasurable(_REASONS["reference"])
        if self.is_reference and len(self.peers.retrained) > 1:
            raise NotMeasurable(ITSELF)
        return self.peers.retrained[0]

    @property
    def is_reference(self) -> bool:
        """Whether this model is the first retrained one."""
        return bool(self.peers.retrained) and self.peers.retrained[0] is self.subject

    @property
    def others(self) -> list[Subject]:
        """The retrained models but for this one.

        Raises:
            NotMeasurable: there is none.
        """
        others = [other for other in self.peers.retrained if other is not self.subject]
        if not others:
            raise NotMeasurable(_REASONS["retrained"])
        return others

    @property
    def untrained(self) -> Passes:
        """Outputs of a network with new weights.

        Raises:
            NotMeasurable: there is none, or it is this one.
        """
        if self.peers.untrained is None:
            raise NotMeasurable(_REASONS["untrained"])
        if self.peers.untrained is self.passes:
            raise NotMeasurable("this is the untrained network itself")
        return self.peers.untrained

    def once(self, compute: Callable[[Case], T]) -> T:
        """Compute something that several metrics of this model share, the first time only.

        Raises:
            NotMeasurable: every time, where `compute` raised it the first time.
        """
        if compute not in self._results:
            try:
                self._results[compute] = compute(self)
            except NotMeasurable as error:
                self._results[compute] = error
        result: Any = self._results[compute]
        if isinstance(result, NotMeasurable):
            raise result
        return cast(T, result)

    def require(self, needs: tuple[Need, ...]) -> None:
        """Check that the ingredients of a metric are there.

        Raises:
            NotMeasurable: one is missing; the text names it.
        """
        for need in needs:
            if need in ("original", "reference", "untrained"):
                getattr(self, need)
            elif need == "retrained":
                _ = self.others
            elif (
                (need == "test" and self.peers.nothing_held_out)
                or (need == "held-out" and not bool(self.test.forget.any()))
                or (need == "downstream" and not self.domains)
                or (need == "whole classes" and not self.peers.forgotten)
                or (need == "canaries" and not self.peers.canaries)
            ):
                raise NotMeasurable(_REASONS[need])
