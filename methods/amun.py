"""AMUN: fine-tune on adversarial images of the forget set, under the wrong labels they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.checkpoints.sweep_state import Rows
from letheon.engine.distributed import gather_rows
from letheon.engine.memory.products import sum_parts
from letheon.engine.memory.sample_rows import SampleRows
from letheon.engine.memory.shards import blank_batch
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.numbers.sweep import batches
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import reuse
from letheon.loaders.batch import Batch
from letheon.methods.finetune import cross_entropy
from letheon.methods.requirements import require_between, require_positive, require_samples


@dataclass
class AdversarialState(State):
    """Adversarial images of each forget sample: n of all ranks, of which each keeps its own."""

    place: Tensor  # (N,) int64, its row among those of all ranks; 0 for a retain sample
    labels: Tensor  # (n,) int64, the class it is learned under; (n, k) with k images of each
    images: SampleRows = rebuilt()  # (C, H, W) or (k, C, H, W) each, in the network's input space


def image_bytes(run: Run) -> int:
    """Count the bytes of one image as `find_images` keeps it."""
    return 3 * run.model.preset.size**2 * run.model.head.weight.element_size()


def find_images(
    run: Run,
    what: tuple[object, ...],
    search: Callable[[Batch], tuple[Tensor, Tensor]],
    copies: tuple[int, ...] = (),
) -> AdversarialState:
    """Search for images of all forget samples, each rank for its own, which it keeps.

    Runs of one call that start from the same weights and search alike share them: change none.

    Args:
        run: the run, whose model is in evaluation mode while `search` is called.
        what: the method and all that `search` depends on besides weights, samples and seed.
        search: a batch -> images (B, *copies, C, H, W) and int64 labels (B, *copies). Where the
            network is split over the ranks, each passes as often through it as the others; a rank
            that has no batch left is asked for a blank image, which is no forget sample.
        copies: how many images of each sample; nothing where it is one.
    """
    key = (*what, run.seed, run.recipe.batch_size)
    found = reuse(run, key, lambda: _search(run, f"adversarial images {key}", search, copies))
    return AdversarialState(found.place, found.labels, found.images)


def _search(
    run: Run,
    name: str,
    search: Callable[[Batch], tuple[Tensor, Tensor]],
    copies: tuple[int, ...],
) -> AdversarialState:
    model, device = run.model, run.ranks.device
    was_training = model.training
    model.eval()
    numbers = torch.empty(0, dtype=torch.int64, device=device)
    shape = (0, *copies, 3, model.preset.size, model.preset.size)
    images = torch.empty(shape, dtype=model.head.weight.dtype, device=device)
    rows = [[numbers], [numbers.new_empty((0, *copies))], [images]]
    for batch in batches(
        run, "forget", name, Rows(rows), blank=lambda net: search(blank_batch(net))
    ):
        found, labels = search(batch)
        for column, value in zip(rows, (batch.index, labels, found), strict=True):
            column.append(value)
    model.train(was_training)
    index, labels, images = (torch.cat(column) for column in rows)
    own = SampleRows.share(index, images, len(run.forget), run.ranks)
    return AdversarialState(own.place, gather_rows(labels, run.ranks), own)


def attack(net: nn.Module, images: Tensor, labels: Tensor, radius: Tensor, steps: int) -> Tensor:
    """Untargeted projected gradient ascent in an l2 ball around each image.

    Args:
        net: in evaluation mode.
        images: (B, C, H, W), what the network is given.
        labels: (B,) int64, whose cross-entropy is raised.
        radius: (B,) of each ball; a step is a tenth of it.
        steps: how many.
    """
    size = radius[:, None, None, None]

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.flatten(1), dim=1).view(x.shape)

    moved = images.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        loss = F.cross_entropy(net(moved).logits, labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, moved)
        offset = moved.detach() + unit(slope) * size / 10 - images
        length = offset.flatten(1).norm(dim=1)[:, None, None, None]
        moved = images + torch.where(length > size, offset * size / length, offset)
    return moved.detach()


@dataclass(frozen=True)
class Amun(Method):
    """AMUN: cross-entropy on all training samples and on near adversarial images of forget samples.

    For each forget sample x, x' is found by untargeted l2 projected gradient ascent on the original
    network in a ball whose radius starts at `radius` and is doubled until the network's answer y'
    is not y; then it learns D and {(x', y')} (Ebrahimpour-Boroojeny et al. 2025, "AMUN: Adversarial
    Machine UNlearning", algorithm 1). The forget samples stay in, with their true labels, as
    published. `images forget` is the variant without retain data, D_f and {(x', y')}.

    Radius 0.01, steps of a tenth of it, SGD at 0.01 for 10 epochs are published. Here distances are
    in units of the network's normalized input, and x' come in batches of their own, without
    augmentation, one beside every k-th of the others, k the number of theirs by that of the forget
    set's, rounded down: each is seen at least once an epoch, and less than twice but for rounding;
    batch-norm follows the recipe (frozen in these steps alone it collapses on the digits); the
    authors shuffle them in. An image that no ball up to the largest fools has its last x' under the
    answer it gets.
    """

    name: ClassVar[str] = "amun"
    definition: ClassVar[Definition] = Definition(
        alias="AMUN",
        reads="mixed; forget beside",
        formula="CE on all samples and on adversarial images of F under the wrong labels they get",
        cost="E (N + N_f to 2 N_f) g, up to 130 N_f g once",
        source="Ebrahimpour-Boroojeny et al. 2025, alg. 1",
    )
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    radius: float = 0.01
    """Of the first ball, in the network's input space."""
    steps: int = 10
    """Of the ascent, in each ball."""
    doublings: int = 12
    """Balls that are tried after the first."""
    images: Literal["all", "forget"] = "all"
    """What is learned beside the adversarial images."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("radius", self.radius)
        require_between("steps", self.steps, 1)
        require_between("doublings", self.doublings)

    @property
    def separates_forget(self) -> bool:  # type: ignore[override]
        """Where retain samples are read, too."""
        return self.images == "all"

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty that is read."""
        require_samples(run, self.name, retain=self.images == "all")

    def sample_bytes(self, run: Run) -> int:
        """An image."""
        return image_bytes(run)

    def prepare(self, run: Run) -> AdversarialState:
        """Find the adversarial images, each rank those of its samples."""
        what = (self.name, self.radius, self.steps, self.doublings)
        return find_images(run, what, lambda batch: self._fool(run, batch))

    def _fool(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images that the network takes for another class, and for which."""
        model, images = run.model, batch.images.clone()
        radius = torch.full((len(images),), self.radius, dtype=images.dtype, device=images.device)
        found = ~batch.forget  # none yet; nothing is sought for a blank image
        for _ in range(self.doublings + 1):
            tried = attack(model, batch.images, batch.labels, radius, self.steps)
            images = torch.where(found[:, None, None, None], images, tried)
            with torch.no_grad():
                found |= model(images).logits.argmax(dim=1) != batch.labels
            if not int(sum_parts(run, (~found).sum())):  # on no rank whose passes must be as many
                break
            radius = torch.where(found, radius, radius * 2)
        with torch.no_grad():
            return images, model(images).logits.argmax(dim=1)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """All samples, or the forget set; beside them the adversarial images."""
        assert isinstance(state, AdversarialState)
        place, labels = state.place, state.labels

        def mislead(net: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(net(batch.rows).logits, labels[place[batch.index]])

        adversarial = Phase("adversarial", "forget", mislead, rows=state.images)
        if self.images == "forget":
            adversarial = replace(adversarial, batch_norm="frozen")
            return [Phase("forget", "forget", cross_entropy, "frozen", beside=adversarial)]
        every = max(1, run.loader.steps("mixed") // run.loader.steps("forget"))
        return [Phase("all", "mixed", cross_entropy, beside=adversarial, every=every)]
