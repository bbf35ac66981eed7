"""Where the host may wait for the device, and how often: what is not here is a fault."""

from __future__ import annotations

from collections.abc import Mapping

ONCE = "once a run"
EPOCH = "once an epoch"
PASS = "once a pass over a set"
TILE = "once a tile of many rows"
STEP = "each step of a short training on images of the host"
PLACES: dict[str, str] = {
}  # fmt: skip
"""file:function -> how often it waits."""


def find_undeclared(waits: Mapping[str, int]) -> list[str]:
    """Return the waits of functions of ours that are not among `PLACES`."""
    return sorted(wait for wait in waits if ":" in wait and wait.split(" ")[0] not in PLACES
                  and not wait.startswith("aten::"))  # fmt: skip
