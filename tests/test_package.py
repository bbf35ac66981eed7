"""What is said about the package in more than one file is the same in all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import letheon
from letheon import saved_help
from letheon.loaders.decode import turbojpeg

ROOT = Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.py").read_text()


def test_the_version_is_semantic_and_the_citations_too() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", letheon.__version__)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {letheon.__version__}\n" in citation
    assert SETUP.count(letheon.__version__) == 0


def test_the_saved_help_watches_all_folders_that_are_installed() -> None:
    assert f"FOLDERS = {saved_help.FOLDERS!r}".replace("'", '"') in SETUP


def test_no_extra_but_its_own_brings_the_package_that_hides_pyturbojpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for line in SETUP.splitlines() if '"turbojpeg>=' in line]
    assert len(lines) == 1 and lines[0].strip().startswith('"turbojpeg":')
    # PyTurboJPEG's module is never imported: whatever it does then cannot matter.
    (tmp_path / "turbojpeg.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    turbojpeg.library.cache_clear()
    turbojpeg.library()
    turbojpeg.library.cache_clear()
