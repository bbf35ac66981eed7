"""L2UL: climb the loss of forget samples, held by adversarial images of them and by importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.memory.products import extremes
from letheon.engine.method import Definition, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import absolute_gradient_sum
from letheon.errors import InputError
from letheon.kernels.keyed import normal, uniform
from letheon.loaders.batch import Batch
from letheon.methods.amun import AdversarialState, find_images, image_bytes
from letheon.methods.distillation import in_fp32
from letheon.methods.paired import UntilForgotten
from letheon.methods.random_label import draw_labels
from letheon.methods.requirements import require_between, require_positive, require_samples


@dataclass
class L2ulState(AdversarialState):
    """The adversarial images, and how each weight is held."""

    pull: list[Tensor] = rebuilt()  # by parameter: 0 for its most important weight, 1 for the least
    start: list[Tensor] = rebuilt()  # by parameter, the weights that the run started from


def logit_length(net: nn.Module, batch: Batch) -> Tensor:
    """Mean l2 norm of the logits: a sensitivity that needs no label (Aljundi et al. 2018)."""
    logits: Tensor = in_fp32(net(batch.images).logits)
    return torch.linalg.vector_norm(logits, dim=1).mean()


def spread_out(importance: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """One minus the importances of a tensor, brought to 0 to 1; 1 where all are the same."""
    return 1 - (importance - lowest) / (highest - lowest).clamp(min=1e-30)


@dataclass(frozen=True)
class L2ul(UntilForgotten):
    """L2UL: descend -CE(F) and CE of targeted adversarial images of F; R is never read.

    Beside each forget sample come `beside` of its `images` adversarial images x_k, each under the
    wrong class it was made for; a step descends the mean of -CE(x, y) and all CE(x_k, y_k), plus
    weight / 2 sum_i (1 - Omega_i) (w_i - w_original_i)^2. Omega is the mean absolute gradient of
    the length of the logits over F, brought to 0 to 1 in each tensor. Ends once no forget sample is
    right (Cha et al. 2024, "Learning to Unlearn: Instance-Wise Unlearning for Pre-Trained
    Classifiers").

    x_k is found by targeted l2 projected gradient descent on the original network, from a random
    place in the ball; distances are in pixels from 0 to 1, and x_k is not clipped to these.
    Published for ResNet-18 on CIFAR-10: 20 images, for CIFAR-100 and ImageNet 200; radius 4, 100
    steps of 0.1, 32 forget and 256 adversarial images a step, SGD at 1e-3 with decay 1e-4, weight
    1. Their code looks at the forget accuracy after each step, here after each epoch; takes Omega
    of batch means in training mode (`importance batch` is of batch means, too); and draws its
    wrong classes again from only one class where the first draw was right. They run the two kinds
    of images through the network one after the other, each with batch statistics of its own where
    batch-norm is not frozen, read 256 adversarial images beside fewer forget samples, too, and
    train without augmentation: here x is augmented as in training and x_k is not, all go through
    at once, and 100 epochs are fewer passes over the adversarial images. The term of the weights
    enters as its gradient: the recorded loss is without it. A rank holds `images` images of each
    forget sample of its share.
    """

    name: ClassVar[str] = "l2ul"
    definition: ClassVar[Definition] = Definition(
        alias="L2UL",
        reads="forget",
        formula="-CE(F) + CE of targeted adversarial images of F, and (1 - Omega) (w - w_o)^2",
        cost="E N_f 9 g, N_f l an epoch, 2000 N_f g once",
        source="Cha et al. 2024",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"weight": (0.1, 100.0)}
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=100, lr=1e-3, batch_size=32, weight_decay=1e-4)
    images: int = 20
    """Adversarial images of each forget sample."""
    beside: int = 8
    """How many of them are read beside it in an epoch, the next ones in the next; at most all."""
    radius: float = 4.0
    """Of the ball around an image, as the l2 norm of the change of pixels from 0 to 1."""
    step: float = 0.1
    """Length of a step of the attack, the same unit."""
    steps: int = 100
    """Of the attack."""
    weight: float = 1.0
    """lambda, of the distance to the original weights; 0: these are free."""
    importance: Literal["sample", "batch"] = "sample"
    """sample: of each sample's own gradient; batch: of the mean gradient of a batch."""
    until: float = 1e-6
    """Forget accuracy, a fraction, below which the training ends: none is right; 0: never."""
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm while only forget samples are read; the published code has `recipe`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for option in ("images", "beside", "steps"):
            require_between(option, getattr(self, option), 1)
        for option in ("radius", "step"):
            require_positive(option, getattr(self, option))
        require_between("weight", self.weight)
        require_between("until", self.until, 0, 1)
        if self.beside > self.images:
            raise InputError(
                f"got beside {self.beside} of {self.images} images; expected at most all of them; "
                "raise images or lower beside",
                option="beside",
            )

    def check(self, run: Run) -> None:
        """Refuse a request without a forget sample."""
        require_samples(run, self.name, retain=False)

    def sample_bytes(self, run: Run) -> int:
        """All its images."""
        return self.images * image_bytes(run)

    def prepare(self, run: Run) -> L2ulState:
        """Find the adversarial images and the importances, by the original network."""
        sums = absolute_gradient_sum(run, "forget", logit_length, self.importance)
        what = (self.name, self.images, self.radius, self.step, self.steps)
        found = find_images(run, what, lambda batch: self._mislead(run, batch), (self.images,))
        ends = zip(*extremes(run, sums), strict=True)
        pull = [spread_out(total, *pair) for total, pair in zip(sums, ends, strict=True)]
        start = [parameter.detach().clone() for parameter in run.parameters]
        return L2ulState(found.place, found.labels, found.images, pull, start)

    def _mislead(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, images, C, H, W) near each sample's that are taken for other classes."""
        classes = torch.arange(run.model.classes, device=batch.labels.device)
        images, labels = [], []
        for number in range(self.images):
            copy = torch.full((), number, device=classes.device)  # a copy of it would wait
            goal = draw_labels(batch, classes, "other", run.seed, copy)
            images.append(self._attack(run, batch, goal, number))
            labels.append(goal)
        return torch.stack(images, dim=1), torch.stack(labels, dim=1)

    def _attack(self, run: Run, batch: Batch, goal: Tensor, number: int) -> Tensor:
        """Descend CE(x + d, goal) over d in the ball, by steps of one length."""
        images, size = batch.images, batch.images[0].numel()
        unit = 1 / images.new_tensor(run.model.preset.std)[:, None, None]  # of a pixel, normalized
        draws = normal(run.seed, "l2ul", number, batch.index, size)
        length = uniform(run.seed, "l2ul-length", number, batch.index, 1)
        offset = (F.normalize(draws, dim=1) * self.radius * length).to(images.dtype)
        for _ in range(self.steps):
            offset.requires_grad_(True)
            logits = run.model(images + offset.view(images.shape) * unit).logits
            loss = F.cross_entropy(logits, goal, reduction="sum")
            (slope,) = torch.autograd.grad(loss, offset)
            offset = offset.detach() - self.step * F.normalize(slope, dim=1)
            offset = offset * (self.radius / offset.norm(dim=1, keepdim=True)).clamp(max=1)
        return images + offset.view(images.shape) * unit

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        assert isinstance(state, L2ulState)
        place, labels, now = state.place, state.labels, run.epoch
        turn = torch.arange(self.beside, device=place.device)
        images = state.images.of_columns((epoch * self.beside + turn) % self.images)

        def mislead(net: nn.Module, batch: Batch) -> Tensor:
            rows = place[batch.index][None]  # (1, B)
            copies = (now * self.beside + turn)[:, None] % self.images  # (beside, 1)
            assert batch.rows is not None  # (B, beside, C, H, W)
            others = batch.rows.transpose(0, 1).flatten(0, 1)  # (beside * B, ...): batch by batch
            count = len(batch.labels)
            logits = net(torch.cat([batch.images, others.to(batch.images.dtype)])).logits
            losses = F.cross_entropy(
                logits, torch.cat([batch.labels, labels[rows, copies].flatten()]), reduction="none"
            )
            climb, hold = losses.split([count, count * self.beside])
            return (hold.sum() - climb.sum()) / len(losses)

        return [Phase("mislead", "forget", mislead, self.forget_batch_norm, rows=images)]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Add the gradient of the distance to the original weights; the same on every rank."""
        assert isinstance(state, L2ulState)
        for parameter, start, pull in zip(run.parameters, state.start, state.pull, strict=True):
            if parameter.grad is not None:
                parameter.grad += self.weight * pull * (parameter.detach() - start)
