"""Two agents whose nodes see other files: refused by both, with host and rank, before any write."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cluster.drills import SCRIPT, note
from tests.launch_tools import ROOT, Scripts
from tests.patience import PATIENCE
from tests.ports import free_port
from tests.test_bad_input import images as pictures


def missing() -> str:
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("unshare") is None:
        return "needs root and unshare"
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return f"needs mount namespaces ({done.stderr.decode().strip()})" if done.returncode else ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


def start_both(
    args: list[str], other: list[str], mount: tuple[Path, Path] | None
) -> list[tuple[int, str]]:
    """Exit code and words of two agents; the second sees `mount[0]` in place of `mount[1]`."""
    port = free_port()
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=j{port}",
    ]  # fmt: skip
    bind = f"mount --bind {mount[0]} {mount[1]} && " if mount is not None else ""
    lines = [
        [*agent, *args],
        ["unshare", "-m", "bash", "-c", f'{bind}exec "$@"', "agent", *agent, *other],
    ]
    running = [
        subprocess.Popen(
            line, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for line in lines
    ]  # fmt: skip
    words = [one.communicate(timeout=PATIENCE)[1] for one in running]
    return [(one.returncode, text) for one, text in zip(running, words, strict=True)]


@pytest.mark.parametrize("fault", ["forget request", "train images", "weights", "seed"])
def test_a_node_that_differs_is_refused(fault: str, tmp_path: Path, scripts: Scripts) -> None:
    data = pictures(tmp_path / "set", each=4)
    common = ["--data", str(data), "--device", "cpu"]
    original = tmp_path / "original"
    ended = scripts("train", *common, "--epochs", "0", "--out", original)
    assert ended.code == 0, ended.err
    requests = tmp_path / "request.txt", tmp_path / "other.txt"
    for file, text in zip(requests, ("1\n", "2\n"), strict=True):
        file.write_text(text)
    args = [
        SCRIPT.replace("train.py", "forget.py"), *common, "--weights", str(original),
        "--forget", f"file:{requests[0]}", "--accept-chance", "--out", str(tmp_path / "run"),
        "--seed", "0", "finetune", "--epochs", "1", "--batch-size", "8",
    ]  # fmt: skip
    other, mount = list(args), None
    if fault == "forget request":
        mount = requests[1], requests[0]
    elif fault == "train images":
        less = tmp_path / "less"
        shutil.copytree(data, less)
        next((less / "train").rglob("*.png")).unlink()
        mount = less, data
    elif fault == "weights":
        changed = tmp_path / "changed"
        shutil.copytree(original, changed)
        tensors = load_file(changed / "weights.safetensors")
        first = next(iter(tensors))
        tensors[first] = tensors[first] + 1
        save_file(tensors, changed / "weights.safetensors")
        mount = changed, original
    else:
        other[other.index("--seed") + 1] = "1"
    ends = start_both(args, other, mount)
    assert all(code != 0 for code, _ in ends)
    line = next(
        line for _, text in ends for line in text.splitlines() if line.startswith("error: ")
    )
    assert socket.gethostname() in line and "(rank " in line, line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))
    note("two nodes x 1 rank", f"another {fault} on one", "refused with host and rank", 0)
