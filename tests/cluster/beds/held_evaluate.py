"""evaluate that waits in the middle while a file is there; started as launch/evaluate.py is.

Each rank waits before its n-th exchange with the others, and leaves a file that says so beside the
one that LETHEON_HOLD names; a signal ends the wait. So a fault strikes all ranks at one place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from letheon.engine.runs.stop import last_signal
from letheon.launch import evaluate
from tests.cluster.drills import HOLD
from tests.drill.processes import EXCHANGES

EXCHANGE = 20
"""Exchanges before which a process waits: in the middle of the outputs of the first model."""


class Held:
    """Counts the exchanges of this process."""

    taken = 0

    def counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, before the n-th call of which the process waits."""

        def call(*args: Any, **options: Any) -> Any:
            self.taken += 1
            hold = Path(os.environ[HOLD])
            if self.taken == EXCHANGE and hold.exists():
                hold.with_name(f"{hold.name}-{os.environ['RANK']}").write_text("")
                while hold.exists() and not last_signal():
                    time.sleep(0.02)
            return work(*args, **options)

        return call


if __name__ == "__main__":
    held = Held()
    for name in EXCHANGES:
        setattr(dist, name, held.counted(getattr(dist, name)))
    evaluate.start()
