"""train that waits in the middle while a file is there; started by torchrun as launch/train.py is.

So a fault strikes a run that goes on, however fast or slow the machine is. The file that
LETHEON_HOLD names says which numbers of ranks are to wait, such as "2 3"; a signal ends the wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from letheon.engine.runs import plan
from letheon.engine.runs.stop import Poll, last_signal
from letheon.launch import train
from tests.cluster.drills import HOLD

STEPS = 20
"""Steps that a process takes before it waits: beyond the first saved state."""


class Held(Poll):
    """Waits after its twentieth step; no rank waits for another meanwhile."""

    taken = 0

    def after_step(self, *broken: Callable[[], bool]) -> int:
        self.taken += 1
        while self.taken == STEPS and self._is_held() and not last_signal():
            time.sleep(0.02)
        return super().after_step(*broken)

    def _is_held(self) -> bool:
        file = Path(os.environ[HOLD])
        try:
            return str(self.ranks.world) in file.read_text().split()
        except FileNotFoundError:
            return False


if __name__ == "__main__":
    plan.Poll = Held  # type: ignore[misc]
    train.start()
