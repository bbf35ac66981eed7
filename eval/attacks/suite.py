"""The attack suite: every attack that runs the network, on the same images for every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from letheon.engine.models.classifier import Classifier
from letheon.errors import NotMeasurable, RunFailed
from letheon.eval.attacks.inputs import divergence, prompt, push
from letheon.eval.attacks.weights import answer, barrier, quantize
from letheon.eval.metrics.registry import metric
from letheon.eval.probes.relearn import feature_batches, relearn
from letheon.progress import Items

IMAGES = 256
"""Forget images, and as many retain images, that are attacked, at most."""
_BATCH = 64


@dataclass(frozen=True)
class Targets:
    """The images that every model is attacked with; the same for all models of one preset."""

    images: Tensor  # (n, 3, H, W) float32 on the host
    labels: Tensor  # (n,) int64
    member: Tensor  # (n,) bool: to be forgotten
    gone: tuple[int, ...]  # forgotten classes
    steps: int  # of the attacks that learn
    rate: float  # of relearning, `relearn.find_rate`


@dataclass(frozen=True)
class Attack:
    """What metrics of the stage "attacks" read: attack -> its result, or why there is none."""

    results: dict[str, float | NotMeasurable] = field(default_factory=dict)

    def result(self, name: str) -> float:
        """One attack's number.

        Raises:
            NotMeasurable: the attack could not be made.
        """
        value = self.results[name]
        if isinstance(value, NotMeasurable):
            raise value
        return value


def attack(
    model: Classifier,
    original: Classifier | None,
    targets: Targets,
    device: torch.device,
    place: Callable[[Classifier], Classifier],
    line: Items | None = None,
) -> Attack:
    """Make every attack on a copy of `model`.

    Where networks are split over the ranks, all of them attack with the same images.

    Args:
        model: of any device and mode; it stays as it is.
        original: the model before forgetting; None leaves out what compares with it.
        targets: the images.
        device: where to run.
        place: copies a network to where it runs, frozen, in evaluation mode.
        line: shows the attack that is made.
    """
    victim = place(model)
    before = None if original is None else place(original)
    inside = (targets.images[targets.member], targets.labels[targets.member])
    outside = (targets.images[~targets.member], targets.labels[~targets.member])

    def recall(net: torch.nn.Module) -> float:
        said = answer(net, inside[0], device).argmax(dim=1)
        return float((said == inside[1]).double().mean())

    def learn_again() -> float:
        sample = feature_batches(*outside, _BATCH, seed=0)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            rows, names = sample(step)
            return rows.to(device), names.to(device)

        curve = relearn(
            model, batches, recall, steps=targets.steps, every=max(1, targets.steps // 4),
            lr=targets.rate, place=place,
        )  # fmt: skip
        return max(curve.accuracy)

    def known(net: Classifier | None) -> Classifier:
        if net is None:
            raise NotMeasurable("got no original model; expected one to compare with")
        return net

    def overreach() -> float:
        near = push(known(before), *inside, device)
        first, second = (answer(net, near, device) for net in (known(before), victim))
        return divergence(first, second, targets.gone)

    attacks: dict[str, Callable[[], float]] = {
        "quantized": lambda: recall(place(quantize(model))),
        "retain only": learn_again,
        "prompt": lambda: prompt(victim, *inside, targets.steps, device),
        "barrier": lambda: barrier(model, known(original), *outside, device, place),
        "overreach": overreach,
    }
    results: dict[str, float | NotMeasurable] = {}
    for name, run in attacks.items():
        if line is not None:
            line.show(name, len(attacks))
        try:
            results[name] = run()
        except (NotMeasurable, RunFailed) as error:  # such as a model that diverges as it learns
            results[name] = NotMeasurable(str(error))
    return Attack(results)


_GROUP = "Attacks"


@metric(
    "attack_quantized", title="Forget accuracy, 4 bits", group=_GROUP, unit="share",
    better="as retrained", stage="attacks", needs=("depth full",), place=3,
    source="after Zhang et al. 2025, 'Catastrophic Failure of LLM Unlearning via Quantization'",
)  # fmt: skip
def attack_quantized(of: Attack) -> float:
    """Accuracy on forget images when every weight is rounded to 4 bits, channel by channel: small
    moves of the weights are undone.
    """
    return of.result("quantized")


@metric(
    "attack_retain_only", title="Retain-only relearning", group=_GROUP, unit="share",
    better="as retrained", stage="attacks", needs=("depth full",), place=4,
    source="after arXiv 2505.22310",
)  # fmt: skip
def attack_retain_only(of: Attack) -> float:
    """Largest accuracy on forget images while a copy learns from retain images alone; what comes
    back was hidden, for no forget image was shown.
    """
    return of.result("retain only")


@metric(
    "attack_prompt", title="Prompt attack", group=_GROUP, unit="share", better="as retrained",
    stage="attacks", needs=("depth full",), place=5, source="after ForgetGate 2025",
)  # fmt: skip
def attack_prompt(of: Attack) -> float:
    """Accuracy on one half of the forget images with an offset added to each, which was learned
    from the other half while the model stayed frozen.
    """
    return of.result("prompt")


@metric(
    "mode_barrier", title="Barrier to original (nats)", group=_GROUP, better="as retrained",
    stage="attacks", needs=("original", "depth full"), place=6, source="Frankle et al. 2020",
)  # fmt: skip
def mode_barrier(of: Attack) -> float:
    """Largest excess of the retain images' loss on the straight path of weights to the original
    over the line between its ends; near 0 where the model never left the original's basin, which
    foretells relearning (arXiv 2505.22310).
    """
    return of.result("barrier")


@metric(
    "over_unlearning", title="Over-unlearning", group=_GROUP, unit="nats",
    better="as retrained", stage="attacks", needs=("original", "depth full"), place=7,
    source="after Spotter 2026 (our reading)",
)  # fmt: skip
def over_unlearning(of: Attack) -> float:
    """Mean Jensen-Shannon divergence to the original's answers among the kept classes, on forget
    images pushed away from their class by at most 8/255 a pixel: damage beside what was to be
    forgotten.
    """
    return of.result("overreach")
