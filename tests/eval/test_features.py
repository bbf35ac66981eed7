"""One pass over a set: every sample once, in its own place, the same for 1, 2 and 3 ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier, build
from letheon.errors import InputError
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.inference.taps import pool
from letheon.eval.outputs import Outputs
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages

CLASSES = 5


def images(n: int = 47) -> ArrayImages:
    draw = np.random.default_rng(7)
    pixels = draw.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    labels = draw.integers(0, CLASSES, n)
    return ArrayImages("noise", pixels, labels, [f"class {c}" for c in range(CLASSES)])


def loader(ranks: Ranks, n: int = 47, batch: int = 10) -> TorchLoader:
    data = images(n)
    forget = data.labels == 2
    preset = build("small", CLASSES).preset
    return TorchLoader(data, forget, preset, batch, Reader(0, ranks.rank, ranks.world))


def test_rows_are_those_of_a_plain_forward_pass() -> None:
    model = build("small", CLASSES, seed=3)
    read = loader(Ranks())
    got = extract(model, read, Ranks())
    batches = list(read.sweep())
    with torch.no_grad():
        logits, features = model.eval()(torch.cat([batch.images for batch in batches]))
    torch.testing.assert_close(got.logits, logits)
    torch.testing.assert_close(got.features, features)
    assert got.labels.tolist() == read.images.labels.tolist()
    assert got.forget.tolist() == read.forget.tolist()
    assert got.index.tolist() == list(range(47))


def test_repeated_indices_are_read_once_and_sorted() -> None:
    model = build("small", CLASSES)
    got = extract(model, loader(Ranks()), Ranks(), InferenceOptions((9, 2, 9)))
    assert got.index.tolist() == [2, 9]


def test_modes_come_back_as_they_were() -> None:
    model = build("small", CLASSES)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    before = [module.training for module in model.modules()]
    extract(model, loader(Ranks()), Ranks(), InferenceOptions((1,)))
    assert [module.training for module in model.modules()] == before


def test_running_statistics_do_not_move() -> None:
    model = build("small", CLASSES).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract(model, loader(Ranks()), Ranks())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_results_can_be_trained_on() -> None:
    got = extract(build("small", CLASSES), loader(Ranks()), Ranks())
    probe = nn.Linear(got.features.shape[1], CLASSES)
    nn.functional.cross_entropy(probe(got.features), got.labels).backward()
    assert probe.weight.grad is not None


def taps_of(model: Classifier) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def test_taps_are_the_means_over_space_of_the_named_outputs() -> None:
    model = build("small", CLASSES, seed=3)
    read = loader(Ranks())
    names = taps_of(model)
    got = extract(model, read, Ranks(), InferenceOptions(taps=tuple(names)))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen[name].append(out.mean(dim=(2, 3)))
        )
    with torch.no_grad():
        for batch in read.sweep():
            model.eval()(batch.images)
    assert list(got.taps) == names
    for name in names:
        torch.testing.assert_close(got.taps[name], torch.cat(seen[name]))


def test_an_unknown_tap_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="got tap 'layer9'"):
        extract(
            build("small", CLASSES), loader(Ranks()), Ranks(), InferenceOptions(taps=("layer9",))
        )


def test_pooling_finds_the_channels() -> None:
    maps = torch.randn(2, 5, 7, 7)
    torch.testing.assert_close(pool(maps), maps.mean(dim=(2, 3)))
    ends = maps.permute(0, 2, 3, 1)
    torch.testing.assert_close(pool(ends), maps.mean(dim=(2, 3)))
    tokens = torch.randn(2, 50, 8)
    torch.testing.assert_close(pool(tokens), tokens.mean(dim=1))
    assert pool(torch.randn(2, 9)).shape == (2, 9)
    assert pool(maps.half()).dtype == torch.float32


def test_where_keeps_rows_together() -> None:
    n = 6
    outputs = Outputs(
        torch.arange(n)[:, None].float(),
        torch.arange(n)[:, None].float() * 10,
        torch.arange(n),
        torch.arange(n) % 2 == 0,
        torch.arange(n) + 100,
        {"tap": torch.arange(n)[:, None].float() * 100},
    )
    kept = outputs.where(outputs.forget)
    assert kept.index.tolist() == [100, 102, 104]
    assert kept.labels.tolist() == [0, 2, 4]
    assert kept.taps["tap"][:, 0].tolist() == [0, 200, 400]
    assert len(kept) == 3


def test_flip_is_the_mean_with_the_mirror_image() -> None:
    model = build("small", CLASSES, seed=3)
    read = loader(Ranks())
    got = extract(model, read, Ranks(), InferenceOptions(taps=("net.conv1",), flip=True))
    images = torch.cat([batch.images for batch in read.sweep()])
    with torch.no_grad():
        plain, mirrored = model.eval()(images), model(images.flip(-1))
    torch.testing.assert_close(got.logits, (plain.logits + mirrored.logits) / 2)
    torch.testing.assert_close(got.features, (plain.features + mirrored.features) / 2)
    assert not torch.allclose(got.logits, plain.logits)
    alone = extract(model, read, Ranks(), InferenceOptions(taps=("net.conv1",)))
    torch.testing.assert_close(got.taps["net.conv1"], alone.taps["net.conv1"])


@pytest.mark.parametrize("flip", [False, True])
def test_shift_is_the_weighted_mean_with_two_moved_images(flip: bool) -> None:
    model = build("small", CLASSES, seed=3).eval()
    read = loader(Ranks())
    taps = ("net.conv1",)
    got = extract(model, read, Ranks(), InferenceOptions(taps=taps, flip=flip, shift=True))
    images = torch.cat([batch.images for batch in read.sweep()]).numpy()
    wide = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), "reflect")
    size = images.shape[-1]
    views = {0.5: [images], 0.25: [wide[..., :size, :size], wide[..., 2:, 2:]]}
    logits, features = torch.zeros_like(got.logits), torch.zeros_like(got.features)
    for weight, moved in views.items():
        for view in moved:
            sides = [view, view[..., ::-1]] if flip else [view]
            for side in sides:
                with torch.no_grad():
                    output = model(torch.from_numpy(side.copy()))
                logits += weight / len(sides) * output.logits
                features += weight / len(sides) * output.features
    torch.testing.assert_close(got.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.features, features, atol=1e-5, rtol=1e-5)
    alone = extract(model, read, Ranks(), InferenceOptions(taps=taps))
    torch.testing.assert_close(got.taps["net.conv1"], alone.taps["net.conv1"])
    assert not torch.allclose(got.logits, alone.logits)
