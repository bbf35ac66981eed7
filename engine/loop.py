"""The one training loop.

The events of a method, each called by name at its place:

    state = method.prepare(run)
    for epoch in range(epochs):
        for phase in method.phases(run, state, epoch):
            for batch in loader.train(phase.stream, epoch):
                loss = phase.loss(net, batch);  backward;  gradients averaged over ranks
                method.edit_grads(run, state, phase)
                optimizer of phase.slot steps
                method.edit_weights(run, state, phase)
                the same for one batch of phase.beside
        method.after_epoch(run, state, accuracies)
    method.finish(run, state)

The step never waits for the host: losses and counts stay on the device and are read once a phase.
Each rank's loss is weighted by its share of the global batch, so an uneven last batch counts each
sample once whatever the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from letheon.engine.checkpoints.loop_state import (
    Course,
    collect,
    pass_state,
    share_state,
)
from letheon.engine.checkpoints.method_state import State, state_dict
from letheon.engine.checkpoints.model_file import tensors_digest, weights_digest
from letheon.engine.compiled import CodeFile, Start, cache_watch
from letheon.engine.distributed import require_equal
from letheon.engine.health import check_finite, measure_accuracies, watch_collapse
from letheon.engine.memory.sharding import check_sharding, shard_run
from letheon.engine.memory.shards import own_parts
from letheon.engine.method import BackTo, Decision, Method, Phase, Run
from letheon.engine.passes.one_pass import Log, Pass, goes_back
from letheon.engine.runs.progress import EpochPart, TrainingLine
from letheon.engine.step import assemble
from letheon.errors import RunFailed
from letheon.loaders.batch import Loader
from letheon.progress import say

if TYPE_CHECKING:
    from letheon.engine.checkpoints.saver import Saver

Shapes = dict[str, tuple[int, ...]]
"""Of a network's weights and statistics, by key."""


@dataclass
class Seconds:
    """Wall clock of one run, in seconds; evaluation and saving are nobody's training time."""

    prepare: float = 0.0  # teachers, masks, one-shot edits
    compile: float = 0.0  # forward and backward of the first call of each graph
    train: float = 0.0  # everything else from the first batch of each pass to its last step
    start: Start = ""  # cold: a graph was compiled; warm: all came from the cache; "": no graph
    together: int = 1  # runs, at most, that were fed in one pass; their steps are in `train` too


def run_method(
    method: Method,
    run: Run,
    log: Log = lambda *_, **__: None,
    saver: Saver | None = None,
) -> Seconds:
    """Train `run.model` in place as `method` says.

    With a `saver` the run goes on from the state that it has found, and is saved on its way.

    Returns:
        The seconds spent; equal weights on every rank are checked by digest after `prepare` and
        at the end.

    Raises:
        RunFailed: on every rank: a loss or a weight is not finite, a retain phase met a forget
            sample, the ranks' weights differ, the method left its model changed, or the network
            collapsed and the recipe says stop.
        Stopped: a signal came, and the state is saved.
    """
    seconds = Seconds()
    line = TrainingLine(run.ranks.main)
    for one in passes(method, run, seconds, log, saver):
        one.begin()
        for batch, other in line.watch(
            [one.shown()], one.batches(), one.steps - one.skip, lambda item: item[0].total
        ):
            one.take(batch, other)
            if saver is not None:
                saver.after_step()
    line.close()
    return seconds


def passes(
    method: Method, run: Run, seconds: Seconds, log: Log, saver: Saver | None = None
) -> Iterator[Pass]:
    """Yield the run as the passes over the data it asks for; the caller begins and feeds each.

    What lies before, between and after the passes is done here, and `seconds` filled in. Raises as
    `run_method`.
    """
    known = len(run.notes)
    shapes = _place(method, run, saver)
    course = _prepare(method, run, seconds)
    for note in run.notes[known:]:
        log("note", text=note)
    code, cache = CodeFile(run.precision.compile_file, run.ranks.main), cache_watch()
    run.sweeps = None
    course.origin = saver.start(course) if saver is not None else None
    for epoch in range(course.epoch, run.recipe.epochs):
        yield from _feed_epoch(method, course, epoch, log, saver)
        code.save()
        moment = f"after step {course.steps}, the end of epoch {epoch}"
        check_finite(run, moment)
        if epoch + 1 < run.recipe.epochs:
            collapsed = not method.from_scratch and watch_collapse(run, log, moment)
            if saver is not None and not collapsed and _shapes(run) == shapes:
                saver.note_finite(epoch)
        if _decide(method, course, epoch, log) != "go on":
            break
        course.epoch, course.phase = epoch + 1, 0
        if saver is not None and course.epoch < run.recipe.epochs:
            saver.after_epoch()
    course.step.finish()
    seconds.compile, seconds.start = course.step.compile_seconds, cache()
    seconds.train -= seconds.compile
    _finish(method, course, shapes)


def _place(method: Method, run: Run, saver: Saver | None) -> Shapes:
    """Before the method's first word: device, number format, split; the network's shapes then."""
    run.epoch = run.epoch.to(run.ranks.device)
    if saver is not None:
        saver.prepare(run)
    _settle_precision(run)
    if run.splits:
        check_sharding(method, run)
        shard_run(run)
    else:
        run.precision.apply(run.model, run.ranks.device)
    return _shapes(run)


def _prepare(method: Method, run: Run, seconds: Seconds) -> Course:
    """Let the method prepare, on the clock; then the step that all its phases share."""
    started = time.perf_counter()
    state = method.prepare(run) or State()
    state_dict(state)  # a field that cannot be saved is refused before the first step
    _require_equal(run, "weights after prepare")
    sources = _open_sources(method, run)
    run.shared = None
    seconds.prepare = time.perf_counter() - started
    if run.sweeps is not None:
        seconds.prepare += run.sweeps.seconds
    return Course(run, assemble(method, run, state), state, seconds, sources)


def _feed_epoch(
    method: Method, course: Course, epoch: int, log: Log, saver: Saver | None
) -> Iterator[Pass]:
    """Yield the passes of one epoch, a pass again where it is rolled back.

    The first pass goes on from the state that was found.
    """
    run = course.run
    run.epoch.fill_(epoch)
    run.epoch_number = epoch
    phases = method.phases(run, course.state, epoch)
    parts = _divide(course, phases)
    for number, phase in enumerate(phases):
        if number < course.phase:
            continue  # before the run was stopped
        before, course.origin = course.origin, None
        if before is None and run.recipe.on_nonfinite == "rollback":
            before = share_state(collect(course), run.ranks)
            if before is not None and saver is not None:
                saver.note_log(before)
        course.anchor = before
        turn: Pass | None = None
        while turn is None or goes_back(turn, course, saver):
            earlier = turn
            turn = Pass(run, course.step, phase, epoch, parts[number], log, course.sources)
            if before is not None and (own := pass_state(before, run.ranks)) is not None:
                turn.load_state_dict(*own)
            if earlier is not None:
                turn.bad = earlier.bad
            course.now = turn
            yield turn
        turn.close()
        _count(course, turn, number)


def _divide(course: Course, phases: Sequence[Phase]) -> list[EpochPart]:
    """Which part of the epoch each phase is, by the images that they read."""
    images = []
    for phase in phases:
        stream = course.run.stream(phase)
        loader = course.sources.get(phase.source, course.run.loader)
        images.append(loader.steps(stream) * (stream.batch_size or course.run.recipe.batch_size))
    ends = [end / sum(images) for end in accumulate(images)]
    later = range(len(phases) - 1, -1, -1)
    return [EpochPart(*part) for part in zip(later, [0.0, *ends], ends, strict=False)]


def _count(course: Course, one: Pass, number: int) -> None:
    """A pass is over: the next state that is saved begins behind it."""
    course.now, course.phase = None, number + 1
    course.steps += one.steps
    course.seconds.train += time.perf_counter() - one.started
    course.seconds.together = max(course.seconds.together, one.together)


def _finish(method: Method, course: Course, shapes: Shapes) -> None:
    """After the last epoch: the method's last word, and what must hold of the weights."""
    run = course.run
    method.finish(run, course.state)
    if hasattr(run.model, "extra"):
        del run.model.extra
    _check_shapes(method, run, shapes)
    run.model.eval()
    check_finite(run, "at the end")
    _require_equal(run, "weights at the end")


def _require_equal(run: Run, what: str) -> None:
    """Compare the ranks' weights; of a network that is split, what each rank has whole."""
    whole = dict(run.model.net.named_buffers())
    digest = weights_digest(run.model) if run.shards is None else tensors_digest(whole)
    require_equal(run.ranks, what, digest)


def _decide(method: Method, course: Course, epoch: int, log: Log) -> Decision:
    """Ask the method what comes after an epoch, if it has an answer; go back where it says so."""
    if not method.watches_epochs:
        return "go on"
    run, snapshots = course.run, course.snapshots
    if method.goes_back:
        net = own_parts(run.model.net.state_dict())
        snapshots.append({key: value.cpu().clone() for key, value in net.items()})
    accuracies = measure_accuracies(run, method.reads_accuracies)
    decision = method.after_epoch(run, course.state, accuracies)
    log("after epoch", epoch=epoch, decision=str(decision), **accuracies._asdict())
    if isinstance(decision, BackTo):
        if not 0 <= decision.epoch < len(snapshots):
            raise RunFailed(
                f"got {decision} from {method.name} after epoch {epoch}; expected an epoch of 0 to "
                f"{epoch} and a method that declares goes_back; mend the method"
            )
        with torch.no_grad():
            for key, value in own_parts(run.model.net.state_dict()).items():
                value.copy_(snapshots[decision.epoch][key])
    return decision


def _settle_precision(run: Run) -> None:
    """Decide what `auto` left open: by capability, or by a trial where the user asked for one."""
    run.precision = run.precision.resolve(run.ranks.device)
    if not run.precision.tune_step:
        return
    run.precision, line = run.precision.tune(run.model.preset.size, run.ranks)
    if line:
        run.notes.append(line)
        if run.ranks.main:
            say(line)


def _open_sources(method: Method, run: Run) -> dict[str, Loader]:
    found = method.sources(run)
    if found and run.open_images is None:
        raise RunFailed(f"got further images from {method.name}; this run has no way to read them")
    return {name: run.open_images(images) for name, images in found.items() if run.open_images}


def _shapes(run: Run) -> Shapes:
    return {key: tuple(value.shape) for key, value in run.model.net.state_dict().items()}


def _check_shapes(method: Method, run: Run, before: Shapes) -> None:
    """Refuse a model whose keys or shapes are not those it started with."""
    after = _shapes(run)
    odd = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if odd:
        raise RunFailed(
            f"got {odd[0]} of shape {after.get(odd[0])} from {method.name} (and "
            f"{len(odd) - 1} more); expected {before.get(odd[0])}, as the network had; "
            "the method's finish must remove or merge what it added"
        )
