"""Every method on the ranks of a job, and every metric of a full row; started by torchrun, too."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from letheon import durable
from letheon.engine.distributed import Ranks, join_ranks
from letheon.engine.loop import run_method
from letheon.engine.memory.shards import host_state
from letheon.engine.method import Method
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from tests.eval.test_ranks import audited, flat
from tests.methods.cases import cases
from tests.patience import PATIENCE
from tests.world import run_of

# As tests/methods/test_ranks.py: batches of 7 over 41 images, uneven on 2, on 3 and on 4 ranks.
FROZEN = Recipe(epochs=2, lr=0.05, batch_size=7, batch_norm="frozen")
GENTLE = replace(FROZEN, lr=0.005)


def end(ranks: Ranks, method: Method, precision: Precision) -> dict[str, Any]:
    """Losses of a run's passes, and its weights on the first rank, as lists."""
    losses: list[float] = []

    def log(kind: str, **of: Any) -> None:
        losses.extend([float(of["loss"])] if "loss" in of else [])

    run = run_of(method, ranks)
    run.precision = precision
    run_method(method, run, log)
    state = host_state(run.model, ranks).items()
    return {"losses": losses, "weights": {key: value.tolist() for key, value in state}}


def everything(ranks: Ranks) -> dict[str, Any]:
    """The ends of all runs by name, and a row; on every rank, complete on the first."""
    runs = {}
    for name, method in cases(FROZEN, GENTLE).items():
        runs[name] = end(ranks, method, Precision("fp32"))
        runs[f"{name}, split"] = end(ranks, method, Precision("fp32", reduce="shard"))
    row = {key: value for key, value in flat(audited(ranks)).items() if "/points" not in key}
    return {"runs": runs, "row": row}


def main() -> None:
    """Write what there is to compare to the file that the first argument names."""
    with join_ranks("cpu", PATIENCE) as ranks:
        found = everything(ranks)
        if ranks.main:
            durable.write(Path(sys.argv[1]), json.dumps(found))


if __name__ == "__main__":
    main()
