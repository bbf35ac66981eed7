"""One job on a real SLURM of two nodes: preempted, its node lost, its time up, and equal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.beds.slurm_bed import Bed, missing
from tests.cluster.drills import HELD, HOLD, SCRIPT, TRAIN, newest_state, note, weights_of
from tests.launch_tools import ROOT, torchrun
from tests.patience import PATIENCE, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
BATCH = str(ROOT / "launch" / "slurm" / "forget.sbatch")
EPOCHS = "40"


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    bed = Bed(folder)
    yield bed
    bed.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Weights and seconds of the undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    started = time.monotonic()
    ended = torchrun(4, "train", *TRAIN, "--epochs", EPOCHS, "--out", out)
    assert ended.code == 0, ended.err
    return weights_of(out), time.monotonic() - started


def submit(bed: Bed, out: Path, *options: str) -> str:
    """A job of four ranks that waits in the middle while the file `hold` beside `out` is there."""
    hold = out.with_name("hold")
    hold.write_text("4")
    return bed.submit(
        "--nodes=2", *options, BATCH, HELD, *TRAIN, "--epochs", EPOCHS, "--out", str(out),
        RANKS="2", PYTHON=sys.executable, HEAD="127.0.0.1", OMP_NUM_THREADS="1",
        GRACE=str(PATIENCE), PYTHONPATH=str(ROOT), **{HOLD: str(hold)},
    )  # fmt: skip


def log_of(bed: Bed) -> str:
    return "\n".join(file.read_text() for file in bed.folder.glob("forget*.out"))


def check_alive(bed: Bed, job: str, *bad: str) -> None:
    """Fail where a job is over for good; one that is queued again looks so, for a time."""
    for _ in range(300):
        state = bed.field(job, "JobState")
        if state not in bad:
            return
        time.sleep(2)
    pytest.fail(f"job {job} is {state}; the end of its log:\n{log_of(bed)[-2000:]}")


def wait_for_save(bed: Bed, job: str, out: Path, after: int) -> None:
    """Until the job runs and has saved a state beyond `after`."""

    def saved() -> bool:
        check_alive(bed, job, "FAILED", "CANCELLED", "COMPLETED")
        return bed.hurry(job) and newest_state(out) > after

    wait_for(saved, f"state after {after}")


def restarts(bed: Bed, job: str) -> int:
    return int(bed.field(job, "Restarts"))


def finish(bed: Bed, job: str, after: int = 0) -> None:
    """Until the job has ended well, and was queued again more often than `after`."""

    def done() -> bool:
        bed.hurry(job)
        check_alive(bed, job, "FAILED", "CANCELLED")
        return bed.field(job, "JobState") == "COMPLETED" and restarts(bed, job) > after

    wait_for(done, "end of the job")


def test_a_job_is_preempted_loses_a_node_and_ends_equal(
    bed: Bed, whole: tuple[str, float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    started = time.monotonic()
    job = submit(bed, out)
    wait_for_save(bed, job, out, 0)

    before = newest_state(out)
    other = bed.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "true")
    wait_for(lambda: bed.field(other, "JobState") == "COMPLETED", "end of the other job")
    assert "saved after step" in log_of(bed)
    assert newest_state(out) > before  # saved for the signal
    wait_for_save(bed, job, out, newest_state(out))

    before = newest_state(out)
    bed.kill_node("n2")
    out.with_name("hold").unlink()
    wait_for(lambda: restarts(bed, job) >= 2, "second requeue")
    bed.start_node("n2")
    finish(bed, job, 1)
    assert weights_of(out) == whole[0]
    assert "already done" not in log_of(bed)
    lost = time.monotonic() - started - whole[1]
    note("SLURM, 2 nodes x 2 ranks", "preempted, then a node lost", "equal weights", lost)

    stamp = (out / "weights.safetensors").stat().st_mtime_ns
    turns = restarts(bed, job)
    bed.run("scontrol", "requeue", job)
    finish(bed, job, turns)
    assert "already done by the same command" in log_of(bed)
    assert (out / "weights.safetensors").stat().st_mtime_ns == stamp
    note("SLURM, 2 nodes x 2 ranks", "queued again after its end", "already done", 0)
    assert not list(bed.processes())


def test_a_job_whose_time_is_up_goes_on(bed: Bed, whole: tuple[str, float], tmp_path: Path) -> None:
    """The limit is set once the run has saved; the warning comes within its last 55 seconds."""
    out = tmp_path / "run"
    started = time.monotonic()
    job = submit(bed, out, "--time=600", "--signal=USR1@55")
    wait_for_save(bed, job, out, 0)
    hours, minutes, _ = bed.field(job, "RunTime").split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    bed.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    wait_for(lambda: restarts(bed, job) > 0, "requeue")
    assert "stopped: " in log_of(bed)
    out.with_name("hold").unlink()
    bed.run("scontrol", "update", f"JobId={job}", "TimeLimit=600")
    finish(bed, job)
    assert weights_of(out) == whole[0]
    lost = time.monotonic() - started - whole[1]
    note("SLURM, 2 nodes x 2 ranks", "its time limit", "equal weights", lost)


def test_bad_input_is_not_queued_again(bed: Bed, tmp_path: Path) -> None:
    job = bed.submit(
        "--nodes=2", BATCH, SCRIPT, *TRAIN, "--data", "nowhere", "--out", str(tmp_path / "run"),
        RANKS="1", PYTHON=sys.executable, HEAD="127.0.0.1",
    )  # fmt: skip
    wait_for(lambda: bed.field(job, "JobState") == "FAILED", "refusal")
    assert bed.field(job, "ExitCode") == "2:0" and bed.field(job, "Restarts") == "0"


def srun(bed: Bed, *command: str, **variables: str) -> str:
    """Submit a job of one srun with one task a rank, two on each node; returns its number."""
    script = bed.folder / "srun.sh"
    script.write_text('#!/bin/bash\nexec srun --kill-on-bad-exit=0 "$@"\n')
    return bed.submit(
        "--nodes=2", "--ntasks-per-node=2", "--output=forget-srun-%j.out", str(script), *command,
        # The nodes' names are no names of hosts here.
        MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **variables,
    )  # fmt: skip


def test_srun_without_torchrun(bed: Bed, whole: tuple[str, float], tmp_path: Path) -> None:
    """One task a rank: a rank is killed, the job ends, and the same line goes on."""
    out, hold = tmp_path / "run", tmp_path / "hold"
    hold.write_text("4")
    args = (*TRAIN, "--epochs", EPOCHS, "--out", str(out))
    job = srun(bed, sys.executable, HELD, *args, **{HOLD: str(hold)})
    wait_for_save(bed, job, out, 0)
    processes = {
        int(one.removeprefix("SLURM_PROCID=")): pid
        for pid, env in bed.processes()
        for one in env
        if one.startswith("SLURM_PROCID=")
    }
    assert sorted(processes) == [0, 1, 2, 3]
    os.kill(processes[3], signal.SIGKILL)
    hold.unlink()
    wait_for(lambda: bed.field(job, "JobState") == "FAILED", "end of the job")
    wait_for(lambda: not list(bed.processes()), "end of every rank")
    text = next(bed.folder.glob(f"forget-srun-{job}.out")).read_text()
    assert re.search(r"error: .*: lost .*rank 3 on ", text), text
    assert "Traceback" not in text
    job = srun(bed, sys.executable, SCRIPT, *args)
    finish(bed, job, -1)
    assert weights_of(out) == whole[0]
    versions = json.loads((out / "versions.json").read_text())
    assert [node["ranks"] for node in versions["nodes"]] == [[0, 1, 2, 3]]
    outcome = "no rank left; the same line: equal weights"
    note("srun, 2 nodes x 2 tasks", "SIGKILL of a rank", outcome)
