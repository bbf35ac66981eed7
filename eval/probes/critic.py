"""A layer's information on "to be forgotten", by a critic built of the layers that follow it.

Jeon et al. 2026 (arXiv 2405.17878), as second-hand accounts of the paper describe it: the critic of
layer l is f(z) . g(y), where f is the model's own layers after l with a projection, g has one
vector for each of the two labels, and both are trained by SGD to the largest InfoNCE. A projection
followed by products with two vectors is a linear layer of two outputs: that stands in for the head.

Ours, where the accounts say nothing: f starts from the model's own weights; batch norms keep their
statistics; the rate, the batches and the number of steps; and the bound is taken on held-out
samples, as in `information`. The paper averages five trainings; here there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, share_out
from letheon.engine.models.classifier import Classifier, Head
from letheon.eval.probes.information import halves, info_nce
from letheon.eval.probes.relearn import feature_batches

STEPS = 200
"""SGD steps of each layer's critic."""
_BATCH, _LR, _ROWS = 64, 0.01, 256


def build_critic(model: Classifier, tap: str, seed: int) -> tuple[Classifier, list[nn.Parameter]]:
    """Build a critic: a copy of `model` with two outputs, and its parameters after `tap`.

    "features" leaves the last linear layer alone. What is defined after a module is taken to run
    after it, as in every network of `engine.model`.
    """
    net = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net.net.set_submodule(net.head_path, Head(model.head.in_features, 2))
    names = [name for name, _ in net.named_parameters()]
    inside = [i for i, name in enumerate(names) if name.startswith(f"{tap}.")]
    after = [p for i, p in enumerate(net.parameters()) if inside and i > inside[-1]]
    # The head is trained whatever the order.
    trained = list({id(p): p for p in (*after, *net.head.parameters())}.values())
    for parameter in trained:
        parameter.requires_grad_(True)
    return net, trained


def critic_information(
    model: Classifier,
    tap: str,
    images: Tensor,
    member: Tensor,
    device: torch.device,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> float:
    """I(Z; Y) of one layer in nats, from below, in [0, log 2].

    Args:
        model: of any device and mode; it stays as it is.
        tap: a module's name, as `taps.stages` gives it, or "features".
        images: (n, 3, H, W) float32 on the host.
        member: (n,) bool, of a forgotten class; at least two on each side.
        device: where to train.
        steps: of SGD, 0.01 with momentum 0.9, on batches of 64.
        seed: of the split, the order and the two outputs' start.
    """
    fit, ask = (torch.from_numpy(rows) for rows in halves(member.cpu().numpy(), seed))
    net, trained = build_critic(model, tap, seed)
    net.to(device)
    optimizer = torch.optim.SGD(trained, lr=_LR, momentum=0.9)
    truth = member.long().cpu()
    log_share = (torch.bincount(truth[fit], minlength=2) / len(fit)).log().to(device)
    batches = feature_batches(images[fit], truth[fit], _BATCH, seed)
    for step in range(steps):
        inputs, labels = batches(step)
        scores = net(inputs.to(device)).logits
        loss = nn.functional.cross_entropy(scores + log_share, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = [net(part.to(device)).logits.cpu() for part in images[ask].split(_ROWS)]
    return max(0.0, info_nce(torch.cat(parts), member.cpu()[ask]))


def critic_by_layer(
    model: Classifier, taps: Sequence[str], images: Tensor, member: Tensor, ranks: Ranks
) -> dict[str, float]:
    """Layer -> `critic_information`; every rank must call, each trains a share."""
    layers = [*taps, "features"]

    def train(tap: str) -> float:
        return critic_information(model, tap, images, member, ranks.device, steps=STEPS, seed=0)

    return dict(zip(layers, share_out(layers, train, ranks), strict=True))
