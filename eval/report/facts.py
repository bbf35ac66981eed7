"""What a report is about, for the head of its page: network, data, request, seeds, versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from letheon.errors import join_few
from letheon.eval.comparison import Comparison


def describe_comparison(
    of: Comparison, data: str, downstream: str | None, versions: Mapping[str, Any], date: datetime
) -> dict[str, str]:
    """Write the facts of a comparison as texts by name.

    Args:
        of: the models and sets.
        data: the upstream set as it was named.
        downstream: that of k-NN, where there is one.
        versions: of software and hardware, as `run_folder.versions` gives them.
        date: of the measurement.
    """
    networks = dict.fromkeys(entry.model.name for entry in of.entries)
    gone = int(of.forget_mask("train").sum())
    seeds = {entry.seed for entry in of.entries if entry.seed is not None}
    packages = versions.get("packages", {})
    shown = [f"{name} {packages[name]}" for name in ("letheon", "torch") if name in packages]
    revision = str(versions.get("revision", ""))[:12]
    changed = " with changes" if versions.get("uncommitted_changes") else ""
    facts = {
        "Network": ", ".join(networks),
        "Data": f"{data}: {len(of.data.train):,} training, {len(of.data.test):,} test images, "
        f"{len(of.data.classes)} classes",
        "To be forgotten": f"{_forgotten(of)}: {gone:,} training images",
        "Downstream": f"{downstream}: {', '.join(of.domains)}" if downstream else "",
        "Seeds": ", ".join(map(str, sorted(seeds))),
        "Date": date.strftime("%d %B %Y, %H:%M %Z").strip(),
        "Software": ", ".join([*shown, f"Python {versions.get('python', '')}"]),
        "Hardware": f"{versions.get('device', '')}, {versions.get('cores', '')} cores, "
        f"{(world := versions.get('world', 1))} process{'' if world == 1 else 'es'}",
        "Revision": revision + changed if revision else "",
        "Command": _command(versions.get("command", ())),
    }
    return {name: text for name, text in facts.items() if text}


def _forgotten(of: Comparison) -> str:
    names = [of.data.classes[number] for number in of.request.classes]
    if not names:
        return of.request.text
    return f"class {join_few(names, 12)}"


def _command(words: Sequence[str]) -> str:
    """Write the command that was typed; the first word of a console command is two."""
    if not words:
        return ""
    return f"{Path(words[0]).name} {shlex.join(words[1:])}"
