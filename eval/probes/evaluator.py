"""What a row says of a model's features: probes, IDI, confusions, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from letheon.engine.distributed import Ranks
from letheon.errors import InputError
from letheon.eval.inference.extract import Outputs
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics import confusion
from letheon.eval.probes.embedding import embed
from letheon.eval.probes.information import idi, information
from letheon.eval.probes.linear import linear_probe
from letheon.eval.row_builder import Findings

SHOTS = 5
"""Training images of each class in the few-shot probe."""
PROBED = 50_000
"""Training images of the linear probe, about, at most; beyond, as many of each class."""
BALANCED = "balanced"
"""The set of a pass that holds as many retain as forget training images, with taps."""
_RIDGE_FROM = 2_000_000  # training images x classes
_PROBES = ("probe_forgotten", "probe_retained", "probe_few_shot")


def probes(
    model: Passes,
    forgotten: Sequence[int],
    names: Sequence[str],
    found: Findings,
) -> None:
    """Enter the probes, the confusions and the picture of the forgotten classes.

    Args:
        model: its training and test pass.
        forgotten: class numbers; empty where single samples were forgotten, which leaves all out.
        names: of all classes.
        found: is added to.
    """
    alone = Ranks(device=found.ranks.device)
    train, test = model.outputs["train"], model.outputs["test"]
    gone = torch.tensor(list(forgotten), dtype=torch.int64)

    def whole_classes() -> None:
        if not forgotten:
            raise InputError("got single samples to forget; this is defined for whole classes")

    def linear() -> dict[str, Any]:
        whole_classes()
        each = None if len(train) <= PROBED else max(1, PROBED // len(names))
        used = min(len(train), PROBED) * len(names)
        full, few = (
            linear_probe(
                train.features, train.labels, test.features, test.labels, gone, shots=shots,
                solver="ridge" if used >= _RIDGE_FROM else "logistic",
            )
            for shots in (each, SHOTS)
        )  # fmt: skip
        return dict(zip(_PROBES, (full.forgotten, full.retained, few.forgotten), strict=True))

    def called() -> dict[str, Any]:
        whole_classes()
        return {
            "head_confusion": confusion.by_head(test, forgotten, names),
            "knn_confusion": confusion.by_neighbours(train, test, forgotten, names, ranks=alone),
        }

    def plane() -> dict[str, Any]:
        whole_classes()
        return {"embedding": embed(test.features, test.labels, gone)}

    found.add(_PROBES, linear)
    found.add(("head_confusion", "knn_confusion"), called)
    found.add(("embedding",), plane)


def told_by_layer(model: Passes) -> dict[str, float]:
    """Layer -> `information` on "to be forgotten" in its pooled outputs, in nats; kept in `model`.

    Raises:
        InputError: no balanced pass with taps, or too few samples.
    """
    if not model.information:
        side: Outputs | None = model.outputs.get(BALANCED)
        if side is None or not side.taps:
            raise InputError("got no pass with layers over forget and retain images; add taps")
        layers = {**side.taps, "features": side.features}
        model.information |= {name: information(rows, side.forget) for name, rows in layers.items()}
    return model.information


def index(model: Passes, original: Passes, references: Sequence[Passes]) -> float:
    """IDI, with the mean of the retrained models as reference."""
    known = [told_by_layer(other) for other in references]
    mean = {layer: fmean(told[layer] for told in known) for layer in known[0]}
    return idi(told_by_layer(model), mean, told_by_layer(original)).value


def check_finite(model: Passes) -> None:
    """Refuse outputs that are not numbers, naming the first layer that gives them.

    Raises:
        InputError: NaN or infinity; the text has the layer, the model and the set.
    """
    # Sets with layers first: the others can name no layer but the last two.
    for key, side in sorted(model.outputs.items(), key=lambda item: not item[1].taps):
        layers: Mapping[str, torch.Tensor] = {
            **{f"layer {name}": rows for name, rows in side.taps.items()},
            "the pooled features": side.features,
            "the logits": side.logits,
        }
        for name, rows in layers.items():
            parts = rows.split(8192)
            broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in parts)
            if broken:
                raise InputError(
                    f"got NaN or infinite values for {broken} of {len(rows)} images in {name} of "
                    f"{model.name} on the {key} set; expected numbers; the model has diverged: "
                    "lower its learning rate"
                )
