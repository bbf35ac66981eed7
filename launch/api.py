"""The functions of `import letheon`: forget, train, evaluate and load_model from Python.

They do what the scripts do, over the same engine, for a network, images and a method that the
caller holds. Nothing handed in is modified: the work is done on copies.
"""

from __future__ import annotations

import copy
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from letheon.choices import check_type
from letheon.engine.checkpoints import model_file
from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.distributed import Ranks, gather_objects, join_ranks
from letheon.engine.memory.sharding import check_sharding
from letheon.engine.memory.shards import copy_on_meta
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import fresh_modes
from letheon.engine.runs.agreement import plan_facts
from letheon.engine.runs.loggers import read_lines
from letheon.engine.runs.manifest import verify_records
from letheon.engine.runs.plan import JobOptions, Plan, train_and_save
from letheon.engine.runs.run_folder import FINISHED, LOG, ORIGIN, check_free
from letheon.engine.runs.stop import SIGNALS, STOPPED, Stopped, last_signal, listen
from letheon.errors import InputError
from letheon.eval.attacks.session import measure_all
from letheon.eval.case import Conditions
from letheon.eval.comparison import (
    Comparison,
    Entry,
    add_random_control,
    assemble_comparison,
    plant_canaries,
)
from letheon.eval.evaluate import Extent, Measuring
from letheon.eval.inference.networks import Shelf, Source
from letheon.eval.references import read_kind, read_start
from letheon.eval.report.row_list import Rows
from letheon.launch.arguments.networks import align, check_images, check_trainable, open_model
from letheon.launch.command import together
from letheon.launch.inputs import (
    Call,
    Forget,
    Images,
    Model,
    Options,
    Result,
    build_call,
    build_method,
    build_preset,
    name_of,
    open_images,
    replace_fields,
    resolve_request,
    split_settings,
)
from letheon.launch.records.claim import claim
from letheon.loaders.batch import Loader
from letheon.loaders.canaries import draw_canaries, plant
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request
from letheon.sealed import read_json


def forget(
    model: Model,
    *,
    train: Images,
    forget: Forget,
    method: str | Method = "salun",
    test: Images = None,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Result:
    """Forget classes or samples: run an unlearning method on a copy of `model`.

    Args:
        model: the trained network; any nn.Module whose output is that of its last nn.Linear.
        train: the images it was trained on, those to forget among them.
        forget: what is to be forgotten; a list is of classes.
        method: a method's name, or an instance of any Method.
        test: held-out images, for the record; a path of `train` brings its own.
        out: a run folder to make; by default nothing is kept on disk.
        **options: see `Options`; beside a method's name its own settings too, as --help names
            them, such as `epochs=3, lr=0.01`.

    Returns:
        The network and the record; the same weights on every rank.

    Raises:
        InputError: anything amiss with what was handed in; nothing has been written.
        RunFailed: numbers that are not finite, a full disk.
    """
    preset = options.pop("preset", None)
    chosen = build_method(method, **split_settings(options))
    with _folder(out, chosen) as folder:
        call = build_call(train, options, weights=name_of(model), method=chosen, out=folder)

        def plan(ranks: Ranks) -> tuple[Plan, Run]:
            check_free(call.out, call.overwrite, resume=True)
            data = open_images(call, train, test)
            network = open_model(model, data, preset)
            if call.relearn_earlier:
                network.requests = ()
            data = plant(align(network, data), network.canaries)
            if call.method.from_scratch and isinstance(model, nn.Module | Result):
                raise InputError(
                    f"got method {method!r}, which starts from new weights, for a network handed "
                    "in; expected an architecture it can build; train a new network of yours on "
                    "the images to retain",
                    option="method",
                )
            check_trainable(network, data, call.method.recipe.epochs > 0)
            request = resolve_request(forget, data, call.seed)
            job = replace(call, forget=request.text)
            return plan_forgetting(job, call.method, network, data, request, ranks)

        return _run(call, plan, model, None if out is None else folder)


def train(
    model: str | nn.Module,
    *,
    train: Images,
    method: Method | None = None,
    test: Images = None,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Result:
    """Train a network on the whole training set: the original, which is to forget later.

    Args:
        model: an architecture's name, such as resnet50, which gets new weights by the seed; or a
            network, of which a copy is trained from the weights it has.
        train: the images.
        method: how to train; by default `Train`.
        test: held-out images, for the record.
        out: a run folder to make; by default nothing is kept on disk.
        **options: see `Options`; without a method those of `Train` too, such as `epochs=30`.

    Returns:
        As `forget`.

    Raises:
        InputError: anything amiss with what was handed in; nothing has been written.
        RunFailed: numbers that are not finite, a full disk.
    """
    preset = options.pop("preset", None)
    chosen = build_method(method or "train", **split_settings(options))
    with _folder(out, chosen) as folder:
        call = build_call(train, options, weights=name_of(model), method=chosen, out=folder)

        def plan(ranks: Ranks) -> tuple[Plan, Run]:
            check_free(call.out, call.overwrite, resume=True)
            data = open_images(call, train, test)
            if isinstance(model, str):
                known = None if preset is None else build_preset(preset)
                network = build(model, len(data.classes), call.seed, known)
                check_images(network, data)
            else:
                network = open_model(model, data, preset)
            if call.relearn_earlier:
                network.requests = ()
            check_trainable(network, data, call.method.recipe.epochs > 0)
            data = align(network, data)
            planting = draw_canaries(call.planting, data, call.seed)
            if planting and network.canaries:
                raise InputError(
                    "got canaries for a network that has some; expected one without; leave them "
                    "out",
                    option="planting",
                )
            network.canaries = network.canaries or planting
            data = plant(data, network.canaries)
            return plan_training(call, call.method, network, data, ranks)

        return _run(call, plan, model, None if out is None else folder)


def evaluate(
    *,
    original: Model | Sequence[Model] | None = None,
    retrained: Model | Sequence[Model] = (),
    unlearned: Model | Sequence[Model] = (),
    train: Images,
    forget: Forget,
    test: Images = None,
    downstream: str | None = None,
    **options: Unpack[Options],
) -> Rows:
    """Measure what models still know of what they were to forget: one row a model.

    Args:
        original: the model before forgetting; further ones, trained on the same images with other
            seeds, give the originals' own spread.
        retrained: models trained without the forget set; the first is the reference.
        unlearned: the models after forgetting.
        train: the training images, those to forget among them.
        forget: what was forgotten, as `forget` takes it.
        test: held-out images; a path of `train` brings its own.
        downstream: a set for k-NN, as --downstream takes it.
        **options: see `Options`; the fields of `Extent` and `Conditions` too, such as
            `depth="full", relearn=100, ks=(1, 5)`.

    Returns:
        The rows, equal on every rank: a list of dicts that prints itself as a table, and has
        `to_frame()` and `report(folder)`. `letheon evaluate --define` prints what each metric is.

    Raises:
        InputError: anything amiss with what was handed in.
    """
    preset = options.pop("preset", None)
    batch_size, extent = options.pop("batch_size", 256), options.pop("extent", Extent())
    random_control = options.pop("random_control", False)
    check_type(batch_size, int, "batch_size")
    check_type(extent, Extent, "extent")
    check_type(downstream, str | None, "downstream")
    check_type(random_control, bool, "random_control")
    extent, conditions = replace_fields([extent, Conditions()], split_settings(options))
    call = build_call(train, options)
    models = [
        *(("original", model) for model in _as_list(original)),
        *(("retrained", model) for model in _as_list(retrained)),
        *(("unlearned", model) for model in _as_list(unlearned)),
    ]
    with fresh_modes(), join_ranks(call.device) as ranks:

        def plan() -> Comparison:
            data = open_images(call, train, test)
            if not models:
                raise InputError("got no model; expected original, retrained or unlearned")
            images, shelf, entries = data, Shelf(), list[Entry]()
            for role, model in models:
                quiet = partial(open_model, model, images, preset, lambda line: None)
                source = Source("", quiet, shelf)
                network = open_model(model, images, preset)
                data = data if entries else align(network, data)
                if network.classes != len(data.classes):
                    raise InputError(
                        f"got a model of {network.classes} classes beside one of "
                        f"{len(data.classes)}; compare models of one data set",
                        option=role,
                    )
                entries.append(_entry(model, role, network, source, [e.name for e in entries]))
            data = plant_canaries(entries, data)
            domains = {} if downstream is None else call.open_domains(downstream)
            request = resolve_request(forget, data, call.seed)
            found = assemble_comparison(entries, data, domains, request)
            if random_control:
                found = add_random_control(found, call.seed)
            extent.check(found, call.seed)
            return found

        comparison = together(ranks, plan)
        table = measure_all(Measuring(call, comparison, conditions, extent, batch_size, ranks))
        return Rows(table.flat, table.left_out)


def _as_list(models: Model | Sequence[Model] | None) -> list[Model]:
    if models is None:
        return []
    return [*models] if isinstance(models, list | tuple) else [models]  # type: ignore[list-item]


def _entry(
    model: Model, role: str, network: Classifier, source: Source, others: Sequence[str]
) -> Entry:
    """Name a model of a comparison after its method, folder or class, with a number if need be."""
    seconds, seed, out, kind = None, None, None, ""
    if isinstance(model, Result):
        seed, spent = model.seed, model.record["seconds"]
        name = role if role == "original" and model.out is None else model.name
        seconds = spent["prepare"] + spent["train"]
        out, kind = model.out, str(model.record.get("kind", ""))
    elif isinstance(model, str | Path):
        verify_records(Path(model), FINISHED, ORIGIN)
        name, out, kind = Path(model).name, Path(model), read_kind(Path(model))
    else:
        name = role
    known = [other for other in others if other == name or other.startswith(f"{name}-")]
    name = f"{name}-{len(known) + 1}" if known else name
    start = "" if out is None else read_start(out)
    digest = weights_digest(network)
    return Entry(
        name, role, copy_on_meta(network.eval()), digest, seconds, seed=seed, start=start,
        kind=kind, source=replace(source, name=name, weights=digest),
    )  # fmt: skip


def load_model(path: str | Path, **options: Any) -> Classifier:
    """Load a run folder or checkpoint; `options` are those of `model_file.load_model`.

    Of a network of your own, whose class is in no file of weights, give one as `module`: a copy of
    it gets the weights, strictly.
    """
    with fresh_modes():
        return model_file.load_model(Path(path), **options)


def plan_forgetting(
    job: JobOptions,
    method: Method,
    model: Classifier,
    data: Data,
    request: Request,
    ranks: Ranks,
    like: Loader | None = None,
) -> tuple[Plan, Run]:
    """Plan an unlearning run on opened model and data; nothing is written.

    `like` is another run's loader of the same images, to share them in memory.

    Raises:
        InputError: the method refuses the run, or the ranks cannot share a batch.
    """
    seed = method.stream_seed(job.seed)
    if method.from_scratch:
        fresh = build(model.name, model.classes, seed, model.preset)
        fresh.class_names, fresh.requests = model.class_names, model.requests
        fresh.canaries, model = model.canaries, fresh
    accept = bool(getattr(job, "accept_chance", False))
    plan = Plan(job, method.recipe, model, data, request, accept, seed)
    run = plan.run(ranks, like)
    method.check(run)
    check_sharding(method, run)
    return plan, run


def plan_training(
    job: JobOptions, method: Method, model: Classifier, data: Data, ranks: Ranks
) -> tuple[Plan, Run]:
    """Plan training on all images; nothing is written."""
    plan = Plan(job, method.recipe, model, data)
    run = plan.run(ranks)
    method.check(run)
    check_sharding(method, run)
    return plan, run


def _run(call: Call, plan: Any, model: Model, out: Path | None) -> Result:
    """Plan on all ranks, run, and read the record; torch's random state is left as it was."""
    with fresh_modes(), join_ranks(call.device) as ranks:
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        with claim([call.out], ranks):
            planned, run = together(ranks, lambda: plan(ranks), lambda one: plan_facts(*one))
            if out is None:
                planned = replace(planned, label=call.method.name)
            with torch.random.fork_rng(devices), _save_at_signals(out):
                train_and_save(planned, call.method, run, call.out, call.saving, call.overwrite)
        own: tuple[dict[str, Any], list[dict[str, Any]]] = ({}, [])
        if ranks.main:
            own = (read_json(call.out / FINISHED), [*read_lines(call.out / LOG)])
        record, metrics = gather_objects(own, ranks)[0]
        trained = run.model if run.shards is None else run.shards.host_copy()
        network = _restore(model, trained)
    name = record["method"] if out is None else out.name
    return Result(
        network, record, metrics, planned.request, out, name, call.seed,
        run.model.preset, run.model.requests, run.model.canaries,
    )  # fmt: skip


@contextmanager
def _save_at_signals(out: Path | None) -> Iterator[None]:
    """Save a run that has a folder when Ctrl-C or a scheduler stops it; then stop as they ask.

    Signals that the caller's program handles by itself are left to it, and so is a second Ctrl-C,
    so that it ends no notebook's kernel.
    """
    # Ignored is Ctrl-C in a job that a script has put into the background.
    usual = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_IGN)
    if out is None or any(signal.getsignal(number) not in usual for number in SIGNALS):
        yield
        return
    try:
        with listen(signal.getsignal(signal.SIGINT)):
            yield
    except Stopped as stop:
        line = f"stopped: {stop}; the same call goes on from the last save"
        if last_signal() == signal.SIGINT.name:
            raise KeyboardInterrupt(line) from None
        model_file.note(line)
        raise SystemExit(STOPPED) from None


def _restore(model: Model, trained: Classifier) -> nn.Module:
    """Copy what was handed in, with the trained weights."""
    if isinstance(model, Result):
        model = model.model
    if isinstance(model, nn.Module):
        own = copy.deepcopy(model)
        net = own
        if isinstance(own, Classifier):
            net, own.requests, own.canaries = own.net, trained.requests, trained.canaries
    else:
        fresh = Classifier(trained.plain_net(), trained.name, trained.preset)
        fresh.class_names, fresh.requests = trained.class_names, trained.requests
        fresh.canaries = trained.canaries
        return fresh.cpu().eval()
    net.load_state_dict(trained.net.state_dict())
    return own


@contextmanager
def _folder(out: str | Path | None, method: Method) -> Iterator[Path]:
    """Yield the run folder, a temporary one of the method's name where none is to be kept."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="letheon-") as folder:
        yield Path(folder) / method.name.replace("/", "-")
