"""Freed memory of the CPU kept for the next step, instead of given back and fetched anew.

glibc maps large blocks one by one and unmaps them when they are freed, so every step has the
system clear the same activations again, page by page. Only the benchmark uses it: it gained 0 to
5 % on one machine, which is not worth holding the memory.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_DEFAULTS = 128 * 1024, 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """From now on in this process; `keep=False` puts glibc's own settings back.

    The process then holds what it once needed at most until it ends.

    Returns:
        False where the C library has no such switch, and nothing is changed.
    """
    try:
        switch = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim, maps = (2**31 - 1, 0) if keep else _DEFAULTS
    return bool(switch(_TRIM_THRESHOLD, trim) and switch(_MMAP_MAX, maps))
