"""What a training shows while it runs: epoch, phase and loss, without waiting for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from letheon.errors import join_few
from letheon.progress import Line, clear, format_seconds, say, shorten

T = TypeVar("T")


class HostCopy:
    """A tensor on its way to the host: sent now, read later, by when the copy is long done."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._done: torch.cuda.Event | None = None

    def send(self, values: Tensor) -> None:
        """Begin the copy of `values` (n,), as they are at this point of the device's work."""
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._host, self._done = values.clone(), None

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._host is not None and (self._done is None or self._done.query())

    @property
    def sent(self) -> bool:
        """Whether something was sent that was not read."""
        return self._host is not None

    def read(self) -> list[float]:
        """Return the numbers that were sent; waits for them where they are still on their way."""
        assert self._host is not None
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._host.tolist()
        self._host = None
        return numbers


class Progress:
    """Every `every` steps, a line with the mean loss of this rank's samples since the last one.

    What the steps added up to is copied to the host when a line is due, and read when the next one
    is.
    """

    def __init__(self, every: int, write: Callable[..., None]):
        """`write(step=..., loss=..., lr=...)` is called once a line."""
        self.every, self.write = every, write
        self.before = (0.0, 0.0)  # loss and samples at the last line
        self._copy = HostCopy()
        self._sent: tuple[int, float] | None = None

    def step(self, number: int, sums: Tensor, rate: float) -> None:
        """After step `number`, counted from one; `sums` holds loss and samples so far, on top."""
        if number % self.every:
            return
        self.read()
        self._copy.send(sums)
        self._sent = (number, rate)

    def read(self) -> None:
        """Write the line that is on its way, if any; also at the end of the pass."""
        if self._sent is None:
            return
        number, rate = self._sent
        self._sent = None
        loss, samples, *_ = self._copy.read()
        count = samples - self.before[1]  # 0 where every step since then was left out
        mean = (loss - self.before[0]) / count if count else math.nan
        self.before = (loss, samples)
        self.write(step=number, loss=mean if math.isfinite(mean) else str(mean), lr=rate)


class EpochPart(NamedTuple):
    """Which part of its epoch a pass is."""

    later: int  # passes that follow in the same epoch
    begin: float  # share of the epoch's images that lie before it
    end: float  # and with it


class Shown(NamedTuple):
    """One pass of one run, as the line shows it."""

    name: str  # of the run; "" where it is alone
    phase: str
    epoch: int
    epochs: int
    part: EpochPart  # begins behind the steps that an earlier process has taken
    sums: Callable[[], Tensor]  # loss and samples of this rank so far, on top
    losses: Mapping[str, float]  # mean loss by phase, once the pass is closed

    @property
    def title(self) -> str:
        """The run's name, or its phase."""
        return self.name or self.phase

    def share_done(self, share: float) -> float:
        """The share of the run's epochs that is done with this share of the pass."""
        begin, end = self.part.begin, self.part.end
        return (self.epoch + begin + (end - begin) * share) / self.epochs


class TrainingLine:
    """Show the passes of a training, one after another; of several runs, those fed together."""

    def __init__(self, speaks: bool) -> None:
        """`speaks` is False on all ranks but the first."""
        self._speaks = speaks
        self._started = time.perf_counter()
        self._before: Sequence[Shown] = ()  # the pass before
        self._others: Sequence[float] = ()
        self._earlier: float | None = None  # share of all that an earlier process has done
        self._clear()

    def _clear(self) -> None:
        self._losses: dict[str, float] = {}
        self._waited = self._seconds = 0.0
        self._images = 0

    def watch(
        self,
        shown: Sequence[Shown],
        batches: Iterable[T],
        steps: int,
        images: Callable[[T], int],
        others: Sequence[float] = (),
    ) -> Iterator[T]:
        """Yield the batches of a pass.

        Args:
            shown: the runs that are fed by it.
            batches: the batches.
            steps: how many they are.
            images: counts the images of a batch, over all ranks.
            others: of each run that is not fed by it, the share of its epochs that is done.
        """
        self._note()
        self._others = others
        first, self._before = shown[0], shown
        epochs = max(one.epochs for one in shown)
        if self._earlier is None:
            self._earlier = self._share_done(shown, 0.0)
        copy, known = HostCopy(), [""]

        def loss() -> list[str]:
            if copy.ready:
                total, samples, *_ = copy.read()
                known[0] = f"loss {total / samples:.4g}" if samples else ""
            copy.send(first.sums())
            return known if known[0] else []

        def left(share: float) -> float:
            return self._seconds_left(shown, share)

        titles = join_few([shorten(one.title) for one in shown], 1)
        label = f"epoch {first.epoch + 1}/{epochs} {titles}"
        line = Line(label, steps, self._speaks, loss, left)
        yield from line.watch(batches, images)
        self._images += line.images
        self._waited += line.waited
        self._seconds += time.perf_counter() - line.started

    def close(self) -> None:
        """After the last pass."""
        self._note()
        clear()

    def _note(self) -> None:
        """Note the losses of the pass before; at the end of an epoch, write its line."""
        shown, self._before = self._before, ()
        for one in shown:
            for phase, loss in one.losses.items():
                self._losses[one.name or phase] = loss
        if not shown or shown[0].part.later:
            return
        epochs, epoch = max(one.epochs for one in shown), shown[0].epoch + 1
        line = Line(f"epoch {epoch}/{epochs}", 1, self._speaks, self._means)
        line.images, line.waited = self._images, self._waited
        line.started -= self._seconds
        if line.mode == "lines":
            left = format_seconds(self._seconds_left(shown, 1.0))
            say("  ".join([line.label, *line.speed(), f"left {left}"]))
        self._clear()

    def _seconds_left(self, shown: Sequence[Shown], share: float) -> float:
        """Estimate the time to the end of all runs, with this share of the pass of some."""
        done, earlier = self._share_done(shown, share), self._earlier or 0.0
        spent = time.perf_counter() - self._started
        return spent * (1 - done) / (done - earlier) if done > earlier else 0.0

    def _share_done(self, shown: Sequence[Shown], share: float) -> float:
        """Share of all runs that is done, with this share of the pass of some."""
        shares = [*self._others, *(one.share_done(share) for one in shown)]
        return sum(shares) / len(shares)

    def _means(self) -> list[str]:
        return [", ".join(f"{name} loss {loss:.4g}" for name, loss in self._losses.items())]
