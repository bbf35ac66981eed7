"""A pass before training that was stopped after any batch ends bitwise as the one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from letheon.engine import statistics
from letheon.engine.checkpoints import sweep_state
from letheon.engine.checkpoints.run_state import RunState, StateFolder
from letheon.engine.checkpoints.sweep_state import Rows, Sums, Sweeps
from letheon.engine.distributed import Ranks, gather_in_turn, scatter_in_turn
from letheon.engine.method import Run
from letheon.engine.numbers.sweep import repeat
from letheon.engine.recipe import Recipe
from letheon.engine.runs.stop import SAVE, Poll, Stopped, defer, listen, signals_wait
from letheon.errors import RunFailed
from letheon.folders import state_folder
from letheon.launch import mask
from letheon.loaders.batch import Batch
from letheon.methods.amun import Amun
from letheon.methods.finetune import Finetune, cross_entropy
from letheon.methods.fisher import class_loss
from letheon.methods.influence import conjugate_gradients
from letheon.methods.unsir import Unsir
from tests.engine.resume_tools import Break, BreakAt
from tests.launch_tools import Scripts
from tests.pool import on_ranks
from tests.test_resume import lines_of, stop_after, weights_of
from tests.world import run_of

METHOD = Finetune(Recipe(batch_size=7))
LOSSES = [partial(class_loss, label=label) for label in range(3)]


def solve(run: Run) -> list[Tensor]:
    """Six of at most nine rounds, of a matrix with six eigenvalues."""
    diagonal = torch.arange(1.0, 7).repeat(3)
    goal, watch = [torch.linspace(-1, 1, 18)], partial(repeat, run, "retain", "solve")
    return conjugate_gradients(lambda v: [diagonal * v[0]], goal, 9, 1e-6, run, watch)


WORK: dict[str, Callable[[Run], Any]] = {
    "gradients": lambda run: statistics.gradient_sum(run, "forget", cross_entropy),
    "squares": lambda run: statistics.squared_gradient_sum(run, "forget", cross_entropy),
    "a pass for each class": lambda run: statistics.squared_gradient_sum_of(run, "forget", LOSSES),
    "moments": lambda run: statistics.class_moments(run, "forget"),
    "covariances": lambda run: statistics.class_covariances(run, "forget"),
    "inputs": lambda run: statistics.input_covariances(run, "forget", ["0", "5"]),
    "patches": lambda run: statistics.patch_moments(run, "all", 2, 15),
    "outputs": lambda run: statistics.outputs_by_index(run, "forget"),
    "adversarial": lambda run: Amun(steps=2, doublings=2).prepare(run).images.own,
    "noise images": lambda run: Unsir(noise_steps=3, noise_images=9).prepare(run).images,
    "conjugate gradients": lambda run: solve(run),
    "two passes, then one of them again": lambda run: [
        statistics.gradient_sum(run, part, cross_entropy)  # type: ignore[arg-type]
        for part in ("forget", "retain", "forget")
    ],
}


class Counts:
    """A loader that notes what its sweeps read."""

    def __init__(self, run: Run) -> None:
        self._loader, self.read = run.loader, 0
        run.loader = self  # type: ignore[assignment]

    def sweep(self, indices: Sequence[int], skip: int = 0) -> Iterator[Batch]:
        for batch in self._loader.sweep(indices, skip):
            self.read += 1
            yield batch


# Whose batches are read again, but not what is done with them.
HELD = ("a pass for each class", "conjugate gradients", "noise images")


def compute(name: str, poll: Poll, folder: Path | None) -> tuple[list[Tensor], int] | None:
    """The result and the batches that were read for it; nothing where the poll broke it off."""
    run = run_of(METHOD, poll.ranks)
    counts = Counts(run)
    if folder is not None:
        run.sweeps = Sweeps(folder, poll, folder)
        run.sweeps.load({"images": run.images})
    try:
        result = tree_leaves(WORK[name](run))
    except Break:
        return None
    finally:
        if run.sweeps is not None:
            run.sweeps.close()
    return result, counts.read


def stopped_at_each(ranks: Ranks, name: str, folder: Path) -> list[int]:
    """Where the end was another, or batches were read again; the last entry counts the stops."""
    whole = compute(name, Poll(ranks), None)
    assert whole is not None
    odd, left = [], {}
    for stop in range(1, sys.maxsize):
        place, poll = folder / str(stop), BreakAt(ranks, 1, sys.maxsize)
        if compute(name, BreakAt(ranks, 1, stop), place) is not None:
            # Whatever was counted and saved is not done again.
            odd += [at for at, count in left.items() if at + count > stop]
            return [*odd, stop - 1]
        ended = compute(name, poll, place)
        assert ended is not None
        left[stop] = poll.taken
        same = all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(whole[0], ended[0], strict=True)
        )
        # A stop strikes after the next batch, whose read is lost.
        if not same or (name not in HELD and ended[1] > whole[1] - stop + 1):
            odd.append(stop)
    raise AssertionError


def each_on_ranks(ranks: Ranks, folder: Path, names: list[str]) -> list[list[int]]:
    return [stopped_at_each(ranks, name, folder / name) for name in names]


@pytest.mark.parametrize("name", WORK)
def test_a_pass_goes_on_after_any_batch(name: str, tmp_path: Path) -> None:
    (*odd, stops) = stopped_at_each(Ranks(), name, tmp_path)
    assert odd == [] and stops >= 1


@pytest.mark.slow
def test_on_two_ranks(tmp_path: Path) -> None:
    """Of 11 forget samples, so that one rank has a batch more than the other."""
    names = ["gradients", "outputs", "conjugate gradients", "two passes, then one of them again"]
    for found in on_ranks(2, each_on_ranks, tmp_path, names):
        assert all(len(one) == 1 and one[0] >= 1 for one in found)


def break_off(ranks: Ranks, folder: Path, stop: int) -> bool:
    """Whether the search for adversarial images was broken off after so many batches."""
    return compute("adversarial", BreakAt(ranks, 1, stop), folder) is None


def go_on(ranks: Ranks, folder: Path) -> tuple[bool, int]:
    """Whether the search ends as it should, and how many batches it read again of this rank's."""
    whole = compute("adversarial", Poll(ranks), None)
    ended = compute("adversarial", Poll(ranks), folder)
    assert whole is not None and ended is not None
    same = all(torch.equal(a, b) for a, b in zip(whole[0], ended[0], strict=True))
    return same, whole[1] - ended[1]


def save_again(ranks: Ranks, folder: Path) -> None:
    """Load what was saved, and save it beside another pass."""
    poll = Poll(ranks)
    sweeps = Sweeps(folder, poll, folder)
    sweeps.load({"images": run_of(METHOD, ranks).images})
    poll.after_step = lambda *_: SAVE  # type: ignore[method-assign]
    for _ in sweeps.watch("another", Sums(torch.zeros(3)), lambda skip: iter(range(1)), 1):
        pass
    sweeps.close()


def write_parts_alone(ranks: Ranks, folder: Path) -> None:
    """As a process that is killed once the other ranks' shares are on disk, and not its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_state, "save_on_first", lambda *args: None)
        save_again(ranks, folder)


def test_each_rank_has_a_file_and_the_first_holds_no_others_rows(tmp_path: Path) -> None:
    """What a rank has found lies in a file of its own, and comes back to it."""
    assert all(on_ranks(3, break_off, tmp_path, 1))
    folders = [tmp_path, tmp_path / "part-0001", tmp_path / "part-0002"]
    newest = [max(folder.glob("*.safetensors")) for folder in folders]
    names = [{*load_file(file)} for file in newest]
    assert names[0] == names[1] == names[2]
    rows = [sum(v.numel() for v in load_file(file).values()) for file in newest]
    assert max(rows) < 0.5 * sum(rows)
    assert all(same and again > 0 for same, again in on_ranks(3, go_on, tmp_path))


def test_the_first_rank_holds_one_other_share_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks 1 to 3 send theirs to a first rank without them: when one comes the last is gone."""
    held: list[weakref.ref[torch.Tensor]] = []

    def gather(own: object, ranks: Ranks) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(3):
            assert all(one() is None for one in held)
            share = {"rows": torch.ones(4)}
            held.append(weakref.ref(share["rows"]))
            yield share
            del share

    monkeypatch.setattr(sweep_state, "gather_in_turn", gather)
    for name in ("wait_for_ranks", "fail_together", "save_on_first"):
        monkeypatch.setattr(sweep_state, name, lambda *args: None)
    shares = sweep_state._Shares(tmp_path, Ranks(0, 4))
    shares.save({"rows": torch.ones(4)}, {})
    assert len(held) == 3 and len([*tmp_path.glob("part-*/*.safetensors")]) == 3


def fail_in_turn(ranks: Ranks, give: bool) -> str:
    """What a rank says where the first one fails as it gives or takes shares, then a sum of all."""
    share = {"rows": torch.full((3,), float(ranks.rank))}

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        yield {**share}
        raise RunFailed("a damaged file")

    try:
        if give:
            scatter_in_turn(parts(), ranks)
        else:
            with closing(gather_in_turn(share, ranks)) as others:
                for _ in others:
                    raise RunFailed("a full disk")
    except RunFailed as error:
        assert sum_of(ranks) == 3
        return str(error)
    return ""


def sum_of(ranks: Ranks) -> float:
    total = torch.tensor([float(ranks.rank)])
    torch.distributed.all_reduce(total)
    return float(total)


@pytest.mark.parametrize(("give", "reason"), [(True, "a damaged file"), (False, "a full disk")])
def test_a_first_rank_that_fails_in_between_lets_the_others_go(give: bool, reason: str) -> None:
    first, *others = on_ranks(3, fail_in_turn, give)
    assert first == reason and all("the first rank failed" in text for text in others)


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_shares_without_the_first_ranks_replace_nothing(kills: int, tmp_path: Path) -> None:
    assert all(on_ranks(2, break_off, tmp_path, 1))
    for _ in range(kills):
        on_ranks(2, write_parts_alone, tmp_path)
    assert all(same and again > 0 for same, again in on_ranks(2, go_on, tmp_path))


def test_a_share_in_use_stays_until_the_next_is_whole(tmp_path: Path) -> None:
    """The newest state has lost a share; a kill in the save after it leaves the one before."""
    assert all(on_ranks(2, break_off, tmp_path, 1))
    on_ranks(2, save_again, tmp_path)
    newest = max((tmp_path / "part-0001").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    on_ranks(2, write_parts_alone, tmp_path)
    assert all(same and again > 0 for same, again in on_ranks(2, go_on, tmp_path))


@pytest.mark.parametrize("newer", [False, True])
def test_every_ranks_share_goes_once_the_mask_is_written(newer: bool, tmp_path: Path) -> None:
    """A share that is newer than the mask is of another command, and stays."""
    out = tmp_path / "mask.safetensors"
    out.write_bytes(b"a mask")
    state = state_folder(out)
    for place in (state, state / "part-0001"):
        StateFolder(place).write(RunState({"a": torch.ones(1)}, {}))
    for file in state.rglob("*"):
        os.utime(file, (1, 1))
    if newer:
        os.utime(next((state / "part-0001").glob("*.safetensors")))
        os.utime(out, (2, 2))
    mask.remove_old_state(out)
    assert state.exists() == newer and out.exists()


def test_a_state_without_a_part_is_none(tmp_path: Path) -> None:
    assert all(on_ranks(2, break_off, tmp_path, 1))
    for file in (tmp_path / "part-0001").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert on_ranks(2, go_on, tmp_path) == [(True, 0)] * 2


def test_other_sums_are_not_taken(tmp_path: Path) -> None:
    """Of other images, other weights or another part of the set, a pass begins from its start."""
    assert compute("gradients", BreakAt(Ranks(), 1, 1), tmp_path) is None
    run = run_of(METHOD)
    sweeps = run.sweeps = Sweeps(tmp_path, Poll(Ranks()), tmp_path)
    assert not sweeps.load({"images": "others"})
    assert sweeps.load({"images": ""})
    counts = Counts(run)
    statistics.gradient_sum(run, "all", cross_entropy)
    assert counts.read == 6
    with torch.no_grad():
        run.parameters[0][0] += 1
    statistics.gradient_sum(run, "forget", cross_entropy)
    assert counts.read == 8


def wait_for_state(folder: Path) -> None:
    """Until the thread of a job that was broken off has written its state."""
    while not [*folder.glob("*.json")]:
        time.sleep(0.01)


def test_a_mask_goes_on(
    tmp_path: Path, scripts: Scripts, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, state = tmp_path / "masks.safetensors", tmp_path / ".masks.safetensors.state"
    args = ("mask", "--weights", original, "--data", "digits", "--forget", "class:3", "--out", out)
    args = (*args, "--batch-size", "32", "--save-every", "2steps")

    class Breaks(Poll):
        taken = 0

        def after_step(self, *broken: Callable[[], bool]) -> int:
            self.taken += 1
            if self.taken > 3:
                raise Stopped("on purpose")
            return super().after_step(*broken)

    with monkeypatch.context() as patch:
        patch.setattr(mask, "Poll", Breaks)
        assert scripts(*args).code == 75 and not out.exists()
    wait_for_state(state)
    ended = scripts(*args)
    assert ended.code == 0 and "goes on with the unfinished mask" in ended.err
    assert not state.exists()
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert scripts(*args, "--overwrite").code == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
    # A process that dies after the mask was written leaves a state that is older than the mask.
    state.mkdir()
    (state / "000001.json").write_text("{}")
    ended = scripts(*args)
    assert ended.code == 2 and state.exists()
    out.touch()
    assert scripts(*args).code == 2 and not state.exists()


def test_a_signal_saves_within_the_pass(tmp_path: Path) -> None:
    class Signals(BreakAt):
        def after_step(self, *broken: Callable[[], bool]) -> int:
            if self.taken == 0:
                signal.raise_signal(signal.SIGTERM)
            return super().after_step(*broken)

    with listen(), pytest.raises(Stopped, match="saved in its preparation, after 1 of 2 batches"):
        compute("gradients", Signals(Ranks(), 0, sys.maxsize), tmp_path)
    with listen():  # which forgets the signal
        ended = compute("gradients", Poll(Ranks()), tmp_path)
    assert ended is not None and ended[1] == 1


@pytest.mark.slow
def test_a_run_stopped_in_its_preparation_goes_on(
    tmp_path: Path, scripts: Scripts, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("forget", "--weights", original, "--data", "digits", "--forget", "class:3")
    args = (*args, "--save-every", "3steps", "--out", tmp_path / "run")
    short = ("salun", "random-label", "--epochs", "1", "--batch-size", "32")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        ended = scripts(*args, *short)
        assert ended.code == 75, ended.err
    prepared = tmp_path / "run" / "state" / "prepare"
    wait_for_state(prepared)
    assert not [*prepared.parent.glob("*.json")]
    ended = scripts(*args, *short)
    assert ended.code == 0 and "goes on with the unfinished run" in ended.err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["resumed"] == [{"epoch": 0, "phase": 0, "steps": 0, "world": 1, "overrides": []}]
    assert scripts(*args[:-1], tmp_path / "whole", *short).code == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_a_pass_leaves_the_signals_to_another_run_that_has_begun(tmp_path: Path) -> None:
    """Of several runs of a call, one trains already: its work is not lost to a signal."""
    sweeps = Sweeps(tmp_path / "state", Poll(Ranks()), tmp_path)
    defer(True)
    try:
        assert [*sweeps.watch("sum", Rows([]), lambda skip: iter(range(2)), 2)] == [0, 1]
        assert signals_wait()
    finally:
        defer(False)
