"""How a model wants its images: one preset per model, used for training and every evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from letheon.choices import refuse_choice

Resize = Literal["short", "square", "crop-square", "none"]
"""Evaluation geometry, before normalisation.

- ``short``: the shorter side to `resize` pixels, then the central `size` x `size` (the usual rule).
- ``square``: both sides to `resize`, aspect ratio lost, then the centre (the seed's rule).
- ``crop-square``: the central square of share size/resize of the shorter side, then resized to
  `size` (the rule of the EfficientNet family).
- ``none``: the image is `size` x `size` already; any other is resized to it.
"""

Augment = Literal[
    "none",
    "flip",
    "pad-crop-flip",
    "resized-crop-flip",
    "shift",
    "reflect-crop-alternate",
    "reflect-crop-alternate-near",
]
"""Training augmentation.

- ``pad-crop-flip``: zero padding by size/8, a random crop, a random mirror (CIFAR).
- ``resized-crop-flip``: a crop of area 0.08..1 and ratio 3/4..4/3 resized to `size`, a random
  mirror (ImageNet).
- ``shift``: zero padding and a random crop, no mirror: for writing, which a mirror would change.
- ``reflect-crop-alternate``: mirrored padding by size/8, a random crop, and the alternating flip: a
  random half of the samples is mirrored in even epochs, the other half in odd ones, so that two
  epochs show each sample both ways (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds").
- ``reflect-crop-alternate-near``: the same with a padding of size/16, for short trainings.
"""

ALTERNATE: tuple[Augment, ...] = ("reflect-crop-alternate", "reflect-crop-alternate-near")
CROP: tuple[Augment, ...] = ("pad-crop-flip", "shift", *ALTERNATE)
"""Those that pad and crop."""


@dataclass(frozen=True)
class Preset:
    """Geometry and normalisation of a model's input; mean and std are on the 0..1 scale."""

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Resize = "short"
    resize_to: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    augment: Augment = "resized-crop-flip"

    @property
    def margin(self) -> int:
        """Pixels of padding on every side, where the augmentation pads and crops."""
        return self.size // (16 if self.augment == "reflect-crop-alternate-near" else 8)

    def with_size(self, size: int | None) -> Preset:
        """The preset at `size` pixels, its margin scaled along; None is the preset itself."""
        if size is None:
            return self
        return replace(self, size=size, resize_to=round(self.resize_to * size / self.size))


def check_fields(changes: Iterable[str]) -> None:
    """Refuse fields that a preset does not have.

    Raises:
        InputError: the first of them, with the nearest there is.
    """
    known = [field.name for field in fields(Preset)]
    for name in changes:
        if name not in known:
            raise refuse_choice(name, known, "preset")
