"""What a user sees of an error: one line with its flag, an exit code, and torchrun's last lines."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from letheon import errors
from letheon.engine.distributed import Ranks
from letheon.errors import InputError, RunFailed, UnreadableImage, install_extra
from letheon.launch import command
from letheon.launch.command import error_line, run_several, together
from tests.launch_tools import ROOT, Ended, Scripts, torchrun


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("got 3"), "error: got 3"),
        (InputError("got 3", option="batch_size"), "error: --batch-size: got 3"),
        (InputError("got 3", option="method.recipe.lr"), "error: --lr: got 3"),
        (UnreadableImage("a.jpg:\n  cut short", option="data"), "error: --data: a.jpg: cut short"),
        (RunFailed("got a full disk"), "error: got a full disk"),
    ],
)
def test_the_line(error: Exception, line: str) -> None:
    assert error_line(error) == line


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("got 3", option="lr"), 2), (RunFailed("got nan"), 3)]
)
def test_exit_codes(
    error: Exception,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(settings: object, ranks: Ranks) -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as end:
        run_several(lambda: [None], fail)
    assert end.value.code == code
    assert capsys.readouterr().err == error_line(error) + "\n"
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == error_line(error)


@pytest.mark.parametrize("script", ["verify", "dispose", "export", "run", "evaluate"])
def test_nothing_to_work_on_is_bad_input(script: str, scripts: Scripts) -> None:
    ended = scripts(script)
    assert ended.code == 2 and ended.err and not ended.out


def test_a_fault_of_ours_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(settings: object, ranks: Ranks) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ZeroDivisionError):
        run_several(lambda: [None], fail)
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "ZeroDivisionError: ours"
    assert "Traceback" in message["extraInfo"]["py_callstack"]


def test_an_error_keeps_its_kind_and_option() -> None:
    def refuse() -> None:
        raise UnreadableImage("a.jpg", option="data")

    with pytest.raises(UnreadableImage) as caught:
        together(Ranks(), refuse)
    assert caught.value.option == "data"


def closing(ended: Ended) -> str:
    """The last 15 lines that torchrun prints."""
    return "\n".join(ended.err.rstrip().splitlines()[-15:])


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("--device", "cpu", "--dtype", "fp16", "finetune"), "error: --dtype: got dtype fp16", 2),
        (("finetune", "--learning-rate", "1"), "--learning-rate", 2),
        (("grad-ascent", "--lr", "1e20", "--epochs", "3"), "got a mean loss of", 3),
    ],
)
@pytest.mark.slow
def test_torchrun_ends_with_the_error(
    arguments: tuple[str, ...], message: str, code: int, original: Path, tmp_path: Path
) -> None:
    ended = torchrun(
        2, "forget", "--weights", original, "--forget", "class:3", "--out", tmp_path / "out",
        *arguments,
    )  # fmt: skip
    assert ended.code != 0
    assert message in closing(ended) and f"exitcode  : {code}" in closing(ended)
    assert "To enable traceback" not in ended.err


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from letheon import __version__
    from letheon.launch import main

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["letheon", *args])
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    assert call("--version") == (0, f"letheon {__version__}\n", "")
    scripts = {path.stem for path in (ROOT / "launch").rglob("*.py") if "def start()" in
               path.read_text()}  # fmt: skip
    assert scripts == set(main.COMMANDS)
    for args in ((), ("--help",), ("-h",)):
        code, out, _ = call(*args)
        assert code == 0 and all(f"  {name} " in out for name in scripts)
    code, _, err = call("forgot", "--weights", "x")
    assert code == 2 and "did you mean forget?" in err and len(err.splitlines()) == 1
    code, out, _ = call("evaluate", "--define")
    assert code == 0 and "FA" in out
    code, _, err = call(
        "forget", "--weights", "nowhere", "--forget", "class:3", "--out", "x", "spkd"
    )
    assert code == 2 and err.startswith("error: ")


def test_the_scripts_say_the_flag(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:3", "--out", original, "finetune"
    )
    assert ended.code == 2 and ended.err.startswith("error: --out: got ")


def test_a_job_that_is_done_ends_at_once_where_a_thread_hangs_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's own end would abort the process, after all was saved."""
    codes: list[int] = []
    monkeypatch.setattr(command, "hangs", lambda: True)
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        command.run_several(lambda: [object()], lambda settings, ranks: None)
    assert codes == [0]


def test_how_to_install_is_said_to_users_of_a_wheel_and_of_a_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert install_extra("report") == "pip install 'matplotlib>=3.10'"
    assert install_extra("faiss") == "pip install 'faiss-cpu>=1.9'"  # and not faiss-gpu

    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(errors, "requires", missing)
    assert install_extra("report") == "pip install '.[report]' in the checkout"


def test_every_missing_package_is_installed_by_the_same_words() -> None:
    """What else says `pip install` would hold for a checkout alone; each extra is a known one."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    own: list[str] = []
    named: set[str] = set()
    for folder in ("letheon", "engine", "eval", "kernels", "launch", "loaders", "methods"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            own += [str(file.relative_to(ROOT))] * ("pip install" in text)
            named |= set(re.findall(r"install_extra\('(\w+)'\)", text))
    assert own == ["letheon/errors.py"]
    assert len(named) > 8 and all(f'"{extra}": [' in setup for extra in named)
