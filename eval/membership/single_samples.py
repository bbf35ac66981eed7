"""Scores of single samples: is this one still in the model, judged beside retrained models?

Each attack gives a score a sample, larger for one that looks trained on, from stored outputs alone.
The retrained models never saw a forget sample: what each of them says of it, measured against the
others, is what chance gives. Rows are models and columns are samples: (K, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from letheon.errors import NotMeasurable
from letheon.eval.checks import Floats
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.many_models import log_density, rmia
from letheon.eval.membership.over_seeds import LEAST
from letheon.eval.membership.sides import select_logits
from letheon.eval.membership.signals import gather_signal, log_confidence, margin


@dataclass(frozen=True)
class Answers:
    """What models say of the same samples."""

    margins: Floats  # (K, n) of the forget samples
    log_p: Floats  # (K, n) log p(y|x) of the same
    population: Floats  # (K, m) log p(y|z) of held-out samples

    def __len__(self) -> int:
        """Count the models."""
        return len(self.margins)

    def select(self, rows: slice | list[int]) -> Answers:
        """Select some of the models."""
        return Answers(self.margins[rows], self.log_p[rows], self.population[rows])

    def without(self, row: int) -> Answers:
        """Leave one model out."""
        return self.select([other for other in range(len(self)) if other != row])

    def join(self, other: Answers) -> Answers:
        """Put other models behind these."""
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return Answers(*(np.concatenate(part) for part in parts))


def read_answers(model: Passes) -> Answers:
    """Read one model's answers to every forget image and to the test set; all ranks must call."""
    train, test = model.outputs["train"], model.outputs["test"]
    forget = select_logits(train, train.forget)
    signals = ((forget, margin), (forget, log_confidence), (test, log_confidence))
    return Answers(*(gather_signal(of, signal).numpy()[None] for of, signal in signals))


Score = Callable[[Answers, Answers, Answers], Floats]
"""(one model, K retrained models, L originals) -> (n,) scores of its samples."""


def raw_margin(model: Answers, retrained: Answers, originals: Answers) -> Floats:
    """(n,) margins as they are, one threshold for all samples (Yeom et al. 2018, with margins)."""
    return model.margins[0]


def excess(model: Answers, retrained: Answers, originals: Answers) -> Floats:
    """(n,) margins over the retrained models' mean of the sample: the offline LiRA of Carlini et
    al. 2022 with one spread for all samples, as they advise for few models.
    """
    return np.asarray(model.margins[0] - retrained.margins.mean(axis=0))


def offline_lira(model: Answers, retrained: Answers, originals: Answers) -> Floats:
    """(n,) the same in standard deviations of the sample's own retrained margins: the offline LiRA
    of Carlini et al. 2022, whose probability rises with it.
    """
    spread = np.maximum(retrained.margins.std(axis=0, ddof=1), 1e-6)
    return excess(model, retrained, originals) / spread


def offline_rmia(model: Answers, retrained: Answers, originals: Answers) -> Floats:
    """(n,) `rmia` scores with all retrained models for references, the test set for population."""
    return rmia(model.log_p[0], retrained.log_p, model.population[0], retrained.population)


def likelihood_ratio(model: Answers, retrained: Answers, originals: Answers) -> Floats:
    """(n,) log ratio of U-LiRA (Hayes et al. 2024): Gaussians of the margins of the originals,
    which saw the sample, and of the retrained models, which did not.

    Raises:
        NotMeasurable: fewer than three originals.
    """
    if len(originals) < LEAST:
        raise NotMeasurable(f"got {len(originals)} originals; a Gaussian needs {LEAST}")
    own = model.margins[0]
    return log_density(own, originals.margins) - log_density(own, retrained.margins)


SCORES: Mapping[str, Score] = {
    "margin": raw_margin,
    "LiRA, offline, one spread": excess,
    "LiRA, offline": offline_lira,
    "RMIA": offline_rmia,
    "U-LiRA, originals as trained": likelihood_ratio,
}
"""Attacks on single samples by name."""


def scores_without_each(score: Score, models: Answers, originals: Answers) -> Floats:
    """(K, n) scores of each of K retrained models against the K - 1 others."""
    return np.stack(
        [score(models.select([k]), models.without(k), originals) for k in range(len(models))]
    )
