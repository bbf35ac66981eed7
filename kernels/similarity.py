"""Losses between two networks' views of a batch: which samples look alike, how far, at which angle.

Student and teacher may differ in width; only relations between samples are compared. The batch
the relations are taken over is the batch that is passed in: gather the features over ranks first
for relations across ranks. No Triton form: the products are plain matrix products, and what is
left is (b, b).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 1 << 24  # cosines in memory at once in angle_loss: 64 MiB in float32


def similarity_loss(student: Tensor, teacher: Tensor, squared: bool = True) -> Tensor:
    """The similarity-preserving loss (Tung and Mori 2019), a scalar.

    The Gram matrices of both feature sets, each row scaled to length one, are compared by the
    squared Frobenius norm of their difference, divided by b^2. `squared=False` is the norm itself
    over b^2, as the published unlearning code has it; its gradient where the matrices agree
    exactly is defined as zero. So is that of a sample whose features are all zero: its row stays
    zero instead of being divided by a tiny number.

    Args:
        student: (b, ...) any float type; read without a copy when contiguous or channels-last.
        teacher: (b, ...), its width free; usually without gradient.
        squared: the paper's form.

    Returns:
        0-dim float32 (float64 for float64 features); zero for an empty batch. No host sync.
    """
    b = student.shape[0]
    difference = _unit_rows(gram(student)) - _unit_rows(gram(teacher))  # (b, b)
    total = difference.square().sum()
    if not squared:
        total = _root(total)
    return total / max(b * b, 1)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance-wise relational distillation (RKD-D, Park et al. 2019), a scalar.

    Pairwise Euclidean distances, each divided by the mean of its matrix's nonzero distances, then
    the Huber loss between the two, averaged over the b(b-1) ordered pairs of two samples. The
    authors' code averages over all b^2 entries, the zero diagonal included: that is this times
    (b-1)/b. Features as in `similarity_loss`; zero for fewer than two samples.
    """
    b = student.shape[0]
    left, right = _scaled_distances(student), _scaled_distances(teacher)
    return F.smooth_l1_loss(left, right, reduction="sum") / max(b * (b - 1), 1)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Angle-wise relational distillation (RKD-A, Park et al. 2019), a scalar.

    The Huber loss between the cosines of the angle that samples i and k make at sample j, averaged
    over the b(b-1)(b-2) ordered triplets of three different samples. The authors' code averages
    over all b^3, whose other entries are zero: their value is this times (b-1)(b-2)/b^2. Where two
    samples coincide the angle is undefined: its cosine counts as zero and has no gradient.

    Cosines come from the (b, b) Gram matrix, so nothing of size b^2 d exists, and in blocks of
    anchors j that are computed again in the backward pass, so nothing of size b^3 does. Features
    as in `similarity_loss`; zero for fewer than three samples.
    """
    b = student.shape[0]
    student_gram, teacher_gram = _centered_gram(student), _centered_gram(teacher)
    total = 0 * student_gram.sum()  # so that an empty batch has a graph too
    anchors = max(1, _CHUNK // max(b * b, 1))
    for first in range(0, b, anchors):
        last = min(first + anchors, b)
        if first == 0 and last == b:
            total = total + _angle_sum(student_gram, teacher_gram, first, last)
        else:
            total = total + checkpoint(
                _angle_sum, student_gram, teacher_gram, first, last,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
    return total / max(b * (b - 1) * (b - 2), 1)


def as_rows(features: Tensor) -> Tensor:
    """(b, ...) to (b, d) without a copy for contiguous and for channels-last features.

    Channels-last maps come out in (height, width, channel) order. A Gram matrix does not change
    when the columns are permuted, so either order serves it; do not use the rows for anything that
    reads a single column.
    """
    if features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last):
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1) if features.dim() > 1 else features[:, None]


def gram(features: Tensor) -> Tensor:
    """(b, b) inner products of the samples: float64 for float64 features, else float32.

    Halves are widened before the product and autocast is off inside. On CUDA the product follows
    `torch.backends.cuda.matmul.fp32_precision`: with tf32 its relative error is about 1e-3, unless
    the features were bf16 or fp16, which tf32 holds exactly.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = as_rows(features)
        if rows.dtype != torch.float64:
            rows = rows.float()
        return rows @ rows.T


def _root(values: Tensor) -> Tensor:
    """Square root with gradient zero at zero."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1).sqrt(), 0)


def _inverse_root(values: Tensor) -> Tensor:
    """One over the square root; zero, with gradient zero, at zero."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1).rsqrt(), 0)


def _unit_rows(matrix: Tensor) -> Tensor:
    return matrix * _inverse_root(matrix.square().sum(1, keepdim=True))


def _centered_gram(features: Tensor) -> Tensor:
    """(b, b); centering moves no distance or angle and keeps their differences from cancelling."""
    rows = as_rows(features)
    if rows.dtype != torch.float64:
        rows = rows.float()
    return gram(rows - rows.mean(0))


def _squared_distances(products: Tensor) -> Tensor:
    """(b, b), never negative, from the Gram matrix."""
    norms = products.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * products).clamp_min(0)
    # Rounding leaves about eps * norm where two samples coincide; below that it is zero.
    noise = 8 * torch.finfo(products.dtype).eps * (norms[:, None] + norms[None, :])
    return torch.where(squares > noise, squares, 0)


def _scaled_distances(features: Tensor) -> Tensor:
    """(b, b) distances over the mean of the nonzero ones; zero gradient at zero distance."""
    squares = _squared_distances(_centered_gram(features))
    distances = _root(squares)
    mean = distances.sum() / (squares > 0).sum().clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1)


def _angle_sum(student_gram: Tensor, teacher_gram: Tensor, first: int, last: int) -> Tensor:
    """Sum of the Huber losses over the triplets whose middle sample is in [first, last)."""
    return F.smooth_l1_loss(
        _cosines(student_gram, first, last), _cosines(teacher_gram, first, last), reduction="sum"
    )


def _cosines(products: Tensor, first: int, last: int) -> Tensor:
    """(last-first, b, b): entry (j, i, k) is the cosine at j between i and k, 0 where undefined."""
    inverse = _inverse_root(_squared_distances(products)[first:last])  # (anchors, b)
    at = products[first:last]  # (anchors, b): <j, i>
    own = products.diagonal()[first:last, None, None]  # <j, j>
    inner = products[None] - at[:, :, None] - at[:, None, :] + own  # <i - j, k - j>
    # i = k is no angle: its cosine is one in both networks up to rounding, left out exactly.
    other = ~torch.eye(products.shape[0], dtype=torch.bool, device=products.device)
    return inner * inverse[:, :, None] * inverse[:, None, :] * other
