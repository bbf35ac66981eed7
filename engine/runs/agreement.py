"""Agreement of all ranks before anything is written: the same settings, request, images and code.

Nodes are started one by one, each with its own command line, file systems and environment. What
differs between them is found by one exchange and refused by name, before it can train half of the
ranks on something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from letheon import __version__
from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.method import Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.ranks.launchers import visible_slice
from letheon.engine.runs.plan import Plan
from letheon.engine.runs.run_folder import code_digest
from letheon.errors import InputError, LetheonError
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import Request

Facts = Mapping[str, str]
"""What must be equal on all ranks that say it, by its name in a refusal."""
PLACES = (
    "data", "classes", "downstream", "out", "overwrite", "weights", "original", "retrained", "runs",
    "forget", "mask", "related", "groups", "canaries_among", "cache", "device", "workers", "report",
    "define", "other_originals",
)  # fmt: skip
"""Settings that may differ between nodes: where things lie; their contents are compared."""


@dataclass(frozen=True)
class Word:
    """What one rank says of itself, and of the run it is about to start."""

    rank: int
    host: str
    versions: dict[str, str]
    problem: LetheonError | None
    facts: Facts
    gpu: str = ""
    """The GPU it computes on, as `name_gpu` has it."""

    @property
    def place(self) -> str:
        """Host and rank, as messages name them."""
        return f"{self.host} (rank {self.rank})"


def agree_on_start(ranks: Ranks, problem: LetheonError | None, facts: Facts) -> None:
    """Exchange the ranks' words, and refuse on all of them what one refuses or what differs.

    `ranks.nodes` then says which ranks are where, with the versions of each node.

    Raises:
        LetheonError: the first rank's that has one; with host and rank where others have none.
        InputError: a fact that differs, with host and rank of both; two ranks on one GPU.
    """
    gpu = name_gpu(ranks)
    word = Word(ranks.rank, socket.gethostname(), _versions(), problem, facts, gpu)
    words = gather_objects(word, ranks)
    ranks.nodes[:] = _list_nodes(words)
    failed = [one for one in words if one.problem is not None]
    if failed:
        error = failed[0].problem
        assert error is not None
        if len(failed) < len(words):
            error.args = (f"on {failed[0].place}: {error}",)
        error.everywhere = True
        raise error
    if shared := describe_shared_gpus([one.gpu for one in words]):
        refusal = InputError(
            f"got {shared}; expected one rank a GPU; start fewer ranks, or let each see another GPU"
        )
        refusal.everywhere = True
        raise refusal
    differing = _compare(words)
    if differing:
        more = f" (and {len(differing) - 1} more differences)" if len(differing) > 1 else ""
        refusal = InputError(
            f"got {differing[0]}{more}; expected the same on all; start every node with the same "
            "command, on the same images, code and versions"
        )
        refusal.everywhere = True
        raise refusal


def name_gpu(ranks: Ranks) -> str:
    """Name the GPU of this rank, its host before it; "" on a CPU or alone.

    By the card's own number; a part of a card (MIG), which may show the number of the whole, by
    the name that CUDA_VISIBLE_DEVICES has for it.
    """
    if ranks.world == 1 or ranks.device.type != "cuda":
        return ""
    card = visible_slice() or torch.cuda.get_device_properties(ranks.device).uuid
    return f"{socket.gethostname()} {card}"


def describe_shared_gpus(gpus: Sequence[str]) -> str:
    """Say which ranks share a GPU, of the first that is shared; "" where none is.

    Args:
        gpus: by rank, as `name_gpu` has them. What a launcher says does not tell: a rank that sees
            one GPU may be the only one that sees it, or not.
    """
    for gpu in dict.fromkeys(filter(None, gpus)):
        ranks = [str(rank) for rank, other in enumerate(gpus) if other == gpu]
        if len(ranks) > 1:
            return f"ranks {', '.join(ranks)} on one GPU ({gpu})"
    return ""


def _compare(words: list[Word]) -> list[str]:
    """Name each fact that differs: its first value, and the first other one."""
    first: dict[str, Word] = {}
    found: dict[str, str] = {}
    for word in words:
        for name, value in {**word.versions, **word.facts}.items():
            before = first.setdefault(name, word)
            other = {**before.versions, **before.facts}[name]
            if value != other and name not in found:
                found[name] = f"{name} {value} on {word.place} and {other} on {before.place}"
    return list(found.values())


def _versions() -> dict[str, str]:
    return {"version of letheon": __version__, "version of torch": torch.__version__}


def _list_nodes(words: list[Word]) -> list[dict[str, Any]]:
    nodes: dict[str, dict[str, Any]] = {}
    for word in words:
        node = nodes.setdefault(word.host, {"host": word.host, "ranks": [], **word.versions})
        node["ranks"].append(word.rank)
    return list(nodes.values())


def plan_facts(plan: Plan, run: Run) -> Facts:
    """State what a planned run is, for `agree_on_start`."""
    request = _request_fact(plan.request)
    facts = {**_setting_facts(plan.job), **request, **_data_facts(plan.data, run.ranks)}
    facts["weights"] = weights_digest(run.model)[:16]
    facts["number format"] = run.precision.dtype
    facts["loader"] = type(run.loader).__name__
    facts["kind of device"] = run.ranks.device.type
    return facts


def ranking_facts(
    kinds: Sequence[str],
    model: Classifier,
    data: Data,
    domains: Mapping[str, ImageSet],
    ranks: Ranks,
) -> Facts:
    """State what ranks the requests, for `agree_on_start`: the ranks read it together.

    Args:
        kinds: of the rankings, in their order; where there are none, nothing else is stated.
        model: that ranks.
        data: whose training images are ranked, or classes.
        domains: of the downstream set that ranks classes.
        ranks: the job.
    """
    facts = {"rankings of requests": " ".join(kinds) or "none"}
    if kinds:
        facts |= {"weights": weights_digest(model)[:16], **_data_facts(data, ranks)}
        sets = [f"{name}, {len(one)}" for name, one in domains.items()]
        facts["downstream sets"] = "; ".join(sets)
        if domains and _states_images(ranks):
            digests = [one.digest[:16] for one in domains.values()]
            facts["downstream images"] = f"digests {', '.join(digests)}"
    return facts


def comparison_facts(job: Any, request: Request, data: Data, ranks: Ranks) -> Facts:
    """State what an evaluation is, for `agree_on_start`."""
    device = {"kind of device": ranks.device.type}
    return {**_setting_facts(job), **_request_fact(request), **_data_facts(data, ranks), **device}


def _request_fact(request: Request | None) -> Facts:
    if request is None:
        return {}
    kind, digest = request.numbers
    return {"forget request": f"of {kind} {digest[:16]}"}


def _setting_facts(job: Any) -> dict[str, str]:
    """The settings by name, but for places; a method by its class."""
    facts = {}
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name in PLACES or isinstance(value, Path):
            continue
        if dataclasses.is_dataclass(value):
            name = type(value).__name__
            inner = _setting_facts(value)
            facts[field.name] = name
            facts |= {f"{field.name}.{key}": text for key, text in inner.items()}
        else:
            facts[field.name] = str(value)
    return facts


def _states_images(ranks: Ranks) -> bool:
    """Whether this rank digests images: one of each node, whose others see the same files."""
    return ranks.world > 1 and ranks.local_rank == 0


def _data_facts(data: Data, ranks: Ranks) -> dict[str, str]:
    """Labels and class names; one rank of each node also states images and code by digest."""
    labels = hashlib.sha256(json.dumps(data.classes).encode())
    for images in (data.train, data.test):
        labels.update(images.labels.astype("<i8").tobytes())
    facts = {"labels and class names": labels.hexdigest()[:16]}
    if _states_images(ranks):
        facts["train images"] = f"{len(data.train)}, digest {data.train.digest[:16]}"
        facts["test images"] = f"{len(data.test)}, digest {data.test.digest[:16]}"
        facts["code"] = code_digest()[:16]
    return facts
