"""Networks of timm, ``timm:NAME``, with timm's own preset; the one file that imports timm."""

from __future__ import annotations

import importlib.util

from torch import nn

from letheon.engine.checkpoints.hub_config import timm_preset
from letheon.errors import InputError, install_extra, suggest
from letheon.loaders.preset import Preset

PREFIX = "timm:"
_DEFAULT = Preset(size=224)


def is_installed() -> bool:
    """Whether timm can be imported."""
    return importlib.util.find_spec("timm") is not None


def timm_network(name: str, classes: int, size: int) -> nn.Module:
    """Build timm's network `name`, after the prefix, with new weights; nothing is downloaded.

    Raises:
        InputError: timm is not installed, does not know the name, or cannot build it so.
    """
    kind = _check_name(name)
    import timm

    options = {"img_size": size} if size != preset_of_timm(name).size else {}
    try:
        try:
            net = timm.create_model(kind, pretrained=False, num_classes=classes, **options)
        except TypeError:  # most networks take images of any size
            net = timm.create_model(kind, pretrained=False, num_classes=classes)
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"got model {name}, which timm cannot build for {size} pixels ({reason}); give another "
            "size",
            option="size",
        ) from error
    for module in net.modules():
        if type(module) is timm.layers.Linear:  # torch's own, but for scripts
            module.__class__ = nn.Linear
    return net


def preset_of_timm(name: str) -> Preset:
    """Return how timm's network wants its images, by its pretrained_cfg.

    Raises:
        InputError: as `timm_network`, or a setting that is none of ours.
    """
    kind = _check_name(name)
    import timm

    known = timm.models.get_pretrained_cfg(kind)
    try:
        return timm_preset({} if known is None else known.to_dict(), _DEFAULT)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"got model {name}, whose images timm makes in another way ({error}); expected "
            "bilinear or bicubic interpolation; choose another of its weights' names",
            option="model",
        ) from error


def _check_name(name: str) -> str:
    """The name without its prefix, if timm is there and knows it."""
    kind = name.removeprefix(PREFIX)
    if not is_installed():
        raise InputError(
            f"got model {name}, and timm is not installed; expected it, which builds the network; "
            f"{install_extra('timm')}",
            option="model",
        )
    import timm

    if not timm.is_model(kind):
        known = [PREFIX + one for one in timm.list_models()]
        raise InputError(
            f"got model {name}, which timm does not know{suggest(name, known)}", option="model"
        )
    return kind
