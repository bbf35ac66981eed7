"""The features of the forgotten classes as points in the plane, to be looked at, not scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from letheon.errors import NotMeasurable
from letheon.eval.checks import Ints, Numbers, classes, matrix
from letheon.eval.metrics.registry import metric
from letheon.kernels.keyed import hash_keys

if TYPE_CHECKING:
    from letheon.eval.case import Case


_POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_SCHEMA = {
    "type": "object",
    "required": ["points", "labels"],
    "properties": {
        "points": {"type": "array", "items": _POINT},
        "labels": {"type": "array", "items": {"type": "integer", "minimum": -1}},
    },
}


def _first(rows: np.ndarray[Any, np.dtype[np.int64]], most: int, seed: int) -> Any:
    """At most `most` of the positions, the same ones for every model that has these rows."""
    keys = hash_keys(seed, "embedding", 0, torch.from_numpy(rows), 1)[:, 0].numpy()
    return rows[np.argsort(keys, kind="stable")[:most]]


def _sample_sides(truth: Ints, forgotten: Ints, most: int, seed: int) -> Any:
    """Increasing positions of at most `most` forgotten samples and as many others."""
    gone = np.isin(truth, forgotten)
    sides = [_first(np.flatnonzero(side), most, seed) for side in (gone, ~gone)]
    return np.sort(np.concatenate(sides))


def embed(
    features: Numbers, labels: Numbers, forgotten: Numbers, *, most: int = 300, seed: int = 0
) -> dict[str, list[Any]]:
    """Embed by t-SNE (van der Maaten and Hinton 2008) of forgotten samples among others.

    Each model is embedded by itself, from a PCA start, so positions of two models cannot be
    compared; whether the forgotten classes still stand apart can. Distances between clusters and
    their sizes mean nothing.

    Args:
        features: (n, D) of held-out samples.
        labels: (n,) their classes.
        forgotten: (k,) class numbers.
        most: forgotten samples, and as many others.
        seed: of the choice and of t-SNE.

    Returns:
        {"points": (m, 2) list, "labels": (m,) class numbers, -1 for the others}, as a report's row
        takes it under "embedding".

    Raises:
        NotMeasurable: fewer than four samples in all.
        RunFailed: NaN or infinity.
    """
    from sklearn.decomposition import PCA  # here: a second to import
    from sklearn.manifold import TSNE

    table = matrix(features, "features")
    truth = classes(labels, "labels", len(table))
    sample = _sample_sides(truth, classes(forgotten, "forgotten classes"), most, seed)
    gone = np.isin(truth[sample], classes(forgotten, "forgotten classes"))
    if len(sample) < 4:
        raise NotMeasurable(f"got {len(sample)} samples to embed; expected at least 4")
    part = table[sample]
    if min(part.shape) > 50:
        part = PCA(50, random_state=seed).fit_transform(part)
    perplexity = min(30.0, (len(sample) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="random" if part.shape[1] < 2 else "pca",
                 random_state=seed)  # fmt: skip
    points = plane.fit_transform(part)
    shown = np.where(gone, truth[sample], -1)
    return {"points": np.round(points.astype(float), 3).tolist(), "labels": shown.tolist()}


_MOST = 300  # forgotten test images, and as many others


def _embedding_rows(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of the test images to embed, on every rank."""
    test, forgotten = case.test, np.asarray(case.peers.forgotten, dtype=np.int64)
    truth = test.gather(test.labels)
    places = torch.from_numpy(_sample_sides(truth.numpy(), forgotten, _MOST, 0))
    return test.gather(test.features[test.local_rows(places)]), truth[places]


@metric(
    "embedding", title="t-SNE of the forgotten classes", group="Representation and probes",
    unit="table", needs=("whole classes", "depth full"), place=26, schema=_SCHEMA,
    source="van der Maaten and Hinton 2008", gathers=_embedding_rows,
)  # fmt: skip
def embedding(case: Case) -> dict[str, Any]:
    """Test features of the forgotten classes among others as points in the plane, to be looked at;
    each model is embedded by itself.
    """
    forgotten = torch.tensor(case.peers.forgotten, dtype=torch.int64)
    features, labels = case.once(_embedding_rows)
    return embed(features, labels, forgotten, most=_MOST, seed=0)
