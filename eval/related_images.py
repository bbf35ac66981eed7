"""Find images to relearn from that resemble the forgotten ones but are not among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from letheon.errors import InputError, name_option
from letheon.eval.comparison import Comparison
from letheon.eval.inference.sampling import sample_rows
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.forget_request import resolve
from letheon.loaders.open import open_domains


@dataclass(frozen=True)
class Source:
    """Images of a set, and what their classes are called by the models."""

    images: ImageSet
    indices: list[int]
    numbers: Tensor  # (classes of the set,) int64: the models' class, -1 where they have none


def find_related(text: str, of: Comparison, seed: int, most: int) -> list[Source]:
    """Find related images: of kept classes, or of a folder; and as many retain images.

    Args:
        text: class:NAMES or file:LIST of the training set, none of them forgotten; or a folder or
            archive of images in class folders, those named like a class of the models being read.
        of: the models and sets.
        seed: of the request's reading.
        most: related images, at most.

    Raises:
        InputError: a forgotten class in the list, or a folder without a known class.
    """
    train, forget = of.data.train, torch.from_numpy(of.forget_mask("train"))
    labels = torch.from_numpy(np.asarray(train.labels))
    plain = torch.arange(len(of.data.classes))
    if text.startswith(("class:", "file:")):
        with name_option("related"):
            classes = resolve(text, of.data, seed).classes
        both = sorted(set(classes) & set(of.request.classes))
        if both:
            raise InputError(
                f"got related images {text}, of which {of.data.classes[both[0]]} was to be "
                "forgotten; expected other classes",
                option="related",
            )
        near = torch.isin(labels, torch.tensor(classes)) & ~forget
        sources = [Source(train, sample_rows(near, most).tolist(), plain)]
        rest = ~forget & ~near
    else:
        known = {name: number for number, name in enumerate(of.data.classes)}
        with name_option("related"):
            domains = open_domains(text)
        sources, rest = [], ~forget
        for images in domains.values():
            numbers = torch.tensor([known.get(name, -1) for name in images.classes])
            named = numbers[torch.from_numpy(np.asarray(images.labels))] >= 0
            sources.append(
                Source(images, sample_rows(named, -(-most // len(domains))).tolist(), numbers)
            )
        sources = [source for source in sources if source.indices]
        if not sources:
            raise InputError(
                f"got related images {text}, whose classes are none of the models'; expected "
                f"folders named like {', '.join(of.data.classes[:4])}",
                option="related",
            )
    count = sum(len(source.indices) for source in sources)
    return [*sources, Source(train, sample_rows(rest, count).tolist(), plain)]
