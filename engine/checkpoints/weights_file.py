"""Read and write weights on disk: safetensors, torch files, and Hugging Face folders.

Nothing pickled is ever run (`torch_file`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from letheon import durable
from letheon.engine.checkpoints.torch_file import Placeholder, StoredTensor, read_torch_file
from letheon.errors import InputError, join_few
from letheon.sealed import read_json

FILE = "weights.safetensors"
"""Name of the weights in a run folder."""
FACTS_DIGEST = "facts_digest"
"""Entry of a file's metadata that holds the SHA-256 of all others."""
_STATES = ("_parameters", "_buffers", "_modules")
_MOST_PARTS = 1_000_000
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")

Value: TypeAlias = "Tensor | StoredTensor"


@dataclass(frozen=True)
class Weights:
    """Contents of a file: every dict of tensors in it, by its place, and what it says of itself."""

    parts: dict[str, dict[str, Value]]  # by the place in the file, such as "state_dict"
    facts: dict[str, str]  # metadata of our own files, else empty
    config: dict[str, Any]  # config.json and preprocessor_config.json of a Hugging Face folder


def weights_path(path: Path) -> Path:
    """Name the safetensors file that `path` means: itself, or the one in the run folder `path`."""
    return path if path.suffix == ".safetensors" else path / FILE


def read_weights(path: Path) -> Weights:
    """Read a run folder, a Hugging Face folder, a safetensors file or a torch file.

    Raises:
        InputError: no such file, cut short, or no dict of tensors in it.
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        path, config = _open_folder(path)
    if not path.is_file():
        raise InputError(f"got {path}; there is no such file; give a run folder or a checkpoint")
    facts: dict[str, str] = {}
    if path.suffix == ".safetensors":
        content, facts = _read_safetensors(path)
    else:
        try:
            content = read_torch_file(path)
        except Exception as error:  # a damaged file makes the unpickler raise nearly anything
            raise _unreadable(path, error) from error
    try:
        parts = dict(_state_dicts(content, "", set()))
    except (RecursionError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not parts:
        raise InputError(
            f"got {path}; it holds {_describe(content)}; expected a state dict, plain or inside "
            "what a training script saves"
        )
    return Weights(parts, facts, config)


def write_weights(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Replace the file `path`, all or nothing, even if the machine stops; makes its folder.

    Raises:
        InputError: the folder cannot be made.
        RunFailed: writing failed; nothing of ours is left there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"got {path} to save weights in; its folder cannot be made ({error.strerror}); "
            "name a folder that can be written"
        ) from error
    durable.write(path, pack_tensors(state, facts))


def pack_tensors(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file, equal for equal content.

    Its facts are in order, and their digest is one of them (`check_facts`).
    """
    data = memoryview(save(_separate(tensors)))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    if facts:
        content = {**facts, FACTS_DIGEST: _facts_digest(facts)}
        header = {"__metadata__": dict(sorted(content.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, data[8 + size :]])


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, such as tied weights, which the format refuses."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        found[key] = value.clone() if value.numel() and place in places else value
        places.add(place)
    return found


def check_facts(path: Path, facts: Mapping[str, str]) -> None:
    """Verify what a file says of itself against its digest, where it has one.

    Raises:
        InputError: they differ.
    """
    if facts.get(FACTS_DIGEST, _facts_digest(facts)) != _facts_digest(facts):
        raise InputError(
            f"got {path}; what it says of itself, such as its classes, is not what it was saved "
            "with; copy the file again"
        )


def _facts_digest(facts: Mapping[str, str]) -> str:
    """SHA-256 over what a file says of itself, such as the names of its classes."""
    rest = {key: value for key, value in facts.items() if key != FACTS_DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hub_weights(path: Path) -> Path | None:
    """Return the weights of a Hugging Face folder; None for a folder of another kind."""
    if (path / FILE).is_file():
        return None
    return next((path / name for name in _HUB_FILES if (path / name).is_file()), None)


def _open_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """Find the weights in a run folder or a Hugging Face folder, and the latter's settings."""
    if (path / FILE).is_file():
        return path / FILE, {}
    hub = hub_weights(path)
    if hub is None:
        raise InputError(
            f"got {path}, a folder without {FILE}; the run may be unfinished; "
            f"give a finished run, a checkpoint file or a folder with {' or '.join(_HUB_FILES)}"
        )
    config: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            try:
                config |= dict(read_json(path / name))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"got {path / name}, which cannot be read ({error}); expected JSON; "
                    "download the folder again"
                ) from error
    return hub, config


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
            check_facts(path, facts)
            return state, facts if {"letheon_format", FACTS_DIGEST} & facts.keys() else {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
    return InputError(
        f"got {path}; it cannot be read as weights ({reason}); it may be cut short or of another "
        "format; expected safetensors, or a torch file with a state dict"
    )


def _describe(content: Any) -> str:
    if isinstance(content, Placeholder):
        return f"a pickled {type(content).__name__}"
    if isinstance(content, Mapping):
        others = [str(k) for k, v in content.items() if not isinstance(v, Tensor | StoredTensor)]
        return f"a dict with {join_few(others)} that are no tensors" if others else "an empty dict"
    tensor = isinstance(content, Tensor | StoredTensor)
    return "a Tensor" if tensor else f"a {type(content).__name__}"


def _state_dicts(
    content: Any, place: str, seen: set[int]
) -> Iterator[tuple[str, dict[str, Value]]]:
    """Walk through a file's content to every dict of tensors and every pickled network."""
    if id(content) in seen:
        return  # a pickle may hold one object many times, itself among its items too
    seen.add(id(content))
    if isinstance(content, Placeholder) and isinstance(content.state, dict):
        if "_parameters" in content.state:
            yield place or "network", dict(_module_tensors(content, "", frozenset(), _Budget()))
            return
        if type(content).__module__.startswith("__torch__"):
            yield place or "network", dict(_scripted_tensors(content, "", frozenset(), _Budget()))
            return
        yield from _state_dicts(content.state, place, seen)
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if isinstance(content, Mapping):
        tensors = {
            k: v
            for k, v in content.items()
            if isinstance(k, str) and isinstance(v, Tensor | StoredTensor)
        }
        if tensors:
            yield place, tensors
        for key, value in content.items():
            if isinstance(value, Mapping | list | tuple):
                yield from _state_dicts(value, f"{place}.{key}" if place else str(key), seen)


class _Budget:
    """Bounds a walk: a pickled network may hold one part many times over, at every level again."""

    def __init__(self) -> None:
        self.left = _MOST_PARTS

    def spend(self, parts: int) -> None:
        """Take them off; raises `ValueError` where nothing is left."""
        self.left -= parts
        if self.left < 0:
            raise ValueError(f"a network of more than {_MOST_PARTS} parts")


def _scripted_tensors(
    module: Placeholder, path: str, above: frozenset[int], budget: _Budget
) -> Iterator[tuple[str, Value]]:
    """What `state_dict` would give of a TorchScript module, whose state is its attributes."""
    if id(module) in above or not isinstance(module.state, dict):
        return
    budget.spend(1 + len(module.state))
    for key, value in module.state.items():
        if isinstance(value, Tensor | StoredTensor):
            yield f"{path}{key}", value
        elif isinstance(value, Placeholder):
            yield from _scripted_tensors(value, f"{path}{key}.", above | {id(module)}, budget)


def _module_tensors(
    module: Placeholder, path: str, above: frozenset[int], budget: _Budget
) -> Iterator[tuple[str, Value]]:
    """What `state_dict` would give of a pickled network."""
    if id(module) in above or not isinstance(module.state, dict):
        return
    budget.spend(1 + sum(map(len, filter(None, map(module.state.get, _STATES)))))
    skipped = module.state.get("_non_persistent_buffers_set") or ()
    for kind in _STATES[:2]:
        for key, value in dict(module.state.get(kind) or {}).items():
            if isinstance(value, Tensor | StoredTensor) and key not in skipped:
                yield path + key, value
    for key, value in dict(module.state.get("_modules") or {}).items():
        if isinstance(value, Placeholder):
            yield from _module_tensors(value, f"{path}{key}.", above | {id(module)}, budget)
