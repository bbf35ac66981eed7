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
from letheon.regular import require_regular

FILE = "reads.safetensors"
FORGET = "forget"
"""Name of the mask of the forget set beside the counts; those are named ``READS/PHASE``."""
EARLIER = "earlier"
"""Name of the mask of the samples that earlier requests name, and the run left out; where any."""


def write_reads(
    folder: Path, reads: Mapping[str, Tensor], forget: Tensor, numbers: Tensor, samples: int
) -> dict[str, Any]:
    """Write how often each training sample was read and return what follows from it.

    The file counts by the numbers of the set itself, as requests do: a run that leaves out what was
    forgotten earlier has numbers of its own.

    Args:
        folder: the run's.
        reads: "what the phase reads/its name" -> (n,) int32, on the host, summed over ranks.
        forget: (n,) bool, the forget set.
        numbers: (n,) int64, the number in the set of each sample of the run.
        samples: of the set, N.

    Returns:
        As `prove`.
    """

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(samples, dtype=values.dtype).index_copy_(0, numbers, values.cpu())

    counts = {name: spread(count) for name, count in reads.items()}
    mask, own = spread(forget), spread(torch.ones(len(numbers), dtype=torch.bool))
    known = {FORGET: mask} | ({} if bool(own.all()) else {EARLIER: ~own})
    flags = {name: flag.to(torch.uint8) for name, flag in known.items()}
    write_weights(folder / FILE, {**counts, **flags}, {})
    return prove(counts, mask, known.get(EARLIER))


def read_reads(folder: Path) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Read the counts by phase, the mask of the forget set, and that of `EARLIER`, if any."""
    require_regular(folder / FILE)
    tensors = load_file(folder / FILE)
    earlier = tensors.pop(EARLIER, None)
    return tensors, tensors.pop(FORGET).bool(), None if earlier is None else earlier.bool()


def prove(
    reads: Mapping[str, Tensor], forget: Tensor, earlier: Tensor | None = None
) -> dict[str, Any]:
    """Sum up what was read: no forget sample in a phase that reads retain alone, and the reverse.

    Args:
        reads: by phase, (N,) int32.
        forget: (N,) bool.
        earlier: (N,) bool, samples that no phase is to read; None: there are none.

    Returns:
        ``forget_samples`` and the ``forget_digest`` of their sorted numbers; by phase the reads of
        forget and retain samples and the number of different samples; ``clean`` where none was
        read by a phase that is not to; ``earlier_samples`` where there are some.
    """
    phases = {}
    clean = True
    for name, count in sorted(reads.items()):
        of_forget, of_retain = int(count[forget].sum()), int(count[~forget].sum())
        allowed = name.partition("/")[0]
        clean &= not (of_forget if allowed == "retain" else of_retain if allowed == "forget" else 0)
        clean &= earlier is None or not bool(count[earlier].any())
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
        **({} if earlier is None else {"earlier_samples": int(earlier.sum())}),
    }
