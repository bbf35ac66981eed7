"""Read how a model wants its images from the settings files of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from letheon.errors import InputError
from letheon.loaders.preset import Preset


def config_preset(path: Path, config: dict[str, Any], default: Preset) -> Preset | None:
    """Read the preset of timm's config.json or transformers' preprocessor_config.json.

    Returns:
        None where they do not say a mean; what they leave out is `default`'s.

    Raises:
        InputError: a setting of another form than these libraries write.
    """
    try:
        if "pretrained_cfg" in config:
            return timm_preset(config["pretrained_cfg"], default)
        if "image_mean" in config:
            return _transformers_preset(config, default)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"got {path}, whose config cannot be read ({type(error).__name__}: {error}); expected "
            "size, mean and std as timm or transformers write them; give them as options"
        ) from error
    return None


def timm_preset(settings: dict[str, Any], default: Preset) -> Preset:
    """Make the preset that timm's settings of a network say; what they leave out is `default`'s.

    Raises:
        KeyError, TypeError, ValueError, IndexError: a setting of another form.
    """
    size = int(settings.get("input_size", (3, default.size, default.size))[-1])
    return dataclasses.replace(
        default,
        size=size,
        mean=_triple(settings.get("mean", default.mean)),
        std=_triple(settings.get("std", default.std)),
        resize="square" if settings.get("crop_mode") == "squash" else "short",
        resize_to=math.floor(size / float(settings.get("crop_pct", 0.875))),
        interpolation=_interpolation(str(settings.get("interpolation", "bilinear"))),
    )


def _transformers_preset(settings: dict[str, Any], default: Preset) -> Preset:
    size = settings.get("size", default.size)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size["height"]
    preset = dataclasses.replace(
        default,
        size=int(size),
        mean=_triple(settings["image_mean"]),
        std=_triple(settings["image_std"]),
        resize="square",
        resize_to=int(size),
        interpolation="bicubic" if settings.get("resample") == 3 else "bilinear",
    )
    if "crop_pct" not in settings:
        return preset
    resize_to = int(preset.size / float(settings["crop_pct"]))
    return dataclasses.replace(preset, resize="short", resize_to=resize_to)


def _triple(numbers: Any) -> tuple[float, float, float]:
    red, green, blue = (float(number) for number in numbers)
    return red, green, blue


def _interpolation(word: str) -> Any:
    if word not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation {word}")
    return word
