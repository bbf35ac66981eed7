"""EncodedImage images to rows of a batch: decoded, cut, resized, mirrored and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import UnreadableImage
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, geometry
from letheon.loaders.transforms.normalize import normalize_into

Image = NDArray[np.uint8]  # (H, W, 3)


def fill(
    out: Tensor,
    encoded: Sequence[EncodedImage | UnreadableImage],
    u: NDArray[np.float64] | None,
    preset: Preset,
    scaled: bool = False,
    codec: jpeg.Codec | None = None,
) -> None:
    """Write each image into its row of `out`.

    Args:
        out: (B, S, S, 3), float32 for normalised pixels or uint8 for plain ones.
        encoded: B images, or the reasons why they are not there.
        u: (B, D) from `augment.draws`; None is the test transform.
        preset: the geometry and scale.
        scaled: decode large crops at a smaller scale, see `jpeg.crop`.
        codec: the JPEG library; None takes the fastest.

    Raises:
        InputError: Naming the first image that cannot be read.
    """
    boxes: list[jpeg.Box] = []
    if u is not None and preset.augment == "resized-crop-flip":
        sides = [(1, 1) if isinstance(s, UnreadableImage) else (s.height, s.width) for s in encoded]
        boxes = augment.boxes(u, np.array(sides, np.int64).reshape(-1, 2)).tolist()
    mirror = np.zeros(len(encoded), np.bool_) if u is None else augment.mirror_mask(u, preset)
    for k, image in enumerate(encoded):
        if isinstance(image, UnreadableImage):
            raise image
        if boxes:
            part = image.crop(boxes[k], preset.size if scaled else 0, codec)
            square = geometry.resize(part, preset.size, preset.size, preset)
            row = torch.from_numpy(np.ascontiguousarray(square))
            normalize_into(out[k], row.flip(1) if mirror[k] else row, preset)
        elif u is None:
            square = geometry.fit(image.pixels(codec), preset)
            normalize_into(out[k], torch.from_numpy(np.ascontiguousarray(square)), preset)
        else:
            square = geometry.augment_images([image.pixels(codec)], u[k : k + 1], preset)[0]
            normalize_into(out[k], torch.from_numpy(square), preset)
