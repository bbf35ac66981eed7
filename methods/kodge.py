"""Kodge's projection: take out of each layer the space that only the forget set uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import input_covariances, reads_rows
from letheon.errors import InputError
from letheon.methods.requirements import require_between, require_positive, require_samples


def scaled_projection(covariance: Tensor, alpha: float) -> Tensor:
    """U diag(a r / ((a - 1) r + 1)) U^T (D, D) of a covariance with eigenvectors U and shares r.

    The eigenvalues of the sum of x x^T are the squared singular values of the inputs; r are their
    shares of the whole.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors * (alpha * shares / ((alpha - 1) * shares + 1))) @ vectors.T


@dataclass(frozen=True)
class Kodge(Method):
    """SVD unlearning: project every layer's input off the directions of the forget set alone.

    For each linear and ungrouped convolution layer, M_f and M_r are scaled projections onto the
    inputs (patches) it is given for forget and retain samples: the directions of their singular
    value decomposition, weighed by a r / ((a - 1) r + 1), r the share of the energy. Its weight
    becomes W (I - (I - M_r) M_f), so that of an input only what retain samples do not use is taken
    away (Kodge, Saha and Roy 2024, "Deep Unlearning: Fast and Efficient Gradient-free Class
    Forgetting").

    alpha_r 100 and 3 to 10 for alpha_f are published, searched by accuracy for each class; their
    ImageNet run looks at 999 samples and at most 10,000 patches, of one class at a time. Here all
    patches of at most `samples` samples of each set count; other layers stay as they are.
    """

    name: ClassVar[str] = "kodge"
    definition: ClassVar[Definition] = Definition(
        alias="SVD unlearning",
        reads="up to 1000 of each set",
        formula="W (I - (I - M_r) M_f) in every layer, M scaled projections onto its inputs",
        cost="2000 l, eigenvectors",
        source="Kodge et al. 2024",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha_forget": (1.0, 30.0)}
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=0)
    alpha_forget: float = 3.0
    """How far weak directions of the forget set count as its own; larger forgets more."""
    alpha_retain: float = 100.0
    """The same for the retain set; larger keeps more."""
    samples: int = 1000
    """Samples of each set at most, drawn by the seed."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("alpha_forget", self.alpha_forget)
        require_positive("alpha_retain", self.alpha_retain)
        require_between("samples", self.samples, 1)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty, and a network without such a layer."""
        require_samples(run, self.name)
        if not self.layers(run):
            raise InputError(
                f"got {run.model.name}, which trains no linear and no ungrouped convolution "
                "layer; expected one; use another method"
            )

    def layers(self, run: Run) -> list[str]:
        """Paths of the layers that are projected."""
        return [
            path
            for path, layer in run.model.net.named_modules()
            if reads_rows(layer) and layer.weight.requires_grad
        ]

    def prepare(self, run: Run) -> State:
        """Project the weights."""
        layers = self.layers(run)
        forget = input_covariances(run, "forget", layers, self.samples)
        retain = input_covariances(run, "retain", layers, self.samples)
        with torch.no_grad():
            for path in layers:
                ours = scaled_projection(forget[path], self.alpha_forget)
                kept = scaled_projection(retain[path], self.alpha_retain)
                whole = run.model.net.get_submodule(path).weight
                assert isinstance(whole, Tensor)
                weight = run.own_parameter(whole)
                rows = weight.flatten(1).double()  # (out, D)
                weight.copy_((rows - (rows - rows @ kept) @ ours).view(weight.shape))
        return State()
