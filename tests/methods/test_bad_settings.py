"""Settings that make no sense for the network or the request: refused in one line, or they work."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.recipe import Recipe
from letheon.errors import InputError, RunFailed
from letheon.methods.amun import Amun
from letheon.methods.bad_teacher import BadTeacher
from letheon.methods.boundary_expanding import BoundaryExpanding
from letheon.methods.boundary_shrink import BoundaryShrink
from letheon.methods.cf_k import CfK
from letheon.methods.cmf import Cmf
from letheon.methods.cola import Cola
from letheon.methods.dual_optim import DualOptim
from letheon.methods.duck import Duck
from letheon.methods.esc import Esc
from letheon.methods.eu_k import EuK
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.influence import Influence
from letheon.methods.kd import Kd
from letheon.methods.kodge import Kodge
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.lotus import Lotus
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.pl_spkd import PlSpkd
from letheon.methods.pseudo_label import PseudoLabel
from letheon.methods.random_label import RandomLabel
from letheon.methods.rkd import Rkd
from letheon.methods.salun import SalUn
from letheon.methods.salun_soft import SalUnSoft
from letheon.methods.scar import Scar
from letheon.methods.scrub import Scrub
from letheon.methods.sfron import Sfron
from letheon.methods.ssd import Ssd
from letheon.methods.unsir import Unsir
from letheon.methods.weight_negation import WeightNegation
from letheon.methods.wrapper import Wrapper
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.world import run_of

# What is wrong -> how the method is made, and what the message says.
BAD: dict[str, tuple[Callable[[], Method], str]] = {
    "density above 1": (lambda: SalUn(RandomLabel(), density=1.5), "density"),
    "soft density below 0": (lambda: SalUnSoft(density=-0.1), "density"),
    "no retain share": (lambda: BadTeacher(retain_share=0.0), "retain_share"),
    "a share above 1": (lambda: Lotus(retain_share=1.5), "retain_share"),
    "a share of noise": (lambda: Unsir(retain_share=2.0), "retain_share"),
    "more than all directions": (lambda: Esc(share=1.5), "share"),
    "a mix above 1": (lambda: NegGradPlus(alpha=1.5), "alpha"),
    "a step of minus one": (lambda: BoundaryShrink(epsilon=-1.0), "epsilon"),
    "no threshold": (lambda: Ssd(alpha=-1.0), "alpha"),
    "ascent every 0 steps": (lambda: Sfron(every=0), "every"),
    "no samples": (lambda: Influence(samples=0), "samples"),
    "no samples of inputs": (lambda: Kodge(samples=0), "samples"),
    "fewer than no epochs": (lambda: Finetune(Recipe(epochs=-1)), "epochs"),
    "a warm-up beyond the end": (lambda: Finetune(Recipe(epochs=1, warmup=2)), "warmup"),
    "more free epochs": (lambda: L1Sparse(Recipe(epochs=2), free_epochs=3), "free_epochs"),
    "collapse beyond the end": (lambda: Cola(Recipe(epochs=2), collapse_epochs=3), "collapse"),
    "negative max epochs": (lambda: Scrub(max_epochs=-1), "max_epochs"),
    "more layers than there are": (lambda: CfK(k=9), "got k 9; expected 1 to 2"),
    "an unknown layer": (lambda: CfK(layers=("layer9",)), "'layer9', which holds no weight"),
    "an unknown layer to negate": (lambda: WeightNegation(layers=("stem",)), "'stem'"),
    "a batch of nothing": (lambda: Finetune(Recipe(batch_size=0)), "batch_size 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_in_one_line(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises(InputError) as caught:
        method = make()
        method.check(run_of(method))
    text = str(caught.value)
    assert words in text and "\n" not in text and "--" not in text
    assert re.search(r"\bgot\b.*\bexpected\b|\bgot\b.*;", text)


# Refused before a network or an image is at hand.
ALONE_BAD: dict[str, tuple[Callable[[], Method], str]] = {
    "one pass for both sets": (lambda: DualOptim(RandomLabel()), "dual-optim around random-label"),
    "one set": (lambda: DualOptim(Finetune()), "dual-optim around finetune"),
    "forgotten images alone": (lambda: DualOptim(Amun(images="forget")), "dual-optim around amun"),
    "a climb of no epochs": (lambda: DualOptim(Scrub(max_epochs=0)), "dual-optim around scrub"),
    "no pass": (lambda: DualOptim(Ssd()), "dual-optim around ssd"),
    "a wider head": (lambda: SalUn(BoundaryExpanding()), "salun around boundary-expanding"),
    "another head": (lambda: SalUn(Cmf()), "salun around cmf"),
    "no layer": (lambda: EuK(k=0), "got k 0"),
}


@pytest.mark.parametrize("case", ALONE_BAD)
def test_it_is_refused_before_anything_is_read(case: str) -> None:
    make, words = ALONE_BAD[case]
    with pytest.raises(InputError, match=f"{words}.*expected"):
        make()


@pytest.mark.parametrize("method", [BadTeacher(), EuK(k=1)])
def test_a_layer_that_cannot_be_drawn_anew_is_refused_before_the_start(method: Method) -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.by * x

    run = run_of(method)
    method.check(run)
    run.model.net = torch.nn.Sequential(Scale(), run.model.net)
    with pytest.raises(InputError, match="got 0 of kind Scale"):
        method.check(run)


@pytest.mark.parametrize("method", [Duck(), Scar()])
def test_a_single_class_that_is_kept_is_refused_before_the_start(method: Method) -> None:
    run = run_of(method)
    run.forget_classes = (0, 1, 2)
    with pytest.raises(InputError, match="got 1 classes with retain samples"):
        method.check(run)


GENTLE = Recipe(epochs=1, lr=1e-3, batch_size=16)
ALONE = cases(GENTLE)
ONE = cases(replace(GENTLE, batch_size=1), replace(GENTLE, lr=1e-5, batch_size=1))


@pytest.mark.parametrize("name", [name for name in ALONE if not isinstance(ALONE[name], Wrapper)])
def test_what_a_method_says_of_its_passes_is_so(name: str) -> None:
    """And dual-optim works round each that tells them apart, over all of its epochs."""
    method = ALONE[name]
    run = run_of(method)
    phases = method.phases(run, method.prepare(run), 0)
    reads = [one.reads for phase in phases for one in (phase, phase.beside) if one is not None]
    apart = "forget" in reads and {*reads} != {"forget"}
    assert method.separates_forget == apart
    if apart:
        method = replace(method, recipe=replace(method.recipe, epochs=2))
        assert end(DualOptim(method), run_of(method)) == ""


def end(method: Method, run: Run) -> str:
    """How a run ends: in finite weights, or in one line of our own."""
    try:
        method.check(run)
        run_method(method, run)
    except (InputError, RunFailed) as error:
        assert "\n" not in str(error) and "got" in str(error)
        return str(error)
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    return ""


@pytest.mark.parametrize("name", ALONE)
def test_no_retain_image_at_all(name: str) -> None:
    """A method that reads some says so; one that needs none works."""
    run = run_of(ALONE[name])
    run.forget = torch.ones(41, dtype=torch.bool)
    run.loader.forget = run.forget.numpy()  # type: ignore[attr-defined]
    run.forget_classes, run.held_out = (0, 1, 2, 3), lambda: run.loader
    text = end(ALONE[name], run)
    assert not text or "retain" in text or "class" in text, text
    if isinstance(ALONE[name], PseudoLabel | PlSpkd | HeadDistillation):
        assert "all classes" in text  # a label that is kept is none of any


@pytest.mark.parametrize("method", [Kd, Rkd, RandomLabel])
def test_a_label_that_is_kept_where_none_is(method: type[Method]) -> None:
    kept = {"draw": "retained"} if method is RandomLabel else {"forget_pass": "pseudo-label"}
    one = method(**kept)
    run = run_of(one)
    run.forget_classes = (0, 1, 2, 3)
    with pytest.raises(InputError, match="all classes"):
        one.check(run)


@pytest.mark.parametrize("name", slow_but([*ONE][::3], ONE))
def test_batches_of_one_sample(name: str) -> None:
    run = run_of(ONE[name])
    run.held_out = lambda: run.loader
    text = end(ONE[name], run)
    assert not text or "batch" in text or "retain" in text, text


def test_a_network_that_diverges_is_named_with_its_step() -> None:
    method = GradAscent(Recipe(epochs=3, lr=1e25, batch_size=4))
    text = end(method, run_of(method))
    assert re.search(r"epoch \d", text) and re.search(r"step \d", text) and "lower lr" in text
