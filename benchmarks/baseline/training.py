"""The baseline's methods: FT, GA, SalUn (random label) and SPKD, one step at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from baseline.data import Images, Loaded
from baseline.evaluation import accuracy
from baseline.kernels import Masks, masked_step, similarity, top_masks
from baseline.model import Hook, Normalized
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Reads
from letheon.spans import span, waits

Name = Literal["ft", "ga", "salun", "spkd"]
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, logits, labels -> loss


@dataclass
class Training:
    """What all passes of one run share."""

    model: Normalized
    images: Images
    epochs: int
    lr: float
    batch_size: int
    seed: int
    device: torch.device
    density: float = 0.5
    ce_weight: float = 10.0
    sp_weight: float = 30_000.0
    squared: bool = True
    validate: bool = True
    out: Path | None = None

    def __post_init__(self) -> None:
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.masks: Masks | None = None
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.lr, momentum=0.9, weight_decay=5e-4
        )

    def one_pass(
        self,
        reads: Reads,
        epoch: int,
        criterion: Criterion,
        labels: NDArray[np.int64],
        fixed: bool = False,
    ) -> float:
        """One epoch over one set, with `fixed` batch-norm or that of training; the mean loss.

        Two host syncs a step, as published.
        """
        self.model.train()
        if fixed:
            for layer in self.model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        loader = self.images.batches(reads, self.batch_size, self.seed, epoch, labels)
        loss_sum = right = seen = 0.0
        for images, target in waits("data", loader):
            images, target = images.to(self.device), target.to(self.device)
            logits = self.model(images)
            loss = criterion(images, logits, target)
            self.optimizer.zero_grad()
            loss.backward()
            if self.masks is None:
                self.optimizer.step()
            else:
                masked_step(self.model, self.masks, self.start, self.optimizer)
            loss_sum += loss.item() * len(target)
            right += (logits.argmax(1) == target).float().mean().item() * len(target)
            seen += len(target)
        return loss_sum / seen

    def after_epoch(self, epoch: int) -> None:
        """Save the whole state and measure accuracy on all four sets, as published."""
        if self.out is not None:
            with span("saving"):
                folder = self.out / str(epoch)
                folder.mkdir(parents=True, exist_ok=True)
                save_file(self.model.net.state_dict(), folder / "weights.safetensors")
        if self.validate:
            with span("validation", whole=True):
                for data in self.images.parts().values():
                    loader = self.images.in_order(data, self.batch_size)
                    accuracy(self.model, loader, self.device)


def saliency(run: Training) -> Masks:
    """The weights with the largest summed gradient on the forget set, by two sorts of all of them.

    Fixed: the gradient is summed over samples under the test transform, and the mask has exactly
    round(density * N) ones. One density; the published script sorts twenty times for its ten.
    """
    run.model.eval()
    run.model.zero_grad()
    sums = {n: torch.zeros_like(p) for n, p in run.model.named_parameters()}
    loader: Loaded = run.images.in_order(run.images.parts()["FA"], run.batch_size)
    for images, target in waits("data", loader):
        images, target = images.to(run.device), target.to(run.device)
        loss = -F.cross_entropy(run.model(images), target)
        run.optimizer.zero_grad()
        loss.backward()
        for name, parameter in run.model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.detach() * len(target)
    run.optimizer.zero_grad()
    with span("statistics"):
        masks = top_masks(list(sums.values()), run.density)
    return dict(zip(sums, masks, strict=True))


def _cross_entropy(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def _ascent(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels)


def random_labels(images: Images, seed: int, epoch: int) -> NDArray[np.int64]:
    """(N,) the labels with those of the forget set drawn anew among the other classes.

    The draws are our keyed ones, so that both sides learn the same labels.
    """
    labels = images.labels.copy()
    chosen = np.flatnonzero(images.forget)
    u = uniform(seed, "random-label", epoch, torch.from_numpy(chosen), 1)[:, 0].numpy()
    others = [np.delete(np.arange(len(images.train.classes)), y) for y in labels[chosen]]
    labels[chosen] = [other[int(v * len(other))] for other, v in zip(others, u, strict=True)]
    return labels


def forget(method: Name, run: Training) -> None:
    """Train `run.model` in place."""
    true = run.images.labels
    with span("compute"):
        if method == "salun":
            run.masks = saliency(run)
        teacher = copy.deepcopy(run.model).eval()
        hooks = [Hook(run.model), Hook(teacher)] if method == "spkd" else []

        def restore(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
            student, original = hooks
            with torch.no_grad():
                teacher(images)
            sp = similarity(student.features, original.features, run.squared)
            return run.ce_weight * F.cross_entropy(logits, labels) + run.sp_weight * sp

        for epoch in range(run.epochs):
            if method in ("ga", "spkd"):
                # GA reads nothing else, whose running statistics would become the forget set's.
                run.one_pass("forget", epoch, _ascent, true, fixed=method == "ga")
            if method == "ft":
                run.one_pass("retain", epoch, _cross_entropy, true)
            if method == "salun":
                labels = random_labels(run.images, run.seed, epoch)
                run.one_pass("mixed", epoch, _cross_entropy, labels)
            if method == "spkd":
                run.one_pass("retain", epoch, restore, true)
            run.after_epoch(epoch)
        for hook in hooks:
            hook.remove()
    run.model.eval()
