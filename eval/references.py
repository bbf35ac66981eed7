"""Check that originals and retrained models are what they are given for, as far as records tell.

A p-value says how often a true retrained model would be accused, if the retrained models are such:
trained once each by other seeds, by one recipe, on the images that were to be kept. What certainly
is none is refused. What may be none is said in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from letheon.engine.runs.origin import read_origin
from letheon.engine.runs.run_folder import FINISHED
from letheon.errors import InputError, join_few
from letheon.loaders.forget_request import Request
from letheon.sealed import read_sealed

if TYPE_CHECKING:
    from letheon.eval.comparison import Comparison, Entry

_FRESH = {"training", "reference", "random-network"}
"""Kinds of runs, and a method, whose first weights are no model's."""
FORGETTING = ("control", "unlearned")
"""Roles of the models that were to forget."""
_NO_RECIPE = ("name", "share_seed")
"""Settings of a method that are no recipe of training."""
_MOST = 4  # settings, or models, that a sentence names


def read_start(folder: Path) -> str:
    """Read the digest of the weights that a run began to forget with; "" where it names none."""
    if not (folder / FINISHED).is_file():
        return ""
    facts = read_sealed(folder / FINISHED)
    if {str(facts.get("kind")), str(facts.get("method"))} & _FRESH:
        return ""
    return str((read_origin(folder) or {}).get("weights", ""))


def read_kind(folder: Path) -> str:
    """Read what a run was: training, reference, unlearning or control; "" without a record."""
    file = folder / FINISHED
    return str(read_sealed(file).get("kind", "")) if file.is_file() else ""


def read_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select what a run's settings say of its training: dotted name -> value."""

    def flatten(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flatten(value, "" if name == "recipe" else f"{where}{name}.")
            elif name not in _NO_RECIPE:
                yield f"{where}{name}", value

    method, precision = settings.get("method"), settings.get("precision")
    found = dict(flatten(method, "")) if isinstance(method, Mapping) else {}
    if isinstance(precision, Mapping) and "dtype" in precision:
        found["dtype"] = precision["dtype"]
    return found


def check_references(entries: Sequence[Entry], request: Request) -> None:
    """Refuse originals and retrained models that are none.

    Raises:
        InputError: one network twice, a retrained model that a run's record calls something else,
            an original that forgot what was to be forgotten, or networks of other shapes.
    """
    known: dict[str, Entry] = {}
    shapes: dict[str, Any] = {}
    for entry in entries:
        if entry.role not in ("original", "retrained"):
            continue
        if (other := known.setdefault(entry.weights, entry)) is not entry:
            raise InputError(
                f"got {other.name} ({other.role}) and {entry.name} ({entry.role}) of the same "
                "weights; expected each to be trained by itself, with a seed of its own; leave one "
                "out",
                option=entry.role,
            )
        if entry.role == "retrained" and entry.kind not in ("", "reference", "training"):
            raise InputError(
                f"got {entry.name} as a retrained model, whose record says that it is a run of "
                f"{entry.kind}; expected one of retrain, which never saw the forget set",
                option="retrained",
            )
        forgot = {one.numbers for one in entry.model.requests}
        if entry.role == "original" and request.numbers in forgot:
            raise InputError(
                f"got {entry.name} as an original, which has forgotten {request.text} itself; "
                "expected the model before forgetting",
                option="original",
            )
        own = {name: tuple(value.shape) for name, value in entry.model.state_dict().items()}
        if own != (shapes := shapes or own):
            raise InputError(
                f"got {entry.name}, a {entry.model.name} of other shapes than "
                f"{next(iter(known.values())).name}, a {next(iter(known.values())).model.name}; "
                "expected original and retrained models of one architecture",
                option=entry.role,
            )


class Doubt(NamedTuple):
    """What makes the numbers of some models worth less than they look."""

    names: tuple[str, ...]  # of the models
    text: str


def list_doubts(of: Comparison) -> list[Doubt]:
    """List what may be no reference, or is compared with itself or with another original."""
    return [
        *_find_shared_seeds(of),
        *_find_other_starts(of),
        *_find_other_recipes(of),
        *_find_missing_records(of),
        *_find_missing_canaries(of),
        *_find_copies(of),
    ]


def _find_shared_seeds(of: Comparison) -> Iterator[Doubt]:
    for before in of.of_role("original"):
        for entry in of.of_role("retrained"):
            if entry.seed is not None and entry.seed == before.seed and not entry.own_stream:
                yield Doubt(
                    (entry.name,),
                    f"{entry.name} was retrained with the seed of {before.name}, {entry.seed}: "
                    "they share first weights and order, and every distance to this reference "
                    "flatters; retrain with another seed, or without share_seed",
                )


def _find_other_starts(of: Comparison) -> Iterator[Doubt]:
    """Find the models that were made from another original than they are compared with."""
    original, others = of.find_original(), dict[str, list[str]]()
    if original is None:
        return
    for entry in of.entries:
        if entry.role in FORGETTING and entry.start not in ("", original.weights):
            others.setdefault(entry.start, []).append(entry.name)
    known = {entry.weights: entry.name for entry in of.of_role("original")}
    for start, names in others.items():
        yield Doubt(
            tuple(names),
            f"{', '.join(names)}: made from {known.get(start, 'another original')}, compared with "
            f"{original.name}: what another seed costs looks like forgetting; measure these beside "
            "their own original, named first",
        )


def _find_other_recipes(of: Comparison) -> Iterator[Doubt]:
    """Find originals and retrained models that were trained in another way than the first one."""
    known = [e for role in ("retrained", "original") for e in of.of_role(role) if e.recipe]
    others: dict[str, list[str]] = {}
    for entry in known[1:]:
        first = known[0].recipe
        odd = [key for key in first if key in entry.recipe and first[key] != entry.recipe[key]]
        if odd:
            parts = [f"{key} {entry.recipe[key]} for {first[key]}" for key in odd]
            others.setdefault(join_few(parts, _MOST), []).append(entry.name)
    for text, names in others.items():
        yield Doubt(
            tuple(names),
            f"{join_few(names, _MOST)}: trained by another recipe than {known[0].name} ({text}); "
            "spreads, sides and p-values take for granted that originals and retrained models "
            "differ by what they saw and by their seeds alone",
        )


def _find_missing_records(of: Comparison) -> Iterator[Doubt]:
    """Find retrained models without the record that others have of what they saw."""
    known = of.of_role("retrained")
    if names := tuple(entry.name for entry in known if entry.kind == "training"):
        yield Doubt(
            names,
            f"{join_few(names, _MOST)}: trained by itself, not as a retrained model of this "
            "request; that it never saw the forget set is taken on trust",
        )
    names = tuple(entry.name for entry in known if not entry.kind)
    if names and len(names) < len(known):
        yield Doubt(
            names,
            f"{join_few(names, _MOST)}: without a record, unlike other retrained models; that it "
            "never saw the forget set is taken on trust",
        )


def _find_missing_canaries(of: Comparison) -> Iterator[Doubt]:
    """Find references that say nothing of the canaries that others were trained with."""
    if not of.canaries:
        return
    known = (*of.of_role("original"), *of.of_role("retrained"))
    names = tuple(entry.name for entry in known if entry.model.canaries is None)
    if names:
        yield Doubt(
            names,
            f"{join_few(names, _MOST)}: without a record of the {len(of.canaries)} canaries of the "
            "others; trained on true labels it is no reference of those that were not",
        )


def _find_copies(of: Comparison) -> Iterator[Doubt]:
    """Find models to be judged that are one of the retrained models."""
    known = {entry.weights: entry.name for entry in of.of_role("retrained")}
    for entry in of.entries:
        if entry.role in FORGETTING and entry.weights in known:
            yield Doubt(
                (entry.name,),
                f"{entry.name} has the weights of {known[entry.weights]}: it is compared with "
                "itself, and its numbers say nothing of a method",
            )
