"""The Information Difference Index: what each layer still tells about "is it a forgotten class".

Jeon, Jeung, Kim, No and Choi 2026 (arXiv 2405.17878). What is theirs, as far as we could read it:
the information I(Z; Y) between a layer's output Z and the binary label Y = "of the forget set",
bounded from below by InfoNCE with a critic; its difference to the retrained model, summed over
layers; the quotient against the original model. What is ours is marked in `information`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from letheon.errors import InputError
from letheon.eval.checks import Floats, Numbers, matrix
from letheon.eval.membership.signals import loss
from letheon.kernels.keyed import permutation

Critic = Callable[[int], nn.Module]
"""Given the width of a layer, a module (B, width) -> (B, 2) scores f(z, 0), f(z, 1)."""


def small_critic(width: int) -> nn.Module:
    """Two hidden layers of 128; for layers whose later layers cannot be run from pooled outputs."""
    layers = (nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    return nn.Sequential(*layers)


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


def _linear_scores(fit: Floats, truth: NDArray[np.bool_], asked: Floats) -> Tensor:
    """(m, 2) scores of the best linear critic: the logistic regression's logits less log p."""
    model = LogisticRegression(max_iter=2000).fit(fit, truth)
    logit = torch.from_numpy(np.asarray(model.decision_function(asked)))
    scores = torch.stack([torch.zeros_like(logit), logit], dim=1)
    share = torch.from_numpy(np.array([1 - truth.mean(), truth.mean()]))
    return scores - share.log()


def _trained_scores(
    fit: Floats, truth: NDArray[np.bool_], asked: Floats, critic: Critic, steps: int, seed: int
) -> Tensor:
    """(m, 2) scores of a critic trained with Adam to the largest InfoNCE on `fit`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = critic(fit.shape[1])
    z, y = torch.from_numpy(fit).float(), torch.from_numpy(truth).long()
    log_share = (torch.bincount(y, minlength=2) / len(y)).log()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    for step in range(steps):
        rows = permutation(seed, "critic", step, len(y))[:256]
        descended = nn.functional.cross_entropy(net(z[rows]) + log_share, y[rows])
        optimiser.zero_grad()
        descended.backward()
        optimiser.step()
    with torch.no_grad():
        scores: Tensor = net(torch.from_numpy(asked).float())
    return scores


def information(
    features: Numbers,
    member: Tensor,
    *,
    critic: Critic | None = None,
    steps: int = 500,
    seed: int = 0,
) -> float:
    """I(Z; Y) of one layer in nats, estimated from below, in [0, log 2].

    Ours, not the paper's: the critic is fitted on one half of the samples and InfoNCE is taken on
    the other (a seeded split, each class halved), since on its own samples a critic of many
    weights shows log 2 for noise; a negative estimate is given as 0; Z is the layer's pooled
    output, scaled to unit variance; and the default critic is linear, in which case the number is
    a linear probe's log-loss reading. The paper's critic is built from the layers that follow:
    `probes_critic`.

    Args:
        features: (n, D) pooled outputs of the layer.
        member: (n,) bool, of a forgotten class; as many true as false makes log 2 the most.
        critic: None, the linear critic by logistic regression; or a module to train.
        steps: of AdamW on batches of 256, for a trained critic.
        seed: of the split and the critic.

    Raises:
        InputError: fewer than two samples on a side, NaN or infinity.
    """
    table = matrix(features, "layer features")
    truth = member.cpu().numpy().astype(bool)
    if len(truth) != len(table) or min(truth.sum(), (~truth).sum()) < 2:
        raise InputError(
            f"got {int(truth.sum())} forget samples among {len(truth)} labels for {len(table)} "
            "rows; expected at least two forget and two other samples"
        )
    fit, ask = halves(truth, seed)
    mean, spread = table[fit].mean(axis=0), table[fit].std(axis=0)
    spread[spread <= 1e-12 * (1 + np.abs(mean))] = np.inf
    scaled = (table - mean) / spread
    scores = (
        _linear_scores(scaled[fit], truth[fit], scaled[ask])
        if critic is None
        else _trained_scores(scaled[fit], truth[fit], scaled[ask], critic, steps, seed)
    )
    return max(0.0, info_nce(scores, torch.from_numpy(truth[ask])))


def halves(truth: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit a critic on and rows to ask it, each with half of either side."""
    order = permutation(seed, "information", 0, len(truth)).numpy()
    sides = [order[truth[order]], order[~truth[order]]]
    fit, ask = (np.concatenate([side[start::2] for side in sides]) for start in (0, 1))
    return fit, ask


class Idi(NamedTuple):
    """The index, and what it was made of, by layer in nats."""

    value: float
    unlearned: dict[str, float]
    retrained: dict[str, float]
    original: dict[str, float]


def idi(
    unlearned: Mapping[str, float],
    retrained: Mapping[str, float],
    original: Mapping[str, float],
    *,
    floor: bool = False,
) -> Idi:
    """IDI: sum over layers of I(unlearned) - I(retrained), over the same of the original model.

    0 is ideal, 1 as if nothing had been done; below 0 the features tell less than the retrained
    model's. The paper prints negative values, so differences are summed with their sign.

    Args:
        unlearned: layer -> `information`, on the same samples for the three models.
        retrained: the same of the retrained model, best the mean over several: on 800 samples of
            small digits another retrained model had an index of 0.28 against a single one.
        original: the same of the original model.
        floor: count a layer's negative difference as 0, as a second-hand reading of the paper has
            it.

    Raises:
        InputError: other layers, or an original model that tells no more than the retrained one.
    """
    if not (set(unlearned) == set(retrained) == set(original)) or not unlearned:
        raise InputError(
            f"got layers {sorted(unlearned)}, {sorted(retrained)} and {sorted(original)}; "
            "expected the same layers of all three models"
        )

    def difference(model: Mapping[str, float]) -> float:
        terms: Sequence[float] = [model[layer] - retrained[layer] for layer in model]
        return sum(max(0.0, term) for term in terms) if floor else sum(terms)

    whole = difference(original)
    if whole <= 0:
        raise InputError(
            f"got an original model with {whole:.4f} nats more than the retrained one; expected "
            "more than 0; the layers or samples do not show the forgotten classes"
        )
    return Idi(difference(unlearned) / whole, dict(unlearned), dict(retrained), dict(original))
