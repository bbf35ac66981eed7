"""Read and write state dicts: safetensors, and the torch files of others.

Nothing pickled is ever run.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from letheon import durable
from letheon.errors import InputError

FILE = "weights.safetensors"
"""Name of the weights in a run folder."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class Weights:
    """Contents of a file; tensors on the CPU, prefixes of wrappers removed from their names."""

    state: dict[str, Tensor]
    facts: dict[str, str]  # metadata of our own files, else empty
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None  # mean, std of such a submodule


def weights_path(path: Path) -> Path:
    """Name the safetensors file that `path` means: itself, or the one in the run folder `path`."""
    return path if path.suffix == ".safetensors" else path / FILE


def read_weights(path: Path) -> Weights:
    """Read a run folder, a safetensors file or a torch file (state dict, plain or wrapped).

    Raises:
        InputError: no such file, cut short, pickled objects, or no state dict in it.
    """
    if path.is_dir():
        if not (path / FILE).is_file():
            raise InputError(
                f"got {path}, a folder without {FILE}; the run may be unfinished; "
                "give a finished run or a checkpoint file"
            )
        path = path / FILE
    if not path.is_file():
        raise InputError(f"got {path}; there is no such file; give a run folder or a checkpoint")
    state, facts = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    normalize = _pop_normalize(state, path)
    return Weights(without_prefixes(state), facts, normalize)


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
    durable.write(path, save(state, facts))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
            return state, facts if "letheon_format" in facts else {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and pickled:
            raise InputError(
                f"got {path}; it holds a pickled {pickled[1]}, and reading that could run any "
                "code; save its state_dict alone and give that file"
            ) from error
        raise _unreadable(path, error) from error
    return _unwrap(content, path), {}


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
    return InputError(
        f"got {path}; it cannot be read as weights ({reason}); it may be cut short or of another "
        "format; expected safetensors, or a torch file with a state dict"
    )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict inside the dicts that training scripts put around it."""
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                return _unwrap(content[wrapper], path)
        others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        if content and not others:
            return {str(key): value for key, value in content.items()}
        holds = f"a dict with {few(others)} that are no tensors" if others else "an empty dict"
    else:
        holds = f"a {type(content).__name__}"
    raise InputError(
        f"got {path}; it holds {holds}; expected a state dict, plain or under "
        f"{', '.join(_WRAPPERS)}"
    )


def _pop_normalize(
    state: dict[str, Tensor], path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Remove a normalizing submodule's mean and std from `state`; none of our networks has one.

    Rounded to 7 digits: 0.485 was stored as the float32 next to it.
    """
    keys = {part: [k for k in state if k.endswith("." + part)] for part in ("mean", "std")}
    if not keys["mean"] and not keys["std"]:
        return None
    values_of = [[state.pop(key).flatten().tolist() for key in keys[part]] for part in keys]
    if [len(values[0]) if len(values) == 1 else 0 for values in values_of] != [3, 3]:
        raise InputError(
            f"got {path} with {few(keys['mean'] + keys['std'])}; expected one mean and one std of "
            "3 numbers; remove them and state the normalization in the preset"
        )
    mean, std = (tuple(round(number, 7) for number in values[0]) for values in values_of)
    if not (all(0 <= m <= 1 for m in mean) and all(0 < s < math.inf for s in std)):
        raise InputError(
            f"got {path} with mean {mean} and std {std}; expected means on the 0..1 scale and "
            "positive, finite stds; divide them by 255 if they are for 0..255"
        )
    return mean, std


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the leading names that all keys share (`module.`, `net.`, `1.`), and `_orig_mod.`.

    No network here has all its weights in one submodule, so a shared name is always a wrapper's.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while len(state) > 1:
        heads = {key.partition(".")[0] if "." in key else key for key in state}
        if len(heads) > 1 or not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def few(keys: list[str]) -> str:
    """Print the first three keys, and how many more."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
