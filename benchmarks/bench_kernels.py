"""Each kernel against its plain and compiled forms, and against the way the field's code does it.

    python benchmarks/bench_kernels.py --out benchmarks/results/kernels_cpu.csv

"field" is the published code's way (baseline/kernels.py). On CUDA the public functions run their
Triton forms; rows for CUDA come from gpu_suite.py and there are none until it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from baseline import kernels as baseline
from harness import Results, Row, compare
from torch import Tensor, nn

from letheon.kernels import masked_sgd_reference
from letheon.kernels.augment import crop_resize_normalize
from letheon.kernels.augment_reference import Filter, crop_resize_normalize_reference
from letheon.kernels.flat import Layout
from letheon.kernels.masked_sgd import masked_sgd_
from letheon.kernels.masked_sgd_reference import masked_sgd_reference_
from letheon.kernels.similarity import angle_loss, distance_loss, similarity_loss
from letheon.kernels.small_conv import small_conv2d
from letheon.kernels.threshold import thresholds_by_histogram, thresholds_by_sort, top_masks

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The 62 parameter shapes of ResNet-18 with 1000 classes: 11,689,512 weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    for wide, narrow in ((64, 64), (128, 64), (256, 128), (512, 256)):
        for inputs in (narrow, wide, wide, wide):
            shapes += [(wide, inputs, 3, 3), (wide,), (wide,)]
        if wide != narrow:
            shapes += [(wide, narrow, 1, 1), (wide,), (wide,)]
    return [*shapes, (1000, 512), (1000,)]


def weights(device: str, seed: int = 0) -> list[Tensor]:
    """Tensors of those shapes, convolutions channels-last."""
    torch.manual_seed(seed)
    tensors = [torch.randn(s, device=device) for s in resnet18_shapes()]
    last = torch.channels_last
    return [t.contiguous(memory_format=last) if t.dim() == 4 else t for t in tensors]


def count(tensors: list[Tensor]) -> int:
    """Weights in all."""
    return sum(t.numel() for t in tensors)


@contextmanager
def whole_buffers() -> Iterator[None]:
    """Without the cache-sized pieces, which a compiler would unroll."""
    chunk, masked_sgd_reference._CHUNK = masked_sgd_reference._CHUNK, 1 << 40
    try:
        yield
    finally:
        masked_sgd_reference._CHUNK = chunk


def bench_masked_sgd(device: str, repeats: int) -> list[Row]:
    """One step on ResNet-18's weights, half of them masked."""
    values, grads, momenta = (weights(device, seed) for seed in range(3))
    keep = [t > 0 for t in weights(device, 3)]
    layout = Layout.of(values)
    flat = [layout.gather(t) for t in (values, grads, momenta)]
    bits, bools = layout.bits(keep), layout.gather(keep)

    def torch_sgd(**options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = [nn.Parameter(v.clone()) for v in values]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return params, torch.optim.SGD(params, **HYPER, **options)

    params, optimizer = torch_sgd(foreach=device != "cpu")
    model = nn.Module()
    for i, param in enumerate(params):
        model.register_parameter(str(i), param)
    integers = {str(i): k.to(torch.int64) for i, k in enumerate(keep)}
    start = {str(i): v.clone() for i, v in enumerate(values)}
    compiled = torch.compile(masked_sgd_reference_, fullgraph=True)
    p, g, m = ([t] for t in flat)

    def run_compiled() -> None:
        with whole_buffers():
            compiled(p, g, m, [bools], **HYPER)

    variants: dict[str, Callable[[], object]] = {
        "field, int64 masks": lambda: baseline.masked_step(model, integers, start, optimizer),
        "torch SGD foreach, no mask": torch_sgd(foreach=True)[1].step,
        "torch SGD fused, no mask": torch_sgd(fused=True)[1].step,
        "plain, tensors, bool": lambda: masked_sgd_reference_(
            values, grads, momenta, keep, **HYPER
        ),
        "plain, flat, bool": lambda: masked_sgd_reference_(p, g, m, [bools], **HYPER),
        "plain, flat, bits": lambda: masked_sgd_reference_(p, g, m, [bits], **HYPER),
        "compiled plain, flat, bool": run_compiled,
    }
    if device != "cpu":
        variants |= {
            "triton, tensors, bool": lambda: masked_sgd_(values, grads, momenta, keep, **HYPER),
            "triton, flat, bool": lambda: masked_sgd_(p, g, m, [bools], **HYPER),
            "triton, flat, bits": lambda: masked_sgd_(p, g, m, [bits], **HYPER),
        }
    with torch.no_grad():
        return compare("masked_sgd", variants, repeats, mode="step", x=count(values), device=device)


def bench_threshold(device: str, repeats: int) -> list[Row]:
    """Masks for densities 0.1 to 1.0 over ResNet-18's gradients."""
    scores = [t * 1e-3 for t in weights(device)]
    densities = [i / 10 for i in range(1, 11)]

    def by_kthvalue() -> list[list[Tensor]]:
        flat = torch.cat([s.reshape(-1).abs() for s in scores])
        masks = []
        for density in densities:
            limit = flat.kthvalue(max(1, len(flat) - round(density * len(flat)))).values
            masks.append([s.abs() > limit for s in scores])
        return masks

    variants: dict[str, Callable[[], object]] = {
        "field, two sorts, one density": lambda: baseline.top_masks(scores, 0.5),
        "kthvalue, ten densities": by_kthvalue,
        "histogram, ten densities": lambda: top_masks(scores, densities, thresholds_by_histogram),
        "sort, ten densities": lambda: top_masks(scores, densities, thresholds_by_sort),
    }
    return compare("threshold", variants, max(3, repeats // 4), 1, x=count(scores), device=device)


def bench_augment(device: str, repeats: int) -> list[Row]:
    """A batch of crops of resident 256-pixel images to 224 pixels."""
    b, size = (16 if device == "cpu" else 256), 224
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (b, 256, 256, 3), dtype=torch.uint8, generator=gen)
    images = images.to(device)
    extent = 96 + (160 * torch.rand(b, 2, generator=gen)).floor()
    corner = ((256 - extent) * torch.rand(b, 2, generator=gen)).floor()
    boxes = torch.cat([corner, extent], 1).to(device)
    source, flip = torch.arange(b, device=device), torch.rand(b, generator=gen).to(device) < 0.5
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def one_by_one() -> Tensor:
        crops = []
        scale = [torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std)]
        for i, (top, left, height, width) in enumerate(boxes.int().tolist()):
            crop = images[i, top : top + height, left : left + width].permute(2, 0, 1)[None]
            crop = F.interpolate(crop.float(), (size, size), mode="bilinear", antialias=True)
            crops.append(crop.flip(3) if flip[i] else crop)
        whole = (torch.cat(crops) / 255 - scale[0]) / scale[1]
        return whole.contiguous(memory_format=torch.channels_last)

    arguments = (images, boxes, source, flip, size, mean, std)
    variants: dict[str, Callable[[], object]] = {"interpolate, image by image": one_by_one}
    compiled = torch.compile(crop_resize_normalize_reference)
    filters: tuple[Filter, ...] = ("box", "bilinear")
    for kind in filters:
        reference = crop_resize_normalize_reference
        variants[f"plain {kind}"] = partial(reference, *arguments, kind)
        if device != "cpu":
            variants[f"compiled {kind}"] = partial(compiled, *arguments, kind)
            variants[f"triton {kind}"] = partial(crop_resize_normalize, *arguments, kind)
    return compare("augment", variants, repeats, x=f"{b} x {size}", device=device)


def bench_losses(device: str, repeats: int) -> Iterator[Row]:
    """Relational losses, forward and backward, on pooled features and on a map."""

    def both(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
        student = x.clone().requires_grad_()

        def run() -> None:
            student.grad = None
            loss(student, y).backward()

        return run

    torch.manual_seed(0)
    b = 128
    pooled = [torch.randn(b, 2048, device=device) for _ in range(2)]
    maps = [torch.randn(32, 256, 28, 28, device=device) for _ in range(2)]
    maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    for name, forms, (x, y) in (
        ("similarity, pooled", {"field": baseline.similarity, "ours": similarity_loss}, pooled),
        ("similarity, map", {"field": baseline.similarity, "ours": similarity_loss}, maps),
        ("angle", {"field": baseline.angle, "ours": angle_loss}, pooled),
        ("distance", {"ours": distance_loss}, pooled),
    ):
        variants = {form: both(loss, x, y) for form, loss in forms.items()}
        variants["compiled ours"] = both(torch.compile(forms["ours"]), x, y)
        yield from compare(name, variants, repeats, mode="full", x=tuple(x.shape), device=device)


def bench_small_conv(device: str, repeats: int) -> Iterator[Row]:
    """Forward and both gradients of the last layers of a ResNet at 64 and 96 pixels; CPU only."""
    if device != "cpu":
        return
    for side, inputs, outputs, stride in ((4, 256, 512, 2), (2, 512, 512, 1), (3, 512, 512, 1)):
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(64, inputs, side, side, generator=draw)
        weight = torch.randn(outputs, inputs, 3, 3, generator=draw)
        image, weight = (
            t.contiguous(memory_format=torch.channels_last).requires_grad_()
            for t in (image, weight)
        )

        def both(way: Callable[..., Tensor], image: Tensor = image, weight: Tensor = weight,
                 stride: int = stride) -> object:  # fmt: skip
            out = way(image, weight, None, (stride, stride), (1, 1))
            return torch.autograd.grad(out, (image, weight), torch.ones_like(out))

        variants: dict[str, Callable[[], object]] = {
            "torch": partial(both, F.conv2d),
            "ours": partial(both, small_conv2d),
        }
        x = f"64 x {inputs} x {side} x {side} to {outputs}, stride {stride}"
        yield from compare("small_conv", variants, repeats, 2, mode="both", x=x, device=device)


Bench = Callable[[str, int], Iterable[Row]]
BENCHES: dict[str, Bench] = {
    "masked_sgd": bench_masked_sgd,
    "threshold": bench_threshold,
    "augment": bench_augment,
    "losses": bench_losses,
    "small_conv": bench_small_conv,
}


@dataclass(frozen=True)
class Options:
    """Which kernels to time, and where the rows go."""

    only: tuple[str, ...] = tuple(BENCHES)
    """of masked_sgd, threshold, augment, losses, small_conv"""
    repeats: int = 30
    """timed calls of each variant, after three of warm-up"""
    threads: int = 1
    """threads of torch on the CPU"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""


def main(options: Options) -> None:
    """Run the benches and write their rows."""
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = Results(options.out)
    for name in options.only:
        results.add(BENCHES[name](device, options.repeats))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
