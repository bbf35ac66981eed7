"""What a script imports before it does anything, and the help that is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from letheon import saved_help

SCRIPTS = "train forget mask evaluate prepare doctor records.verify records.dispose api"
OWN = "small speed_cnn speed_cnn_wide resnet20 resnet56 vgg16_bn_cifar efficientnet_lite0"
"""Networks of our own; the others are made by torchvision, which imports torch's compiler."""
SLOW = "scipy sklearn torch._dynamo sympy torchvision.models torchvision matplotlib timm faiss"


def python(code: str, cache: Path) -> str:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "90"}
    for name in ("RANK", "TORCHELASTIC_ERROR_FILE"):
        env.pop(name, None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def test_what_is_slow_to_import_is_imported_when_it_is_used(tmp_path: Path) -> None:
    out = python(
        "import sys; from importlib import import_module\n"
        f"for name in '{SCRIPTS}'.split(): import_module(f'letheon.launch.{{name}}')\n"
        f"print([name for name in '{SLOW}'.split() if name in sys.modules])",
        tmp_path,
    )
    assert out.strip() == "[]"


def test_weights_are_known_and_digits_read_without_a_slow_import(tmp_path: Path) -> None:
    """Torch's compiler is not loaded to draw on meta, nor scikit-learn to read a table."""
    out = python(
        "import sys; from letheon.engine.checkpoints.state_dict_match import skeleton\n"
        "from letheon.loaders.datasets.digits import upstream\n"
        f"for name in '{OWN}'.split():\n"
        "    assert all(p.is_meta for p in skeleton(name).parameters())\n"
        "assert upstream()\n"
        "print([name for name in ('torch._dynamo', 'sklearn', 'scipy') if name in sys.modules])",
        tmp_path,
    )
    assert out.strip() == "[]"


LIGHT = """
import sys
from letheon.launch.main import main
sys.argv = ["letheon", *{args}]
try:
    main()
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "numpy", "tyro") if name in sys.modules])
"""


def test_help_and_version_import_nothing_and_help_is_saved(tmp_path: Path) -> None:
    for args in (["--help"], ["--version"], []):
        assert python(LIGHT.format(args=args), tmp_path).splitlines()[-1] == "[]"
    for args, word in ((["mask", "--help"], "--densities"), (["methods", "scrub"], "KL_T(p_o, p)")):
        first, second = (python(LIGHT.format(args=args), tmp_path) for _ in "12")
        *text, before = first.splitlines()
        *again, after = second.splitlines()
        assert text == again and word in first
        assert before == "['torch', 'numpy', 'tyro']" and after == "[]"


def test_help_into_a_pipe_that_is_closed_is_no_error(tmp_path: Path) -> None:
    """As `letheon forget --help | head -1`, printed first and then saved."""
    code = (
        "from letheon.saved_help import run_or_show\n"
        "run_or_show(['forget', '--help'], ('--help',), lambda: print('x' * 10**6))"
    )
    for saved in (False, True):
        if saved:
            python(code, tmp_path)
        read, write = os.pipe()
        os.close(read)
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        env.pop("RANK", None)
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=env, check=False
        )
        os.close(write)
        assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """How often the command has run, after it was asked with these arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(saved_help, "FOLDERS", ("kernels",))
    runs: list[int] = []

    def ask(*args: str, code: int = 0) -> int:
        def run() -> None:
            runs.append(code)
            print("the help", *args)
            raise SystemExit(code)

        try:
            saved_help.run_or_show(args, ("--help", "-h"), run)
        except SystemExit as end:
            assert end.code == code
        return len(runs)

    return ask


def test_help_is_printed_anew_where_anything_differs(
    show: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [show("forget", "--help"), show("forget", "--help")] == [1, 1]
    assert capsys.readouterr().out == "the help forget --help\n" * 2
    assert show("forget", "salun", "--help") == 2
    monkeypatch.setenv("COLUMNS", "61")
    assert show("forget", "--help") == 3
    monkeypatch.setattr(saved_help, "FOLDERS", ("kernels", "methods"))  # other source
    assert show("forget", "--help") == 4
    monkeypatch.setenv("RANK", "0")
    assert show("forget", "--help") == 5


def test_terminals_of_many_widths_share_few_texts(
    show: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page has 100, 80, 60 or 40 columns, whatever the terminal has."""
    widths = ((300, 1), (100, 1), (99, 2), (80, 2), (79, 3), (60, 3), (59, 4), (40, 4), (20, 4))
    for columns, runs in (*widths, *((columns, 4) for columns in range(20, 200, 7))):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert show("forget", "--help") == runs


def test_no_help_is_saved_of_mistakes_options_and_plugins(
    show: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [show("forget", "--help", code=2) for _ in "12"] == [1, 2]
    assert [show("forget", "--config", "file", "--help") for _ in "12"] == [3, 4]
    monkeypatch.setattr(saved_help, "entry_points", lambda group: ["a method"])
    assert [show("forget", "--help") for _ in "12"] == [5, 6]
    monkeypatch.undo()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert [show("forget", "--help") for _ in "12"] == [7, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_newest_texts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_help, "_KEEP", 2)
    for number in range(4):
        saved_help._save(tmp_path / f"{number}.txt", "")
        os.utime(tmp_path / f"{number}.txt", (number, number))
    assert len(list(tmp_path.glob("*.txt"))) == 2
