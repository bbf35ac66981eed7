"""Files that a command names are regular: a FIFO hangs none of them, and a device fills no memory.

A hostile run folder neither.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from letheon.engine.checkpoints.model_file import load_model
from letheon.engine.models.classifier import build
from letheon.engine.runs.manifest import MANIFEST, SIGNATURE, _canonical, read_manifest
from letheon.errors import InputError, LetheonError
from letheon.eval.comparison import Comparison
from letheon.launch.joblist import read_jobs
from letheon.launch.jobs.find_runs import find_runs
from letheon.launch.jobs.run import read_recipe as read_job
from letheon.launch.records.checks import check_run
from letheon.launch.records.dispose import list_holders
from letheon.launch.records.replay import expand_config
from letheon.launch.tuning.recipe_file import read_recipe
from letheon.loaders.forget_request import Request, resolve
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.loaders.views import order_classes
from letheon.methods.saliency import load_masks
from tests.fuzz.parsers import PARSERS, data, files_of
from tests.fuzz.records import make_record
from tests.patience import PATIENCE


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A reader that hangs is a failure, not a hanging suite."""
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)


def groups(path: str) -> None:
    opened = data()
    Comparison([], opened, {}, Request("class:0", (0,), None, "")).read_groups(Path(path))


READERS: dict[str, Callable[[str], object]] = {
    "classes of a request": lambda path: resolve(f"file:{path}", data(), 1),
    "samples of a request": lambda path: resolve(f"samples:{path}", data(), 1),
    "order of classes": lambda path: order_classes(data(), path),
    "groups": groups,
    "jobs": lambda path: read_jobs(["--jobs", path]),
    "settings": lambda path: expand_config(["--config", path], ["finetune"], []),
    "recipe": read_recipe,
    "job": lambda path: read_job(Path(path)),
    "weights": lambda path: load_model(Path(path)),
    "images": open_source,
    "mask": lambda path: load_masks(Path(path), 0.5, {}, []),
}


@pytest.mark.parametrize("name", READERS)
def test_named_files(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for file in ("x.toml", "zero.toml"):
        with pytest.raises(InputError, match="not a regular file|no such file"):
            READERS[name](str(tmp_path / file))


@pytest.mark.parametrize("text", ["[" * 100_000, "a = " + "[" * 100_000])
def test_deeply_nested_files(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    for name in ("settings", "recipe", "job"):
        with pytest.raises(InputError, match="cannot be read"):
            READERS[name](str(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARSERS if not name.endswith(" image")])
def test_no_parser_waits_for_a_fifo(name: str, tmp_path: Path) -> None:
    """Each of a parser's files in turn, read in a child that an alarm ends."""
    (tmp_path / "good").mkdir()
    PARSERS[name].make(tmp_path / "good")
    for number, file in enumerate(files_of(tmp_path / "good")):
        now = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", now)
        place = now / file.relative_to(tmp_path / "good")
        place.unlink()
        os.mkfifo(place)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(PATIENCE)
                PARSERS[name].read(now)
                code = 0
            except LetheonError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0, place


def test_tars_in_one_another(tmp_path: Path) -> None:
    content = b"x"
    for number in range(40):
        head = tarfile.TarInfo("a.tar" if number else "a/x.jpg")
        head.size = len(content)
        content = head.tobuf() + content + bytes(-len(content) % 512 + 1024)
    (tmp_path / "deep.tar").write_bytes(content)
    with pytest.raises(InputError, match="tars in one another"):
        open_source(str(tmp_path / "deep.tar"))


@pytest.mark.parametrize("name", ["preset", "requests", "canaries", "classes"])
@pytest.mark.parametrize("text", ["[" * 100_000, "3", '[{"x": 1}]'])
def test_facts_of_a_checkpoint(name: str, text: str, tmp_path: Path) -> None:
    from letheon.engine.checkpoints import weights_file

    model = build("small", 2, 1, Preset(size=8, resize_to=8))
    facts = {"model": "small", name: text}
    weights_file.write_weights(tmp_path / "x.safetensors", model.state_dict(), facts)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        load_model(tmp_path / "x.safetensors", tell=lambda line: None)


def forge(run: Path, **changes: object) -> None:
    """Another manifest under its own seal."""
    content = {**read_manifest(run), **changes}
    del content["digest"]
    (run / MANIFEST).write_text(_canonical(content))


def test_a_hostile_run_folder(tmp_path: Path) -> None:
    make_record(tmp_path)
    run = tmp_path / "run"
    states = {check.name: check.state for check in check_run(run)}
    assert "mismatch" not in states.values() and states["reads"] == states["log"] == "ok"
    for name in ("metrics.jsonl", "reads.safetensors", SIGNATURE):
        before = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        states = {check.name: check.state for check in check_run(run)}
        assert "mismatch" in states.values() or name == SIGNATURE
        (run / name).unlink()
        if before is not None:
            (run / name).write_bytes(before)
    (run / "reads.safetensors").write_bytes(b"\xff" * 64)
    assert {check.name: check.state for check in check_run(run)}["reads"] == "mismatch"
    facts = read_manifest(run)["facts"]
    cache = tmp_path / "cache"
    (cache / ("a" * 32)).mkdir(parents=True)
    (cache / ("a" * 32) / "facts.json").write_text(json.dumps({"images": "e" * 64}))
    # An original that is its own, and a digest that is a part of every other.
    for digest in ("", "e", 1):
        forge(run, original={"path": str(run)}, facts={**facts, "data": {"train": digest}})
        assert not any(holder.removable for holder in list_holders(run, cache))
    for odd in ({"facts": 3}, {"facts": {}}, {"settings": None}, {"original": [1]}):
        forge(run, **{"facts": facts, **odd})
        assert any(check.state == "mismatch" for check in check_run(run)) or "settings" in odd
        with pytest.raises(InputError, match="broken file"):
            list_holders(run, cache)
    (run / "run.json").write_text("[1]")
    with pytest.raises(InputError, match=r"run\.json"):
        find_runs(tmp_path)
