"""The masked step against torch.optim.SGD and autograd, and its promise about masked bits."""

import pytest
import torch

from letheon.kernels.bits import pack
from letheon.kernels.flat import Layout, adopt_
from letheon.kernels.masked_sgd import masked_sgd_, masked_sgd_reference_

LR, MOMENTUM, DECAY, L1 = 0.1, 0.9, 5e-2, 3e-2
SHAPES = [(17, 3, 3, 3), (17,), (), (40_001,), (0, 4), (5, 7)]


def make(seed, dtype=torch.float32, last=True):
    gen = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=gen).to(dtype) for s in SHAPES]
    if last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (MOMENTUM, False), (MOMENTUM, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)])
def test_unmasked_equals_torch_sgd_with_an_l1_term(momentum, nesterov, dtype, rate):
    ours, theirs = make(0, dtype), [t.requires_grad_() for t in make(0, dtype)]
    momenta = [torch.full_like(t, torch.nan) for t in ours]
    optimiser = torch.optim.SGD(
        theirs, LR, momentum=momentum, weight_decay=DECAY, nesterov=nesterov, foreach=False
    )
    for step in range(3):
        targets = make(step + 1, dtype)
        optimiser.zero_grad()
        loss = sum((t * g).sum() + L1 * t.abs().sum() for t, g in zip(theirs, targets, strict=True))
        loss.backward()
        optimiser.step()
        scaled = [g * 8 for g in targets]
        masked_sgd_(
            ours, scaled, momenta, None, rate, momentum, DECAY, L1, 8.0, step == 0, nesterov
        )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_masked_weights_keep_their_bits_and_the_others_do_not_notice(packed, nesterov, momentum):
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
        shared = (LR, momentum, DECAY, L1)
        masked_sgd_([masked], [broken], [buffers[0]], [mask], *shared, nesterov=nesterov)
        masked_sgd_([plain], [grad], [buffers[1]], None, *shared, nesterov=nesterov)
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


def test_average_follows_the_new_weights():
    params, averages = make(0), make(1)
    expected = [a.clone() for a in averages]
    for step in range(2):
        masked_sgd_(params, make(step + 2), None, None, LR, ema=averages, ema_decay=0.75)
        expected = [0.75 * e + 0.25 * p for e, p in zip(expected, params, strict=True)]
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("skip", [True, False])
def test_skipped_step_leaves_everything(skip):
    start = [make(0), make(1), make(2)]
    params, momenta, averages = make(0), make(1), make(2)
    grads = make(3)
    if skip:
        grads[1][3] = torch.inf
    masked_sgd_(params, grads, momenta, None, LR, MOMENTUM, DECAY, ema=averages,
                skip=torch.tensor(float(skip)))  # fmt: skip
    for now, before in zip((params, momenta, averages), start, strict=True):
        for a, b in zip(now, before, strict=True):
            assert torch.equal(a, b) == (skip or not a.numel())


def test_gradients_of_another_float_type_and_a_tensor_scale():
    params, expected = make(0), make(0)
    grads = make(1, torch.bfloat16)
    masked_sgd_(params, grads, None, None, LR, grad_scale=torch.tensor(4.0))
    masked_sgd_reference_(expected, [g.float() / 4 for g in grads], None, None, LR)
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
        arguments = (LR, MOMENTUM, DECAY, L1)
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
