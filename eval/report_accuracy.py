"""Pictures of what models answer: trade-off, time, change by class, relearning."""

from __future__ import annotations

from collections.abc import Sequence

from letheon.eval.report.definitions import define, printed
from letheon.eval.report.pictures import Picture, drawn, looks, shown_name, told
from letheon.eval.report.plots import Series, curves, scatter
from letheon.eval.report.rows import Prepared
from letheon.eval.report_plots_tables import Panel, boxes, heat

_HEATED_CLASSES = 30  # more classes than these are summed up in boxes


def trade_off(prepared: Prepared) -> Picture:
    """Forget against retain accuracy; held-out, unless that is known of fewer models."""
    title = "Forget–retain trade-off"

    def having(x: str, y: str) -> list[dict[str, float]]:
        return [r for r in prepared.rows if r.get(x) is not None and r.get(y) is not None]

    x, y = max((("TFA", "TRA"), ("FA", "RA")), key=lambda pair: len(having(*pair)))
    shown = having(x, y)
    if not shown:
        return Picture(title, "Left out: no model has both forget and retain accuracy.")
    of = looks(prepared)
    series = [
        Series(shown_name(prepared, r), [100 * r[x]], [100 * r[y]], of[str(r["name"])])
        for r in shown
    ]
    caption = f"{x} against {y} in per cent; a good model lies where the retrained ones do."
    bands = prepared.reference.bands if prepared.reference else {}
    band = None
    if x in bands and y in bands:
        (left, right), (low, high) = (
            (100 * (b.mean - (b.std or 0)), 100 * (b.mean + (b.std or 0)))
            for b in (bands[x], bands[y])
        )
        band = ((left, right), (low, high))
        caption += (
            f" Shaded: mean ± standard deviation of {bands[x].seeds} retrained models."
            if bands[x].std is not None
            else " One retrained model: no band can be drawn."
        )
    labels = (f"{x}, forget accuracy (%)", f"{y}, retain accuracy (%)")
    svg = scatter(series, labels, band=band)
    facts = [(str(r["name"]), f"{printed(x, r[x])} and {printed(y, r[y])}") for r in shown]
    return drawn(title, caption, svg, f"Scatter of {x} against {y} in per cent. {told(facts)}")


def time_gap(prepared: Prepared) -> Picture:
    """Run time against the gap to the retrained models."""
    title = "Time against gap"
    timed = [row for row in prepared.rows if (row.get("seconds") or 0) > 0]
    gap = next(
        (k for k in ("average_gap", "gap") if any(r.get(k) is not None for r in timed)), None
    )
    if gap is None:
        why = 'Left out: no model has both "seconds" and a gap to a retrained model.'
        return Picture(title, why)
    shown = [row for row in timed if row.get(gap) is not None]
    of = looks(prepared)
    series = [
        Series(shown_name(prepared, r), [r["seconds"]], [100 * r[gap]], of[r["name"]])
        for r in shown
    ]
    what = define(gap).title.lower()
    svg = scatter(series, ("run time (s)", f"{what} (points)"), log_x=True)
    facts = [(r["name"], f"{r['seconds']:.0f} s, {100 * r[gap]:.2f} points") for r in shown]
    caption = (
        f"Lower left is better. The {what} of a retrained model is to the mean of the others; time "
        "is without compilation, precomputation and evaluation."
    )
    return drawn(title, caption, svg, f"Scatter of run time against {what}. {told(facts)}")


def class_change(prepared: Prepared) -> Picture:
    """Accuracy of each class less the original model's."""
    title, key = "Accuracy change by class", "accuracy_by_class"
    base = next((r for r in prepared.of_role("original") if r.get(key)), None)
    if base is None:
        return Picture(title, f'Left out: the original model\'s row has no "{key}".')
    count = len(base[key])
    others = [r for r in prepared.rows if r is not base and len(r.get(key) or ()) == count]
    if not others:
        return Picture(title, f'Left out: no other model\'s row has "{key}" of {count} classes.')
    changes = [
        [None if a is None or b is None else a - b for a, b in zip(r[key], base[key], strict=True)]
        for r in others
    ]
    names = [r["name"] for r in others]
    gone = {c for r in prepared.rows for c in (r.get("forgotten") or ())}
    sides = [_sides(change, gone) for change in changes]
    facts = [(name, _means(*side)) for name, side in zip(names, sides, strict=True)]
    if count <= _HEATED_CLASSES:
        known = next((r["classes"] for r in prepared.rows if r.get("classes")), range(count))
        columns = [f"✗ {name}" if c in gone else str(name) for c, name in enumerate(known)]
        panel = Panel("", names, columns, changes)
        svg = heat([panel], ("class (✗: to be forgotten)", ""), change=True)
        caption = "Held-out accuracy less the original model's, in points."
    else:
        groups = [(name, *side) for name, side in zip(names, sides, strict=True)]
        svg = boxes(groups, "change of accuracy from the original (points)")
        caption = (
            f"Held-out accuracy of {count} classes less the original model's; "
            "whiskers reach the extremes."
        )
    return drawn(title, caption, svg, f"Change of accuracy by class, in points. {told(facts)}")


def _sides(change: Sequence[float | None], gone: set[int]) -> tuple[list[float], list[float]]:
    """Changes of the forgotten and of the other classes, in points."""
    known = [(c in gone, 100 * v) for c, v in enumerate(change) if v is not None]
    return [v for inside, v in known if inside], [v for inside, v in known if not inside]


def _means(gone: Sequence[float], kept: Sequence[float]) -> str:
    sides = (("forgotten", gone), ("others", kept))
    return ", ".join(f"{name} {sum(v) / len(v):+.1f} on average" for name, v in sides if v)


def relearn(prepared: Prepared) -> list[Picture]:
    """One picture a recipe: same data, related data, head only."""
    title, key = "Relearn curve", "relearn"
    recipes = list(dict.fromkeys(name for r in prepared.rows for name in (r.get(key) or {})))
    if not recipes:
        return [Picture(title, f'Left out: no model\'s row has "{key}".')]
    of, pictures = looks(prepared), []
    for recipe in recipes:
        series, facts = [], []
        for row in prepared.rows:
            curve = (row.get(key) or {}).get(recipe)
            if curve:
                values = [100 * share for share in curve["accuracy"]]
                name = shown_name(prepared, row)
                series.append(Series(name, curve["steps"], values, of[row["name"]]))
                ends = f"{values[0]:.0f} to {values[-1]:.0f} per cent in {curve['steps'][-1]} steps"
                facts.append((row["name"], ends))
        svg = curves(series, ("step", "forgotten classes (%)"))
        caption = f"Held-out accuracy on the forgotten classes while relearning: {recipe}."
        pictures.append(drawn(f"{title}: {recipe}", caption, svg, told(facts)))
    return pictures
