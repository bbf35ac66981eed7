"""What is left of a preparation that is killed or asked to stop: no process, and parts to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from letheon.errors import InputError, UnreadableImage
from letheon.folders import new_folder
from letheon.launch import prepare
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.formats import arrays_writer, parts
from letheon.loaders.formats.beton_set import open_betons, write_betons
from letheon.loaders.open import open_domains
from tests.launch_tools import ROOT
from tests.loaders.hanging_images import COUNT, HangingImages
from tests.patience import PATIENCE, wait_for


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_helpers_die_with_their_parent_and_parts_are_used_again(tmp_path: Path) -> None:
    started = {}
    for kind in ("loader", "alone"):
        (tmp_path / kind).mkdir()
        command = [sys.executable, "-m", "tests.loaders.hanging_images"]
        command += [str(tmp_path / kind), str(tmp_path / f"out-{kind}"), kind]
        started[kind] = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    helpers = {}
    try:
        for kind, count in (("loader", 2), ("alone", 1)):
            folder, process = tmp_path / kind, started[kind]
            wait_for(
                lambda f=folder, n=count, p=process: (  # type: ignore[misc]
                    len(list(f.iterdir())) == n or p.poll() is not None
                ),
                "helpers at work",
            )
            helpers[kind] = [int(file.name) for file in folder.iterdir()]
            assert len(helpers[kind]) == count and all(map(lives, helpers[kind]))
        started["loader"].kill()
        os.killpg(started["alone"].pid, signal.SIGINT)  # as a terminal does
        everyone = helpers["loader"] + helpers["alone"]
        wait_for(lambda: not any(map(lives, everyone)), "end of the helpers")
        said = started["alone"].communicate(timeout=PATIENCE)[1]
        assert started["alone"].returncode == prepare.STOPPED == 75
        assert said.startswith("stopped by SIGINT") and said.count("\n") == 1, said
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
    for kind in ("loader", "alone"):
        out = tmp_path / f"out-{kind}"
        assert not out.exists() and new_folder(out).is_dir()
        images = HangingImages(tmp_path)
        write_betons({"set": images}, out)
        assert images.reads == COUNT - parts.CHUNK
        found = open_betons(out)
        assert isinstance(found, dict) and len(found["set"]) == COUNT


def stop_at(number: int, asked: signal.Signals) -> ArrayImages:
    """600 images; reading this one sends the process a signal."""

    class Signalled(HangingImages):
        def read(self, i: int) -> np.ndarray:
            if i == number:
                os.kill(os.getpid(), asked)
            return super().read(i)

    return Signalled(Path("."))


@pytest.mark.parametrize("form", ["beton", "arrays"])
def test_a_signal_is_one_line_and_a_second_run_goes_on(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    size = ["--size", "8"] if form == "arrays" else []
    arguments = ["prepare.py", "--source", "x", "--out", str(out), "--form", form, *size]
    monkeypatch.setattr(sys, "argv", [*arguments, "--workers", "0"])
    before = signal.getsignal(signal.SIGTERM)
    codes = []
    asked = signal.SIGUSR1 if form == "arrays" else signal.SIGTERM
    for number in (300, -1):
        images = stop_at(number, asked)
        monkeypatch.setattr(prepare, "open_source", lambda path, s=images: {"set": s})
        try:
            prepare.start()
        except SystemExit as end:
            codes.append(end.code)
        assert signal.getsignal(signal.SIGTERM) is before
    assert codes == [75] and images.reads == COUNT - parts.CHUNK  # type: ignore[attr-defined]
    assert capsys.readouterr().err.startswith(f"stopped by {asked.name}: ")
    assert not new_folder(out).exists()
    (found,) = open_domains(str(out)).values()
    assert len(found) == COUNT and np.array_equal(found.labels, images.labels)
    if form == "arrays":
        assert np.array_equal(found.read_many(np.arange(COUNT)), images.pixels)
    with pytest.raises(SystemExit):  # a good set is never replaced
        prepare.start()


@pytest.mark.parametrize("damage", ["cut", "zeros", "page", "gone"])
def test_a_damaged_part_is_made_again(damage: str, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    images = stop_at(300, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        arrays_writer.prepare({"set": images}, tmp_path / "out", 8)
    folder = new_folder(tmp_path / "out") / "set" / "parts"
    data, page = folder / "0.bin", folder / "0.json"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-5])
    elif damage == "zeros":
        data.write_bytes(bytes(data.stat().st_size))
    elif damage == "gone":
        data.unlink()
    else:
        page.write_text(page.read_text().replace("10", "11", 1))
    whole = HangingImages(tmp_path)
    arrays_writer.prepare({"set": whole}, tmp_path / "out", 8)
    assert whole.reads == COUNT
    (found,) = open_domains(str(tmp_path / "out")).values()
    assert np.array_equal(found.read_many(np.arange(COUNT)), whole.pixels)


def test_a_class_without_images_leaves_nothing(tmp_path: Path) -> None:
    class Unreadable(HangingImages):
        def read(self, i: int) -> np.ndarray:
            raise UnreadableImage("broken")

    with pytest.raises(InputError, match="no readable image"):
        write_betons({"set": Unreadable(tmp_path)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_preparations_of_one_place_are_refused(tmp_path: Path) -> None:
    """The second is refused in a line that names the first, which ends as if it were alone."""
    refused: list[str] = []

    class Second(HangingImages):
        def read(self, i: int) -> np.ndarray:
            if i == 100:
                code = (
                    "import sys; from pathlib import Path; from letheon.errors import InputError;"
                    "from letheon.folders import lock\n"
                    "try:\n    lock(Path(sys.argv[1])).__enter__()\n"
                    "except InputError as error:\n    print(error)"
                )
                command = [sys.executable, "-c", code, str(tmp_path / "out")]
                refused.append(subprocess.run(command, capture_output=True, text=True).stdout)
                with pytest.raises(InputError, match="is working on it"):
                    write_betons({"set": HangingImages(tmp_path)}, tmp_path / "out")
            return super().read(i)

    arrays_writer.prepare({"set": Second(tmp_path)}, tmp_path / "out", 8)
    assert len(refused) == 1 and f"process {os.getpid()} on" in refused[0]
    (found,) = open_domains(str(tmp_path / "out")).values()
    assert len(found) == COUNT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
