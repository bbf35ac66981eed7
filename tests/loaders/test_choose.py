"""Which backend is chosen, and that it says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.loaders import factory
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.factory import choose_backend, make_loader
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset

PRESET = Preset(size=32, resize_to=40)
SMALL = Preset(size=16, resize="none", augment="pad-crop-flip")


def test_auto_takes_threads_for_encoded_images_and_says_so(photographs: Path) -> None:
    (images,) = open_source(str(photographs)).values()  # type: ignore[union-attr]
    lines: list[str] = []
    loader = make_loader(
        "auto", images, np.zeros(34, np.bool_), PRESET, 8, Reader(0), tell=lines.append
    )
    assert isinstance(loader, BetonLoader)
    assert len(lines) == 1 and lines[0].startswith("loader auto takes beton: encoded images")


def test_auto_takes_the_plain_loader_for_arrays_on_the_host(array_images: Any) -> None:
    lines: list[str] = []
    loader = make_loader(
        "auto", array_images(9), np.zeros(9, np.bool_), SMALL, 3, Reader(0), tell=lines.append
    )
    assert isinstance(loader, TorchLoader) and "decoded images in memory" in lines[0]


def test_auto_keeps_on_the_gpu_what_takes_a_quarter_of_it(
    array_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: ArrayImages = array_images(10)
    needed = 10 * 16 * 16 * 3
    for free, kind in ((4 * needed, "resident"), (4 * needed - 4, "torch")):
        monkeypatch.setattr(factory, "free_bytes", lambda device, free=free: free)
        assert choose_backend(images, SMALL, torch.device("cuda"))[0] == kind
    assert choose_backend(images, SMALL, torch.device("cpu"))[0] == "torch"


def test_an_unknown_kind_is_refused(array_images: Any) -> None:
    kind: Any = "webdataset"
    with pytest.raises(InputError, match="got loader 'webdataset'; expected one of auto, torch"):
        make_loader(kind, array_images(9), np.zeros(9, np.bool_), SMALL, 3, Reader(0))
