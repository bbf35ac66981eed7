"""Folders of runs and a table, as `letheon serve` finds them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from letheon.eval.report.write import write_report

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def write_run(folder: Path, epochs: int = 4, passes: int = 4, **more: Any) -> Path:
    """Write the records of a run; `more` are files by their names without the ending."""
    folder.mkdir(parents=True)
    method = {"name": "finetune", "recipe": {"epochs": epochs}}
    settings = {"method": method, "data": "digits", "model": "small", "seed": 1}
    files: dict[str, Any] = {
        "settings": settings,
        "request": {"text": "class:3"},
        "versions": {"nodes": [{"host": "node7"}], "world": 1},
        "run": {"method": "finetune", "model": "small", "weights": f"digest of {folder.name}"},
    }
    for name, content in (files | more).items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    log_passes(folder, range(passes))
    return folder


def log_passes(folder: Path, epochs: range) -> None:
    with (folder / "metrics.jsonl").open("a") as log:
        for k in epochs:
            line = {"kind": "phase", "at": k, "epoch": k, "phase": "retain", "loss": 2.0 / (k + 1)}
            log.write(json.dumps(line) + "\n")


def rows() -> list[dict[str, Any]]:
    roles = ["original", "retrained", "unlearned", "unlearned", "unlearned"]
    names = ["O", "R", "near", "middle", "far"]
    found = []
    for k, (name, role) in enumerate(zip(names, roles, strict=True)):
        row = {"name": name, "role": role, "FA": k / 10, "RA": 0.9, "TFA": k / 8, "TRA": 1 - k / 9}
        row |= {"gap": k / 20, "seconds": 10.0 + k, "conditions": {"digest": f"digest of {name}"}}
        found.append(row)
    return found


def write_folder(out: Path) -> Path:
    """Write some runs, and a table of them with its page."""
    for name in ("near", "middle", "far"):
        write_run(out / name)
    write_run(out / "now", passes=2, run=None)
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, "PNG")
    code = base64.b64encode(dot.getvalue()).decode()
    tile = {"image": f"data:image/png;base64,{code}", "name": "three"}
    answer = {"model": "near", "name": "eight", "share": "61%", "right": False}
    examples = {
        "sentence": "Keyed choice.", "domain": "", "neighbors": [],
        "answers": [{"tile": tile, "kind": "to be forgotten", "models": [answer]}],
    }  # fmt: skip
    facts = {"Network": "small"}
    write_report(rows(), out / "table", heading="What is left", facts=facts, examples=examples)
    return out
