"""k-nearest-neighbour accuracy: does the representation still tell the classes apart?

One search at the largest k serves every k. Neighbours are ranked by their float64 score, rounded to
a fixed grid, and equal scores by the lower database position, so the answer does not depend on
tiles, threads, ranks, the device or the search library: those only propose candidates, and a query
whose candidates cannot be proven complete is searched again in float64.

The vote among neighbours is scikit-learn's (KNeighborsClassifier, brute force): each counts one,
equal sums go to the lowest class. ``temperature`` weighs each by exp(similarity / T), after Wu et
al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.errors import InputError
from letheon.eval.inference.extract import Outputs
from letheon.eval.metrics.accuracy import Count
from letheon.eval.metrics.knn_splits import Split
from letheon.eval.search.neighbors import Proposer, nearest
from letheon.eval.search.scores import Metric

Weights = Literal["uniform", "temperature"]
Space = Literal["pooled", "logits"]
"""What an image's vector is: the pooled features, or the logits as the seed's last version has it
(a compatibility value: it moves when only the classifier's head does)."""


@dataclass(frozen=True)
class Neighbours:
    """What k-NN says of each query, for each k."""

    counts: dict[int, Count]  # k -> queries whose vote is their label
    predictions: dict[int, Tensor]  # k -> (Q,) int64
    index: Tensor  # (Q, max k) int64, positions in the database, nearest first
    recall: float = 1.0  # share of the true neighbours found; below 1 for faiss-ivf and -cagra only

    @property
    def accuracy(self) -> dict[int, float | None]:
        """The share of queries that are right, for each k."""
        return {k: count.share for k, count in self.counts.items()}


def _checked(name: str, vectors: Tensor, labels: Tensor) -> None:
    if vectors.ndim != 2 or len(vectors) != len(labels) or len(vectors) == 0:
        raise InputError(
            f"got {name} of shape {tuple(vectors.shape)} with {len(labels)} labels; "
            "expected (n, D) with n labels, n > 0"
        )
    # A sum of numbers that are not all finite is not finite, and is made much faster than a mask.
    parts = [part for part in vectors.split(8192) if not bool(part.sum().isfinite())]
    broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in parts)
    if broken:
        raise InputError(
            f"got NaN or infinite values in {broken} of {len(vectors)} rows of {name}; "
            "expected numbers; the model that made them has diverged"
        )


def _votes(labels: Tensor, similarity: Tensor, classes: int, temperature: float | None) -> Tensor:
    """(Q,) int64: the class with the largest sum, the lowest of equal ones."""
    if temperature is None:
        weights = torch.ones_like(similarity)
    else:
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    sums = similarity.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
    return sums.argmax(dim=1)


def knn(
    database: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (5,),
    metric: Metric = "cosine",
    weights: Weights = "uniform",
    temperature: float = 0.07,
    backend: Proposer = "auto",
    ranks: Ranks | None = None,
    names: tuple[str, str] = ("the database", "the queries"),
) -> Neighbours:
    """Classify each query by its nearest database rows.

    Args:
        database: (N, D) floating point, in memory of any kind.
        labels: (N,) int64, the database's classes, not negative.
        queries: (Q, D).
        query_labels: (Q,) int64.
        ks: numbers of neighbours; one search at the largest, its prefixes for the others.
        metric: cosine (a zero row is orthogonal to everything) or l2.
        weights: each neighbour's vote. temperature is exp(cos / T), for l2 exp(-d^2 / 2T), which
            is the same on unit vectors.
        temperature: T.
        backend: what proposes candidates; the answer does not depend on it, faiss-ivf and
            faiss-cagra apart.
        ranks: each rank searches its share of the database, on its device, and gets the whole
            answer; all pass the same. Default: this process alone, on the database's device.
        names: what the two sets are called in messages.

    Raises:
        InputError: values that are not finite (naming the set), k outside 1..N, T not positive.
    """
    _checked(names[0], database, labels)
    _checked(names[1], queries, query_labels)
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > len(database):
        raise InputError(
            f"got k = {', '.join(map(str, ks))} for {names[0]} of {len(database)} samples; "
            f"expected each k in 1..{len(database)}"
        )
    if weights == "temperature" and not temperature > 0:
        raise InputError(f"got temperature {temperature}; expected a number above 0")
    found = nearest(database, queries, ks[-1], metric, backend, ranks)
    classes = int(labels.max()) + 1
    voters = labels.to(found.places.device)[found.places]  # (Q, max k)
    heat = temperature if weights == "temperature" else None
    truth = query_labels.to(voters.device)
    predictions = {k: _votes(voters[:, :k], found.similarity[:, :k], classes, heat) for k in ks}
    counts = {k: Count(int((said == truth).sum()), len(truth)) for k, said in predictions.items()}
    return Neighbours(counts, predictions, found.places, found.recall)


def vectors(outputs: Outputs, space: Space = "pooled") -> Tensor:
    """(n, D) float32: what represents each image."""
    return outputs.features if space == "pooled" else outputs.logits


class Options(TypedDict, total=False):
    """The keyword arguments of `knn` that say how to search and vote."""

    ks: Sequence[int]
    metric: Metric
    weights: Weights
    temperature: float
    backend: Proposer
    ranks: Ranks | None


def domain_matrix(
    domains: Mapping[str, Outputs],
    splits: Mapping[str, Split],
    pairs: Sequence[tuple[str, str]] | None = None,
    space: Space = "pooled",
    **options: Unpack[Options],
) -> dict[tuple[str, str], Neighbours]:
    """Search each domain's database part with each domain's query part.

    Args:
        domains: name -> outputs; the classes of all must be numbered alike.
        splits: name -> split of that domain.
        pairs: (database domain, query domain) wanted; default all of them.
        space: pooled features or logits.
        **options: as in `knn`.

    Returns:
        (database domain, query domain) -> result.
    """
    wanted = pairs if pairs is not None else [(a, b) for a in domains for b in domains]
    result = {}
    for source, target in wanted:
        stored, asking = splits[source].database, splits[target].queries
        result[source, target] = knn(
            vectors(domains[source], space)[stored],
            domains[source].labels[stored],
            vectors(domains[target], space)[asking],
            domains[target].labels[asking],
            names=(f"the database part of {source}", f"the query part of {target}"),
            **options,
        )
    return result
