"""Power on single samples: the share of leaked samples that each attack finds at few false alarms.

A leak here is a model retrained without the forget set but for n of its samples. The threshold of
an attack is where at most a share `level` of the retrained models' own samples lies above it, each
model scored against the others. What this costs on models that had no part in it is counted too:
on the samples that a leak did not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from letheon.errors import NotMeasurable
from letheon.eval.audit.false_positives import LEVEL, exact_interval
from letheon.eval.membership.roc import threshold_at_fpr
from letheon.eval.membership.single_samples import SCORES, Answers, Score, scores_without_each

LEVELS = (0.01, 0.001)
"""False-positive rates at which attacks are asked."""
THIRDS = ("hard", "middle", "easy")
"""Of the forget samples, by the retrained models' mean margin: what is known without its sight."""


@dataclass(frozen=True)
class Rate:
    """How many of the cases were found."""

    hits: int
    count: int
    spread: float | None = None
    """Standard deviation of the share over the models; None for fewer than two."""

    @property
    def text(self) -> str:
        """The share, its spread over the models, its exact 95 % interval and the count, in %."""
        if not self.count:
            return "–"
        low, high = (100 * end for end in exact_interval(self.hits, self.count))
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        share = 100 * self.hits / self.count
        return f"{share:.1f}{spread} ({low:.1f} to {high:.1f}; {self.count})"


@dataclass(frozen=True)
class Leak:
    """A model of known truth."""

    size: str
    answers: Answers  # (1, n)
    seen: NDArray[np.bool_]  # (n,) the forget samples it was trained on


@dataclass(frozen=True)
class SamplePower:
    """How often one attack finds leaked samples at one false-positive rate."""

    attack: str
    level: float
    why: str = ""  # it is not decidable
    fresh: Rate = Rate(0, 0)  # samples of the leaks that these did not see: false alarms
    every: Rate = Rate(0, 0)  # leaked samples of all sizes
    by_size: Mapping[str, Rate] = field(default_factory=dict)
    by_third: Mapping[str, Rate] = field(default_factory=dict)


def _count(hits: Sequence[NDArray[np.bool_]]) -> Rate:
    """Count hits over the models; each array holds one model's cases."""
    shares = [float(each.mean()) for each in hits if len(each)]
    spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else None
    return Rate(sum(int(each.sum()) for each in hits), sum(map(len, hits)), spread)


def measure_samples(
    leaks: Sequence[Leak], retrained: Answers, originals: Answers
) -> Iterator[SamplePower]:
    """Yield the power of every attack at every level, as far as it is decidable.

    Args:
        leaks: models that saw some of the forget samples.
        retrained: of K models that saw none.
        originals: of models that saw all; may be none.
    """
    order = retrained.margins.mean(axis=0).argsort(kind="stable")
    third = np.empty_like(order)
    third[order] = np.arange(len(order)) * len(THIRDS) // len(order)
    for attack, score in SCORES.items():
        try:
            null = scores_without_each(score, retrained, originals).ravel()
        except NotMeasurable as error:
            yield from (SamplePower(attack, level, str(error)) for level in LEVELS)
            continue
        scored = [(leak, score(leak.answers, retrained, originals)) for leak in leaks]
        for level in LEVELS:
            if len(null) * level < 1:
                why = f"{len(null)} scores of retrained models cannot tell {level:.1%}"
                yield SamplePower(attack, level, why)
                continue
            limit = threshold_at_fpr(null, level)
            found = [(leak, values >= limit) for leak, values in scored]
            sizes = dict.fromkeys(leak.size for leak in leaks)
            yield SamplePower(
                attack, level, "",
                _count([hits[~leak.seen] for leak, hits in found]),
                _count([hits[leak.seen] for leak, hits in found]),
                {s: _count([hits[leak.seen] for leak, hits in found if leak.size == s])
                 for s in sizes},
                {name: _count([hits[leak.seen & (third == n)] for leak, hits in found])
                 for n, name in enumerate(THIRDS)},
            )  # fmt: skip


def is_found_by_largest(
    score: Score, model: Answers, retrained: Answers, originals: Answers
) -> bool:
    """Tell whether the largest score of any sample accuses the model, at `LEVEL`.

    Conformal, as the verdict: the model and the K retrained models are each scored against all
    others, and p is the share whose largest score is as large.
    """
    tops = scores_without_each(score, model.join(retrained), originals).max(axis=1)
    return bool(np.mean(tops >= tops[0]) <= LEVEL)


def largest_rates(
    leaks: Sequence[Leak], retrained: Answers, originals: Answers
) -> Iterator[tuple[str, Rate, dict[str, Rate]]]:
    """Yield attack, rate on the retrained models, rate on the leaks of each size."""

    def rate(score: Score, cases: Sequence[tuple[Answers, Answers]]) -> Rate:
        flags = [is_found_by_largest(score, one, others, originals) for one, others in cases]
        return Rate(sum(flags), len(flags))

    for attack, score in SCORES.items():
        each = [(retrained.select([k]), retrained.without(k)) for k in range(len(retrained))]
        try:
            false = rate(score, each)
        except NotMeasurable:
            continue
        sizes = dict.fromkeys(leak.size for leak in leaks)
        found = {
            size: rate(score, [(x.answers, retrained) for x in leaks if x.size == size])
            for size in sizes
        }
        yield attack, false, found


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], named: int) -> str:
    """Write a Markdown table whose first `named` columns are text."""
    rule = "---|" * named + "---:|" * (len(heads) - named)
    rows = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([f"| {' | '.join(heads)} |", f"|{rule}", *rows])


def as_sample_tables(
    leaks: Sequence[Leak],
    powers: Sequence[SamplePower],
    models: Sequence[tuple[str, Rate, Mapping[str, Rate]]],
) -> str:
    """Write Markdown tables: single samples by size and by third, then whole models."""
    sizes = list(dict.fromkeys(leak.size for leak in leaks))

    def cells(one: SamplePower, rates: Mapping[str, Rate], heads: Sequence[str]) -> list[str]:
        if one.why:
            return [one.attack, f"{one.level:.1%}", one.why, "–", *("–" for _ in heads)]
        texts = (rates[head].text for head in heads)
        return [one.attack, f"{one.level:.1%}", one.fresh.text, one.every.text, *texts]

    shared = ("attack", "at", "false alarms", "all")
    by_size = _table((*shared, *sizes), (cells(one, one.by_size, sizes) for one in powers), 1)
    by_third = _table((*shared, *THIRDS), (cells(one, one.by_third, THIRDS) for one in powers), 1)
    of_models = (
        [attack, f"{false.hits} of {false.count}", *(found[size].text for size in sizes)]
        for attack, false, found in models
    )
    heads = ("model accused by its largest score", "false positives", *sizes)
    return "\n\n".join([by_size, by_third, _table(heads, of_models, 1)]) + "\n"
