"""Torch's flight recorder: the last collectives of each rank over NCCL, written when one times out.

Torch reads the variables when it makes the process group, the path when it writes. The files are
torch's own, pickled: its tool `torchfrtrace` reads them, and nothing of Letheon does.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Variables that switch it on, with so many collectives a rank."""
PATH = "TORCH_FR_DUMP_TEMP_FILE"
"""Variable of where it writes; the rank's number is appended."""
_FILE = "/nccl-rank-"
_OLDER = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    PATH: "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}


def record_collectives(device: torch.device) -> None:
    """Switch the recorder on, before a process group with NCCL is made; what the user set stays."""
    if device.type == "cuda":
        for name, value in RECORDER.items():
            _set(name, value)


def write_flights_to(folder: Path, device: torch.device) -> None:
    """Let the recorder write to ``nccl-rank-0``, ... in a folder of a run, if it is on.

    Where this host has no such run folder, torch's own place stays.
    """
    if device.type == "cuda" and "TORCH_NCCL_DUMP_ON_TIMEOUT" in os.environ:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            if os.environ.get(PATH, "").endswith(_FILE):  # of an earlier run of this process
                del os.environ[PATH]
            _set(PATH, f"{folder.absolute()}{_FILE}")


def _set(name: str, value: str) -> None:
    """Set a variable, unless somebody has, under this name or the older one."""
    if _OLDER.get(name, name) not in os.environ:
        os.environ.setdefault(name, value)
