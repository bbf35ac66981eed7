"""SalUn: any method, allowed to move only the weights most salient for the forget set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.optimizers import MaskedSgd
from letheon.errors import InputError, RunFailed
from letheon.methods.saliency import load_masks, mask_facts, require_densities, saliency_masks
from letheon.methods.wrapper import Wrapper, WrapperState


@dataclass
class SalunState(WrapperState):
    """The mask, what it protects, and the inner method's own state, which never sees either."""

    masks: dict[str, Tensor]  # bool, by parameter name; true where a weight may move
    start: dict[str, Tensor] = rebuilt()  # every weight of the network, as it was


@dataclass(frozen=True)
class SalUn(Wrapper):
    """SalUn (Fan et al. 2024): an inner method under a saliency mask.

    A weight outside the mask is bitwise what it was, whatever the inner method does. SGD leaves it
    out of the step; after other optimizers, and after an inner method that edits weights itself,
    what moved is put back. (The published code before 2026 let weight decay and momentum leak.)
    Batch-norm's running statistics are no weights and follow the inner method, and so do parameters
    that it adds.
    """

    name: ClassVar[str] = "salun"
    definition: ClassVar[Definition] = Definition(
        alias="SalUn",
        reads="as its inner method",
        formula="as its inner method, under a saliency mask",
        cost="as its inner method, and N_f g once for the mask",
        source="Fan et al. 2024",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.1, 0.9)}
    density: float = 0.5
    """Share of all weights that may move."""
    mask: Path | None = None
    """A file of launch/mask.py; without it the mask is made here, the same way."""
    leak: bool = False
    """Compatibility: only gradients are masked, so weight decay and momentum move every weight."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and an inner method that no mask fits."""
        if not 0 < self.density <= 1:
            raise InputError(
                f"got density {self.density}; expected 0 < density <= 1", option="density"
            )
        if self.inner.replaces_head:
            raise InputError(
                f"got salun around {self.inner.name}, which replaces the head; expected a method "
                f"that a mask fits; use {self.inner.name} alone"
            )

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """The inner method's: the mask is split as the weights are."""
        return self.inner.elementwise

    def check(self, run: Run) -> None:
        """Refuse a mask file that is missing, torn, or of other weights, images or requests."""
        super().check(run)
        require_densities(run, [self.density], "density")
        self._load(run)  # a mask that is not that of the run, before it starts

    def _load(self, run: Run) -> dict[str, Tensor] | None:
        if self.mask is None:
            return None
        names = list(run.named_parameters)
        masks = load_masks(self.mask, self.density, mask_facts(run), names)
        return {name: run.own_part(mask).to(run.ranks.device) for name, mask in masks.items()}

    def prepare(self, run: Run) -> SalunState:
        """Make or load the mask, at the weights the run starts from."""
        masks = self._load(run) or saliency_masks(run, [self.density])[0]
        start = {name: weight.clone() for name, weight in run.weights.items()}
        state = SalunState(self.inner.prepare(run) or State(), masks, start)
        self._put_back(run, state)
        return state

    @property
    def _masks_step(self) -> bool:
        """True where the mask acts inside the optimizer's step."""
        own = type(self.inner).optimizer is not Method.optimizer
        return self.recipe.optimizer == "sgd" and not self.leak and not own

    def _moving(self, run: Run, state: SalunState) -> list[Tensor]:
        """One bool mask per parameter that is trained now; added parameters may move."""
        masks = []
        for name, parameter in run.named_parameters.items():
            added = torch.full_like(parameter, name.startswith("extra."), dtype=torch.bool)
            mask = state.masks.get(name, added)
            if mask.shape != parameter.shape:
                raise RunFailed(
                    f"got {name} of shape {tuple(parameter.shape)} from {self.inner.name}; "
                    f"expected {tuple(mask.shape)}, which the mask fits; use it without salun"
                )
            masks.append(mask)
        return masks

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """SGD under the mask; other optimizers are the inner method's."""
        assert isinstance(state, SalunState)
        if not self._masks_step:
            return super().optimizer(run, state, slot)
        recipe, masks = run.recipe, self._moving(run, state)
        return MaskedSgd(
            run.parameters, masks, recipe.lr, recipe.momentum, recipe.weight_decay, run.flat
        )

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Zero the gradients outside the mask, where the step itself does not."""
        assert isinstance(state, SalunState)
        super().edit_grads(run, state, phase)
        if self._masks_step:
            return
        for parameter, mask in zip(run.parameters, self._moving(run, state), strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        """Put back every weight outside the mask, where the step may have moved it."""
        assert isinstance(state, SalunState)
        super().edit_weights(run, state, phase)
        edits = type(self.inner).edit_weights is not Method.edit_weights
        if edits or not self._masks_step:
            self._put_back(run, state)

    @torch.no_grad()
    def _put_back(self, run: Run, state: SalunState) -> None:
        """Give every weight outside the mask the bits it had."""
        if self.leak:
            return
        for name, parameter in run.weights.items():
            start, mask = state.start.get(name), state.masks.get(name)
            if start is None or start.shape != parameter.shape:
                continue  # surgery: the loop refuses it unless `finish` undoes it
            parameter.copy_(start if mask is None else torch.where(mask, parameter, start))

    def finish(self, run: Run, state: State) -> None:
        """Let the inner method clean up, and hold the mask once more."""
        assert isinstance(state, SalunState)
        super().finish(run, state)
        self._put_back(run, state)
