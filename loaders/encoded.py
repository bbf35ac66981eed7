"""Images of any set as they are kept, for what decodes by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.decode.encoded_image import Stored, from_file, from_pixels
from letheon.loaders.formats.beton import BetonImages


def stored(images: ImageSet, indices: NDArray[np.int64]) -> Sequence[Stored | InputError]:
    """Each image of `indices`, or why it cannot be had; a JPEG is not decoded yet.

    Raises:
        InputError: A `.beton` file that is broken as a whole.
    """
    if isinstance(images, BetonImages):
        return images.stored(indices)
    return [_one(images, i) for i in indices.tolist()]


def _one(images: ImageSet, i: int) -> Stored | InputError:
    try:
        if isinstance(images, FileImages):
            return from_file(images.tree.read(images.file(i)), images.path(i))
        return from_pixels(images.read(i), images.path(i))
    except InputError as error:
        return error
