"""torchrun on one machine: a killed rank is started again, a stopped one is found and named.

In the middle of a training, and of an evaluation.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.drills import (
    HELD,
    HELD_EVALUATE,
    HOLD,
    TRAIN,
    make_models,
    newest_state,
    note,
    rows_of,
    weights_of,
)
from tests.launch_tools import ROOT, torchrun
from tests.patience import PATIENCE, SILENCE, wait_for

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
]  # fmt: skip


def start(out: Path, log: Path, *args: str, timeout: float = PATIENCE) -> subprocess.Popen[str]:
    """One agent of two ranks that train, held in the middle."""
    settings = (*TRAIN[:-2], "--epochs", "40", "--timeout", str(timeout), "--out", str(out))
    return start_agent(out, log, 2, *args, HELD, *settings)


def start_agent(out: Path, log: Path, ranks: int, *args: str) -> subprocess.Popen[str]:
    """One agent whose ranks wait in the middle; the shared store of torch's default stays."""
    env = {k: v for k, v in os.environ.items() if k != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    hold = out.with_name("hold")
    hold.write_text(str(ranks))
    env |= {HOLD: str(hold), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        return subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=1",
                f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0", *args,
            ],
            stdout=file, stderr=file, text=True, cwd=ROOT, env=env,
        )  # fmt: skip


def ranks_of(agent: subprocess.Popen[str]) -> list[int]:
    """Its processes that are ranks, in their order."""
    file = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    found = {}
    for pid in file.read_text().split():
        env = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        rank = next((one for one in env if one.startswith("RANK=")), "")
        if rank:
            found[int(rank.removeprefix("RANK="))] = int(pid)
    return [found[rank] for rank in sorted(found)]


def wait_for_state(agent: subprocess.Popen[str], out: Path, log: Path) -> None:
    def saved() -> bool:
        assert agent.poll() is None, log.read_text()[-3000:]
        return newest_state(out) > 0

    wait_for(saved, "state")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_started_again_in_the_same_command(victim: int, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    started = time.monotonic()
    agent = start(out, log, "--max-restarts=3")
    wait_for_state(agent, out, log)
    os.kill(ranks_of(agent)[victim], signal.SIGKILL)
    out.with_name("hold").unlink()
    assert agent.wait(PATIENCE) == 0, log.read_text()[-3000:]
    seconds = time.monotonic() - started
    facts = json.loads((out / "run.json").read_text())
    assert facts["resumed"]
    assert json.loads((out / "versions.json").read_text())["restarts"] == 1
    started = time.monotonic()
    whole = torchrun(2, "train", *TRAIN, "--epochs", "40", "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert weights_of(out) == weights_of(tmp_path / "whole")
    lost = seconds - (time.monotonic() - started)
    note("one host x 2 ranks", f"SIGKILL of rank {victim}", "equal weights", lost)


def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    agent = start(out, log, "--shutdown-timeout=5", timeout=SILENCE)
    wait_for_state(agent, out, log)
    stopped = ranks_of(agent)[1]
    os.kill(stopped, signal.SIGSTOP)
    out.with_name("hold").unlink()
    started = time.monotonic()
    try:
        assert agent.wait(PATIENCE) == 1
    finally:
        if Path(f"/proc/{stopped}").exists() and agent.poll() is None:
            os.kill(stopped, signal.SIGKILL)
    text = log.read_text()
    line = next(line for line in text.splitlines() if line.startswith("error: on "))
    assert f"waited for rank 1 on {socket.gethostname()}, which says nothing any more" in line
    assert "loop.py" in (out / "stacks" / "rank-0.txt").read_text()
    assert not Path(f"/proc/{stopped}").exists()
    lost = time.monotonic() - started
    fault = f"SIGSTOP of a rank, --timeout {SILENCE}"
    note("one host x 2 ranks", fault, "named, ends, stacks", lost)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], object]:
    """What evaluate is told, and the rows of three undisturbed ranks."""
    folder = tmp_path_factory.mktemp("models")
    told = make_models(folder)
    whole = torchrun(3, "evaluate", *told, "--out", folder / "table")
    assert whole.code == 0, whole.err
    return told, rows_of(folder / "table")


def evaluate(
    out: Path, log: Path, told: tuple[str, ...], *args: str, timeout: float = PATIENCE
) -> subprocess.Popen[str]:
    """One agent of three ranks that evaluate, all of which wait at one place."""
    settings = (*told[:-1], str(timeout), "--out", str(out))
    agent = start_agent(out, log, 3, *args, HELD_EVALUATE, *settings)

    def waiting() -> bool:
        assert agent.poll() is None, log.read_text()[-3000:]
        return all(out.with_name(f"hold-{rank}").exists() for rank in range(3))

    wait_for(waiting, "wait of every rank")
    return agent


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("restarts", [0, 1])
def test_an_evaluation_loses_a_rank(
    victim: int, restarts: int, models: tuple[tuple[str, ...], object], tmp_path: Path
) -> None:
    """Its agent starts all again, or all end, and the same line gives the same table."""
    told, rows = models
    out, log = tmp_path / "table", tmp_path / "log"
    agent = evaluate(out, log, told, f"--max-restarts={restarts}")
    ranks = ranks_of(agent)
    os.kill(ranks[victim], signal.SIGKILL)
    out.with_name("hold").unlink()
    ended = agent.wait(PATIENCE)
    text = log.read_text()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    if restarts:
        assert ended == 0, text[-3000:]
    else:
        assert ended == 1, text  # torchrun's SIGTERM may come before the connection has closed
        assert re.search(rf"lost .*rank {victim} on |^stopped: ", text, re.MULTILINE), text
        assert "RuntimeError" not in text  # gloo's own words, which name nobody
        again = torchrun(3, "evaluate", *told, "--out", out)
        assert again.code == 0, again.err
    assert rows_of(out) == rows
    how = "started again" if restarts else "the same line"
    note("evaluate, one host x 3 ranks", f"SIGKILL of rank {victim}", f"{how}: equal table")


def test_a_rank_of_an_evaluation_stands_still(
    models: tuple[tuple[str, ...], object], tmp_path: Path
) -> None:
    told, rows = models
    out, log = tmp_path / "table", tmp_path / "log"
    agent = evaluate(out, log, told, "--shutdown-timeout=5", timeout=SILENCE)
    ranks = ranks_of(agent)
    os.kill(ranks[1], signal.SIGSTOP)
    out.with_name("hold").unlink()
    try:
        assert agent.wait(PATIENCE) == 1
    finally:
        if Path(f"/proc/{ranks[1]}").exists() and agent.poll() is None:
            os.kill(ranks[1], signal.SIGKILL)
    text = log.read_text()
    assert f"waited for rank 1 on {socket.gethostname()}, which says nothing any more" in text
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    again = torchrun(3, "evaluate", *told, "--out", out)
    assert again.code == 0, again.err
    assert rows_of(out) == rows
    fault = f"SIGSTOP of a rank, --timeout {SILENCE}"
    note("evaluate, one host x 3 ranks", fault, "named, ends; the same line: equal table")
