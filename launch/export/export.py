"""Write a model in a form that another library reads.

    letheon export runs/salun --form safetensors --out salun.safetensors
    letheon export runs/salun --form huggingface --out salun-for-the-hub

Every form but ONNX is read back before the command ends, and its weights are compared bitwise.
docs/export.md says which library opens what.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from letheon.engine.checkpoints.model_file import load_model, weights_digest
from letheon.engine.distributed import Ranks
from letheon.engine.runs.run_folder import check_free_file
from letheon.errors import InputError, RunFailed
from letheon.launch.command import run_command
from letheon.launch.console.summary import console
from letheon.launch.export import forms, hub
from letheon.launch.records.claim import claim
from letheon.progress import note

Form = Literal["safetensors", "torchvision", "timm", "onnx", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a model as safetensors, for torchvision, timm or ONNX, or as a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished run, or a file of weights."""
    out: Path
    """File to write; for huggingface a folder, in which other files stay."""
    form: Form = "safetensors"
    """Form of the result; `docs/export.md` says what reads each."""
    overwrite: bool = False
    """Replace what is already there."""


def main(settings: Settings, ranks: Ranks) -> None:
    """Load, write, and read what was written; on the first rank."""
    if not ranks.main:
        return
    with claim([settings.out], ranks, settle=lambda out: None):
        written = write(settings)
    note(f"wrote {written} from {settings.run}")
    if console().json:
        console().show(json.dumps({"out": str(written.absolute()), "form": settings.form}))


def write(settings: Settings) -> Path:
    """Write one form.

    Returns:
        the file or the folder.

    Raises:
        InputError: another library has no such network, or a package is not installed.
        RunFailed: what was written does not read as what it was made of.
    """
    model, out = load_model(settings.run), settings.out
    files = [out / name for name in hub.FILES] if settings.form == "huggingface" else [out]
    if settings.form == "huggingface" and out.is_file():
        raise InputError(f"got {out}; it is a file; name a folder", option="out")
    if settings.form in forms.ENDINGS and out.suffix not in forms.ENDINGS[settings.form]:
        endings = " or ".join(forms.ENDINGS[settings.form])
        raise InputError(f"got {out} for {settings.form}; expected a file {endings}", option="out")
    for file in files:
        check_free_file(file, settings.overwrite)
    if settings.form == "onnx":
        note(forms.write_onnx(out, model))
        return out
    if settings.form == "huggingface":
        hub.write_folder(out, model, settings.run)
    else:
        forms.write_state(out, model, settings.form)
    again = load_model(out, model.classes, model.name, tell=str)
    if weights_digest(again) != weights_digest(model):
        raise RunFailed(f"got {out}, whose weights are not those of {settings.run}; write it again")
    return out


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
