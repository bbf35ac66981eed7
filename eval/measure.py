"""Everything `evaluate` says of one model, from one inference pass over each image set.

`sweep` makes the passes of a model; `measure` turns them, and those of the original and the
retrained model, into numbers. Nothing here runs a network twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from letheon.engine.distributed import Ranks
from letheon.engine.precision import Precision
from letheon.eval import cka, knn, splits
from letheon.eval.accuracy import forgetting
from letheon.eval.features import Outputs, extract
from letheon.eval.search import Metric, Proposer
from letheon.loaders.batch import Loader
from letheon.loaders.errors import InputError

_DOMAIN = "domain/"
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
    split: splits.Rule = "keyed"
    """legacy is the seed's split."""
    cka: str = "exact"
    """exact, or legacy: the seed's mean of biased values over batches of 512."""
    backend: Proposer = "auto"

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"got k = {self.ks}; expected at least one k above 0")
        if not self.temperature > 0:
            raise InputError(f"got temperature {self.temperature}; expected a number above 0")
        if self.cka not in ("exact", "legacy"):
            raise InputError(f"got --cka {self.cka}; expected exact or legacy")


@dataclass
class Passes:
    """One model's outputs on every set, and what comparisons with it compute once."""

    name: str
    outputs: dict[str, Outputs]  # "train", "test", "domain/<name>"
    weights: str = ""  # digest of the weights these were made with
    _sides: dict[str, cka.Centred] = field(default_factory=dict, repr=False)

    def side(self, part: str) -> cka.Centred:
        """The test features of all, the forget or the retain samples, ready for CKA."""
        if part not in self._sides:
            test = self.outputs["test"]
            label = f"the pooled features of {self.name} on the test set ({part})"
            self._sides[part] = cka.centred(label, test.features[_rows(test, part)])
        return self._sides[part]


def _rows(outputs: Outputs, part: str) -> Tensor:
    if part == "all":
        return outputs.forget | True
    return outputs.forget if part == "forget" else ~outputs.forget


def sweep(
    name: str,
    model: nn.Module,
    loaders: Mapping[str, Loader],
    ranks: Ranks,
    weights: str = "",
    precision: Precision | None = None,
) -> Passes:
    """One inference pass of `model` over each set; every rank must call, and gets the same.

    Args:
        name: what tables and messages call the model.
        model: a Classifier on `ranks.device`.
        loaders: "train", "test" and any "domain/<name>".
        ranks: the job.
        weights: digest of the model's weights, kept beside what is measured.
        precision: default float32.
    """
    missing = {"train", "test"} - set(loaders)
    if missing:
        raise InputError(f"got loaders {', '.join(loaders)}; expected train and test among them")
    outputs = {
        key: extract(model, loader, ranks, precision=precision) for key, loader in loaders.items()
    }
    return Passes(name, outputs, weights)


def measure(
    model: Passes,
    original: Passes | None = None,
    retrained: Passes | None = None,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """The row of one model; no communication, the same on every rank.

    Returns:
        Shares between 0 and 1, or None where a metric is not defined ("why" then says why):

        - FA, RA, TFA, TRA, UA (1 - FA); "counts" has [correct, total] of the first four.
        - gap: mean |FA, RA, TFA, TRA - the retrained model's|, over those both have.
        - knn: mean over the domains at the first k; "knn_domains": {domain: {k: share}}.
        - cka_original, cka_retrained, and for each "_forget", "_retain" (that part of the test
          set), "_floor" (rows shuffled) and "_unbiased".
        - "conditions": what they were measured under, with the digests of the weights.

    Raises:
        InputError: NaN in logits or features, or sets that differ between the models.
    """
    chosen = conditions or Conditions()
    counts = forgetting(model.outputs["train"], model.outputs["test"])
    row: dict[str, Any] = {name: counts[name].share for name in _ACCURACIES}
    row["UA"] = None if row["FA"] is None else 1 - row["FA"]
    why: dict[str, str] = {name: "no samples" for name in _ACCURACIES if row[name] is None}
    row["gap"] = _gap(row, retrained)
    row |= _knn(model, chosen)
    for label, other in (("original", original), ("retrained", retrained)):
        if other is not None:
            row |= _cka(f"cka_{label}", model, other, chosen, why)
    row["counts"] = {name: list(count) for name, count in counts.items()}
    row["conditions"] = {
        "ks": list(chosen.ks),
        "metric": chosen.metric,
        "weights": chosen.weights,
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
    theirs = forgetting(retrained.outputs["train"], retrained.outputs["test"])
    pairs = [(row[name], theirs[name].share) for name in _ACCURACIES]
    differences = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return sum(differences) / len(differences) if differences else None


def _knn(model: Passes, chosen: Conditions) -> dict[str, Any]:
    domains = {
        key.removeprefix(_DOMAIN): outputs
        for key, outputs in model.outputs.items()
        if key.startswith(_DOMAIN)
    }
    drawn = {name: splits.split(len(outputs), chosen.split) for name, outputs in domains.items()}
    found = knn.domain_matrix(
        domains,
        drawn,
        [(name, name) for name in domains],
        chosen.space,
        ks=chosen.ks,
        metric=chosen.metric,
        weights=chosen.weights,
        temperature=chosen.temperature,
        backend=chosen.backend,
    )
    shares = {name: found[name, name].accuracy for name in domains}
    first = [share[chosen.ks[0]] for share in shares.values()]
    known: Sequence[float] = [value for value in first if value is not None]
    return {"knn": sum(known) / len(known) if known else None, "knn_domains": shares}


def _cka(
    label: str, model: Passes, other: Passes, chosen: Conditions, why: dict[str, str]
) -> dict[str, float | None]:
    ours, theirs = model.outputs["test"], other.outputs["test"]
    if not (ours.index.equal(theirs.index) and ours.labels.equal(theirs.labels)):
        raise InputError(
            f"got different test sets for {model.name} ({len(ours)} images) and {other.name} "
            f"({len(theirs)}); measure both on the same"
        )
    result: dict[str, float | None] = {}
    for part, suffix in (("all", ""), ("forget", "_forget"), ("retain", "_retain")):
        found = cka.compare(model.side(part), other.side(part))
        value = found.value
        if chosen.cka == "legacy" and value is not None:
            value = cka.legacy_cka(model.side(part).rows, other.side(part).rows)
        result[label + suffix] = value
        if found.reason:
            why[label + suffix] = found.reason
        if part == "all":
            result |= {f"{label}_floor": found.floor, f"{label}_unbiased": found.unbiased}
    return result
