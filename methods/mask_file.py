"""Saliency masks on disk: one bit a weight, in a file that names the weights it fits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from letheon.errors import InputError
from letheon.kernels.threshold import pack, unpack


def save_masks(
    path: Path, names: list[str], masks: dict[float, list[Tensor]], facts: dict[str, str]
) -> None:
    """Write the masks of several densities to one file; an existing file is replaced at once.

    Args:
        path: the file; its folder exists.
        names: parameter names, in the order of each list of masks.
        masks: density -> one bool tensor per parameter.
        facts: what the masks were made from (weights digest, request digest); kept as text.
    """
    tensors = {
        f"{density:g}/{name}": pack(mask).cpu()
        for density, group in masks.items()
        for name, mask in zip(names, group, strict=True)
    }
    shapes = {
        name: list(mask.shape) for name, mask in zip(names, next(iter(masks.values())), strict=True)
    }
    text = {**facts, "densities": json.dumps(sorted(masks)), "shapes": json.dumps(shapes)}
    temporary = path.with_name(path.name + ".partial")
    save_file(tensors, temporary, text)
    temporary.replace(path)


def load_masks(path: Path, density: float, weights: str, names: list[str]) -> list[Tensor]:
    """One density's masks, in the order of `names`.

    Raises:
        InputError: no such file, not a mask file, another density, or made from other weights.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if "densities" not in facts:
                raise InputError(f"got {path}; it is no mask file; make one with launch/mask.py")
            densities = json.loads(facts["densities"])
            if density not in densities:
                raise InputError(
                    f"got density {density}; {path} holds {densities}; choose of these"
                )
            if facts["weights"] != weights:
                raise InputError(
                    f"got {path}, made from weights {facts['weights'][:12]}; this model is "
                    f"{weights[:12]}; make a mask of it with launch/mask.py"
                )
            shapes = json.loads(facts["shapes"])
            return [
                unpack(file.get_tensor(f"{density:g}/{name}"), torch.Size(shapes[name]))
                for name in names
            ]
    except (OSError, SafetensorError) as error:
        raise InputError(f"got mask {path}; cannot read it ({error}); check --mask") from error
