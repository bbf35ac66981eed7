"""Records of a run by its manifest: one flipped bit is refused, and the file is named."""

import json
from pathlib import Path

import pytest

from letheon.engine.runs.manifest import MANIFEST, build_manifest, verify_records
from letheon.errors import InputError

NAMES = ("run.json", "settings.json", "origin.json")


def test_a_changed_record_is_refused_and_named(tmp_path: Path) -> None:
    for name in NAMES[1:]:
        (tmp_path / name).write_text(json.dumps({"weights": "ab"}))
    text = build_manifest(tmp_path, {}, {"run.json": "{}"})
    (tmp_path / "run.json").write_text("{}")
    verify_records(tmp_path, *NAMES)  # no manifest yet
    (tmp_path / MANIFEST).write_text(text)
    verify_records(tmp_path, *NAMES, "absent.json")
    for name in NAMES:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes([before[0] ^ 1]) + before[1:])
        with pytest.raises(InputError, match=f"{name}, which is not what"):
            verify_records(tmp_path, *NAMES)
        (tmp_path / name).write_bytes(before)
    verify_records(tmp_path, *NAMES)
