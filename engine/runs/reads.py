"""Which samples a run read, how often, in which phase: counted by sample number, and its proof."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from letheon.engine.checkpoints.weights_file import write_weights

FILE = "reads.safetensors"
FORGET = "forget"
"""Name of the mask of the forget set beside the counts; those are named ``READS/PHASE``."""


def write_reads(folder: Path, reads: Mapping[str, Tensor], forget: Tensor) -> dict[str, Any]:
    """Write how often each training sample was read and return what follows from it.

    Args:
        folder: the run's.
        reads: "what the phase reads/its name" -> (N,) int32, on the host, summed over ranks.
        forget: (N,) bool, the forget set.

    Returns:
        As `prove`.
    """
    mask = forget.cpu()
    counts = {name: count for name, count in reads.items() if name != FORGET}
    write_weights(folder / FILE, {**counts, FORGET: mask.to(torch.uint8)}, {})
    return prove(counts, mask)


def read_reads(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Read the counts by phase, and the mask of the forget set, of a run folder."""
    tensors = load_file(folder / FILE)
    return tensors, tensors.pop(FORGET).bool()


def prove(reads: Mapping[str, Tensor], forget: Tensor) -> dict[str, Any]:
    """Sum up what was read: no forget sample in a phase that reads retain alone, and the reverse.

    Returns:
        ``forget_samples`` and the ``forget_digest`` of their sorted numbers; by phase the reads of
        forget and retain samples and the number of different samples; ``clean`` where none was
        read by a phase that is not to.
    """
    phases = {}
    clean = True
    for name, count in sorted(reads.items()):
        of_forget, of_retain = int(count[forget].sum()), int(count[~forget].sum())
        allowed = name.partition("/")[0]
        clean &= not (of_forget if allowed == "retain" else of_retain if allowed == "forget" else 0)
        phases[name] = {
            "forget_reads": of_forget, "retain_reads": of_retain,
            "samples": int((count > 0).sum()), "most": int(count.max()) if len(count) else 0,
        }  # fmt: skip
    numbers = forget.nonzero().flatten().tolist()
    return {
        "forget_samples": len(numbers),
        "forget_digest": hashlib.sha256(",".join(map(str, numbers)).encode()).hexdigest(),
        "phases": phases,
        "clean": clean,
    }
