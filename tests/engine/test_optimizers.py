"""LARS and the masked SGD against their definitions, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from letheon.engine.distributed import Ranks
from letheon.engine.gradient_sync import Flat
from letheon.engine.optimizers import Lars, MaskedSgd
from letheon.engine.recipe import Recipe


def layers() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 2))
    return net.to(memory_format=torch.channels_last)


def slope(net: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    net(torch.randn(4, 3, 5, 5)).square().sum().backward()


def test_lars_is_its_definition() -> None:
    net, beta, momentum = layers(), 0.01, 0.9
    optimizer = Recipe(optimizer="lars", momentum=momentum, weight_decay=beta).build_optimizer(
        list(net.parameters())
    )
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for step, rate in enumerate((2.0, 1.0, 3.0)):
        slope(net, step)
        expected = []
        for i, w in enumerate(net.parameters()):
            assert w.grad is not None
            g, factor = w.grad.clone(), rate
            if w.dim() > 1:
                size = w.detach().norm()
                factor = rate * 0.001 * float(size / (g.norm() + beta * size))
                g += beta * w.detach()
            velocity[i] = momentum * velocity[i] + factor * g
            expected.append(w.detach() - velocity[i])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_lars_moves_zero_weights_and_skips_an_overflow() -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = Lars([weight], 0.1, 0.9, 0.01)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(weight, torch.full((3, 3), -0.1))
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    weight.grad = torch.full((3, 3), torch.inf)
    optimizer.step()
    assert torch.equal(weight, torch.full((3, 3), -0.1))
    del optimizer.found_inf  # type: ignore[attr-defined]
    weight.grad = torch.zeros(3, 3)  # the velocity too is as it was
    optimizer.step()
    velocity = 0.9 * 0.1 + 0.1 * (0.001 / 0.01) * 0.01 * -0.1
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), -0.1 - velocity))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_sgd_is_torchs_with_the_masked_weights_put_back(flat: bool, momentum: float) -> None:
    ours, theirs = layers(), layers()
    start = [p.detach().clone() for p in theirs.parameters()]
    masks = [torch.rand(p.shape) < 0.5 for p in start]
    parameters = list(ours.parameters())
    buffers = Flat(ours, parameters, Ranks()) if flat else None
    masked = MaskedSgd(parameters, masks, 0.1, momentum, 0.05, buffers)
    plain = torch.optim.SGD(theirs.parameters(), 0.1, momentum, weight_decay=0.05)
    for step in range(4):
        for group in (masked.param_groups[0], plain.param_groups[0]):
            group["lr"] = 0.01 / (step + 1)
        slope(ours, step)
        slope(theirs, step)
        masked.step()
        plain.step()
        with torch.no_grad():
            for p, mask, old in zip(theirs.parameters(), masks, start, strict=True):
                p.copy_(torch.where(mask, p, old))
        plain.zero_grad()
        buffers.clear() if buffers is not None else masked.zero_grad()
    for p, q, mask, old in zip(parameters, theirs.parameters(), masks, start, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
        assert torch.equal(p[~mask].view(torch.int32), old[~mask].view(torch.int32))
        assert not torch.equal(p[mask], old[mask])


def test_masked_sgd_skips_an_overflow_and_a_parameter_without_gradient() -> None:
    net = layers()
    parameters = list(net.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = MaskedSgd(parameters, [torch.ones_like(p) > 0 for p in before], 0.1, 0.9, 0.1)
    slope(net, 0)
    parameters[0].grad = None
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.step()
    still = [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert still == [True, False, False, False, False, False]
