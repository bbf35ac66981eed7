"""Saliency masks: which weights matter most for what is to be forgotten, made, saved and loaded.

On disk one bit a weight, in a file that names the weights it fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from letheon import durable
from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.checkpoints.weights_file import check_facts, pack_tensors
from letheon.engine.method import Run
from letheon.engine.statistics import gradient_sum
from letheon.errors import InputError
from letheon.kernels.threshold import pack, top_masks, unpack
from letheon.methods.finetune import cross_entropy
from letheon.regular import require_regular
from letheon.sealed import parse_json
from letheon.spans import span


def require_densities(run: Run, densities: Sequence[float], option: str) -> None:
    """Refuse densities at which no weight may move.

    Raises:
        InputError: one outside 0..1, or so small that it rounds to none of the weights.
    """
    count = sum(run.whole_shape(p).numel() for p in run.parameters)
    for density in densities:
        if not 0 < density <= 1:
            raise InputError(f"got density {density}; expected 0 < density <= 1", option=option)
        if round(density * count) < 1:
            raise InputError(
                f"got density {density:g}, which is none of {count} weights; expected at least "
                f"{1 / count:.1g}; give a larger one",
                option=option,
            )


@span("statistics")
def saliency_masks(run: Run, densities: Sequence[float]) -> list[dict[str, Tensor]]:
    """Make for each density one bool mask per trainable parameter, equal on every rank, or this
    rank's part of it where the network is split over the ranks.

    Saliency is the size of the summed, signed gradient of the forget set's loss at the trained
    weights (Fan et al. 2024, eq. 3): the gradient of each sample is added with its sign and the
    absolute value is taken once, at the end. All parameters are ranked together, and exactly
    round(density * N) of them may move.
    """  # noqa: D205
    names = list(run.named_parameters)
    # The gradient of -CE has the same size, and others may have asked for that of CE.
    scores = gradient_sum(run, "forget", cross_entropy)
    if run.shards is None:
        masks = top_masks(scores, densities)
    else:
        masks = run.shards.choose(scores, lambda whole: top_masks(whole, densities))
    return [dict(zip(names, group, strict=True)) for group in masks]


def save_masks(
    path: Path, masks: Mapping[float, Mapping[str, Tensor]], facts: Mapping[str, str]
) -> None:
    """Write the masks of several densities to one file; an existing file is replaced at once.

    Args:
        path: the file; its folder exists.
        masks: density -> one bool tensor per parameter name.
        facts: what the masks were made from, as `mask_facts`; kept as text.
    """
    tensors = {
        f"{density:g}/{name}": pack(mask).cpu()
        for density, group in masks.items()
        for name, mask in group.items()
    }
    shapes = {name: list(mask.shape) for name, mask in next(iter(masks.values())).items()}
    digests = {
        f"{density:g}": _digest({name: tensors[f"{density:g}/{name}"] for name in group})
        for density, group in masks.items()
    }
    text = {
        **facts, "densities": json.dumps(sorted(masks)), "shapes": json.dumps(shapes),
        "digests": json.dumps(digests, sort_keys=True),
    }  # fmt: skip
    durable.write(path, pack_tensors(tensors, text))


def _digest(bits: Mapping[str, Tensor]) -> str:
    """SHA-256 over the packed masks of one density, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(bits.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def mask_facts(run: Run) -> dict[str, str]:
    """Digests of what a mask is made from: weights, request and training images.

    That of the images is empty on ranks other than the first, which alone looks at every file.
    """
    facts = {"weights": weights_digest(run.model), "request": run.request, "images": run.images}
    return {name: digest for name, digest in facts.items() if digest}


def load_masks(
    path: Path, density: float, origin: Mapping[str, str], names: list[str]
) -> dict[str, Tensor]:
    """Read one density's masks, bool on the host, by the parameters' `names`.

    A digest of `origin` (as `mask_facts`) that the file has, too, must be equal.

    Raises:
        InputError: no such file, not a mask file, another density, bits that are not those that
            were saved, or made from other weights, from other images or for another request.
    """
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            check_facts(path, facts)
            if "densities" not in facts:
                raise InputError(
                    f"got {path}; it is no mask file; make one with launch/mask.py", option="mask"
                )
            densities = parse_json(facts["densities"])
            if density not in densities:
                raise InputError(
                    f"got density {density}; {path} holds {densities}; choose of these",
                    option="density",
                )
            for name, digest in origin.items():
                other = facts.get(name, digest)
                if other != digest:
                    raise InputError(
                        f"got {path}, made for another request, model or set ({name} "
                        f"{other[:12]}; here {digest[:12]}); make a mask with launch/mask.py",
                        option="mask",
                    )
            shapes = parse_json(facts["shapes"])
            bits = {name: file.get_tensor(f"{density:g}/{name}") for name in shapes}
            digest = parse_json(facts.get("digests", "{}")).get(f"{density:g}")
            if digest not in (None, _digest(bits)):
                raise ValueError("its bits are not those that were saved")
            return {name: unpack(bits[name], torch.Size(shapes[name])) for name in names}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"got {path}; expected a mask file that can be read ({reason}); check the path",
            option="mask",
        ) from error
