"""The model card of a Hugging Face folder, made from a run's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from letheon import __version__
from letheon.engine.models.classifier import Classifier


def model_card(run: Path, model: Classifier, timm_name: str | None, digest: str) -> str:
    """Describe a model in Markdown: what it is, how it was made, and what is not claimed.

    Args:
        run: the run's folder; its record is used where there is one. Paths and hosts stay out.
        model: the classifier.
        timm_name: timm's name of the network; None where timm does not build it.
        digest: of the weights.
    """
    record = {name: _read(run / f"{name}.json") for name in ("run", "settings", "versions")}
    method = record["run"].get("method")
    facts: dict[str, Any] = {
        "architecture": model.name,
        "classes": model.classes,
        "images": {"size": model.preset.size, "mean": model.preset.mean, "std": model.preset.std},
        "method": record["settings"].get("method") or method,
        "seed": record["settings"].get("seed"),
        "requests": [{"text": one.text, "digest": one.digest} for one in model.requests],
        "training images": record["run"].get("images"),
        "digests of the images": record["run"].get("data"),
        "versions": record["versions"].get("packages"),
        "source revision": record["versions"].get("revision"),
        "digest of the weights": digest,
        "written by": f"letheon {__version__}",
    }
    lines = json.dumps({k: v for k, v in facts.items() if v}, indent=2, default=str)
    return "\n".join(
        [
            "---",
            f"library_name: {'timm' if timm_name else 'letheon'}",
            "pipeline_tag: image-classification",
            "tags:",
            "- image-classification",
            *(["- machine-unlearning"] if model.requests else []),
            "---",
            "",
            "# Model card",
            "",
            _summary(model, method),
            "",
            "## How it was made",
            "",
            "From the record of the run, as it was written:",
            "",
            *(f"    {line}" for line in lines.splitlines()),
            "",
            "## How to load it",
            "",
            *(f"    {line}" for line in _loading(timm_name)),
            "",
            "## What is not claimed",
            "",
            _limits(model),
            "",
        ]
    )


def _summary(model: Classifier, method: object) -> str:
    text = f"An image classifier of {model.classes} classes, architecture `{model.name}`."
    if model.requests:
        count = len(model.requests)
        times = "once" if count == 1 else f"{count} times"
        how = f", the last time by the method `{method}`" if method else ""
        text += f" It was changed {times} to forget part of its training data{how}."
    return text


def _limits(model: Classifier) -> str:
    if not model.requests:
        return "No accuracy is stated here; measure it on your own data."
    return (
        "This card states what was done, not that the data have been forgotten. A low accuracy on "
        "the forgotten images is no proof of it; compare with a model retrained without them, by "
        "several measures, before relying on it."
    )


def _loading(timm_name: str | None) -> list[str]:
    if timm_name:
        return ["import timm", "", 'net = timm.create_model("local-dir:PATH", pretrained=True)']
    return ["import letheon", "", 'net = letheon.load_model("PATH")']


def _read(file: Path) -> dict[str, Any]:
    """Read a file of the record; nothing where there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
