"""Options on checkpoints from elsewhere: what the file does not say of its network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from letheon.engine.checkpoints.model_file import load_model, note
from letheon.engine.models.classifier import Classifier
from letheon.loaders.preset import Resize


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What a checkpoint from elsewhere is, where it does not say so; run folders say it all."""

    model: str | None = None
    """Architecture, where neither the checkpoint nor its keys say it; timm:NAME for one of timm."""
    part: str | None = None
    """Network of a checkpoint with several: plain, ema (a running average) or its place."""
    size: int | None = None
    """Input pixels the checkpoint was trained at."""
    mean: tuple[float, float, float] | None = None
    """Mean of its images, on the 0..1 scale."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of its images, on the 0..1 scale."""
    resize: Resize | None = None
    """Geometry of its test images: short, square, crop-square or none."""
    resize_to: int | None = None
    """Pixels of that resize, before the crop; by default it follows the size."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How its test images were resized."""

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of a preset that are given."""
        fields = dataclasses.asdict(self).items()
        return {k: v for k, v in fields if k not in ("model", "part") and v is not None}

    def load(self, path: Path, tell: Callable[[str], object] = note) -> Classifier:
        """Load a checkpoint as these options say; `load_model` has `tell` and what is refused."""
        changes = self.changes or None
        return load_model(path, name=self.model, preset=changes, part=self.part, tell=tell)
