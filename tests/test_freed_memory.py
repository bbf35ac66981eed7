"""Memory of large tensors is kept for the next ones: pages that a second use faults in, counted."""

import os
import platform
import subprocess
import sys

import pytest

PAGES = 2 * 16384  # of two arrays of 64 MiB
COUNT = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, whatever the machine's setting
import numpy as np
from letheon.processes import reuse_freed_memory
reuse_freed_memory()
np.ones(2**23), np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(**more: str) -> int:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT]
    environment = {**kept, **more, "NUMPY_MADVISE_HUGEPAGE": "0"}
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's allocator")
def test_freed_memory_is_used_again_unless_the_environment_decides() -> None:
    assert _faults() < PAGES / 8
    assert _faults(MALLOC_TOP_PAD_="0") > PAGES * 3 / 4
