"""torchrun with nodes of unequal size that come and go: a run goes on with those that are there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.drills import HELD, HOLD, TRAIN, newest_state, note
from tests.launch_tools import ROOT, torchrun
from tests.patience import PATIENCE, wait_for
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="ends orphans by prctl")
]  # fmt: skip
# A small rate: rounding grows along a training, as it does between any two orders of a sum.
SLOW = ("0.001" if word == "0.05" else word for word in TRAIN)
GROUPS = (
    *SLOW,
    "--epochs",
    "30",
    "--batch-size",
    "64",
    "--batch-norm-group",
    "16",
    "--rank-batch",
    "32",
)


def start(out: Path, log: Path, port: int, ranks: int) -> subprocess.Popen[str]:
    """One agent of a node with so many ranks."""
    env = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    env |= {HOLD: str(out.with_name("hold")), "PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        return subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2",
                f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--max-restarts=5",
                f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job",
                "--rdzv-conf=last_call_timeout=3",
                HELD, *GROUPS, "--out", str(out),
            ],
            stdout=file, stderr=file, text=True, cwd=ROOT,
            env={**os.environ, **env},
        )  # fmt: skip


def test_a_node_of_another_size_comes_and_goes(tmp_path: Path) -> None:
    """Two ranks, then three with the smaller node, then two again: the weights of one rank."""
    out, log, port = tmp_path / "run", tmp_path / "log", free_port()
    hold = tmp_path / "hold"
    hold.write_text("2 3")
    started = time.monotonic()
    agents = [start(out, log, port, 2)]

    def saved_on(world: int, before: int) -> bool:
        assert agents[0].poll() is None, log.read_text()[-3000:]
        number = newest_state(out)
        file = out / "state" / f"{number:06d}.json"
        return number > before and json.loads(file.read_text())["world"] == world

    try:
        wait_for(lambda: saved_on(2, 0), "state of two ranks")
        agents.append(start(out, log, port, 1))
        wait_for(lambda: saved_on(3, 0), "state of three ranks")
        agents[1].send_signal(signal.SIGKILL)
        hold.unlink()
        assert agents[0].wait(PATIENCE) == 0, log.read_text()[-3000:]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
    seconds = time.monotonic() - started
    resumed = json.loads((out / "run.json").read_text())["resumed"]
    assert {2, 3} <= {one["world"] for one in resumed}
    started = time.monotonic()
    whole = torchrun(1, "train", *GROUPS, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    lost = seconds - (time.monotonic() - started)
    ours, alone = (load_file(p / "weights.safetensors") for p in (out, tmp_path / "whole"))
    odd = {key: float((ours[key] - value).abs().max()) for key, value in alone.items()}
    assert max(odd.values()) < 1e-3, odd
    note("2 + 1 ranks", "a node comes, is killed", "weights of one rank to 1e-3", lost)
