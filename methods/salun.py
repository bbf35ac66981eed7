"""SalUn: any method, allowed to move only the weights most salient for the forget set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.gradients import summed_gradients
from letheon.engine.method import Method, Phase, Run
from letheon.engine.optimizers import MaskedSgd
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.kernels.threshold import top_masks
from letheon.methods.grad_ascent import ascent
from letheon.methods.mask_file import load_masks


def saliency_masks(run: Run, densities: Sequence[float]) -> list[list[Tensor]]:
    """For each density one bool mask per trainable parameter, equal on every rank.

    Saliency is the size of the summed, signed gradient of the forget set's loss at the trained
    weights (Fan et al. 2024, eq. 3): the gradient of each sample is added with its sign and the
    absolute value is taken once, at the end. All parameters are ranked together, and exactly
    round(density * N) of them may move.
    """
    return top_masks(summed_gradients(run, "forget", ascent), densities)


@dataclass(frozen=True)
class SalUn(Method):
    """SalUn (Fan et al. 2024): an inner method under a saliency mask.

    A weight outside the mask is bitwise what it was. SGD leaves it out of the step; after other
    optimisers, what weight decay or momentum moved is put back. (The published code before 2026
    let both leak.) Batch-norm's running statistics are no weights and follow the inner method.
    """

    inner: Method
    """The method under the mask: any that wraps none itself."""
    density: float = 0.5
    """Share of all weights that may move."""
    mask: Path | None = None
    """A file of launch/mask.py; without it the mask is made here, the same way."""
    leak: bool = False
    """Compatibility: only gradients are masked, so weight decay and momentum move every weight."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.density <= 1:
            raise InputError(f"got density {self.density}; expected 0 < density <= 1")

    @property
    def recipe(self) -> Recipe:  # type: ignore[override]
        """The inner method's."""
        return self.inner.recipe

    def check(self, run: Run) -> None:
        """Refuse a mask file that is missing, torn or of other weights."""
        self.inner.check(run)
        self._loaded(run)

    def _loaded(self, run: Run) -> list[Tensor] | None:
        """The masks of the file, where one is given."""
        if self.mask is None:
            return None
        names = [n for n, p in run.model.net.named_parameters() if p.requires_grad]
        masks = load_masks(self.mask, self.density, weights_digest(run.model), names)
        return [mask.to(run.ranks.device) for mask in masks]

    def prepare(self, run: Run) -> None:
        """Make or load the mask, at the weights the run starts from."""
        run.state["mask"] = self._loaded(run) or saliency_masks(run, [self.density])[0]
        if self._puts_back():
            run.state["start"] = [parameter.detach().clone() for parameter in run.parameters]
        self.inner.prepare(run)

    def epoch(self, run: Run, number: int) -> Sequence[Phase]:
        """The inner method's passes."""
        return self.inner.epoch(run, number)

    def _in_one_pass(self) -> bool:
        """True where the mask acts inside the step."""
        own = type(self.inner).optimiser is not Method.optimiser
        return self.recipe.optimizer == "sgd" and not self.leak and not own

    def _puts_back(self) -> bool:
        """True where something beside the masked step may move a weight."""
        edits = type(self.inner).edit_weights is not Method.edit_weights
        return not self.leak and (edits or not self._in_one_pass())

    def optimiser(self, run: Run) -> torch.optim.Optimizer:
        """SGD under the mask; other optimisers are the inner method's."""
        if not self._in_one_pass():
            return self.inner.optimiser(run)
        recipe = run.recipe
        return MaskedSgd(
            run.parameters, run.state["mask"], recipe.lr, recipe.momentum, recipe.weight_decay,
            run.flat,
        )  # fmt: skip

    def edit_grads(self, run: Run) -> None:
        """Zero the gradients outside the mask, where the step itself does not."""
        self.inner.edit_grads(run)
        if self._in_one_pass():
            return
        for parameter, mask in zip(run.parameters, run.state["mask"], strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def edit_weights(self, run: Run) -> None:
        """Put back every weight outside the mask, where the step may have moved it."""
        self.inner.edit_weights(run)
        if not self._puts_back():
            return
        groups = zip(run.parameters, run.state["mask"], run.state["start"], strict=True)
        for parameter, mask, start in groups:
            parameter.copy_(torch.where(mask, parameter, start))

    def finish(self, run: Run) -> None:
        """The inner method's."""
        self.inner.finish(run)
