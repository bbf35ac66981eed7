"""Everything `evaluate` says of one model, from its passes over the image sets.

`passes.sweep` makes them; those of the original and the retrained model serve every row. No network
is run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, Literal

import torch

from letheon.engine.distributed import Ranks
from letheon.errors import InputError
from letheon.eval.inference.passes import Passes, sweep
from letheon.eval.metrics import cka, knn, knn_splits
from letheon.eval.metrics.accuracy import per_class
from letheon.eval.search.neighbors import Proposer
from letheon.eval.search.scores import Metric
from letheon.spans import span

DOMAIN = "domain/"
"""What the keys of downstream sets begin with."""
__all__ = ["DOMAIN", "Conditions", "Passes", "cka_band", "measure", "sweep"]

_ACCURACIES = ("FA", "RA", "TFA", "TRA")


@dataclass(frozen=True)
class Conditions:
    """What the representation metrics depend on besides the model and the images."""

    ks: tuple[int, ...] = (5,)
    """Numbers of neighbours; the first is the one of the table."""
    metric: Metric = "cosine"
    weights: knn.Weights = "uniform"
    temperature: float = 0.07
    space: knn.Space = "pooled"
    """logits is the seed's value."""
    split: knn_splits.Rule = "keyed"
    """legacy is the seed's split."""
    cka: Literal["exact", "legacy"] = "exact"
    """legacy is the seed's mean of biased values over batches of 512."""
    backend: Proposer = "auto"
    matrix: bool = False
    """Also search each domain with the queries of every other."""

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"got k = {self.ks}; expected at least one k above 0")
        if not self.temperature > 0:
            raise InputError(f"got temperature {self.temperature}; expected a number above 0")


@span("statistics")
def measure(
    model: Passes,
    original: Passes | None = None,
    retrained: Passes | None = None,
    conditions: Conditions | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The row of one model: what JSON can hold, the same on every rank.

    Args:
        model: what is measured.
        original: the model before forgetting.
        retrained: the model trained without the forget set.
        conditions: of k-NN and CKA.
        ranks: then every rank must call; the k-NN databases are shared out, and k-NN and CKA run
            on the ranks' devices. Default: on the CPU, without communication.

    Returns:
        Shares between 0 and 1, or None where a metric is not defined ("why" then says why):

        - FA, RA, TFA, TRA, UA (1 - FA); "counts" has [correct, total] of the first four;
          "accuracy_by_class" those of the test set, by class.
        - gap: mean |FA, RA, TFA, TRA - the retrained model's|, over those both have.
        - knn: mean over the domains at the first k; "knn_domains": {domain: {str(k): share}};
          with `matrix` "domain_matrix": {neighbours' domain: {queries' domain: share}}.
        - cka_original, cka_retrained, and for each "_forget", "_retain" (that part of the test
          set), "_floor" (the mean over shufflings of one side) and "_unbiased". Where the test
          pass has taps: "cka_by_layer", "cka_floor_by_layer", to the retrained model.
        - "conditions": what they were measured under, with the digests of the weights.

    Raises:
        InputError: NaN in logits or features, or sets that differ between the models.
    """
    chosen = conditions or Conditions()
    ranks = ranks or Ranks()
    test, counts = model.outputs["test"], model.accuracies
    row: dict[str, Any] = {name: counts[name].share for name in _ACCURACIES}
    row["UA"] = None if row["FA"] is None else 1 - row["FA"]
    why: dict[str, str] = {name: "no samples" for name in _ACCURACIES if row[name] is None}
    row["gap"] = _gap(row, retrained)
    row |= _knn(model, chosen, ranks)
    for label, other in (("original", original), ("retrained", retrained)):
        if other is not None:
            row |= _cka(f"cka_{label}", model, other, chosen, why, ranks.device)
    if retrained is not None and test.taps:
        row |= _layers(model, retrained, why, ranks.device)
    row["counts"] = {name: list(count) for name, count in counts.items()}
    row["accuracy_by_class"] = [count.share for count in per_class(test, test.logits.shape[1])]
    row["conditions"] = {
        "ks": list(chosen.ks),
        "metric": chosen.metric,
        "weights": chosen.weights,
        "temperature": chosen.temperature if chosen.weights == "temperature" else None,
        "space": chosen.space,
        "split": chosen.split,
        "cka": chosen.cka,
        "digest": model.weights,
        "original": original.weights if original else None,
        "retrained": retrained.weights if retrained else None,
        "samples": {key: len(outputs) for key, outputs in model.outputs.items()},
    }
    row["why"] = why
    return row


def _gap(row: Mapping[str, Any], retrained: Passes | None) -> float | None:
    if retrained is None:
        return None
    pairs = [(row[name], retrained.accuracies[name].share) for name in _ACCURACIES]
    differences = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return fmean(differences) if differences else None


def _knn(model: Passes, chosen: Conditions, ranks: Ranks) -> dict[str, Any]:
    domains = {
        key.removeprefix(DOMAIN): outputs
        for key, outputs in model.outputs.items()
        if key.startswith(DOMAIN)
    }
    found = knn.domain_matrix(
        domains,
        {name: knn_splits.split(len(outputs), chosen.split) for name, outputs in domains.items()},
        None if chosen.matrix else [(name, name) for name in domains],
        chosen.space,
        ks=chosen.ks,
        metric=chosen.metric,
        weights=chosen.weights,
        temperature=chosen.temperature,
        backend=chosen.backend,
        ranks=ranks,
    )
    first = chosen.ks[0]
    within = {name: found[name, name].accuracy for name in domains}
    shares = [share for accuracy in within.values() if (share := accuracy[first]) is not None]
    row: dict[str, Any] = {
        "knn": fmean(shares) if shares else None,
        "knn_domains": {
            name: {str(k): share for k, share in accuracy.items()}
            for name, accuracy in within.items()
        },
    }
    if chosen.matrix and domains:
        row["domain_matrix"] = {
            source: {target: found[source, target].accuracy[first] for target in domains}
            for source in domains
        }
    return row


def _cka(
    label: str,
    model: Passes,
    other: Passes,
    chosen: Conditions,
    why: dict[str, str],
    device: torch.device,
) -> dict[str, float | None]:
    _check_same_images(model, other)
    result: dict[str, float | None] = {}
    for part, suffix in (("all", ""), ("forget", "_forget"), ("retain", "_retain")):
        found = cka.compare(model.side(part, device), other.side(part, device))
        value = found.value
        if chosen.cka == "legacy" and value is not None:
            value = cka.legacy_cka(model.side(part, device).rows, other.side(part, device).rows)
        result[label + suffix] = value
        if found.reason:
            why[label + suffix] = found.reason
        if part == "all":
            result |= {f"{label}_floor": found.floor, f"{label}_unbiased": found.unbiased}
    return result


def _layers(
    model: Passes, other: Passes, why: dict[str, str], device: torch.device
) -> dict[str, dict[str, float | None]]:
    """Layer by layer, for the taps that both passes have."""
    _check_same_images(model, other)
    found = {
        tap: cka.compare(model.layer(tap, device), other.layer(tap, device))
        for tap in model.outputs["test"].taps
        if tap in other.outputs["test"].taps
    }
    why |= {f"cka_by_layer {tap}": each.reason for tap, each in found.items() if each.reason}
    return {
        "cka_by_layer": {tap: each.value for tap, each in found.items()},
        "cka_floor_by_layer": {tap: each.floor for tap, each in found.items()},
    }


def _check_same_images(model: Passes, other: Passes) -> None:
    ours, theirs = model.outputs["test"], other.outputs["test"]
    if not (ours.index.equal(theirs.index) and ours.labels.equal(theirs.labels)):
        raise InputError(
            f"got different test sets for {model.name} ({len(ours)} images) and {other.name} "
            f"({len(theirs)}); measure both on the same"
        )


def cka_band(retrained: Sequence[Passes], ranks: Ranks | None = None) -> dict[str, Any]:
    """CKA between independent retrained models: how far 1 is out of reach.

    Args:
        retrained: passes of models retrained with different seeds.
        ranks: as in `measure`.

    Returns:
        "low", "mean", "high" of the exact CKA of pooled test features over all pairs, and "pairs";
        None each where there are fewer than two models.
    """
    device = (ranks or Ranks()).device
    values = []
    for first, second in combinations(retrained, 2):
        _check_same_images(first, second)
        value = cka.compare(first.side("all", device), second.side("all", device)).value
        if value is not None:
            values.append(value)
    if not values:
        return {"low": None, "mean": None, "high": None, "pairs": 0}
    return {"low": min(values), "mean": fmean(values), "high": max(values), "pairs": len(values)}
