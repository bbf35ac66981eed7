"""The Information Difference Index: what each layer still tells about "is it a forgotten class".

Jeon, Jeung, Kim, No and Choi 2026 (arXiv 2405.17878). What is theirs, as far as we could read it:
the information I(Z; Y) between a layer's output Z and the binary label Y = "of the forget set",
bounded from below by InfoNCE with a critic; its difference to the retrained model, summed over
layers; the quotient against the original model. What is ours is marked in `information`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.engine.distributed import gather_objects, wait_for_ranks
from letheon.errors import LetheonError, NotMeasurable
from letheon.eval.checks import Floats, Numbers, matrix
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.signals import loss
from letheon.eval.metrics.registry import NUMBERS_BY_NAME, metric
from letheon.kernels.keyed import permutation

if TYPE_CHECKING:
    from letheon.eval.case import Case

BALANCED = "balanced"
"""The set of a pass that holds as many retain as forget training images, with layers."""


def info_nce(scores: Tensor, member: Tensor) -> float:
    """InfoNCE of critic scores f(z, y) (n, 2) with binary labels (n,), in nats.

    mean over k of f(z_k, y_k) - log(mean over j of exp f(z_k, y_j)), all n samples as one batch.
    With two labels the mean over j is p0 exp f(z, 0) + p1 exp f(z, 1), so this equals the entropy
    of the label less the cross-entropy of the classifier with logits f + log p: a bound that
    reaches I(Z; Y) with the best critic and is never above the label's entropy, at most log 2.
    """
    share = torch.bincount(member.long(), minlength=2).double() / len(member)
    posterior = scores.double() + share.log()  # (n, 2)
    label_entropy = -(share * share.log()).sum()
    return float(label_entropy - loss(posterior, member.long()).mean())


def _linear_scores(fit: Floats, truth: NDArray[np.bool_], rows: Floats) -> Tensor:
    """(m, 2) scores of the best linear critic: the logistic regression's logits less log p."""
    from sklearn.linear_model import LogisticRegression  # here: a second to import

    model = LogisticRegression(max_iter=2000).fit(fit, truth)
    logit = torch.from_numpy(np.asarray(model.decision_function(rows)))
    scores = torch.stack([torch.zeros_like(logit), logit], dim=1)
    share = torch.from_numpy(np.array([1 - truth.mean(), truth.mean()]))
    return scores - share.log()


def information(
    features: Numbers,
    member: Tensor,
    seed: int = 0,
) -> float:
    """I(Z; Y) of one layer in nats, estimated from below, in [0, log 2].

    Ours, not the paper's: the critic is fitted on one half of the samples and InfoNCE is taken on
    the other (a seeded split, each class halved), since on its own samples a critic of many
    weights shows log 2 for noise; a negative estimate is given as 0; Z is the layer's pooled
    output, scaled to unit variance; and the critic is linear, so the number is a linear probe's
    log-loss reading. The paper's critic is built from the layers that follow: `critic`.

    Args:
        features: (n, D) pooled outputs of the layer.
        member: (n,) bool, of a forgotten class; as many true as false makes log 2 the most.
        seed: of the split.

    Raises:
        NotMeasurable: fewer than two samples on a side.
        RunFailed: NaN or infinity.
    """
    table = matrix(features, "layer features")
    truth = member.cpu().numpy().astype(bool)
    if len(truth) != len(table) or min(truth.sum(), (~truth).sum()) < 2:
        raise NotMeasurable(
            f"got {int(truth.sum())} forget samples among {len(truth)} labels for {len(table)} "
            "rows; expected at least two forget and two other samples"
        )
    fit, ask = halves(truth, seed)
    mean, spread = table[fit].mean(axis=0), table[fit].std(axis=0)
    spread[spread <= 1e-12 * (1 + np.abs(mean))] = np.inf
    scaled = (table - mean) / spread
    scores = _linear_scores(scaled[fit], truth[fit], scaled[ask])
    return max(0.0, info_nce(scores, torch.from_numpy(truth[ask])))


def halves(truth: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit a critic on and rows to ask it, each with half of either side."""
    order = permutation(seed, "information", 0, len(truth)).numpy()
    sides = [order[truth[order]], order[~truth[order]]]
    fit, ask = (np.concatenate([side[start::2] for side in sides]) for start in (0, 1))
    return fit, ask


class Idi(NamedTuple):
    """The Information Difference Index, and what it was made of, by layer in nats."""

    value: float
    unlearned: dict[str, float]
    retrained: dict[str, float]
    original: dict[str, float]


def idi(
    unlearned: Mapping[str, float],
    retrained: Mapping[str, float],
    original: Mapping[str, float],
) -> Idi:
    """IDI: sum over layers of I(unlearned) - I(retrained), over the same of the original model.

    0 is ideal, 1 as if nothing had been done; below 0 the features tell less than the retrained
    model's. The paper prints negative values, so differences are summed with their sign.

    Args:
        unlearned: layer -> `information`, on the same samples for the three models.
        retrained: the same of the retrained model, best the mean over several: on 800 samples of
            small digits another retrained model had an index of 0.28 against a single one.
        original: the same of the original model.

    Raises:
        NotMeasurable: other layers, or an original model that tells no more than the retrained one.
    """
    if not (set(unlearned) == set(retrained) == set(original)) or not unlearned:
        raise NotMeasurable(
            f"got layers {sorted(unlearned)}, {sorted(retrained)} and {sorted(original)}; "
            "expected the same layers of all three models"
        )

    def difference(model: Mapping[str, float]) -> float:
        return sum(model[layer] - retrained[layer] for layer in model)

    whole = difference(original)
    if whole <= 0:
        raise NotMeasurable(
            f"got an original model with {whole:.4f} nats more than the retrained one; expected "
            "more than 0; the layers or samples do not show the forgotten classes"
        )
    return Idi(difference(unlearned) / whole, dict(unlearned), dict(retrained), dict(original))


def information_of(model: Passes) -> dict[str, float]:
    """Layer -> `information` on "to be forgotten" in its pooled outputs, in nats; kept in `model`.

    The layers are shared out over the ranks, which must all call.

    Raises:
        NotMeasurable: no balanced pass with layers, or too few samples.
    """

    def compute() -> dict[str, float]:
        side = model.outputs.get(BALANCED)
        if side is None or not side.taps:
            raise NotMeasurable("got no pass with layers over forget and retain images")
        layers, member = {**side.taps, "features": side.features}, side.gather(side.forget)
        own: dict[str, float | LetheonError] = {}
        for turn, (name, rows) in enumerate(layers.items()):
            whole = side.gather(rows)  # one layer at a time, of few samples
            if turn % side.ranks.world == side.ranks.rank:
                try:
                    own[name] = information(whole, member, seed=0)
                except LetheonError as error:
                    own[name] = error
        wait_for_ranks(side.ranks)
        found = {k: v for part in gather_objects(own, side.ranks) for k, v in part.items()}
        values: dict[str, float] = {}
        for name in layers:
            value = found[name]
            if isinstance(value, LetheonError):
                raise value
            values[name] = value
        return values

    return model.once("information", compute)


@metric(
    "idi", title="IDI", group="Representation and probes", better="0",
    needs=("original", "retrained", "depth full"), source="Jeon et al. 2026, arXiv 2405.17878",
    everywhere=True, place=7,
)  # fmt: skip
def information_difference(case: Case) -> float:
    """Information Difference Index: what the layers tell about 'is it forgotten' beyond the
    retrained model, over the same of the original; 1 as if nothing was done, below 0 less than the
    retrained model tells, as of a network that knows nothing at all. InfoNCE on
    held-out samples, with a linear critic (ours) or one built of the later layers, as the paper
    has it (critic layers).
    """
    layers = [information_of(other.passes) for other in case.others]
    mean = {name: fmean(each[name] for each in layers) for name in layers[0]}
    return idi(information_of(case.passes), mean, information_of(case.original.passes)).value


@metric(
    "information_by_layer", title="Information by layer", group="Representation and probes",
    unit="table", needs=("depth full",), everywhere=True, place=27,
    schema=NUMBERS_BY_NAME,
)  # fmt: skip
def information_by_layer(case: Case) -> dict[str, float]:
    """Information on 'is it forgotten' in each layer's output, in nats, from below."""
    return information_of(case.passes)
