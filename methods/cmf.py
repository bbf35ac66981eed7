"""CMF: fine-tune the encoder under a head that is made of the retained classes' mean features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Accuracies, Decision, Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import class_moments
from letheon.loaders.batch import Batch
from letheon.methods.requirements import require_encoder, require_positive, require_samples


@dataclass
class CmfState(State):
    """The head of the epoch."""

    directions: Tensor  # (C, D) unit length, in the type of the weights; 0 for a forgotten class


def mean_directions(run: Run) -> tuple[Tensor, Tensor]:
    """Directions of the mean features of the classes over the retain set, and the features' length.

    Returns:
        (C, D) float64 rows of length one, 0 for a class without a retain sample; and 0-dim float64,
        the root of the mean squared length of a retain sample's features.
    """
    count, mean, variance = class_moments(run, "retain")
    squares = (variance + mean.square()).sum(dim=1)  # (C,) mean squared length in each class
    return F.normalize(mean, dim=1), ((count * squares).sum() / count.sum()).sqrt()


@dataclass(frozen=True)
class Cmf(Method):
    """CMF: descend CE(scale cos(f(x), mu)) on R, mu_c the mean feature of class c over R.

    The head has no weights of its own: its rows are the directions of the retained classes' mean
    features, taken before every epoch and held through it, so that features and head cannot come
    apart; a class that is forgotten as a whole has a row of zeros. At the end the network's own
    last layer gets these rows, times scale over the root mean squared length of the retain
    features, and no bias: its best class is that of the cosines (Gao et al. 2026, "An Illusion of
    Unlearning? Assessing Machine Unlearning Through Internal Representations").

    Our reading: no full text and no code of the authors' could be had. A port recomputes the means
    over all training images, the forget set among them, and looks at test accuracy each epoch; an
    earlier form of it averages them over the steps. Rate 1e-3 and scale 1 are the port's, the
    epochs are fine-tuning's. Reads R once more an epoch, without gradients.
    """

    name: ClassVar[str] = "cmf"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="CMF",
        reads="retain",
        formula="CE of cosines of f to the retained classes' mean features, the head of the "
        "end; our reading",
        cost="E N_r g, (E + 1) N_r l",
        source="Gao et al. 2026",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"scale": (1.0, 64.0)}
    reads_accuracies: ClassVar[Literal["all", "forget", "none"]] = "none"
    replaces_head: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=10, lr=1e-3)
    scale: float = 1.0
    """Factor of the cosines: an inverse temperature."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("scale", self.scale)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves no retain sample, and a network of a head alone."""
        require_samples(run, self.name, forget=False)
        require_encoder(run, self.name)

    def prepare(self, run: Run) -> CmfState:
        """Find the first directions; the network's own head rests."""
        run.model.head.requires_grad_(False)
        return CmfState(mean_directions(run)[0].to(run.model.head.weight.dtype))

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        assert isinstance(state, CmfState)
        directions = state.directions

        def align(net: nn.Module, batch: Batch) -> Tensor:
            features = net(batch.images).features.to(directions.dtype)
            with torch.autocast(features.device.type, enabled=False):
                cosines = F.normalize(features, dim=1) @ directions.T  # (B, C)
                return F.cross_entropy(self.scale * cosines, batch.labels)

        return [Phase("align", "retain", align)]

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """Turn the head to where the features are now."""
        assert isinstance(state, CmfState)
        if run.epoch_number + 1 < run.recipe.epochs:
            state.directions.copy_(mean_directions(run)[0])
        return "go on"

    def finish(self, run: Run, state: State) -> None:
        """Write the last directions into the network's own head."""
        directions, length = mean_directions(run)
        head = run.model.head
        with torch.no_grad():
            rows = directions * (self.scale / length.clamp(min=1e-12))
            run.own_parameter(head.weight).copy_(run.own_part(rows))
            if head.bias is not None:
                run.own_parameter(head.bias).zero_()
        head.requires_grad_(True)
