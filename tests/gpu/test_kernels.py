"""Each kernel against its plain form on a GPU: values, masked bits, host syncs, graph capture.

A check takes a device and returns the largest difference it saw, or raises CheckFailed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_kernels import weights
from torch import Tensor

from letheon.kernels import threshold
from letheon.kernels.augment import crop_resize_normalise, crop_resize_normalise_reference
from letheon.kernels.bits import pack
from letheon.kernels.flat import Layout
from letheon.kernels.masked_sgd import masked_sgd_, masked_sgd_reference_
from letheon.kernels.moments import BatchHsic, Moments
from letheon.kernels.similarity import angle_loss, distance_loss, similarity_loss


class CheckFailed(Exception):
    """A kernel and its plain form differ."""


def difference(ours: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Largest absolute difference; raises CheckFailed above the tolerance or for other shapes."""
    if ours.shape != expected.shape:
        raise CheckFailed(f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
    if not ours.numel():
        return 0.0
    worst = float((ours.double() - expected.double()).abs().max())
    if not worst <= tolerance:
        raise CheckFailed(f"{what}: differs by {worst:g}, allowed {tolerance:g}")
    return worst


def check_masked_sgd(device: str) -> float:
    """All mask kinds and flags on odd sizes, and the model's tensors; masked bits compared."""
    worst = 0.0
    sizes = (0, 1, 1023, 70_001, (1 << 24) + 3) if device == "cuda" else (0, 1, 1023)
    for n in sizes:
        for kind in ("none", "bool", "bits"):
            for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
                gen = torch.Generator(device).manual_seed(n)
                arrays = [torch.randn(n, device=device, generator=gen) for _ in range(4)]
                keep = arrays[3] > 0
                grad = torch.where(keep, arrays[1], torch.nan) if kind != "none" else arrays[1]
                masks = {"none": None, "bool": [keep], "bits": [pack(keep)]}[kind]
                ends = []
                for form in (masked_sgd_, masked_sgd_reference_):
                    p, b, e = arrays[0].clone(), arrays[2].clone(), arrays[3].clone()
                    rate = torch.tensor(0.1, device=device)
                    form([p], [grad], [b], masks, rate, momentum, 0.05, 0.01, 8.0, False, nesterov,
                         [e], 0.9, torch.tensor(0.0, device=device))  # fmt: skip
                    ends.append((p, b, e))
                for ours, expected in zip(*ends, strict=True):
                    worst = max(worst, difference(ours, expected, 1e-5, f"{n} {kind} {momentum}"))
                if masks and not torch.equal(
                    ends[0][0][~keep].view(torch.int32), arrays[0][~keep].view(torch.int32)
                ):
                    raise CheckFailed(f"a masked weight moved: {n} weights, mask as {kind}")
    return worst


def check_threshold(device: str) -> float:
    """Gradients of a model, with a run of zeros and many ties: masks equal bit for bit."""
    scores = [t * 1e-3 for t in weights(device)] if device == "cuda" else []
    gen = torch.Generator(device).manual_seed(0)
    scores.append(torch.zeros(5001, device=device))
    scores.append(torch.randint(-3, 4, (777,), device=device, generator=gen).half())
    densities = [0.0, 0.01, 0.1, 0.5, 0.9, 0.9999, 1.0]
    pairs = zip(
        threshold.top_masks(scores, densities),
        threshold.top_masks_reference([s.cpu() for s in scores], densities),
        strict=True,
    )
    for density, (ours, expected) in zip(densities, pairs, strict=True):
        for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
            if not torch.equal(a.cpu(), b):
                raise CheckFailed(f"masks of tensor {i} differ at density {density}")
    return 0.0


def check_augment(device: str) -> float:
    """Both filters, up and down, all dtypes, against the plain form on the CPU."""
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 90, 70, 3), dtype=torch.uint8, generator=gen)
    extent = torch.tensor([90.0, 70.0]) * (0.2 + 0.8 * torch.rand(20, 2, generator=gen))
    corner = (torch.tensor([90.0, 70.0]) - extent) * torch.rand(20, 2, generator=gen)
    boxes = torch.cat([corner, extent], 1)
    source = torch.randint(0, 6, (20,), generator=gen)
    flip = torch.rand(20, generator=gen) < 0.5
    inputs = [images, boxes, source, flip]
    worst = 0.0
    for kind in ("box", "bilinear"):
        for size in (32, 97) if device == "cuda" else (5,):
            for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
                rest = (size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype)
                ours = crop_resize_normalise(*(t.to(device) for t in inputs), *rest, filter=kind)
                expected = crop_resize_normalise_reference(*inputs, *rest, filter=kind)
                what = f"{kind} {size} {dtype}"
                worst = max(worst, difference(ours.cpu(), expected, allowed, what))
    return worst


def check_sums(device: str) -> float:
    """Losses with their gradients, and CKA sums, against the CPU in float64."""
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, d, generator=gen) for d in (300, 200))
    worst = 0.0
    for loss in (similarity_loss, distance_loss, angle_loss):
        grads = []
        for student, teacher in ((x.to(device), y.to(device)), (x.double(), y.double())):
            student = student.clone().requires_grad_()
            loss(student, teacher).backward()
            grads.append(student.grad.cpu())
        size = float(grads[1].abs().max())
        worst = max(worst, difference(grads[0] / size, grads[1] / size, 1e-3, loss.__name__))
    ckas = []
    for where in (device, "cpu"):
        moments, pairs = Moments([300, 200], where), BatchHsic(1, 1, where)
        moments.add(x.to(where), y.to(where))
        pairs.add([x.to(where)], [y.to(where)])
        ckas.append(torch.stack([moments.cka(0, 1), pairs.cka()[0, 0]]).cpu())
    return max(worst, difference(ckas[0], ckas[1], 1e-5, "CKA"))


def check_no_sync(device: str) -> float:
    """The per-step functions never make the host wait, and a captured step replays (CUDA)."""
    if device != "cuda":
        return 0.0
    values, grads, momenta = (weights(device, s) for s in range(3))
    keep = [t > 0 for t in weights(device, 3)]
    layout = Layout.of(values)
    arguments = [[layout.gather(t)] for t in (values, grads, momenta)] + [[layout.bits(keep)]]
    rate = torch.tensor(0.1, device=device)
    features = torch.randn(64, 512, device=device, requires_grad=True)
    images = torch.zeros(2, 40, 40, 3, dtype=torch.uint8, device=device)
    box = torch.tensor([[0.0, 0, 40, 40]] * 2, device=device)
    one, no = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, device=device).bool()

    def step() -> None:
        masked_sgd_(*arguments, rate, 0.9, 5e-4)

    def everything() -> None:
        step()
        for loss in (similarity_loss, distance_loss, angle_loss):
            loss(features, features.detach() + 1).backward()
        crop_resize_normalise(images, box, one, no, 32, (0.5,) * 3, (0.2,) * 3, torch.bfloat16)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = [a[0].clone() for a in arguments[:3]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now, old in zip(arguments, before, strict=False):
        now[0].copy_(old)
    rate.fill_(0.2)
    graph.replay()
    masked_sgd_reference_(*([b] for b in before), arguments[3], 0.2, 0.9, 5e-4)
    return difference(arguments[0][0], before[0], 1e-5, "the replayed step")


CHECKS: dict[str, Callable[[str], float]] = {
    "masked_sgd": check_masked_sgd,
    "threshold": check_threshold,
    "augment": check_augment,
    "losses and sums": check_sums,
    "no host sync, graph capture": check_no_sync,
}
