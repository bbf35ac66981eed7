"""The relational losses against their definitions written with loops, and their gradients."""

import itertools

import pytest
import torch

from letheon.kernels import similarity
from letheon.kernels.similarity import angle_loss, as_rows, distance_loss, gram, similarity_loss
from tests.marks import slow_but

LOSSES = [
    similarity_loss,
    lambda s, t: similarity_loss(s, t, squared=False),
    distance_loss,
    angle_loss,
]


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def similarity_by_hand(student, teacher):
    b = len(student)
    total = 0.0
    for i in range(b):
        rows = []
        for features in (student, teacher):
            row = torch.stack([features[i].flatten() @ features[j].flatten() for j in range(b)])
            rows.append(row / row.norm())
        total += float(((rows[0] - rows[1]) ** 2).sum())
    return total / b**2, total**0.5 / b**2


def distance_by_hand(student, teacher):
    pairs = list(itertools.permutations(range(len(student)), 2))
    scaled = []
    for features in (student, teacher):
        distances = [float((features[i] - features[j]).norm()) for i, j in pairs]
        scaled.append([d / (sum(distances) / len(distances)) for d in distances])
    return sum(huber(a, b) for a, b in zip(*scaled, strict=True)) / len(pairs)


def angle_by_hand(student, teacher):
    triplets = list(itertools.permutations(range(len(student)), 3))
    total = 0.0
    for i, j, k in triplets:
        cosines = []
        for features in (student, teacher):
            one, other = features[i] - features[j], features[k] - features[j]
            cosines.append(float(one @ other / (one.norm() * other.norm())))
        total += huber(*cosines)
    return total / len(triplets)


@pytest.mark.parametrize(("b", "widths"), [(2, (3, 3)), (5, (7, 2)), (9, (1, 4))])
def test_values_by_definition(b, widths):
    gen = torch.Generator().manual_seed(b)
    student, teacher = (torch.randn(b, d, generator=gen, dtype=torch.float64) for d in widths)
    squared, norm = similarity_by_hand(student, teacher)
    assert float(similarity_loss(student, teacher)) == pytest.approx(squared)
    assert float(similarity_loss(student, teacher, squared=False)) == pytest.approx(norm)
    assert float(distance_loss(student, teacher)) == pytest.approx(
        distance_by_hand(student, teacher), rel=1e-9, abs=1e-12
    )
    if b > 2:
        assert float(angle_loss(student, teacher)) == pytest.approx(
            angle_by_hand(student, teacher), rel=1e-9
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    gen = torch.Generator().manual_seed(0)
    student = torch.randn(6, 4, generator=gen, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, generator=gen, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("b", [0, 1, 2, 3])
def test_tiny_batches_and_equal_features_have_finite_gradients(loss, b):
    student = torch.randn(b, 3, generator=torch.Generator().manual_seed(b), requires_grad=True)
    value = loss(student, student.detach().clone())
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == 0
    assert torch.equal(student.grad, torch.zeros(b, 3))


@pytest.mark.parametrize("loss", LOSSES)
def test_coinciding_samples_and_zero_features_have_finite_gradients(loss):
    gen = torch.Generator().manual_seed(3)
    student = torch.randn(6, 8, generator=gen)
    student[1] = student[0]
    student[5] = 0
    student.requires_grad_()
    loss(student, torch.randn(6, 8, generator=gen)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


def test_angle_loss_in_blocks_of_anchors_is_the_same(monkeypatch):
    gen = torch.Generator().manual_seed(1)
    teacher = torch.randn(7, 5, generator=gen, dtype=torch.float64)
    values, grads = [], []
    for chunk in (1 << 24, 2 * 49, 1):
        monkeypatch.setattr(similarity, "_CHUNK", chunk)
        student = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(7, 3).cos()
        student.requires_grad_()
        value = angle_loss(student, teacher)
        value.backward()
        values.append(float(value.detach()))
        grads.append(student.grad)
    assert values[1:] == pytest.approx(values[:1] * 2)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_low_precision_input_is_computed_in_float32(loss, dtype):
    gen = torch.Generator().manual_seed(2)
    student = torch.randn(33, 65, generator=gen).to(dtype).requires_grad_()
    teacher = torch.randn(33, 17, generator=gen).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    value.backward()
    expected = loss(student.detach().double(), teacher.double())
    assert value.dtype == torch.float32
    assert student.grad.dtype == dtype
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_maps_are_read_in_place_in_either_layout():
    maps = torch.randn(4, 6, 3, 5)
    last = maps.to(memory_format=torch.channels_last)
    assert as_rows(maps).data_ptr() == maps.data_ptr()
    assert as_rows(last).data_ptr() == last.data_ptr()
    assert as_rows(last).is_contiguous()
    torch.testing.assert_close(gram(maps), gram(last), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram(maps)[1, 2], (maps[1] * maps[2]).sum(), rtol=1e-4, atol=1e-4)
    other = torch.randn(4, 2, 2, 2)
    torch.testing.assert_close(similarity_loss(maps, other), similarity_loss(last, other))


def test_a_large_common_offset_does_not_hide_distances():
    gen = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(20, 16, generator=gen), torch.randn(20, 16, generator=gen)
    for loss in (distance_loss, angle_loss):
        plain, moved = loss(student, teacher), loss(student + 100, teacher)
        assert float(moved) == pytest.approx(float(plain), rel=1e-3)


@pytest.mark.parametrize("loss", slow_but(LOSSES[:1], LOSSES))
def test_compiles_as_one_graph(loss):
    gen = torch.Generator().manual_seed(5)
    student = torch.randn(8, 6, 3, 3, generator=gen).to(memory_format=torch.channels_last)
    teacher = torch.randn(8, 9, generator=gen)
    grads = []
    for form in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        ours = student.clone().requires_grad_()
        form(ours, teacher).backward()
        grads.append(ours.grad)
    torch.testing.assert_close(grads[0], grads[1])
