"""A Hugging Face folder: weights and settings as timm reads them, and a model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from letheon import durable
from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.launch.export import forms
from letheon.launch.export.card import model_card
from letheon.loaders.preset import Preset

FILES = ("model.safetensors", "config.json", "README.md")
"""What is written, the settings last but for the card."""


def write_folder(folder: Path, model: Classifier, run: Path) -> None:
    """Write weights, config.json and the card that the record in `run` gives.

    A network that timm builds gets timm's name and keys; any other keeps Letheon's name, and
    Letheon alone loads it.

    Raises:
        InputError: the folder cannot be made, or timm is needed and not installed.
    """
    known = forms.timm_name(model)
    name, state = forms.timm_state(model) if known else (model.name, forms.plain_state(model))
    settings = hub_config(model, name)
    card = model_card(run, model, name if known else None, weights_digest(model))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"got {folder}; it cannot be made ({error.strerror}); name another", option="out"
        ) from error
    durable.write(folder / FILES[0], forms.pack(state))
    durable.write(folder / FILES[1], json.dumps(settings, indent=2) + "\n")
    durable.write(folder / FILES[2], card)


def hub_config(model: Classifier, name: str) -> dict[str, Any]:
    """Make timm's config.json: the architecture, the classes and how images are prepared."""
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": model.classes,
        "num_features": model.head.in_features,
        "pretrained_cfg": _images(model.preset) | {"num_classes": model.classes},
    }
    if model.class_names is not None:
        config["label_names"] = list(model.class_names)
    return config


def _images(preset: Preset) -> dict[str, Any]:
    """Say a preset as timm does.

    Raises:
        InputError: timm has no word for its geometry.
    """
    if preset.resize == "crop-square":
        raise InputError(
            "got a preset that crops before it resizes, which timm's settings cannot say; write "
            "safetensors",
            option="form",
        )
    resize_to = preset.size if preset.resize == "none" else preset.resize_to
    share = preset.size / resize_to
    if math.floor(preset.size / share) != resize_to:  # as timm computes it
        share = math.nextafter(share, 0)
    return {
        "custom_load": False,
        "input_size": [3, preset.size, preset.size],
        "fixed_input_size": False,
        "interpolation": preset.interpolation,
        "crop_pct": share,
        "crop_mode": "center" if preset.resize == "short" else "squash",
        "mean": list(preset.mean),
        "std": list(preset.std),
    }
