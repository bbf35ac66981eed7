"""The meeting of ranks in a store that may hold what dead ranks of an earlier start have left."""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from letheon.errors import RunFailed

_PLACE = "letheon/meeting"
_POLL = 0.05  # seconds between two looks into the store


def meet(store: Store, rank: int, world: int, timeout: float) -> Store:
    """Return a fresh part of a shared store, the same on all ranks that are alive now.

    torchrun keeps one store over its restarts, so that a rank may read the address of one that has
    died (pytorch issue 135712). Here each rank leaves a word of its own, drawn anew; the first
    rank answers with all the words it sees and the name of the new part, again whenever a word
    changes; a rank goes on once it reads its own word in the answer and has said so under the new
    name. Counts of restarts would not do: agents that join later count from zero.

    Args:
        store: the launcher's.
        rank: of this process.
        world: number of ranks.
        timeout: seconds to wait for the others.

    Raises:
        RunFailed: some ranks did not come in time; they are named.
    """
    own = PrefixStore(_PLACE, store)
    own.set_timeout(timedelta(seconds=timeout))
    end = time.monotonic() + timeout
    word = uuid.uuid4().hex
    words = [f"word/{other}" for other in range(world)]
    own.set(words[rank], word)
    if rank == 0:
        name, answer = word, ""
        while not _is_complete(own, name, world):
            if time.monotonic() > end:
                late = [r for r in range(1, world) if not own.check([f"{name}/{r}"])]
                raise RunFailed(
                    f"got no word of ranks {late} in {timeout:g} s; expected {world} ranks; start "
                    "them all at about the same time, or raise the timeout"
                )
            if own.check(words):
                heard = json.dumps([one.decode() for one in own.multi_get(words)])
                if heard != answer:
                    answer = heard
                    own.set("answer", json.dumps([name, heard]))
            time.sleep(_POLL)
        return PrefixStore(f"letheon/{name}", store)
    while True:
        if own.check(["answer"]):
            name, heard = json.loads(own.get("answer"))
            everyone = json.loads(heard)
            if len(everyone) == world and everyone[rank] == word:
                own.set(f"{name}/{rank}", "")
                return PrefixStore(f"letheon/{name}", store)
        if time.monotonic() > end:
            raise RunFailed(
                f"got no answer of rank 0 in {timeout:g} s; expected {world} ranks; start them all "
                "at about the same time, or raise the timeout"
            )
        time.sleep(_POLL)


def _is_complete(own: Store, name: str, world: int) -> bool:
    return bool(own.check([f"{name}/{rank}" for rank in range(1, world)])) if world > 1 else True
