"""Networks of known truth before the verdict: random features of the digits under a fitted head.

Each trains in milliseconds, differs by its seed, and is what its name says: an original, a
retrained model, an original of another seed, head distillation, one-point contraction, untrained.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from letheon.engine.distributed import Ranks
from letheon.eval.audit.conditions import describe_answers, describe_distance, describe_loss
from letheon.eval.audit.originals import describe_places, list_places, place_numbers
from letheon.eval.audit.tables import as_audit
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.comparison import Comparison
from letheon.eval.evaluate import Measuring
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.closeness import closeness, relative_distance
from letheon.eval.membership.over_seeds import Runs, SeveralRuns, margins
from letheon.eval.outputs import Outputs
from letheon.eval.report import verdict
from letheon.eval.row_builder import Row, add_stage, build_row

WIDTH, HELD = 60, 400
NAMES = tuple(map(str, range(10)))


class Nets:
    """Trains on the digits without 3 and 8, or without some single images, or on all."""

    def __init__(self, single: bool) -> None:
        """Forget 100 single images, or two classes."""
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        self.images, self.labels = images[order] / 16, labels[order]
        gone = np.isin(self.labels, (3, 8))
        if single:
            gone = np.arange(len(images)) >= len(images) - 100
        self.gone, self.single = gone, single
        self.train = np.arange(len(images)) >= HELD

    def encode(self, seed: int) -> Any:
        """Random features of one seed: what only the seed decides."""
        draw = np.random.default_rng(seed)
        weights = draw.normal(size=(64, WIDTH)) / 2
        return np.tanh(self.images @ weights + draw.normal(size=WIDTH))

    def head(self, features: Any, rows: Any, targets: Any) -> Any:
        """Fit logits to targets by ridge regression."""
        x = np.c_[features, np.ones(len(features))]
        return x @ np.linalg.solve(
            x[rows].T @ x[rows] + 0.1 * np.eye(WIDTH + 1), x[rows].T @ targets[rows]
        )

    def fitted(self, seed: int, rows: Any) -> tuple[Any, Any]:
        """Features and logits of a network trained on some rows, in an order of its own."""
        features = self.encode(seed)
        return features, self.head(features, rows, 12 * np.eye(10)[self.labels] - 4)

    def subject(self, name: str, features: Any, logits: Any) -> Subject:
        """Its outputs as evaluation has them."""
        sets = {}
        for key, rows in (("train", self.train), ("test", ~self.train)):
            forget = self.gone[rows] & (key == "train" or not self.single)
            labels = torch.from_numpy(self.labels[rows]).long()
            x, z = (torch.from_numpy(v[rows]).float() for v in (features, logits))
            sets[key] = Outputs(x, z, labels, torch.from_numpy(forget), torch.arange(len(labels)))
        return Subject(Passes(name, sets, name))


@cache
def table(single: bool) -> list[dict[str, Any]]:
    """Rows of 4 originals, 6 retrained models and controls, with what reads several runs."""
    nets = Nets(single)
    kept = nets.train & ~nets.gone
    of: dict[str, tuple[str, Any, Any]] = {}
    for seed in range(4):
        of[f"original-{seed}"] = ("original", *nets.fitted(seed, nets.train))
    for seed in range(6):
        of[f"retrained-{seed}"] = ("retrained", *nets.fitted(100 + seed, kept))
    features, logits = nets.fitted(0, nets.train)
    taught = nets.fitted(999, kept)[1]  # the answers of one more retrained model
    of["head-distilled"] = ("control", features, nets.head(features, nets.train, taught))
    of["one-point"] = ("control", features * 1e-2, logits * 1e-2)
    draw = np.random.default_rng(7)
    of["random"] = ("control", features, features @ draw.normal(size=(WIDTH, 10)))
    of["retrain"] = ("unlearned", *nets.fitted(200, kept))
    of["other-original"] = ("unlearned", *nets.fitted(300, nets.train))
    of["no-op"] = ("unlearned", features, logits)
    subjects = {name: nets.subject(name, *each[1:]) for name, each in of.items()}
    by_role = {
        role: [name for name in of if of[name][0] == role] for role in ("original", "retrained")
    }
    peers = Peers(
        subjects["original-0"], tuple(subjects[name] for name in by_role["retrained"]),
        forgotten=() if single else (3, 8), names=NAMES,
    )  # fmt: skip
    known = {name: margins(subject.passes) for name, subject in subjects.items()}
    rows = []
    for name, subject in subjects.items():
        row = build_row(Case(subject, peers), "quick", Row(name, of[name][0]))
        before, after = (
            [known[other] for other in by_role[role] if other != name] for role in by_role
        )
        add_stage(row, SeveralRuns(Runs([known[name]], {}), Runs(after, {}), known[name], before))
        rows.append(row.as_dict())
    return rows


def line_of(rows: list[dict[str, Any]], name: str) -> str:
    """The line of the verdict that names a model."""
    (line,) = [x for x in verdict.judge(rows) if name in x.partition(":")[0].split(", ")]
    return line.partition(": ")[2].removeprefix("each ")


def test_known_truth_of_forgotten_classes() -> None:
    rows = table(single=False)
    assert line_of(rows, "retrain").startswith(
        "closer to the retrained models by its answers to 100% of the forget images, p < 0.001; "
    )
    for name in ("other-original", "no-op"):
        assert line_of(rows, name).startswith("closer to the original model by its answers")
    hidden = line_of(rows, "head-distilled")
    assert hidden.startswith("closer to the retrained models by its answers")
    assert "but its features are more like the original's than a retrained model's" in hidden
    contracted = line_of(rows, "one-point")
    assert "but its answers lie" in contracted and "times as far from them" in contracted
    assert line_of(rows, "random").startswith("no side is named: no better than an untrained")
    places = {row["name"]: list(place_numbers(row, rows).values()) for row in rows}
    assert all(len(found) >= 5 for found in places.values())

    def share(name: str, place: str) -> float:
        return places[name].count(place) / len(places[name])

    for name in ("retrain", *(f"retrained-{seed}" for seed in range(6))):
        assert share(name, "retrained") > 0.7 and share(name, "originals") == 0, name
    for name in ("other-original", *(f"original-{seed}" for seed in range(4))):
        assert share(name, "originals") > 0.6 and share(name, "retrained") == 0, name
    assert share("random", "retrained") < 0.7 and share("head-distilled", "neither") > 0
    text = as_audit(rows)
    assert "## Beside originals of other seeds" in text
    assert describe_places(rows[-1], rows) in text
    for first in (2, 3):  # two originals have no spread, nor has one
        assert not describe_places(rows[-1], rows[first:]) and not list(list_places(rows[first:]))
    assert describe_places(rows[-1], rows[1:])


def test_known_truth_of_forgotten_samples() -> None:
    """The two sides answer nearly alike: neither an original nor a retrained model has a side."""
    rows = table(single=True)
    one = [row for row in rows if row["role"] != "original" or row["name"] == "original-0"]
    for some in (rows, one):
        wrong = "closer to the original" if some is rows else "closer to"
        assert wrong not in line_of(some, "retrain")
    assert "closer to the original model" in line_of(rows, "no-op")
    assert "no better than an untrained network" in line_of(rows, "random")


def test_an_independent_model_is_as_near_to_one_original_as_to_many_retrained() -> None:
    """By means, most would be called closer to the retrained: their mean is nearer to anything."""
    draw = np.random.default_rng(0)
    accused = []
    for _ in range(200):
        everyone = 3 * draw.normal(size=100) + draw.normal(size=(22, 100))
        found = closeness(everyone[0], everyone[1:2], everyone[2:])
        by_means = np.abs(everyone[0] - everyone[1]) > np.abs(everyone[0] - everyone[2:].mean(0))
        accused.append((found.p < 0.05, by_means.mean() > 0.6))
    assert np.mean(accused, axis=0)[0] < 0.12 and np.mean(accused, axis=0)[1] > 0.5


def test_the_distance_of_margins_is_one_for_a_retrained_model_of_any_number() -> None:
    draw = np.random.default_rng(0)
    for count in (3, 20):
        everyone = draw.normal(size=(count + 1, 4000))
        found = relative_distance(everyone[0], everyone[1:])
        others = everyone[1:]
        own = [
            np.mean((one - np.delete(others, k, 0).mean(0)) ** 2) / (1 + 1 / (count - 1))
            for k, one in enumerate(others)
        ]
        far = np.mean((everyone[0] - others.mean(0)) ** 2) / (1 + 1 / count)
        assert found == pytest.approx(np.sqrt(far / np.mean(own))) == pytest.approx(1, abs=0.05)
    assert relative_distance(everyone[0] + 5, everyone[1:]) > 4


def test_what_lost_its_use_is_told_by_half_the_way_to_a_guess() -> None:
    retrained = [{"name": f"r{i}", "role": "retrained", "TRA": 0.9, "RA": 0.9} for i in range(3)]
    classes = {"name": "m", "classes": list(NAMES), "counts": {"TRA": [0, 400]}}
    assert describe_loss({**classes, "TRA": 0.51}, retrained) == ""
    assert "has lost most" in describe_loss({**classes, "TRA": 0.49}, retrained)
    assert "no better than an untrained" in describe_loss({**classes, "TRA": 0.12}, retrained)
    assert "(RA 12.0%" in describe_loss({**classes, "TRA": None, "RA": 0.12}, retrained)
    assert describe_loss({"name": "m", "TRA": 0.1}, retrained) == ""  # of unknown classes


def test_what_can_have_lost_nothing_is_not_called_lost() -> None:
    """Of one class that was kept a guess is right, as is one no worse than retrained models."""

    def tell(own: float, others: Any, names: str, forgotten: list[int]) -> str:
        retrained = [{"name": str(i), "TRA": value} for i, value in enumerate(others)]
        row = {"name": "m", "classes": list(names), "forgotten": forgotten, "TRA": own}
        return describe_loss({**row, "counts": {"TRA": [0, 100]}}, retrained)

    assert tell(1.0, [1.0] * 3, "ab", [0]) == tell(0.9, [0.98] * 3, "abc", [0, 1]) == ""
    assert tell(0.31, [0.30] * 3, "abcd", [0]) == tell(0.28, [0.30] * 3, "abcd", [0]) == ""
    assert tell(0.36, [0.35, 0.36, 0.41], "abcd", [0]) == ""  # as one of them
    assert "no better than" in tell(0.3, [0.9] * 3, "abcd", [0])


def test_a_side_is_named_only_where_no_model_of_the_other_answers_so() -> None:
    """Originals that spread less than retrained models make these nearer to the originals."""
    draw = np.random.default_rng(0)
    count, trials, named, tested = 12, 12, 0, 0
    for _ in range(trials):
        hard = 3 * draw.normal(size=500)
        after = hard + draw.normal(size=(count + 1, 500))
        before = hard + 0.3 + 0.7 * draw.normal(size=(1, 500))
        found = [closeness(one, before, np.delete(after, k, 0)) for k, one in enumerate(after)]
        rows = [{"closer_to_retrained": one.share, "closer_p": one.p} for one in found]
        for k, row in enumerate(rows):
            if row["closer_p"] > 0.05:
                continue
            tested += row["closer_to_retrained"] < 0.5
            text = describe_answers(row, [], [*rows[:k], *rows[k + 1 :]])
            named += text.startswith("closer to the original")
    assert tested > 0.4 * trials * (count + 1)  # the sign test alone accuses so many
    assert named <= trials  # one of the 13, the lowest
    of = [{"closer_to_retrained": share, "closer_p": 0.01} for share in (0.4, 0.45, 0.55, 0.6)]
    assert "(said of 1 of the 3 retrained models, too)" in describe_answers(of[0], [], of[1:])
    assert describe_answers(of[1], [], [of[0], of[2]]).endswith(
        "as near or nearer are 1 of the 2 retrained models"
    )
    near = describe_answers(of[2], [of[3], of[0]], [])
    assert near.startswith("no side is named: nearer the retrained models by its answers to 55%")
    assert near.endswith("1 of the 2 originals of other seeds")
    assert describe_answers(of[3], of[:3], of).startswith("closer to the retrained models")


def test_the_distance_is_far_beyond_the_retrained_models_spread_alone() -> None:
    def tell(own: float, *others: float) -> str:
        return describe_distance({"margin_distance": own}, [{"margin_distance": x} for x in others])

    usual = (0.96, 1.0, 1.02, 1.01)
    limit = np.mean(usual) + np.std(usual, ddof=1) * np.sqrt(1.25) * 3.182  # Student's t, 3
    assert tell(1.04, *usual) == "" == tell(limit - 1e-4, *usual)
    assert "lie 1.09 times as far" in tell(limit + 1e-4, *usual)
    assert tell(1.9) == tell(2.1, 2.2) == "" and "lie 2.1 times" in tell(2.1)


def test_which_models_are_runs_of_one_method_and_which_originals_are_compared_with() -> None:
    """Networks without settings are of nobody knows which method: no U-LiRA over them."""
    draw = np.random.default_rng(0)
    kinds = {"o": ("original", ""), "p": ("original", "")}
    kinds |= {f"r{i}": ("retrained", "") for i in range(4)}
    kinds |= {f"u{i}": ("unlearned", "") for i in range(3)}
    kinds |= {f"s{i}": ("unlearned", "{lr: 1}") for i in range(3)}
    entries: list[Any] = [
        SimpleNamespace(name=name, role=role, settings=settings, seed=seed)
        for seed, (name, (role, settings)) in enumerate(kinds.items())
    ]
    shift = {"original": 4.0, "retrained": -4.0, "unlearned": 0.0}
    known = {e.name: torch.from_numpy(draw.normal(size=20) + shift[e.role]) for e in entries}
    rows = [Row(e.name, e.role, values={"RA": 0.9, "TRA": 0.9}) for e in entries]
    of: Any = SimpleNamespace(comparison=Comparison(entries, *[None] * 3), ranks=Ranks())  # type: ignore[arg-type]
    Measuring._add_runs(of, rows, known)
    found = {row.name: row for row in rows}
    assert found["s0"].values["u_lira"] is not None
    assert "got 1 runs of this method" in found["u0"].why["u_lira"]
    copies = [Row(e.name, e.role, values={"RA": 0.9, "TRA": 0.9}) for e in entries]
    entries[-1].seed = entries[-2].seed  # one run under two names
    Measuring._add_runs(of, copies, known)
    assert "got 2 runs of this method" in copies[-1].why["u_lira"]
    # Each original beside the other one; alone, it would have nobody to be compared with.
    assert found["o"].values["closer_to_retrained"] == 0 == found["p"].values["closer_to_retrained"]
    alone = [Row(e.name, e.role, values={"RA": 0.9, "TRA": 0.9}) for e in entries]
    of.comparison = Comparison([e for e in entries if e.name != "p"], *[None] * 3)  # type: ignore[arg-type]
    Measuring._add_runs(of, alone, known)
    assert "closer_to_retrained" not in alone[0].values
