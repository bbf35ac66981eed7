"""Pure tensor functions, each specified by its plain PyTorch form. Imports nothing of ours.

`X.py` is what callers import; where there is an `X_triton.py`, `X_reference.py` (or a function
`*_reference`) is its specification, and `takes_triton` chooses between the two. Functions take at
most eight parameters; the kernels under `@triton.jit` alone may take more, because Triton has no
structures to pass.
"""

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
