"""Rankings by the original network that forget requests name: nearest classes, hardest samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.checkpoints.sweep_state import Rows, Sums, Sweeps
from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.eval.inference.extract import evaluation_mode
from letheon.loaders.batch import Batch, Loader
from letheon.loaders.order import share
from letheon.progress import Line

BATCH = 256
"""Images that the network is shown at once, whatever the number of ranks."""
_UNIT = 2.0**40  # probabilities are added as whole numbers, so that no order of a sum matters


@dataclass(frozen=True)
class Ranker:
    """Shows images to the original network: whole batches on each rank, so that no answer depends
    on how many there are. Every rank must call, and gets the same."""  # noqa: D205, D209

    model: Classifier  # on the ranks' device
    ranks: Ranks
    sweeps: Sweeps | None = None
    """Saves the passes; None does not."""

    def rank_classes(self, domains: Sequence[tuple[Loader, int, int]]) -> list[int]:
        """Rank upstream class ids by how near a downstream set they are, each once.

        For every downstream class the network's mean softmax over that class's images ranks the
        upstream classes. First come the best of each downstream class, by how strongly it is
        predicted, then the second choices, and so on. (The published "top" lists look made like
        this, but their recipe is not published: this is our reading.)

        Args:
            domains: a loader of each downstream domain, with batches of `BATCH` on one rank, the
                number of its images and that of its classes; the domains share their classes.
        """
        kinds = max(images for _, _, images in domains)
        sums = torch.zeros(kinds, self.model.head.out_features, dtype=torch.int64)
        counts = torch.zeros(kinds, dtype=torch.int64)

        def add(logits: Tensor, labels: Tensor) -> None:
            shares = (F.softmax(logits.double(), dim=1) * _UNIT).round().to(torch.int64)  # (b, C)
            sums.index_add_(0, labels, shares)
            counts.add_(torch.bincount(labels, minlength=kinds))

        for number, (loader, count, _) in enumerate(domains):
            self._read(loader, count, f"answers to domain {number}", Sums(sums, counts), add)
        device = self.ranks.device
        totals = [sums.to(device), counts.to(device)]
        sum_over_ranks(totals, self.ranks)
        sums, counts = (total.cpu() for total in totals)
        means = sums[counts > 0] / _UNIT / counts[counts > 0, None]  # (downstream, C) float64
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
        hardness = [torch.empty(0, dtype=torch.float64)]

        def rate(logits: Tensor, labels: Tensor) -> None:
            if score == "loss":
                hardness.append(F.cross_entropy(logits.double(), labels, reduction="none"))
            else:
                hardness.append(-F.softmax(logits.double(), dim=1).amax(1))

        self._read(loader, count, f"hardness by {score}", Rows([hardness]), rate)
        whole = gather_rows(torch.cat(hardness).to(self.ranks.device), self.ranks).cpu()
        return whole.argsort(descending=True, stable=True).tolist()

    @torch.no_grad()
    def _read(
        self,
        loader: Loader,
        count: int,
        name: str,
        sums: Sums,
        add: Callable[[Tensor, Tensor], None],
    ) -> None:
        """Give `add` the logits and labels of this rank's images, on the host, in their order.

        `sums` are what it adds to, saved and restored by `name`.
        """
        ranks, model = self.ranks, self.model
        blocks = -(-count // BATCH)
        mine = share(blocks, ranks.rank, ranks.world)
        indices = [*range(mine.start * BATCH, min(mine.stop * BATCH, count))]

        first = [0]

        def read(skip: int) -> Iterator[Batch]:
            first[0] = skip
            return loader.sweep(indices, skip) if indices[skip * BATCH :] else iter(())

        if self.sweeps is None:
            batches = read(0)
        else:
            known = (name, weights_digest(model), model.preset, count)
            whole = hashlib.sha256(repr(known).encode()).hexdigest()
            batches = self.sweeps.watch(whole, sums, read, -(-blocks // ranks.world))
        precision = Precision("fp32").resolve(ranks.device)
        line = Line(f"rank by {name}", -(-len(indices) // BATCH), ranks.main)
        with evaluation_mode(model):
            for number, batch in enumerate(line.wait_for(batches)):
                if number == 0:
                    line.skip(first[0])
                on_device = batch.to(ranks.device)
                with precision.autocast(ranks.device):
                    logits = model(on_device.images).logits.float()
                add(logits.cpu(), batch.labels.cpu())
                line.advance(1, len(batch.labels) * ranks.world)
        line.close()
