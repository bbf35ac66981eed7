"""Running the scripts inside a test: the exit code, and what was printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from letheon.engine.distributed import Ranks
from letheon.launch import doctor, evaluate, forget, mask, prepare, train
from letheon.launch.command import parse, run_command
from letheon.launch.console import completion, methods
from letheon.launch.ensembles import oracles
from letheon.launch.export import export
from letheon.launch.jobs import run as run_script
from letheon.launch.records import dispose, verify
from letheon.launch.serving import serve
from letheon.launch.tuning import recipes, tune
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "train": train,
    "forget": forget,
    "mask": mask,
    "evaluate": evaluate,
    "prepare": prepare,
    "doctor": doctor,
    "run": run_script,
    "export": export,
    "verify": verify,
    "dispose": dispose,
    "methods": methods,
    "recipes": recipes,
    "tune": tune,
    "oracles": oracles,
    "serve": serve,
    "completion": completion,
}


class Ended(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str


class Scripts:
    """The scripts, run in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, script: str, *args: object) -> Ended:
        """Run `script` with `args`."""
        self.monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        module = SCRIPTS[script]
        self.capsys.readouterr()
        code = 0
        try:
            if script in ("forget", "tune"):
                module.start()
            else:
                run_command(module.Settings, module.main)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return Ended(code, out, err)


def script_on(ranks: Ranks, script: str, *args: object) -> None:
    """Run a script on ranks that are there already: `on_ranks(2, script_on, "train", ...)`."""
    module = SCRIPTS[script]
    module.main(parse(module.Settings, [*map(str, args)]), ranks)


def start_script(script: str, *args: object) -> None:
    """Run a script to the end of this process, as `start_process` wants it."""
    sys.argv = [f"{script}.py", *map(str, args)]
    SCRIPTS[script].start()


def torchrun(ranks: int, script: str, *args: object) -> Ended:
    """Run a script on several ranks, as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(ROOT / "launch" / f"{script}.py")]
    ended = subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    return Ended(ended.returncode, ended.stdout, ended.stderr)
