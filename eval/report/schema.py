"""Write the JSON schema of metrics.json.

python -m letheon.eval.report.schema > docs/metrics.schema.json
"""

from __future__ import annotations

import json
from typing import Any, get_args

from letheon.eval.metrics.registry import NAMES, SHARE, Better, Metric, Unit, metrics
from letheon.eval.report.rows import ROLES
from letheon.eval.report.tables import FORMAT, VERSION

_BAND = {
    "description": "std, low and high (95 % bootstrap interval of the mean) are null with one "
    "seed.",
    "type": "object",
    "required": ["mean", "std", "low", "high", "seeds"],
    "additionalProperties": False,
    "properties": {
        "mean": {"type": "number"},
        "std": {"type": ["number", "null"], "minimum": 0},
        "low": {"type": ["number", "null"]},
        "high": {"type": ["number", "null"]},
        "seeds": {"type": "integer", "minimum": 1},
    },
}
_REFERENCE = {
    "description": "The retrained models as a distribution; null where none was given.",
    "type": ["object", "null"],
    "required": ["seeds", "sentence", "bands"],
    "additionalProperties": False,
    "properties": {
        "seeds": {"type": "integer", "minimum": 1},
        "sentence": {"type": "string"},
        "bands": {"type": "object", "additionalProperties": _BAND},
    },
}
_DEFINITION = {
    "type": "object",
    "required": ["title", "group", "unit", "better", "text", "unverified"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string"},
        "group": {"type": "string"},
        "unit": {"enum": list(get_args(Unit))},
        "better": {"enum": list(get_args(Better))},
        "text": {"type": "string"},
        "unverified": {
            "description": "The published formula could not be read.", "type": "boolean",
        },
    },
}  # fmt: skip
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_CONTEXT = {
    "name": {"type": "string", "minLength": 1},
    "role": {"enum": list(ROLES)},
    "seed": {"type": ["integer", "null"]},
    "why": {"description": "Metric -> why it is null.", **_TEXTS},
    "doubts": {
        "description": "What makes these numbers worth less than they look.",
        "type": "array",
        "items": {"type": "string"},
    },
    "classes": NAMES,
    "forgotten": {"type": "array", "items": {"type": "integer", "minimum": 0}},
}


def _property(metric: Metric, key: str) -> dict[str, Any]:
    """Describe one metric in a row: its definition, and a number, share, table or null."""
    of = metric.definition(key)
    if of.unit == "table":
        shape = dict(metric.schema) or {"type": ["object", "array"]}
        kinds = shape["type"] if isinstance(shape["type"], list) else [shape["type"]]
        return {"description": of.text, **shape, "type": [*dict.fromkeys([*kinds, "null"])]}
    if of.unit == "share":
        return {"description": of.text, **SHARE}
    bound = {"minimum": 0} if of.unit in ("steps", "seconds") else {}
    return {"description": of.text, "type": ["number", "null"], **bound}


def schema() -> dict[str, Any]:
    """Make the schema of our own metrics; those of plug-ins are further numbers of a row."""
    ours = [metric for metric in metrics().values() if not metric.plugin]
    row = {
        "description": "Any further number is a metric; any further text, list or table is "
        "context.",
        "type": "object",
        "required": ["name", "role"],
        "properties": _CONTEXT
        | {key: _property(metric, key) for metric in ours for key in metric.keys},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{FORMAT}-{VERSION}",
        "title": "metrics.json of a Letheon report",
        "description": "Shares are fractions of 1. A metric that was not measured is absent or "
        'null; its row\'s "why" may say the reason.',
        "type": "object",
        "required": ["format", "version", "reference", "rows", "definitions"],
        "additionalProperties": False,
        "properties": {
            "format": {"const": FORMAT},
            "version": {"const": VERSION},
            "reference": _REFERENCE,
            "rows": {
                "description": "One model each: original, retrained, control, unlearned, in this "
                "order.",
                "type": "array",
                "minItems": 1,
                "items": row,
            },
            "definitions": {
                "description": "Metric -> what it is, for every metric that a row has.",
                "type": "object",
                "additionalProperties": _DEFINITION,
            },
            "left_out": {"description": "Model -> why it has no row.", **_TEXTS},
        },
    }


def as_text() -> str:
    """Write the schema as JSON."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(as_text(), end="")
