"""Hold the locks of a command's outputs, so that no two processes write one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from letheon.engine.distributed import Ranks
from letheon.engine.runs.run_folder import remove_leftovers
from letheon.folders import lock
from letheon.launch.command import together


@contextmanager
def claim(
    outs: Sequence[Path], ranks: Ranks, settle: Callable[[Path], object] = remove_leftovers
) -> Iterator[None]:
    """Hold the locks of output folders or files until the block ends, for all ranks at once.

    The first rank takes them and settles what an interrupted replacement left there (`settle`).

    Raises:
        InputError: on every rank: another process works on one of them.
    """
    with ExitStack() as stack:

        def take() -> None:
            for out in outs if ranks.main else ():
                stack.enter_context(lock(out))
                settle(out)

        together(ranks, take)
        yield
