"""Each kernel against its plain form on a GPU: values, masked bits, host syncs, graph capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from letheon.kernels import threshold
from letheon.kernels.augment import crop_resize_normalize
from letheon.kernels.augment_reference import Filter, crop_resize_normalize_reference
from letheon.kernels.flat import Layout
from letheon.kernels.masked_sgd import masked_sgd_
from letheon.kernels.masked_sgd_reference import masked_sgd_reference_
from letheon.kernels.similarity import angle_loss, distance_loss, similarity_loss
from letheon.kernels.threshold import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
SHAPES = [(64, 3, 7, 7), (64,), (512, 256, 3, 3), (512, 512, 3, 3), (1000, 512), (1000,)]


def weights(seed: int = 0) -> list[Tensor]:
    """Tensors of a network's shapes, convolutions channels-last."""
    torch.manual_seed(seed)
    tensors = [torch.randn(s, device=DEVICE) for s in SHAPES]
    last = torch.channels_last
    return [t.contiguous(memory_format=last) if t.dim() == 4 else t for t in tensors]


@pytest.mark.parametrize("n", [0, 1, 1023, 70_001, (1 << 24) + 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_sgd(n: int, packed: bool, momentum: float) -> None:
    gen = torch.Generator(DEVICE).manual_seed(n)
    start, grad, buffer, score = (torch.randn(n, device=DEVICE, generator=gen) for _ in range(4))
    keep = score > 0
    grad = torch.where(keep, grad, torch.nan)
    masks = [pack(keep) if packed else keep]
    ends = []
    for form in (masked_sgd_, masked_sgd_reference_):
        p, b = start.clone(), buffer.clone()
        rate, skip = torch.tensor(0.1, device=DEVICE), torch.tensor(0.0, device=DEVICE)
        form([p], [grad], [b], masks, rate, momentum, 0.05, skip)
        ends.append((p, b))
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    moved = ends[0][0].view(torch.int32) != start.view(torch.int32)
    assert not moved[~keep].any()


def test_threshold() -> None:
    """Gradients of a model, with a run of zeros and many ties: masks equal bit for bit."""
    scores = [t * 1e-3 for t in weights()]
    gen = torch.Generator(DEVICE).manual_seed(0)
    scores.append(torch.zeros(5001, device=DEVICE))
    scores.append(torch.randint(-3, 4, (777,), device=DEVICE, generator=gen).half())
    densities = [0.0, 0.01, 0.1, 0.5, 0.9, 0.9999, 1.0]
    pairs = zip(
        threshold.top_masks(scores, densities),
        threshold.top_masks([s.cpu() for s in scores], densities),
        strict=True,
    )
    for ours, expected in pairs:
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", ["box", "bilinear"])
@pytest.mark.parametrize("size", [32, 97])
def test_augment(kind: Filter, size: int) -> None:
    """Up and down, against the plain form on the CPU."""
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 90, 70, 3), dtype=torch.uint8, generator=gen)
    extent = torch.tensor([90.0, 70.0]) * (0.2 + 0.8 * torch.rand(20, 2, generator=gen))
    corner = (torch.tensor([90.0, 70.0]) - extent) * torch.rand(20, 2, generator=gen)
    boxes = torch.cat([corner, extent], 1)
    source = torch.randint(0, 6, (20,), generator=gen)
    flip = torch.rand(20, generator=gen) < 0.5
    inputs = [images, boxes, source, flip]
    rest = (size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), kind)
    ours = crop_resize_normalize(*(t.to(DEVICE) for t in inputs), *rest)
    expected = crop_resize_normalize_reference(*inputs, *rest)
    # An edge at 90 is known to 5e-6, a fifth of a pixel's weight to 2.5e-5, over 0.225: 1.1e-4.
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("loss", [similarity_loss, distance_loss, angle_loss])
def test_losses(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Gradients against the CPU in float64."""
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, d, generator=gen) for d in (300, 200))
    grads = []
    for student, teacher in ((x.to(DEVICE), y.to(DEVICE)), (x.double(), y.double())):
        student = student.clone().requires_grad_()
        loss(student, teacher).backward()
        assert student.grad is not None
        grads.append(student.grad.cpu().double())
    scale = float(grads[1].abs().max())
    torch.testing.assert_close(grads[0] / scale, grads[1] / scale, rtol=0, atol=1e-3)


def test_the_host_never_waits_and_a_captured_step_replays() -> None:
    device = DEVICE
    values, grads, momenta = (weights(s) for s in range(3))
    keep = [t > 0 for t in weights(3)]
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
        crop_resize_normalize(images, box, one, no, 32, (0.5,) * 3, (0.2,) * 3)

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
    params, grad, buffer = ([b] for b in before)
    masked_sgd_reference_(params, grad, buffer, arguments[3], 0.2, 0.9, 5e-4)
    torch.testing.assert_close(arguments[0][0], before[0], rtol=0, atol=1e-5)
