"""Good records of a run, recipes, settings and saved states, and how they are read."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch

from letheon.engine.checkpoints.model_file import save_model
from letheon.engine.checkpoints.run_state import RunState, StateFolder
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.engine.runs import manifest
from letheon.engine.runs.reads import write_reads
from letheon.engine.runs.run_folder import Record
from letheon.errors import LetheonError
from letheon.launch.jobs.find_runs import find_runs
from letheon.launch.jobs.run import read_recipe as read_job
from letheon.launch.records.checks import check_run
from letheon.launch.records.dispose import list_holders
from letheon.launch.records.replay import expand_config
from letheon.launch.tuning.recipe_file import read_recipe
from letheon.loaders.preset import Preset
from letheon.regular import read_regular

RECIPE = b"""set = "s"
model = "m"
request = "any"
status = "tuned"
source = "x"

[method]
name = "finetune"
lr = 0.1
"""
JOB = b"""data = "digits"

[train]
epochs = 3

[forget]
forget = "class:3"
[[forget.methods]]
name = "finetune"
lr = 0.1
"""


def make_record(folder: Path) -> None:
    """A finished run with every file that `verify` checks."""
    settings = {"weights": None, "data": "digits", "method": {"name": "finetune", "lr": 0.1}}
    record = Record(folder / "run", Ranks(), settings)
    forget = torch.arange(8) < 2
    request = {"text": "samples:x", "classes": [], "samples": [0, 1], "notes": [], "data": ""}
    record.write("request.json", {**request, "digest": hashlib.sha256(b"0,1").hexdigest()})
    record.log("phase", phase="retain", loss=1.0, epoch=0)
    record.log("phase", phase="retain", loss=0.5, epoch=1)
    weights = save_model(record.folder, build("small", 2, 1, Preset(size=8, resize_to=8)))
    counts = {"retain/retain": (~forget).int()}
    reads = write_reads(record.folder, counts, forget, torch.arange(8), 8)
    record.finish(
        weights=weights, method="finetune", kind="unlearning", reads=reads,
        seconds={"prepare": 1.0, "train": 1.0, "together": 1}, data={"train": "d", "test": "e"},
    )  # fmt: skip


def read_record(folder: Path) -> None:
    """Check it as it is, and once more under a manifest that was sealed again by whoever did it."""
    run = folder / "run"
    _look(run)
    file = run / manifest.MANIFEST
    with suppress(ValueError, OSError, RecursionError):
        before = read_regular(file, 2**20)
        content = json.loads(before)
        if isinstance(content, dict):
            rest = {key: value for key, value in content.items() if key != "digest"}
            file.write_text(manifest._canonical(rest))
            try:
                _look(run)
            finally:
                file.write_bytes(before)


def _look(run: Path) -> None:
    for read in (check_run, lambda place: list_holders(place, None)):
        with suppress(LetheonError):
            read(run)
    find_runs(run.parent)


def read_job_file(folder: Path) -> None:
    """A job of `letheon run`."""
    read_job(folder / "job.toml")


def read_recipe_file(folder: Path) -> None:
    """A recipe of one method."""
    read_recipe(str(folder / "recipe.toml"))


def read_settings(folder: Path) -> None:
    """What `--config` reads."""
    expand_config(["--config", str(folder / "settings.json")], ["finetune"], [])


def make_settings(folder: Path) -> None:
    """The settings of a run."""
    content = {"data": "digits", "seed": 1, "method": {"name": "finetune", "recipe": {"lr": 0.1}}}
    (folder / "settings.json").write_text(json.dumps(content))


def make_states(folder: Path) -> None:
    """Two states of a stopped run."""
    states = StateFolder(folder / "state")
    for step in (1, 2):
        states.save(RunState({"weight": torch.arange(9.0)}, {"steps": step}))
        states.wait()


def read_states(folder: Path) -> None:
    """The newest whole one, and all of them."""
    states = StateFolder(folder / "state")
    found, damaged = states.load(lambda facts: facts["steps"] > 0)
    assert (found is not None and torch.equal(found.tensors["weight"], torch.arange(9.0))) or (
        damaged
    )
    for _ in states.load_all(lambda facts: True, damaged):
        pass
