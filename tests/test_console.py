"""What a command prints, on a terminal and into a pipe; times, rates and memory are masked."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from letheon import progress
from letheon.engine.runs.progress import EpochPart, Shown, TrainingLine
from letheon.engine.runs.stop import STOPPED
from letheon.launch import main, train
from tests.launch_tools import ROOT, Scripts

TRAIN = ["--epochs", "2", "--batch-size", "128", "--lr", "0.1"]


def mask(text: str) -> str:
    """Put # for every number that differs from run to run."""
    text = re.sub(r"[\d,]+ images/s", "# images/s", text)
    text = re.sub(r"(data) \d+%", r"\1 #%", text)
    text = re.sub(r"memory [\d.]+ GiB", "memory # GiB", text)
    text = re.sub(r"loss -?[\d.e+-]+", "loss #", text)
    return re.sub(r"(left|took|,) (\d+\.\d s|[\d:]+:\d\d)", r"\1 #", text)


ON_TERMINAL = """
import os, sys
from letheon.launch import evaluate, train
words = sys.argv[1:]
for folder, no_color in (("plain", "1"), ("colored", "")):
    os.environ["NO_COLOR"] = no_color
    sys.argv = [*words, "--out", folder]
    train.start()
    print("=" * 8)
sys.argv = [words[0], "--original", "plain", "--forget", "class:3"]
evaluate.start()
"""


def run_on_terminal(*args: object, folder: Path) -> str:
    """Run train.py twice on a terminal of 120 columns, without colors first, then evaluate.py.

    Returns:
        All that they wrote there.
    """
    command = [sys.executable, "-c", ON_TERMINAL]
    command += [str(ROOT / "launch" / "train.py"), *map(str, args)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update({"COLUMNS": "120", "TERM": "xterm", "OMP_NUM_THREADS": "1"})
        os.execv(command[0], command)
    parts = []
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, b"".join(parts)
    return b"".join(parts).decode()


def test_into_a_pipe_goes_a_line_an_epoch_and_a_summary(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [str(ROOT / "launch" / "train.py"), *TRAIN, "--out", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("PATH", "")  # so that a shell finds this Python by its path alone
    train.start()
    ended = capfd.readouterr()
    assert mask(ended.err).splitlines() == [
        "loader auto takes torch: decoded images in memory",
        "epoch 1/2  all loss #  # images/s  data #%  memory # GiB  left #",
        "epoch 2/2  all loss #  # images/s  data #%  memory # GiB  left #",
    ]
    assert mask(ended.out).splitlines() == [
        "trained small for 2 epochs on 1,438 images of digits, # in all",
        f"  in    {tmp_path}/a",
        f"  next  {sys.executable} {ROOT}/launch/forget.py --weights {tmp_path}/a "
        f"--forget class:0 --out {tmp_path}/salun salun random-label",
    ]


def test_a_terminal_has_one_live_line_that_is_gone_at_the_end(tmp_path: Path) -> None:
    text = run_on_terminal(*TRAIN, folder=tmp_path).replace("\r\n", "\n")
    summary = "trained small for 2 epochs on 1,438 images of digits"
    plain, colored, measured = text.split("========\n")
    for written, bold in ((plain, summary), (colored, f"\x1b[1m{summary}\x1b[0m")):
        head, *states = written.split("\r")
        assert head == "loader auto takes torch: decoded images in memory\n"
        first = mask(states[0])
        assert first == "epoch 1/2 all  1/12  # images/s  data #%  memory # GiB  left #\x1b[K"
        assert all(len(state) <= 119 + len("\x1b[K") for state in states[:-1])
        assert "\n" not in "".join(states[:-1])
        last = states[-1].removeprefix("\x1b[K").splitlines()[0]
        assert mask(last) == f"{bold}, # in all"
    states = [mask(state) for state in measured.split("\r")]
    first = "measure plain  1/1  "
    beginning = next(place for place, state in enumerate(states) if state.startswith(first))
    assert any(state.startswith("train through 1 models  ") for state in states[:beginning])
    assert all(state.endswith("\x1b[K") and "\n" not in state for state in states[beginning:-1])
    assert re.fullmatch(r"measure plain  1/1  .* (\d+)/\1  left #\x1b\[K", states[-2])
    assert states[-1].startswith("\x1b[Kmodel ") and "TRA %" in states[-1]


def test_json_is_all_that_standard_output_holds(scripts: Scripts, original: Path) -> None:
    folder = original.parent / "json"
    args = ["--weights", original, "--forget", "class:3", "--out", folder, "--overwrite"]
    ended = scripts("forget", *args, "--json", "finetune", "--epochs", "1")
    found = json.loads(ended.out)
    assert found["command"] == "forget" and found["out"] == str(folder)
    assert found["facts"]["forget_images"] == 146
    [spent] = found["facts"]["runs"].values()
    assert set(spent["losses"]) and spent["weights"]
    ended = scripts("evaluate", "--runs", folder, "--json", "--original", original)
    found = json.loads(ended.out)
    assert {row["name"] for row in found["facts"]["rows"]} == {"original", "json"}
    ended = scripts("forget", *args, "--json", "finetune", "--lr", "-1")
    assert ended.code == 2
    assert json.loads(ended.out)["exit_code"] == 2 and "got lr -1" in ended.err


def test_quiet_prints_the_result_alone(scripts: Scripts, original: Path) -> None:
    args = ["--original", original, "--forget", "class:3", "--workers", "0"]
    ended = scripts("evaluate", *args, "--quiet")
    assert ended.err == ""
    assert "TRA %" in ended.out and "in all" not in ended.out
    ended = scripts("evaluate", *args)
    assert "in all" in ended.out
    assert mask(ended.err).splitlines()[-3:] == [
        "train through 1 models  # images/s  data #%  memory # GiB  took #",
        "test through 1 models  # images/s  data #%  memory # GiB  took #",
        "measure original  1/1  memory # GiB  took #",
    ]


def test_a_long_epoch_is_not_silent_where_standard_error_is_piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 50 seconds: one line once two minutes have passed without any, then another."""
    now = [0.0]
    monkeypatch.setattr(progress, "_mode", "lines")
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    progress.say("begin")
    line = progress.Line("epoch 1/1 retain", 8)
    for _ in range(8):
        now[0] += 50
        line.advance(1, 10)
    shown = capsys.readouterr().err.splitlines()
    assert [text.split("  ")[:2] for text in shown] == [
        ["begin"], ["epoch 1/1 retain", "3/8"], ["epoch 1/1 retain", "6/8"],
    ]  # fmt: skip
    now[0] += 500
    line = progress.Line("next", 100)
    line.advance(1, 10)  # which has no rate yet
    assert not capsys.readouterr().err
    line.skip(60)  # by an earlier start, in no time of this one
    now[0] += 150
    line.advance(2, 10)
    assert "63/100" in (text := capsys.readouterr().err) and "left 30:50" in text


def test_the_time_left_counts_the_runs_that_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs, one after the other, of two epochs of 50 s each: after the first, 150 are left.

    Of a run that goes on after its first of three epochs two are left, and the first took no time.
    """
    now = [0.0]
    monkeypatch.setattr(progress, "_mode", "lines")
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    line, whole = TrainingLine(True), EpochPart(0, 0.0, 1.0)
    for run in (0, 1):
        for epoch in (0, 1):
            shown = Shown(f"run{run}", "retain", epoch, 2, whole, lambda: torch.ones(2), {})
            for _ in line.watch([shown], [()], 1, lambda _: 10, [float(run)]):
                now[0] += 50
    line.close()
    ends = [text.rpartition("left ")[2] for text in capsys.readouterr().err.splitlines()]
    assert ends == ["2:30", "1:40", "50.0 s", "0.0 s"]
    line = TrainingLine(True)
    for epoch in (1, 2):
        shown = Shown("", "retain", epoch, 3, whole, lambda: torch.ones(2), {})
        for _ in line.watch([shown], [()], 1, lambda _: 10):
            now[0] += 50
    line.close()
    ends = [text.rpartition("left ")[2] for text in capsys.readouterr().err.splitlines()]
    assert ends == ["50.0 s", "0.0 s"]


def test_the_time_left_counts_the_images_of_each_phase(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SPKD reads a tenth of the set, then nine tenths, 1 s a step: each epoch takes 10 s.

    A run that goes on after the seventh of the nine steps of the second phase has 2 s of its first
    epoch before it and 10 of its second.
    """
    now = [0.0]
    monkeypatch.setattr(progress, "_mode", "live")
    monkeypatch.setattr(progress, "_shown_at", -1.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    ascend, restore = EpochPart(1, 0.0, 0.1), EpochPart(0, 0.1, 1.0)

    def left(*passes: tuple[int, EpochPart, int]) -> list[str]:
        """What is said to be left after each step of these passes: epoch, part, steps."""
        line = TrainingLine(True)
        for epoch, part, steps in passes:
            shown = Shown("", "phase", epoch, 2, part, lambda: torch.ones(2), {})
            for _ in line.watch([shown], [()] * steps, steps, lambda _: 10):
                now[0] += 1
        line.close()
        return re.findall(r"left (\S+)", capsys.readouterr().err)

    assert left((0, ascend, 1), (0, restore, 9)) == [f"{20 - step}.0" for step in range(1, 11)]
    late = restore._replace(begin=0.8)  # with seven of its nine steps taken
    assert left((0, late, 2), (1, ascend, 1))[:3] == ["11.0", "10.0", "9.0"]


def test_the_time_left_of_runs_that_are_fed_together_is_that_of_their_mean_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two runs has ascended in 1 s, a tenth of its epoch, before nine shared steps of 1 s:
    after the first they have done 0.2 and 1 / 9, of which 2 s were 14 of 90.
    """  # noqa: D205
    now = [0.0]
    monkeypatch.setattr(progress, "_mode", "live")
    monkeypatch.setattr(progress, "_shown_at", -1.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    line = TrainingLine(True)
    parts = [EpochPart(0, 0.0, 1.0), EpochPart(0, 0.1, 1.0)]
    ascent = Shown("a", "ascend", 0, 1, EpochPart(1, 0.0, 0.1), lambda: torch.ones(2), {})
    both = [
        Shown(n, "r", 0, 1, part, lambda: torch.ones(2), {})
        for n, part in zip("fa", parts, strict=True)
    ]
    for shown, steps, others in (([ascent], 1, [0.0]), (both, 9, [])):
        for _ in line.watch(shown, [()] * steps, steps, lambda _: 10, others):
            now[0] += 1
    line.close()
    left = re.findall(r"left (\S+)", capsys.readouterr().err)
    assert left[0] == "19.0" and left[1] == f"{2 * 76 / 14:.1f}" and left[-1] == "0.0"


def test_of_several_runs_the_line_names_one_and_counts_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of any length leave room for how far it is and the time left on eighty columns."""
    monkeypatch.setattr(progress, "_mode", "live")
    monkeypatch.setattr(progress, "_shown_at", -1.0)
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    names = [f"spkd-lr0.001-forget-batch-normrecipe-ascentbounded-{k}" for k in range(6)]
    part, losses = EpochPart(0, 0.0, 1.0), dict[str, float]()
    shown = [Shown(name, "r", 0, 1, part, lambda: torch.ones(2), losses) for name in names]
    line = TrainingLine(True)
    for _ in line.watch(shown, [()] * 2, 2, lambda _: 10):
        now[0] += 1
    text = capsys.readouterr().err.split("\r")[1].removesuffix("\x1b[K")
    name = "…forget-batch-normrecipe-ascentbounded-0"
    assert text.startswith(f"epoch 1/1 {name} and 5 more  1/2  ") and len(name) == 40
    assert text.endswith("  left 1.0 s") and len(text) < 80


def test_items_show_the_piece_in_hand_and_the_time_left_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two items of two pieces of 60 s each: after one piece 180 s are left."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = {}
    for mode in ("live", "lines", "silent"):
        monkeypatch.setattr(progress, "_mode", mode)
        line = progress.Items("attack", 2)
        for name in "ab":
            line.start(name)
            for piece in ("prompt", "barrier"):
                line.show(piece, 2)
                now[0] += 60
            line.finish()
        progress.clear()
        shown[mode] = capsys.readouterr().err
    assert shown["live"].replace("\x1b[K", "").split("\r")[1:5] == [
        "attack a  1/2  prompt 1/2",
        "attack a  1/2  barrier 2/2  left 3:00",
        "attack b  2/2  prompt 1/2  left 2:00",
        "attack b  2/2  barrier 2/2  left 1:00",
    ]
    monkeypatch.setattr(progress, "_mode", "live")
    line = progress.Items("attack", 1)
    line.start("x" * 200 + "end")
    line.show("prompt", 2)
    progress.clear()
    assert f"attack …{'x' * 36}end  1/1  prompt 1/2" in capsys.readouterr().err
    done = [mask(line) for line in shown["lines"].splitlines()]
    assert done == [
        f"attack {name}  {k}/2  memory # GiB  took #" for k, name in ((1, "a"), (2, "b"))
    ]
    assert shown["silent"] == ""


def test_durations_read_as_people_write_them() -> None:
    texts = [progress.format_seconds(s) for s in (0.04, 59.94, 187, 7509)]
    assert texts == ["0.0 s", "59.9 s", "3:07", "2:05:09"]


OUTPUT = """
import sys
from letheon.processes import end_with_reader
with end_with_reader():
    print("a line for people", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").close()  # the work
    print("the result")
    if len(sys.argv) > 2:
        sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(("stdout", "code"), [("reader gone", 141), ("/dev/full", 3), ("pipe", 0)])
def test_an_output_that_cannot_be_written_ends_after_the_work(
    stdout: str, code: int, tmp_path: Path
) -> None:
    """Standard error has no reader in any case: a line is lost, and no more."""
    sides = []
    for _ in range(2):
        read, write = os.pipe()
        os.close(read)
        sides.append(write)
    with open("/dev/full", "w") as full:
        place = {"reader gone": sides[0], "/dev/full": full, "pipe": subprocess.PIPE}[stdout]
        command = [sys.executable, "-c", OUTPUT, str(tmp_path / "work")]
        ended = subprocess.run(command, stdout=place, stderr=sides[1], check=False)
    for side in sides:
        os.close(side)
    assert ended.returncode == code
    assert (tmp_path / "work").exists()


@pytest.mark.parametrize(("closed", "code"), [(">&- 2>&-", 0), ("> /dev/full", 75)])
def test_a_closed_output_and_a_code_of_its_own(closed: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(OUTPUT)
    command = f"{sys.executable} {tmp_path / 'it.py'} {tmp_path / 'work'} {code} {closed}"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(["sh", "-c", command], env=environment, check=False)
    assert ended.returncode == code
    assert (tmp_path / "work").exists()


def test_ctrl_c_before_the_work_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While packages are imported no handler stands: Python's own would print its stack."""

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt(name)

    monkeypatch.setattr(main, "import_module", interrupt)
    monkeypatch.setattr(sys, "argv", ["letheon", "train", "--data", "digits"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == main._STOPPED == STOPPED
    told = capsys.readouterr()
    assert told.err == "stopped: by SIGINT; the same command starts again\n" and not told.out
