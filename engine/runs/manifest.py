"""The manifest of a run: what it was, and the digest of every file it left, sealed and chained.

    manifest.json   request, settings, seeds, data, code, environment, ancestry, files; written
                    right before run.json, whose digest it holds too
    manifest.sig    where a key was given: an ed25519 signature of manifest.json

It is a replayable record of a run, and signed it says who kept it. It is no proof that a network
has forgotten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from letheon.errors import InputError
from letheon.folders import LOCK
from letheon.regular import LARGEST, read_regular
from letheon.sealed import read_sealed

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
DISPOSAL = "disposal.json"
"""What was removed after the run had ended; it is in no manifest."""
FORMAT = "letheon-manifest-1"
_SEAL = "digest"  # the entry that holds the SHA-256 of all others


def build_manifest(folder: Path, facts: Mapping[str, Any], final: Mapping[str, str]) -> str:
    """Build the text of a run's manifest.

    Args:
        folder: the run's, with all its files but those of `final`.
        facts: what is known of the run by name: request, settings, data, code, and so on.
        final: texts of the files that are written after it, by name.

    Returns:
        JSON in its one canonical form.
    """
    files = {path.name: file_digest(path) for path in run_files(folder)}
    files |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in final.items()}
    return _canonical({"format": FORMAT, **facts, "files": files})


def run_files(folder: Path) -> list[Path]:
    """List the files of a run folder that its manifest names, by name."""
    apart = (MANIFEST, SIGNATURE, DISPOSAL, LOCK)
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in apart and not path.name.endswith(".partial")
    ]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a run's manifest and verify that it is as it was written, to the byte.

    Raises:
        InputError: there is none, or it was changed.
    """
    try:
        text = read_regular(folder / MANIFEST, LARGEST).decode()
        content = json.loads(text)
        whole = isinstance(content, dict) and _canonical(content) == text
    except FileNotFoundError:
        raise InputError(
            f"got {folder}, which has no {MANIFEST}; expected a finished run of this version; "
            "run it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"got {folder / MANIFEST}, which cannot be read ({error})") from None
    if not whole or content.get("format") != FORMAT:
        raise InputError(
            f"got {folder / MANIFEST}; its content is not what its digest says; it was changed"
        )
    return content


def verify_records(folder: Path, *names: str) -> None:
    """Verify files of a run folder by its manifest; runs of earlier versions have none.

    Raises:
        InputError: the manifest or one of the files is not what the run wrote.
    """
    if not (folder / MANIFEST).is_file():
        return
    files = read_manifest(folder).get("files", {})
    for name in names:
        path = folder / name
        if name in files and path.is_file() and file_digest(path) != files[name]:
            raise InputError(
                f"got {path}, which is not what {MANIFEST} says; expected it as the run wrote it; "
                "restore it, or run it again"
            )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def trace_ancestry(weights: str) -> dict[str, str]:
    """Say what a run started from: the digests of its weights' file and of its own manifest.

    Args:
        weights: a run folder or a checkpoint; anything else is only named.

    Returns:
        ``path``, and as far as there is one ``file``, ``weights`` (digest over the tensors) and
        ``manifest``.
    """
    path = Path(weights)
    known = {"path": weights}
    run = path / "run.json"
    file = path / "weights.safetensors" if path.is_dir() else path
    if file.is_file():
        known["file"] = file_digest(file)
    if run.is_file():
        known["weights"] = str(read_sealed(run).get("weights"))
    if (path / MANIFEST).is_file():
        known["manifest"] = file_digest(path / MANIFEST)
    return known


def _canonical(content: Mapping[str, Any]) -> str:
    """Format with the seal over all other entries."""
    rest = {key: value for key, value in content.items() if key != _SEAL}
    seal = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, _SEAL: seal}, indent=1, sort_keys=True) + "\n"
