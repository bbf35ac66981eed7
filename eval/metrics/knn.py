"""k-nearest-neighbor accuracy: does the representation still tell the classes apart?

One search at the largest k serves every k. Neighbors are ranked by their float64 score, rounded to
a fixed grid, and equal scores by the lower database position, so the answer does not depend on
tiles, threads, ranks, the device or the search library: those only propose candidates, and a query
whose candidates cannot be proven complete is searched again in float64.

The vote among neighbors is scikit-learn's (KNeighborsClassifier, brute force): each counts one,
equal sums go to the lowest class. ``temperature`` weighs each by exp(similarity / T), after Wu et
al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks
from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.metrics.accuracy import Count
from letheon.eval.metrics.knn_splits import Rule, split
from letheon.eval.metrics.registry import SHARES_BY_NAME, Summary, metric
from letheon.eval.outputs import Outputs
from letheon.eval.search.neighbors import Proposer, nearest, nearest_sets
from letheon.eval.search.scores import Metric

if TYPE_CHECKING:
    from letheon.eval.case import Case

Weights = Literal["uniform", "temperature"]
Space = Literal["pooled", "logits"]
"""What an image's vector is: the pooled features, or the logits as the seed's last version has it
(a compatibility value: it moves when only the classifier's head does)."""


@dataclass(frozen=True)
class Neighbors:
    """What k-NN says of each query, for each k."""

    counts: dict[int, Count]  # k -> queries of all ranks whose vote is their label
    predictions: dict[int, Tensor]  # k -> (Q,) int64
    recall: float = 1.0  # share of the true neighbors found; below 1 for faiss-ivf and -cagra only

    @property
    def accuracy(self) -> dict[int, float | None]:
        """The share of queries that are right, for each k."""
        return {k: count.share for k, count in self.counts.items()}


def _check(name: str, vectors: Tensor, labels: Tensor, ranks: Ranks) -> int:
    """Check shapes and numbers on every rank; the number of rows over all of them."""
    fits = vectors.ndim == 2 and len(vectors) == len(labels)
    # A sum of numbers that are not all finite is not finite, and is made much faster than a mask.
    parts = vectors.split(8192) if fits and len(vectors) else ()
    parts = tuple(part for part in parts if not bool(part.sum().isfinite()))
    broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in parts)
    counts = torch.tensor([len(vectors), broken, not fits], dtype=torch.int64)
    sum_over_ranks([counts], ranks)
    rows, broken, wrong = counts.tolist()
    if wrong or not rows:
        raise InputError(
            f"got {name} of shape {tuple(vectors.shape)} with {len(labels)} labels; "
            "expected (n, D) with n labels, n > 0"
        )
    if broken:
        raise RunFailed(
            f"got NaN or infinite values in {broken} of {rows} rows of {name}; "
            "expected numbers; the model that made them has diverged"
        )
    return rows


def _votes(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """(Q,) int64: the class with the largest sum, the lowest of equal ones."""
    sums = weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
    return sums.argmax(dim=1)


class Options(TypedDict, total=False):
    """How `knn` votes and searches."""

    weights: Weights
    """Each neighbor's vote. temperature is exp(cos / T), for l2 exp(-d^2 / 2T), which is the same
    on unit vectors. Default: uniform."""
    temperature: float
    """T; default 0.07."""
    backend: Proposer
    """What proposes candidates; the answer does not depend on it, faiss-ivf and faiss-cagra
    apart."""
    names: tuple[str, str]
    """What the two sets are called in messages."""


def knn(
    database: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (5,),
    metric: Metric = "cosine",
    ranks: Ranks | None = None,
    **options: Unpack[Options],
) -> Neighbors:
    """Classify each query by its nearest database rows.

    Args:
        database: (N, D) floating point, in memory of any kind; of several ranks this one's rows.
        labels: (N,) int64, the database's classes, not negative.
        queries: (Q, D), of several ranks this one's.
        query_labels: (Q,) int64.
        ks: numbers of neighbors; one search at the largest, its prefixes for the others.
        metric: cosine (a zero row is orthogonal to everything) or l2.
        ranks: the job whose ranks hold the other rows and queries; each searches its rows on its
            device. Default: this process alone, on the database's device.
        **options: see `Options`.

    Returns:
        Counts over the queries of all ranks, and predictions of this rank's.

    Raises:
        InputError: shapes that do not fit, k outside 1..N, T not positive.
        RunFailed: values that are not finite; the text names the set.
    """
    names = options.get("names", ("the database", "the queries"))
    temperature = options.get("temperature", 0.07)
    weighted = options.get("weights", "uniform") == "temperature"
    ranks = ranks or Ranks(device=database.device)
    rows = _check(names[0], database, labels, ranks)
    _check(names[1], queries, query_labels, ranks)
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > rows:
        raise InputError(
            f"got k = {', '.join(map(str, ks))} for {names[0]} of {rows} samples; "
            f"expected each k in 1..{rows}",
            option="ks",
        )
    if weighted and not temperature > 0:
        raise InputError(f"got temperature {temperature}; expected a number above 0")
    search = (metric, options.get("backend", "auto"), ranks)
    if weighted:
        near = nearest(database, queries, ks[-1], *search)
        places, recall = near.places, near.recall
        weights = ((near.similarity - near.similarity[:, :1]) / temperature).exp()
    else:
        places, recall = nearest_sets(database, queries, ks, *search)
        weights = torch.ones(places.shape, dtype=torch.float32, device=places.device)
    labels = gather_rows(labels, ranks)  # one number a row
    classes = int(labels.max()) + 1
    voters = labels.to(places.device)[places]  # (Q, max k)
    truth = query_labels.to(voters.device)
    predictions = {k: _votes(voters[:, :k], weights[:, :k], classes) for k in ks}
    hits = [int((p == truth).sum()) for p in predictions.values()]
    sums = torch.tensor([*hits, len(truth)], dtype=torch.int64)
    sum_over_ranks([sums], ranks)
    counts = {k: Count(int(right), int(sums[-1])) for k, right in zip(ks, sums, strict=False)}
    return Neighbors(counts, predictions, recall)


def vectors(outputs: Outputs, space: Space = "pooled") -> Tensor:
    """(n, D) float32: what represents each image."""
    return outputs.features if space == "pooled" else outputs.logits


def _part(outputs: Outputs, part: Literal["database", "queries"], rule: Rule) -> Tensor:
    """(k,) rows of this rank in a part of the split of all."""
    parts = split(outputs.span()[1], rule)
    return outputs.local_rows(parts.database if part == "database" else parts.queries)


def _between(case: Case, source: str, target: str) -> Neighbors:
    """Search one domain's database part with another's query part."""
    of, domains = case.conditions, case.domains
    database = _part(domains[source], "database", of.split)
    queries = _part(domains[target], "queries", of.split)
    sides = ((domains[source], database), (domains[target], queries))
    known, asked = (side.gather(side.labels[rows]) for side, rows in sides)
    if len(known) and len(asked) and not bool(torch.isin(asked, known).any()):
        raise NotMeasurable(
            f"got no query of {target} whose class has an image in the database part of {source}; "
            "expected classes of several images, or no vote can be right"
        )
    return knn(
        vectors(domains[source], of.space)[database],
        domains[source].labels[database],
        vectors(domains[target], of.space)[queries],
        domains[target].labels[queries],
        ks=of.ks,
        metric=of.metric,
        weights=of.weights,
        temperature=of.temperature,
        backend=of.backend,
        ranks=case.ranks,
        names=(f"the database part of {source}", f"the query part of {target}"),
    )


def _shares(case: Case, source: str, target: str) -> dict[int, float | None]:
    """Accuracy at each k; None where no class of the queries is in the database."""
    try:
        return _between(case, source, target).accuracy
    except NotMeasurable as error:
        case.once(_reasons)[f"{source} to {target}"] = str(error)
        return dict.fromkeys(case.conditions.ks)


def _reasons(case: Case) -> dict[str, str]:
    """Why some domains have no accuracy, in the order they were measured."""
    return {}


def _within(case: Case) -> dict[str, dict[int, float | None]]:
    """Domain -> accuracy at each k."""
    return {name: _shares(case, name, name) for name in case.domains}


@metric(
    "knn", title="k-NN", group="Representation and probes", unit="share", better="as retrained",
    needs=("downstream",), everywhere=True, reads=_within, source="Kim et al. 2025", place=1,
    summary=Summary(
        "k-NN %", "nearest-neighbor accuracy on the downstream domains, their mean", 6
    ),
)  # fmt: skip
def knn_accuracy(case: Case) -> float:
    """Share of images whose nearest neighbors (k = 5, cosine, pooled features, unless stated
    otherwise) in a fixed 80 % of the same domain vote for their class, tested on the other 20 %,
    mean over the domains.
    """
    first = case.conditions.ks[0]
    shares = [v for each in case.once(_within).values() if (v := each[first]) is not None]
    if not shares:
        raise NotMeasurable("; ".join(case.once(_reasons).values()) or "no samples")
    return fmean(shares)


@metric(
    "knn_domains", title="k-NN by domain", group="Representation and probes", unit="table",
    everywhere=True, reads=_within, place=22,
    schema={"type": "object", "additionalProperties": SHARES_BY_NAME},
)  # fmt: skip
def knn_by_domain(case: Case) -> dict[str, Any]:
    """k-NN accuracy in each downstream domain, for each k."""
    within = case.once(_within)
    return {name: {str(k): v for k, v in each.items()} for name, each in within.items()}


@metric(
    "domain_matrix", title="Domain matrix", group="Representation and probes", unit="table",
    needs=("downstream", "depth full"), everywhere=True, place=23,
    schema={"type": "object", "additionalProperties": SHARES_BY_NAME},
)  # fmt: skip
def domain_matrix(case: Case) -> dict[str, dict[str, float | None]]:
    """k-NN accuracy with neighbors of one domain (rows) and queries of another, at the first k."""
    first, within = case.conditions.ks[0], case.once(_within)
    return {
        source: {
            target: within[source][first]
            if source == target
            else _shares(case, source, target)[first]
            for target in within
        }
        for source in within
    }
