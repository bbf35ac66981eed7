"""The masked step against torch.optim.SGD and autograd, and its promise about masked bits."""

import pytest
import torch

from letheon.kernels.flat import Layout, adopt_
from letheon.kernels.masked_sgd import masked_sgd_
from letheon.kernels.masked_sgd_reference import masked_sgd_reference_
from letheon.kernels.threshold import pack

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-2
SHAPES = [(17, 3, 3, 3), (17,), (), (40_001,), (0, 4), (5, 7)]


def make(seed, dtype=torch.float32, last=True):
    gen = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=gen).to(dtype) for s in SHAPES]
    if last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors


def everywhere(tensors):
    return [torch.ones_like(t, dtype=torch.bool) for t in tensors]


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)])
def test_unmasked_equals_torch_sgd(momentum, dtype, rate):
    ours, theirs = make(0, dtype), [t.requires_grad_() for t in make(0, dtype)]
    momenta = [torch.zeros_like(t) for t in ours]
    optimizer = torch.optim.SGD(theirs, LR, momentum=momentum, weight_decay=DECAY, foreach=False)
    for step in range(3):
        for tensor, gradient in zip(theirs, make(step + 1, dtype), strict=True):
            tensor.grad = gradient
        optimizer.step()
        grads = make(step + 1, dtype)
        masked_sgd_(ours, grads, momenta, everywhere(ours), rate, momentum, DECAY)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_masked_weights_keep_their_bits_and_the_others_do_not_notice(packed, momentum):
    n = 70_001
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=gen)
    start[:100] = -0.0
    keep = torch.rand(n, generator=gen) < 0.5
    masked, plain = start.clone(), start.clone()
    buffers = [torch.randn(n, generator=gen)] * 2
    buffers = [b.clone() for b in buffers]
    for _ in range(3):
        grad = torch.randn(n, generator=gen)
        broken = grad.clone()
        broken[~keep] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38]).repeat(n)[:n][~keep]
        mask = pack(keep) if packed else keep
        shared = (LR, momentum, DECAY)
        masked_sgd_([masked], [broken], [buffers[0]], [mask], *shared)
        masked_sgd_([plain], [grad], [buffers[1]], everywhere([plain]), *shared)
    assert torch.equal(masked.view(torch.int32)[~keep], start.view(torch.int32)[~keep])
    assert torch.equal(masked[keep], plain[keep])
    assert not torch.equal(masked[keep], start[keep])
    if momentum:
        assert not buffers[0][~keep].any()
        assert torch.equal(buffers[0][keep], buffers[1][keep])


def test_layouts_that_differ_give_the_same_numbers():
    grads, keep = make(1), [t > 0 for t in make(2, last=False)]
    results = []
    for mask in (keep, [k.contiguous(memory_format=torch.channels_last) if k.dim() == 4 else k
                        for k in keep]):  # fmt: skip
        params, momenta = make(0), make(3)
        masked_sgd_(params, grads, momenta, mask, LR, MOMENTUM, DECAY)
        results.append(params + momenta)
    plain, momenta = make(0, last=False), make(3, last=False)
    masked_sgd_(plain, make(1, last=False), momenta, keep, LR, MOMENTUM, DECAY)
    for a, b, c in zip(*results, plain + momenta, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("skip", [True, False])
def test_skipped_step_leaves_everything(skip):
    start = [make(0), make(1)]
    params, momenta, grads = make(0), make(1), make(3)
    if skip:
        grads[1][3] = torch.inf
    flag = torch.tensor(float(skip))
    masked_sgd_(params, grads, momenta, everywhere(params), LR, MOMENTUM, DECAY, skip=flag)
    for now, before in zip((params, momenta), start, strict=True):
        for a, b in zip(now, before, strict=True):
            assert torch.equal(a, b) == (skip or not a.numel())


def test_gradients_of_another_float_type():
    params, expected = make(0), make(0)
    grads, keep = make(1, torch.bfloat16), everywhere(params)
    masked_sgd_(params, grads, make(2), keep, LR)
    masked_sgd_reference_(expected, [g.float() for g in grads], make(2), keep, LR)
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_flat_buffer_equals_the_list_of_tensors():
    layout = Layout.of(make(0))
    params, listed = make(0), make(0)
    momenta = [torch.zeros_like(t) for t in listed]
    keep = [t > 0 for t in make(5)]
    flat = adopt_(params, layout)
    buffer = torch.zeros_like(flat)
    for step in range(2):
        grads = make(step + 1)
        arguments = (LR, MOMENTUM, DECAY)
        masked_sgd_([flat], [layout.gather(grads)], [buffer], [layout.bits(keep)], *arguments)
        masked_sgd_(listed, grads, momenta, keep, *arguments)
    for a, b in zip(params, listed, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    gaps = torch.ones(layout.length, dtype=torch.bool)
    for view in layout.views(gaps):
        view.fill_(False)
    assert gaps.any()
    assert not flat[gaps].any()
    with pytest.raises(ValueError, match="tensor 0 with shape"):
        Layout.of([torch.zeros(4, 4)[:, :2]])
