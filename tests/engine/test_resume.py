"""A run that was stopped at any step ends bitwise as the one that was not."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from letheon import durable
from letheon.engine.checkpoints import saver as saver_module
from letheon.engine.checkpoints.loop_state import Course
from letheon.engine.checkpoints.run_state import RunState, StateFolder
from letheon.engine.checkpoints.saver import SaveOptions, Saver, open_saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import Seconds
from letheon.engine.method import Accuracies, BackTo, Decision, Method, Phase, Run, State
from letheon.engine.passes.one_pass import Log
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs import stop as stop_module
from letheon.engine.runs.loggers import broken_link
from letheon.engine.runs.run_folder import Record, check_free, remove_leftovers
from letheon.engine.runs.stop import STOP, Poll, Stopped, check, defer, listen
from letheon.engine.runs.together import Member, run_together
from letheon.errors import InputError, RunFailed
from letheon.loaders.batch import Reader
from letheon.loaders.factory import Kind, make_loader
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import ascent
from tests.engine.resume_tools import Break, BreakAt, attempt, differing, lines
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import PRESET, images, run_of, weights

RECIPE = Recipe(epochs=2, lr=0.02, batch_size=7, schedule="cosine", warmup=1, log_every=2)


class GoesBack(Finetune):
    """Ends with the weights of an earlier epoch, which have to come through the stop."""

    goes_back = True

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        return BackTo(0) if run.epoch_number == 1 else "go on"


class Interleaved(Finetune):
    """A step on the retain set, then one on the forget set, with an optimizer each."""

    def phases(self, run: Run, state: State, epoch: int) -> list[Phase]:
        (retain,) = super().phases(run, state, epoch)
        beside = Phase("ascend", "forget", ascent, "frozen", slot="forget", batch_size=4)
        return [replace(retain, beside=beside)]


METHODS: dict[str, Method] = {
    **cases(RECIPE, replace(RECIPE, epochs=4)),
    "adamw, average": Finetune(replace(RECIPE, optimizer="adamw", ema=0.5)),
    "lars": Finetune(replace(RECIPE, optimizer="lars")),
    "micro-batches": Finetune(replace(RECIPE, grad_accum_steps=2)),
    "goes back": GoesBack(RECIPE),
    "interleaved": Interleaved(RECIPE),
}


def run_with(method: Method, ranks: Ranks, reduce: str = "auto") -> Callable[[], Run]:
    def make() -> Run:
        run = run_of(method, ranks)
        run.precision = Precision("fp32", reduce=reduce)  # type: ignore[arg-type]
        dropout = run.model.net[2]
        dropout.register_forward_hook(lambda m, i, out: torch.nn.functional.dropout(out, 0.1))
        return run

    return make


@pytest.mark.parametrize("name", slow_but([*METHODS][::3], METHODS))
def test_every_method(name: str, tmp_path: Path) -> None:
    """Stopped a step after a save, which is done again; then right after one."""
    method = METHODS[name]
    stops = [9, 2] if name == "influence" else [3, 2]  # within its conjugate gradients
    assert differing(method, run_with(method, Ranks()), tmp_path, stops, every=2) == []


class Watched(Finetune):
    """Asks within its steps which tensors of the state that was found are still alive."""

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        gc.collect()
        alive.append({name for name, tensor in found.items() if tensor() is not None})


found: dict[str, weakref.ref[torch.Tensor]] = {}
alive: list[set[str]] = []


@pytest.mark.slow
@pytest.mark.parametrize("on_nonfinite", ["stop", "rollback"])
def test_a_loaded_state_is_let_go(
    on_nonfinite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the first step after it; but where the pass may have to be done again."""
    recipe = replace(RECIPE, momentum=0.9, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
    make = run_with(Watched(recipe), Ranks())
    before = saver_module.restore

    def restore(course: Course, saved: RunState) -> None:
        found.update({name: weakref.ref(tensor) for name, tensor in saved.tensors.items()})
        before(course, saved)

    monkeypatch.setattr(saver_module, "restore", restore)
    found.clear()
    assert attempt(Watched(recipe), make, tmp_path / "run", BreakAt(Ranks(), 1, 3), False) is None
    alive.clear()
    assert attempt(Watched(recipe), make, tmp_path / "run", Poll(Ranks()), True) is not None
    kinds = {name.partition(".")[0] for name in found}
    assert {"model", "optimizer"} <= kinds and alive
    if on_nonfinite == "rollback":
        assert alive[0] == set(found) and not alive[-1] & set(found)
    else:
        assert not any(alive)


@pytest.mark.slow
@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("name", METHODS)
def test_every_step(name: str, stop: int, tmp_path: Path) -> None:
    method = METHODS[name]
    assert differing(method, run_with(method, Ranks(), "flat"), tmp_path, [stop]) == []


WAYS = ("ddp", "flat")
BOTH = [(name, reduce) for name in ("finetune", "spkd", "interleaved") for reduce in WAYS]


def on_every_rank(ranks: Ranks, folder: Path, cases: list[tuple[str, str]]) -> dict[str, list[str]]:
    odd = {}
    for name, reduce in cases:
        method, place = METHODS[name], folder / f"{name} {reduce}"
        odd[place.name] = differing(method, run_with(method, ranks, reduce), place, [1, 2])
    return {name: what for name, what in odd.items() if what}


def test_two_ranks(tmp_path: Path) -> None:
    assert on_ranks(2, on_every_rank, tmp_path, BOTH) == [{}] * 2


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    """From three ranks on the order of DDP's buckets shows in the last bits."""
    each = [(name, WAYS[k % 2]) for k, name in enumerate(METHODS)]
    assert on_ranks(3, on_every_rank, tmp_path, [*dict.fromkeys([*BOTH, *each])]) == [{}] * 3


KINDS: list[Kind] = ["torch", "resident", "beton"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader(kind: Kind, tmp_path: Path) -> None:
    method, data = METHODS["random-label-paired"], images()

    def make() -> Run:
        run = run_of(method)
        forget = run.forget.numpy()
        run.loader = make_loader(kind, data, forget, PRESET, method.recipe.batch_size, Reader(0))
        return run

    assert differing(method, make, tmp_path, [3], every=2) == []


def members(folder: Path, poll: Poll, resume: bool, ended: dict[str, object]) -> list[Member]:
    def member(name: str) -> Member:
        method = METHODS[name]

        def start() -> tuple[Run, Log, Saver]:
            saver = open_saver(Record(folder / name, Ranks(), {}, resume), poll, resume)
            torch.manual_seed(3)
            return run_with(method, Ranks())(), saver.record.log, saver

        def end(run: Run, seconds: Seconds) -> None:
            ended[name] = weights(run), lines(folder / name)

        return Member(name, method, start, end)

    return [member(name) for name in ("finetune", "spkd", "salun", "random-label-paired")]


@pytest.mark.parametrize("stop", [5, 13])
def test_several_runs_of_one_pass(stop: int, tmp_path: Path) -> None:
    whole: dict[str, object] = {}
    parts: dict[str, object] = {}
    assert not run_together(members(tmp_path / "whole", Poll(Ranks()), False, whole), Ranks())
    poll = BreakAt(Ranks(), 4, stop)
    with pytest.raises(Break):
        run_together(members(tmp_path / "parts", poll, False, parts), Ranks(), poll)
    poll = Poll(Ranks())
    assert not run_together(members(tmp_path / "parts", poll, True, parts), Ranks(), poll)
    assert repr(parts) == repr(whole) and len(parts) == 4


def test_a_stop_of_many_runs_names_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Now(Poll):
        def after_step(self, *_: object) -> int:
            return STOP

    monkeypatch.setattr(stop_module._listener, "stopped", False)
    monkeypatch.setattr("letheon.engine.runs.together.FEW", 1)
    with pytest.raises(Stopped) as stopped:
        run_together(members(tmp_path, Poll(Ranks()), False, {}), Ranks(), Now(Ranks()))
    places = str(stopped.value)
    assert places.count("saved after step") == 1 and places.endswith("; and 3 more beside them")


def state(value: float) -> RunState:
    return RunState({"a": torch.full((3, 4), value)}, {"value": value})


def test_the_newest_whole_state_counts(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    assert not folder and folder.load(lambda facts: True) == (None, [])
    for value in (1.0, 2.0, 3.0):
        folder.save(state(value))
    folder.wait()
    names = sorted(file.name for file in folder.path.iterdir())
    assert names == ["000002.json", "000002.safetensors", "000003.json", "000003.safetensors"]
    found, damaged = folder.load(lambda facts: True)
    assert found is not None and found.facts["value"] == 3.0 and not damaged
    assert bool((found.tensors["a"] == 3.0).all())
    for name in ("000003.safetensors", "000003.json"):
        whole = (folder.path / name).read_bytes()
        for bit in range(0, 8 * len(whole), 97):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder.path / name).write_bytes(flipped)
            found, damaged = folder.load(lambda facts: True)
            assert found is not None and found.facts["value"] == 2.0
            assert len(damaged) == 1 and "000003.json is damaged" in damaged[0]
        (folder.path / name).write_bytes(whole)
    folder.clear()
    assert not folder.path.exists()


def test_a_write_that_fails_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StateFolder(tmp_path / "state")
    folder.save(state(1.0))
    folder.wait()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "flush", full)
    folder.save(state(2.0))
    with pytest.raises(RunFailed, match=r"No space left.*000002"):
        folder.save(state(3.0))
    monkeypatch.undo()
    found, damaged = folder.load(lambda facts: True)
    assert found is not None and found.facts["value"] == 1.0 and not damaged


def drifting(ranks: Ranks, folder: Path) -> str:
    method = Drifts(RECIPE)
    with pytest.raises(RunFailed) as error:
        attempt(method, lambda: run_of(method, ranks), folder, Poll(ranks, steps=2), False)
    return str(error.value)


class Drifts(Finetune):
    """The weights of the second rank move by themselves."""

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        if run.ranks.rank == 1:
            with torch.no_grad():
                run.parameters[1][0] += 1e-3


def test_weights_that_differ_between_ranks_are_found_at_the_save(tmp_path: Path) -> None:
    for line in on_ranks(2, drifting, tmp_path):
        assert "differ between rank 0 and ranks [1], 0.bias first" in line


def test_times_and_steps_between_saves() -> None:
    assert SaveOptions("10min").interval == (600.0, 0)
    assert SaveOptions("1.5h").interval == (5400.0, 0)
    assert SaveOptions("500steps").interval == (0.0, 500)
    assert SaveOptions("1 step").interval == (0.0, 1)
    assert SaveOptions("off").interval == (0.0, 0)
    for text in ("10", "min", "0s", "1.5steps", "-3min", "5epochs"):
        with pytest.raises(InputError, match="expected a time or a number of steps"):
            SaveOptions(text)


class OutOfMemory(Finetune):
    """Its third step finds no memory."""

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        if len(run.warnings) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And more")
        run.warnings.append("")


def test_a_step_without_memory_says_what_would_fit(tmp_path: Path) -> None:
    method = OutOfMemory(RECIPE)
    with pytest.raises(RunFailed, match=r"7 samples a rank in 1 micro-batch .*steps 2, .* of 3"):
        attempt(method, lambda: run_of(method), tmp_path, Poll(Ranks(), steps=1), False)
    assert StateFolder(tmp_path / "state")


def test_a_signal_that_nobody_asked_for_stops_the_job_at_its_next_part() -> None:
    """One that came while it was deferred; a second one, which is not, stops at once."""
    for then in (lambda: check(Ranks()), lambda: signal.raise_signal(signal.SIGTERM)):
        with listen():
            defer(True)
            signal.raise_signal(signal.SIGUSR1)
            defer(False)
            with pytest.raises(Stopped):
                then()
            signal.raise_signal(signal.SIGTERM)  # while it ends: ignored
    with listen():
        check(Ranks())  # forgotten by the next job


def test_curves_and_stacks_stay_when_a_run_goes_on(tmp_path: Path) -> None:
    Record(tmp_path, Ranks(), {})
    for name in ("stacks", "tensorboard"):
        (tmp_path / name).mkdir()
    Record(tmp_path, Ranks(), {}, True)
    assert (tmp_path / "stacks").is_dir() and (tmp_path / "tensorboard").is_dir()
    Record(tmp_path, Ranks(), {})
    assert not (tmp_path / "stacks").exists() and not (tmp_path / "tensorboard").exists()


def test_a_damaged_state_is_replaced_and_not_kept(tmp_path: Path) -> None:
    """Else it would be one of the two that stay, and a whole one go in its place."""
    folder = StateFolder(tmp_path / "state")
    for value in (1.0, 2.0):
        folder.save(state(value))
    folder.wait()
    (folder.path / "000002.json").write_text("{}")
    (folder.path / "000009.safetensors").write_bytes(b"of a process that died before the JSON file")
    again = StateFolder(tmp_path / "state")
    found, damaged = again.load(lambda facts: True)
    assert found is not None and found.facts["value"] == 1.0 and len(damaged) == 1
    again.save(state(3.0))
    again.wait()
    assert sorted({file.stem for file in folder.path.iterdir()}) == ["000001", "000003"]
    again.clear()
    assert not folder.path.exists()


def test_a_state_whose_lines_are_missing_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut, or a deletion that was cut short: the lines are no one's to invent."""
    method = Finetune(RECIPE)
    whole = attempt(method, lambda: run_of(method), tmp_path / "whole", Poll(Ranks()), False)
    assert whole is not None
    flushed: list[Path] = []
    flush = durable.flush
    monkeypatch.setattr(durable, "flush", lambda path: (flushed.append(path), flush(path)))
    poll = BreakAt(Ranks(), 6, 7)  # in the second epoch
    assert attempt(method, lambda: run_of(method), tmp_path / "run", poll, False) is None
    assert tmp_path / "run" / "metrics.jsonl" in flushed
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(b"")
    ended = attempt(method, lambda: run_of(method), tmp_path / "run", Poll(Ranks()), True)
    assert ended is not None and ended[1] == whole[1]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), ended[0].values(), strict=True))
    assert "is damaged (metrics.jsonl has 0 bytes of" in capsys.readouterr().err


def test_a_line_that_was_changed_while_the_run_stood_still_breaks_its_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line, which no other line holds the digest of yet: found by the drill."""
    method = Finetune(RECIPE)
    assert attempt(method, lambda: run_of(method), tmp_path, BreakAt(Ranks(), 6, 7), False) is None
    log = tmp_path / "metrics.jsonl"
    first = log.read_bytes()
    assert b'"loss": ' in first.splitlines()[-1]
    place = first.rindex(b'"loss": ') + len(b'"loss": ')
    log.write_bytes(first[:place] + bytes([first[place] ^ 1]) + first[place + 1 :])  # 2 is 3 now
    ended = attempt(method, lambda: run_of(method), tmp_path, Poll(Ranks()), True)
    assert ended is not None and "is not as it was written" in capsys.readouterr().err
    assert broken_link(log) == len(first.splitlines()) + 1


def test_what_a_kill_at_the_edges_leaves(tmp_path: Path) -> None:
    """Before the run has said what it is, and after it has said that it is finished."""
    out = tmp_path / "run"
    (out / "tensorboard").mkdir(parents=True)
    for name in ("settings.json", "versions.json", "versions.json.partial"):
        check_free(out, overwrite=False, resume=True)
        (out / name).write_text("{}")
    check_free(out, overwrite=False, resume=True)
    (out / "run.json").write_text("{}")
    (out / "state" / "prepare").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    remove_leftovers(out)
    assert not (out / "state").exists() and (out / "notes.txt").exists()
