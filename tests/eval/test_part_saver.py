"""An inference pass with stored outputs that was stopped after any batch ends as if it had not."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from letheon.engine.checkpoints.run_state import RunState, StateFolder
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.engine.runs.stop import Poll, Stopped, listen
from letheon.eval.inference import extract, part_saver, passes
from letheon.eval.inference.cache import stored_outputs
from letheon.eval.inference.part_saver import PartSaver
from letheon.eval.inference.passes import Passes, Store, SweepOptions, Swept
from letheon.eval.inference.taps import stages
from letheon.loaders.batch import Batch
from tests.engine.resume_tools import Break
from tests.eval.test_features import CLASSES, loader
from tests.eval.test_together import equal
from tests.pool import on_ranks

KNOWN = {"train": ("a", 47), "test": ("b", 30)}
IMAGES = {"train": "1" * 64, "test": "2" * 64}


class Counts:
    """A loader that counts the batches of its sweeps."""

    def __init__(self, source: Any, counts: list[int]) -> None:
        self._source, self._counts = source, counts
        self.train, self.steps = source.train, source.steps

    def sweep(self, indices: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        for batch in self._source.sweep(indices, skip):
            self._counts.append(1)
            yield batch


class Waits(StateFolder):
    """The states of a process that is never killed while it writes."""

    def save(self, state: RunState) -> None:
        super().save(state)
        self.wait()


def sweep(
    ranks: Ranks, models: int, folder: Path | None, strike: Callable[[int], int | None]
) -> tuple[list[Passes], int]:
    """Models over both sets, and the batches read; `strike` is asked after each of them."""
    counts: list[int] = []

    class Strikes(Poll):
        def after_step(self, *broken: Callable[[], bool]) -> int:
            word = strike(len(counts))
            return super().after_step(*broken) if word is None else word

    nets = [build("small", CLASSES, seed=seed) for seed in range(models)]
    swept = [Swept(str(k), net, f"w{k}", stages(net)[:k]) for k, net in enumerate(nets)]
    loaders: Any = {k: Counts(loader(ranks, count), counts) for k, (_, count) in KNOWN.items()}
    store = None
    if folder is not None:
        store = Store(folder, KNOWN, IMAGES, {"batch": 10}, (0.0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "Poll", Strikes)
        patch.setattr(part_saver, "StateFolder", Waits)
        patch.setattr(extract, "_HELD_BYTES", 40_000)  # a few batches
        found = passes.sweep_together(swept, loaders, ranks, SweepOptions(store=store))
    return found, len(counts)


def same(ones: list[Passes], others: list[Passes]) -> bool:
    return all(
        equal(one.outputs[key], other.outputs[key])
        for one, other in zip(ones, others, strict=True)
        for key in KNOWN
    )


def break_at(last: int) -> Callable[[int], None]:
    def strike(count: int) -> None:
        if count > last:
            raise Break

    return strike


def stops(ranks: Ranks, folder: Path, models: int, after: Sequence[int]) -> list[int]:
    """After how many batches a stop led to another end or to more reads; last, all batches."""
    whole, count = sweep(ranks, models, None, lambda count: None)
    odd = []
    for stop in after:
        place = folder / str(stop)
        with pytest.raises(Break):
            sweep(ranks, models, place, break_at(stop))
        ended, read = sweep(ranks, models, place, lambda count: None)
        # The batch after which a stop strikes is lost.
        if not same(whole, ended) or read != count - stop:
            odd.append(stop)
        if ranks.main:
            assert {len(path.name) for path in place.iterdir()} == {32}, "parts are removed"
    return [*odd, count]


@pytest.mark.parametrize(("models", "after"), [(1, (1, 4, 7)), (3, (2, 5))])
def test_a_pass_goes_on(models: int, after: tuple[int, ...], tmp_path: Path) -> None:
    """Of five batches of one set and three of the other."""
    assert stops(Ranks(), tmp_path, models, after) == [8]


@pytest.mark.slow
@pytest.mark.parametrize("models", [1, 3])
def test_a_pass_goes_on_after_any_batch(models: int, tmp_path: Path) -> None:
    assert stops(Ranks(), tmp_path, models, range(1, 8)) == [8]


def test_on_two_ranks(tmp_path: Path) -> None:
    assert on_ranks(2, stops, tmp_path, 2, (2,)) == [[8], [8]]


def test_what_was_left_is_found_and_damage_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = sweep(Ranks(), 1, None, lambda count: None)
    with pytest.raises(Break):
        sweep(Ranks(), 1, tmp_path, break_at(4))
    (parts,) = tmp_path.glob("*.parts")
    left = tmp_path / f"{parts.name.removesuffix('.parts')}.partial-1"
    left.mkdir()
    (left / "images").write_text(IMAGES["train"])
    assert stored_outputs(tmp_path, IMAGES["train"]) == [left, parts]
    assert stored_outputs(tmp_path, IMAGES["test"]) == []
    files = sorted(parts.glob("0-of-1/*.safetensors"))
    content = bytearray(files[2].read_bytes())
    content[-9] ^= 4
    files[2].write_bytes(content)
    ended, read = sweep(Ranks(), 1, tmp_path, lambda count: None)
    assert same(whole, ended) and read == 8 - 2
    assert "000003.json is damaged (000003.safetensors has another digest)" in (
        capsys.readouterr().err
    )
    assert [len(path.name) for path in tmp_path.iterdir()] == [32, 32]
    assert len(stored_outputs(tmp_path, IMAGES["test"])) == 1


def test_a_signal_saves_and_other_batches_begin_anew(tmp_path: Path) -> None:
    def strike(count: int) -> None:
        if count == 3:
            signal.raise_signal(signal.SIGTERM)

    with listen(), pytest.raises(Stopped, match="saved the answers to 3 batches of a pass"):
        sweep(Ranks(), 2, tmp_path, strike)
    files = [*tmp_path.glob("*.parts/0-of-1/*.json")]
    assert len(files) == 2 * 3
    for file in files:  # as if of another batch size
        facts = json.loads(file.read_text())
        del facts["digest"]
        facts["origin"]["batch"] = 11
        seal = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({**facts, "digest": seal}, sort_keys=True))
    with listen():  # which forgets the signal
        _, read = sweep(Ranks(), 2, tmp_path, lambda count: None)
    assert read == 8


def test_a_signal_after_the_last_poll_of_a_pass_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(StateFolder):
        def wait(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            super().wait()

    monkeypatch.setattr(part_saver, "StateFolder", Late)
    saver = PartSaver([tmp_path / "x.parts"], {}, Ranks(), Poll(Ranks()))
    with listen(), pytest.raises(Stopped), saver.hold_signals():
        saver.close({}, 3, 30)
    with listen():  # which forgets the signal
        pass
