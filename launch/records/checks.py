"""The checks of a run folder against its manifest: one line each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from letheon.engine.checkpoints.model_file import stored_digest
from letheon.engine.runs.loggers import broken_link
from letheon.engine.runs.manifest import (
    MANIFEST,
    SIGNATURE,
    file_digest,
    read_manifest,
    run_files,
    trace_ancestry,
)
from letheon.engine.runs.reads import prove, read_reads
from letheon.engine.runs.run_folder import FINISHED
from letheon.engine.runs.signature import verify_signature
from letheon.errors import InputError
from letheon.regular import LARGEST, read_regular, read_text
from letheon.sealed import expect_shape


class Check(NamedTuple):
    """One check: ``ok``, ``mismatch``, or ``unknown`` where nothing can be compared."""

    name: str
    state: str
    text: str


def check_run(folder: Path, key: str | None = None) -> list[Check]:
    """Check a run folder: manifest, signature, files, weights, log, request, reads, ancestry.

    Args:
        folder: of a finished run.
        key: the ed25519 public key in hex that must have signed it; None: any, or none.

    Returns:
        The checks in order; where the manifest itself is broken, that one alone.

    Raises:
        InputError: the folder holds no finished run.
    """
    if not (folder / FINISHED).is_file() and not (folder / MANIFEST).is_file():
        raise InputError(f"got {folder}; expected the folder of a finished run")
    try:
        manifest = read_manifest(folder)
        with expect_shape(folder / MANIFEST):
            facts, method = manifest["facts"], manifest["facts"]["method"]
    except InputError as error:
        return [Check("manifest", "mismatch", str(error))]
    checks: list[tuple[str, Callable[[], str | None]]] = [
        ("signature", lambda: _signature(folder, key)),
        ("files", lambda: _files(folder, manifest["files"])),
        ("weights", lambda: _weights(folder, facts["weights"])),
        ("log", lambda: _log(folder)),
        ("request", lambda: _request(manifest)),
        ("reads", lambda: _reads(folder, manifest)),
        ("ancestry", lambda: _ancestry(manifest)),
    ]
    results = [Check("manifest", "ok", f"of {method}, {manifest['digest'][:12]}")]
    for name, check in checks:
        try:
            text = check()
        except _Unknown as absence:
            results.append(Check(name, "unknown", str(absence)))
        except (InputError, OSError, SafetensorError, *_ODD) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            results.append(Check(name, "mismatch", reason))
        else:
            known = "unknown" if text is None else "ok"
            results.append(Check(name, known, text or _NOTHING[name]))
    return results


class _Unknown(Exception):
    """What a check needs is not here; the text says what."""


_ODD = (LookupError, TypeError, ValueError, AttributeError)  # of content of another shape
_NOTHING = {
    "signature": "the run is not signed",
    "request": "the run was to forget nothing",
    "reads": "no reads were counted",
    "ancestry": "the run started from new weights",
}
"""What is said where there is nothing to compare."""


def _signature(folder: Path, key: str | None) -> str | None:
    file = folder / SIGNATURE
    if not file.is_file():
        if key is not None:
            raise InputError(f"there is no {SIGNATURE}")
        return None
    signer = verify_signature(read_text(file), read_regular(folder / MANIFEST, LARGEST), key)
    return f"of the manifest by the key {signer}"


def _files(folder: Path, known: dict[str, str]) -> str:
    present = {path.name: path for path in run_files(folder)}
    for name, digest in known.items():
        if name not in present:
            raise InputError(f"{name} is missing")
        if file_digest(present[name]) != digest:
            raise InputError(f"{name} was changed")
    others = sorted(present.keys() - known.keys())
    return f"{len(known)} as they were" + (f"; not of the run: {', '.join(others)}" * bool(others))


def _weights(folder: Path, digest: str) -> str:
    actual = stored_digest(folder)  # whatever network they are of, a caller's own too
    if actual != digest:
        raise InputError(f"the weights are {actual[:12]}, and the record says {digest[:12]}")
    return f"are those of the record, {digest[:12]}"


def _log(folder: Path) -> str:
    file = folder / "metrics.jsonl"
    if (line := broken_link(file)) is not None:
        raise InputError(f"line {line} of {file.name} does not follow the one before it")
    return "every line follows the one before it"


def _request(manifest: dict[str, Any]) -> str | None:
    request = manifest.get("request")
    if request is None:
        return None
    numbers = request["classes"] if request["samples"] is None else request["samples"]
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).hexdigest()
    if digest != request["digest"]:
        raise InputError("the digest is not that of the classes or samples beside it")
    return f"{request['text']} is that of its digest"


def _reads(folder: Path, manifest: dict[str, Any]) -> str | None:
    stored = manifest["facts"].get("reads")
    if stored is None:
        return None
    counts, forget, earlier = read_reads(folder)
    proof = prove(counts, forget, earlier)
    if proof != stored:
        raise InputError("the counts are not those of the record")
    request = manifest.get("request")
    samples = None if request is None else request["samples"]
    if samples is not None and forget.nonzero().flatten().tolist() != samples:
        raise InputError("the samples to forget are not those of the request")
    gone = _earlier_samples(request or {}, forget.nonzero().flatten().tolist())
    left_out = set() if earlier is None else {*earlier.nonzero().flatten().tolist()}
    if not gone <= left_out:
        raise InputError("samples of an earlier request were not left out")
    if not proof["clean"]:
        raise InputError("a phase read samples that it was not to read")
    retain = sum(name.startswith("retain/") for name in proof["phases"])
    return (
        f"{proof['forget_samples']} samples to forget; 0 reads of them in "
        f"{retain} phases of retain samples alone"
        + (f"; {len(left_out)} forgotten earlier were not read" if left_out else "")
    )


def _earlier_samples(request: dict[str, Any], forget: list[int]) -> set[int]:
    """Samples that earlier requests name by their numbers, but for those that are forgotten now."""
    named = [one["samples"] for one in request.get("earlier", ()) if one["samples"] is not None]
    return {number for numbers in named for number in numbers} - {*forget}


def _ancestry(manifest: dict[str, Any]) -> str | None:
    original = manifest.get("original")
    if original is None:
        return None
    now = trace_ancestry(original["path"])
    if len(now) == 1:
        raise _Unknown(
            f"{original['path']}, what the run started from, is no folder or file seen from here"
        )
    for name, value in original.items():
        if now.get(name) != value:
            raise InputError(f"{original['path']} has another {name} than when the run started")
    return f"{original['path']} is what the run started from"


def as_lines(folder: Path, checks: list[Check]) -> Iterator[str]:
    """Print one line a check."""
    for name, state, text in checks:
        yield f"{folder}: {name:<9} {state:<8} {text}"


def as_json(checks: dict[str, list[Check]]) -> str:
    """Print the checks of each folder as JSON."""
    content = {folder: [check._asdict() for check in found] for folder, found in checks.items()}
    return json.dumps(content, indent=1)
