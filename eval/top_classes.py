"""Rankings by the original network that forget requests name: nearest classes, hardest samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.checkpoints.sweep_state import Rows, Sweeps
from letheon.engine.distributed import Ranks, gather_rows
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.eval.inference.extract import evaluation_mode
from letheon.loaders.batch import Batch, Loader
from letheon.loaders.order import share

BATCH = 256
"""Images that the network is shown at once, whatever the number of ranks."""


@dataclass(frozen=True)
class Ranker:
    """Shows images to the original network: whole batches on each rank, so that no answer depends
    on how many there are. Every rank must call, and gets the same."""  # noqa: D205, D209

    model: Classifier  # on the ranks' device
    ranks: Ranks
    sweeps: Sweeps | None = None
    """Saves the passes; None does not."""

    def rank_classes(self, domains: Sequence[tuple[Loader, int]]) -> list[int]:
        """Rank upstream class ids by how near a downstream set they are, each once.

        For every downstream class the network's mean softmax over that class's images ranks the
        upstream classes. First come the best of each downstream class, by how strongly it is
        predicted, then the second choices, and so on. (The published "top" lists look made like
        this, but their recipe is not published: this is our reading.)

        Args:
            domains: a loader of each downstream domain, with batches of `BATCH` on one rank, and
                the number of its images; the domains share their classes.
        """
        shares, labels = [], []  # (n, C), (n,)
        for number, (loader, count) in enumerate(domains):
            logits = torch.empty(0, self.model.head.out_features)
            columns = [logits], [torch.empty(0, dtype=torch.int64)]
            name = f"answers to domain {number}"
            rows = self._collect(loader, count, name, columns, lambda logits, own: (logits, own))
            shares.append(F.softmax(rows[0].double(), dim=1))
            labels.append(rows[1])
        each, own = torch.cat(shares), torch.cat(labels)
        means = torch.stack([each[own == c].mean(0) for c in own.unique()])
        order = means.argsort(dim=1, descending=True, stable=True)  # (downstream, C)
        ranking: dict[int, None] = {}
        for choice in range(order.shape[1]):
            best = order[:, choice]  # (downstream,)
            strength: Tensor = means.gather(1, best[:, None])[:, 0]
            for row in strength.argsort(descending=True, stable=True).tolist():
                ranking.setdefault(int(best[row]))
        return list(ranking)

    def rank_samples(self, loader: Loader, count: int, score: str) -> list[int]:
        """Rank sample numbers by how hard the network finds them, the hardest first.

        Ties go by number. (Worst-case forget sets by loss: Fan et al. 2024, "Challenging forgets",
        who search for theirs; a ranking by the original is the simple form.)

        Args:
            loader: of the training images, with batches of `BATCH` on one rank.
            count: their number.
            score: ``loss``, the cross-entropy of the label, highest first; or ``confidence``, the
                probability of the network's own answer, lowest first.
        """

        def rate(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            if score == "loss":
                return (F.cross_entropy(logits.double(), labels, reduction="none"),)  # (b,)
            return (-F.softmax(logits.double(), dim=1).amax(1),)

        column = [torch.empty(0, dtype=torch.float64)]
        (hardness,) = self._collect(loader, count, f"hardness by {score}", (column,), rate)
        return hardness.argsort(descending=True, stable=True).tolist()

    @torch.no_grad()
    def _collect(
        self,
        loader: Loader,
        count: int,
        name: str,
        columns: Sequence[list[Tensor]],
        compute: Callable[[Tensor, Tensor], Sequence[Tensor]],
    ) -> list[Tensor]:
        """Gather what `compute` makes of the logits and labels of each image, in their order.

        `columns` begin with an empty tensor each, and hold this rank's rows, on the host.
        """
        ranks, model = self.ranks, self.model
        blocks = -(-count // BATCH)
        mine = share(blocks, ranks.rank, ranks.world)
        indices = [*range(mine.start * BATCH, min(mine.stop * BATCH, count))]

        def read(skip: int) -> Iterator[Batch]:
            return loader.sweep(indices, skip) if indices[skip * BATCH :] else iter(())

        if self.sweeps is None:
            batches = read(0)
        else:
            known = (name, weights_digest(model), model.preset, count)
            whole = hashlib.sha256(repr(known).encode()).hexdigest()
            batches = self.sweeps.watch(whole, Rows(columns), read, -(-blocks // ranks.world))
        precision = Precision("fp32").resolve(ranks.device)
        with evaluation_mode(model):
            for batch in batches:
                on_device = batch.to(ranks.device)
                with precision.autocast(ranks.device):
                    logits = model(on_device.images).logits.float()
                for column, values in zip(
                    columns, compute(logits.cpu(), batch.labels.cpu()), strict=True
                ):
                    column.append(values)
        device = ranks.device
        return [gather_rows(torch.cat(column).to(device), ranks).cpu() for column in columns]
