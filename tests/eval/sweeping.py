"""One model over all sets, for tests of what is made of its outputs."""

from __future__ import annotations

from collections.abc import Mapping

from letheon.engine.distributed import Ranks
from letheon.eval.inference.passes import Passes, SweepOptions, Swept, sweep_together
from letheon.loaders.batch import Loader


def sweep(
    swept: Swept, loaders: Mapping[str, Loader], ranks: Ranks, options: SweepOptions | None = None
) -> Passes:
    return sweep_together([swept], loaders, ranks, options)[0]
