"""Networks, images and requests of a caller's own, as people really have them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import letheon
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.method import Method, Phase, Run
from letheon.engine.precision import fresh_modes
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.launch.records.checks import check_run
from letheon.loaders.batch import Batch
from letheon.methods.train import Train
from tests.patience import PATIENCE

LABELS = torch.arange(40) % 4
IMAGES = (
    torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    + LABELS[:, None, None, None]
)
TRAIN = TensorDataset(IMAGES, LABELS)
SHORT: dict[str, Any] = {"method": "finetune", "epochs": 1, "batch_size": 20, "lr": 0.1}


class Grey(nn.Module):
    """A small network of grey images."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU())
            self.fc = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.fc(self.body(images))
        return logits


class HeadFirst(Grey):
    """One whose head is not the linear layer registered last, and which answers by it."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, 7)

    def forward(self, images: Tensor) -> Tensor:
        """Use the other head, too, as networks with deep supervision do."""
        features = self.body(images)
        self.auxiliary(features).sum()
        logits: Tensor = self.fc(features)
        return logits


class Tied(Grey):
    """One with a weight that stands under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(36, 12)
        self.again.weight = self.body[1].weight  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """Use both."""
        logits: Tensor = self.fc(self.body(images) + self.again(images.flatten(1)))
        return logits


class TwoOutputs(Grey):
    """One that returns an auxiliary output, too, while it is trained."""

    def forward(self, images: Tensor) -> Any:
        """Return the logits, twice in training mode."""
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


def forget(net: nn.Module | Path | str, **changes: Any) -> letheon.Result:
    return letheon.forget(net, **{"train": TRAIN, "forget": [1], **SHORT, **changes})


def weights(result: letheon.Result) -> dict[str, Tensor]:
    return result.model.state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "mask", [LABELS == 3, (LABELS == 3).numpy(), (LABELS == 3).tolist(), [np.True_, np.False_]]
)
def test_a_mask_is_not_taken_for_numbers(mask: Any) -> None:
    """True and False are numbers to Python: a mask would mean samples 1 and 0."""
    with pytest.raises(InputError, match="nonzero"):
        forget(Grey(), forget={"samples": mask})
    [numbers] = (LABELS == 3).nonzero(as_tuple=True)
    request = forget(Grey(), forget={"samples": numbers}).request
    assert request is not None and request.samples == tuple(range(3, 40, 4))


def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    result = forget(Tied(), out=tmp_path / "run", saving=SaveOptions("1steps"))
    assert isinstance(result.model, Tied)
    assert result.model.again.weight is result.model.body[1].weight
    stored = load_file(tmp_path / "run" / "weights.safetensors")
    assert equal(stored, weights(result)) and not equal(stored, Tied().state_dict())
    loaded = letheon.load_model(tmp_path / "run", module=Tied())
    assert equal(loaded.net.state_dict(), stored)


def test_the_head_is_the_layer_whose_output_is_returned(tmp_path: Path) -> None:
    net = HeadFirst()
    result = forget(net, out=tmp_path / "run")
    assert not torch.equal(weights(result)["fc.weight"], net.fc.weight)
    assert torch.equal(weights(result)["auxiliary.weight"], net.auxiliary.weight)
    loaded = letheon.load_model(tmp_path / "run", module=HeadFirst())
    assert loaded.head_path == "fc"
    rows = letheon.evaluate(original=net, unlearned=[result, loaded], train=TRAIN, forget=[1])
    right = (result.model(IMAGES).argmax(1) == LABELS)[LABELS != 1].double().mean().item()
    assert [row["RA"] for row in rows[1:]] == [pytest.approx(right)] * 2


def test_a_run_of_ones_own_network_is_verified_and_loaded(tmp_path: Path) -> None:
    result = forget(Grey(), out=tmp_path / "run")
    assert {check.state for check in check_run(tmp_path / "run")} == {"ok", "unknown"}
    with pytest.raises(InputError, match=r"load_model\(path, module=net\)"):
        forget(tmp_path / "run", forget=[2])
    loaded = letheon.load_model(tmp_path / "run", module=Grey())
    assert equal(loaded.net.state_dict(), weights(result)) and loaded.requests
    other = replace(loaded.preset, size=loaded.preset.size + 1)
    assert letheon.load_model(tmp_path / "run", module=Grey(), preset=other).preset == other
    with pytest.raises(InputError, match="size for .*, whose file says it"):
        letheon.load_model(tmp_path / "run", module=Grey(), preset={"size": 9})
    with pytest.raises(InputError, match="expected 99; give weights and data of the same"):
        letheon.load_model(tmp_path / "run", module=Grey(), classes=99)
    second = forget(loaded, forget=[2])
    assert [request.classes for request in second.requests] == [(1,), (2,)]


def double() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("modes", [torch.no_grad, torch.inference_mode, double])
def test_what_the_caller_has_switched_on_changes_nothing(
    modes: Callable[[], AbstractContextManager[None]],
) -> None:
    expected = forget(Grey())
    with modes():
        result = forget(Grey())
        assert equal(weights(result), weights(expected))
        assert torch.is_inference_mode_enabled() == (modes is torch.inference_mode)
        assert torch.is_autocast_enabled("cpu") == (modes is double)
        result = forget(Grey())
    assert not any(weight.is_inference() for weight in result.model.parameters())


def test_another_default_dtype_changes_nothing() -> None:
    expected, net = forget(Grey()), Grey()
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(weights(forget(net)), weights(expected))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_calls_that_overlap_in_threads_compute_in_float32_and_put_the_default_back() -> None:
    first, second = fresh_modes(), fresh_modes()
    entered, go_on, seen = threading.Event(), threading.Event(), []

    def overlap() -> None:
        with second:
            entered.set()
            go_on.wait(PATIENCE)
            seen.append(torch.get_default_dtype())

    torch.set_default_dtype(torch.float64)
    try:
        thread = threading.Thread(target=overlap)
        with first:
            thread.start()
            assert entered.wait(PATIENCE)
        go_on.set()
        thread.join()
        assert seen == [torch.float32] and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def broken(change: Callable[[Grey], object]) -> Grey:
    net = Grey()
    change(net)
    return net


class Counting(nn.Module):
    """One that keeps a result of its own, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.kept = self.fc.weight * 2


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (broken(lambda net: net.requires_grad_(False)), "all of whose weights are frozen"),
        (broken(lambda net: net.fc.weight.data.fill_(torch.nan)), "fc.weight holds NaN"),
        (Grey().to("meta"), "has no numbers yet"),
        (nn.Sequential(nn.LazyConv2d(3, 3), nn.Linear(4, 4)), "show a lazy network one batch"),
        (Counting(), "cannot be copied"),
        (TwoOutputs(), r"TwoOutputs, which returns a tuple in training mode; .* its layer fc"),
    ],
)
def test_networks_that_cannot_work_are_refused_in_a_line(net: nn.Module, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        forget(net)
    assert caught.value.option == "model" and "\n" not in str(caught.value)


def test_two_outputs_in_training_are_left_alone_where_nothing_is_trained() -> None:
    result = letheon.forget(TwoOutputs(), train=TRAIN, forget=[1], method="esc", batch_size=20)
    assert isinstance(result.model, TwoOutputs)


def test_a_module_without_the_head_of_the_file_is_refused(tmp_path: Path) -> None:
    forget(HeadFirst(), out=tmp_path / "run")
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(InputError, match="got a Sequential without the layer fc, the last one"):
        letheon.load_model(tmp_path / "run", module=other)


def test_methods_refuse_what_they_cannot_learn_by() -> None:
    with pytest.raises(InputError, match=r"Grey, which does not take images of shape \(3, 6, 6\)"):
        forget(Grey(), method="unsir")
    with pytest.raises(InputError, match="trains no weights before its last layer"):
        forget(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), method="cmf")


def test_images_that_a_network_does_not_take_are_refused_before_training(tmp_path: Path) -> None:
    """Grey tensors before a network of colour: an architecture's name, a file, a Classifier."""
    color = TensorDataset(IMAGES.expand(-1, 3, -1, -1), LABELS)
    untrained = Train(recipe=Recipe(epochs=0))
    made = letheon.train("small", train=color, method=untrained, out=tmp_path / "original")
    calls: list[Callable[[], object]] = [
        lambda: letheon.train("small", train=TRAIN),
        lambda: forget(tmp_path / "original"),
        lambda: forget(made.model),
        lambda: letheon.evaluate(original=made, train=TRAIN, forget=[1]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"images of shape \(1, 6, 6\).*tensors must be"):
            call()


def test_labels_that_differ_from_the_listed_ones_are_refused() -> None:
    class Mapped(TensorDataset):
        """A set whose items have other labels than its targets say, but for the first."""

        def __getitem__(self, i: int) -> Any:
            image, label = super().__getitem__(i)
            return image, (0, 3, 1, 2)[int(label)]

    images = Mapped(IMAGES, LABELS)
    images.targets = LABELS.tolist()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="got the label 3 with the image, where the dataset lists"):
        forget(Grey(), train=images)


def test_a_result_prints_as_a_line_and_names_no_folder_that_is_gone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = forget(Grey(), forget={"samples": range(30)}, lr=50.0)
    assert repr(result) == "Result(finetune: forgot samples:30 numbers, seed 1, Grey)"
    [line] = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert line.startswith("warning: finetune: the network collapsed")


@dataclass(frozen=True)
class Interrupted(Method):
    """Fine-tuning in one step of which a signal comes."""

    recipe: Recipe = Recipe(epochs=3, lr=0.1, batch_size=20)
    signal: str = ""
    mark: str = ""
    times: int = 1

    def phases(self, run: Run, state: object, epoch: int) -> Sequence[Phase]:
        """One pass; the signal comes in the second epoch."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            mark = Path(self.mark)
            if self.mark and epoch == 1 and not mark.exists():
                mark.touch()
                for _ in range(self.times):
                    signal.raise_signal(signal.Signals[self.signal])
            return nn.functional.cross_entropy(net(batch.images).logits, batch.labels)

        return [Phase("retain", "retain", loss)]


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored"])
def ctrl_c(request: pytest.FixtureRequest) -> Iterator[None]:
    """What Ctrl-C does outside: it raises, or nothing, as in a job in a script's background."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("name", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)]
)
def test_ctrl_c_saves_a_run_that_has_a_folder(
    name: str, error: type[BaseException], tmp_path: Path
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    call: dict[str, Any] = {"train": TRAIN, "forget": [1], "out": tmp_path / "run"}
    method = Interrupted(signal=name, mark=str(tmp_path / "mark"))
    with pytest.raises(error) as caught:
        letheon.forget(Grey(), method=method, **call)
    assert "goes on from the last save" in str(caught.value) or caught.value.args == (75,)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    again = letheon.forget(Grey(), method=method, **call)
    assert again.record["resumed"]
    (tmp_path / "mark").touch()
    plain = letheon.forget(Grey(), method=method, **call | {"out": tmp_path / "plain"})
    assert equal(weights(again), weights(plain))


def test_a_second_ctrl_c_is_the_callers(tmp_path: Path) -> None:
    """It raises, as anywhere in Python, and does not end the process."""
    before = signal.getsignal(signal.SIGINT)
    method = Interrupted(signal="SIGINT", mark=str(tmp_path / "mark"), times=2)
    with pytest.raises(KeyboardInterrupt):
        letheon.forget(Grey(), method=method, train=TRAIN, forget=[1], out=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    again = letheon.forget(Grey(), method=method, train=TRAIN, forget=[1], out=tmp_path / "run")
    assert again.record["method"] == method.name
