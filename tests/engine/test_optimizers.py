"""LARS, Muon and the masked SGD against their definitions, tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from letheon.engine.distributed import Ranks
from letheon.engine.gradient_sync import Flat
from letheon.engine.optimizers import Lars, MaskedSgd, Muon, orthogonalize
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


def series(values: torch.Tensor) -> torch.Tensor:
    """What the published polynomial makes of singular values, by hand."""
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def reference_direction(matrix: torch.Tensor) -> torch.Tensor:
    """The same singular vectors, each value mapped on its own; float64, by a decomposition."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ torch.diag(series(values / matrix.double().norm())) @ right


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_orthogonalize_maps_singular_values_alone(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    expected = reference_direction(matrix)
    torch.testing.assert_close(orthogonalize(matrix).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonalize(matrix.double()), expected, atol=1e-12, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_orthogonal_values_lie_where_the_docstring_says() -> None:
    mapped = series(torch.linspace(0.02, 1, 20001, dtype=torch.float64))
    assert mapped.min() > 0.6 and mapped.max() < 1.21


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_orthogonalize_is_torchs_muon_to_its_bfloat16() -> None:
    torch.manual_seed(2)
    weight = nn.Parameter(torch.zeros(6, 20))
    weight.grad = torch.randn(6, 20)
    torch.optim.Muon([weight], 1.0, 0.0, 0.0, nesterov=False, ns_steps=3).step()
    torch.testing.assert_close(weight.detach(), -orthogonalize(weight.grad), atol=0.03, rtol=0)


def test_muon_is_its_definition() -> None:
    net, rate, momentum, decay = layers(), 0.2, 0.6, 0.3
    recipe = Recipe(optimizer="muon", momentum=momentum, weight_decay=decay)
    optimizer = recipe.build_optimizer(list(net.parameters()))
    velocity = [torch.zeros_like(p, dtype=torch.float64) for p in net.parameters()]
    for step in range(3):
        slope(net, step)
        expected = []
        for i, w in enumerate(net.parameters()):
            assert w.grad is not None
            old, g = w.detach().double(), w.grad.double()
            if w.dim() == 4:
                velocity[i] = momentum * velocity[i] + g
                pull = (g + momentum * velocity[i]).reshape(len(w), -1)
                old = old * (len(w) ** 0.5 / old.norm())
                expected.append(old - rate * reference_direction(pull).reshape(w.shape))
            else:
                g = g + decay * old
                velocity[i] = momentum * velocity[i] + g
                expected.append(old - rate * (g + momentum * velocity[i]))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)
            ours.data.copy_(theirs)  # differences of rounding do not grow
        assert next(iter(net.parameters())).is_contiguous(memory_format=torch.channels_last)


def test_muon_goes_on_from_its_saved_state_and_skips_an_overflow() -> None:
    one, other = layers(), layers()
    first = Muon(list(one.parameters()), 0.1, 0.6, 0.1)
    for step in range(2):
        slope(one, step)
        first.step()
        first.zero_grad()
    other.load_state_dict(one.state_dict())
    second = Muon(list(other.parameters()), 0.1, 0.6, 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before = [p.detach().clone() for p in one.parameters()]
    for net, optimizer in ((one, first), (other, second)):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad()
        slope(net, 7)
        optimizer.step()
    for p, q, old in zip(one.parameters(), other.parameters(), before, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, old)
