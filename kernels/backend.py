"""Which form of a kernel runs: Triton where tensor and machine allow, else plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes_triton(tensor: Tensor) -> bool:
    """True on CUDA with Triton installed; on the CPU only under TRITON_INTERPRET=1.

    The variable must be set before Triton is first imported; it is for tests, since the
    interpreter runs about a thousand times slower than the plain form.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (tensor.is_cuda or interpreted) and _triton_installed()
