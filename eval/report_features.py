"""Pictures of what features hold: CKA by layer, neighbours across domains, embeddings."""

from __future__ import annotations

from letheon.eval.report.pictures import Picture, Row, chosen, drawn, looks, marks, told
from letheon.eval.report.plots import Series, curves
from letheon.eval.report.rows import Prepared
from letheon.eval.report_plots_tables import Cloud, Panel, clouds, heat


def cka_layers(prepared: Prepared) -> Picture:
    """CKA to the retrained reference, layer by layer."""
    title, key = "CKA to the retrained model, layer by layer", "cka_by_layer"
    having = [row for row in prepared.rows if row.get(key) and row["role"] != "retrained"]
    if not having:
        return Picture(title, f'Left out: no model\'s row has "{key}".')
    layers = list(having[0][key])
    shown = [row for row in having if list(row[key]) == layers]
    other = [row["name"] for row in having if row not in shown]
    caption = "Linear CKA of pooled features with the retrained reference."
    pairs = [
        row[key] for row in prepared.of_role("retrained") if list(row.get(key) or ()) == layers
    ]
    between = [[pair[n] for pair in pairs if pair[n] is not None] for n in layers]
    band = None
    if all(between):
        band = ([min(values) for values in between], [max(values) for values in between])
        caption += " Shaded: where other retrained models lie."
    floors = [r["cka_floor_by_layer"] for r in shown if r.get("cka_floor_by_layer")]
    floor = [floors[0].get(n) for n in layers] if floors else None
    if floor:
        caption += " Dotted: the value that unrelated features reach."
    if other:
        caption += f" Not drawn, for their layers have other names: {', '.join(other)}."
    places, of = list(range(len(layers))), looks(prepared)
    series = [Series(r["name"], places, [r[key][n] for n in layers], of[r["name"]]) for r in shown]
    svg = curves(series, ("layer", "CKA"), ticks=layers, band=band, floor=floor)
    facts = [(s.name, f"{_short(s.y[0])} to {_short(s.y[-1])}") for s in series]
    return drawn(title, caption, svg, f"CKA from {layers[0]} to {layers[-1]}. {told(facts)}")


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def domain_matrix(prepared: Prepared) -> Picture:
    """k-NN accuracy from each domain to each."""
    title, key = "Domain matrix", "domain_matrix"
    shown, others = chosen(prepared, key)
    if not shown:
        return Picture(title, f'Left out: no model\'s row has "{key}".')

    def read(row: Row) -> Panel:
        table = row[key]
        columns = list(next(iter(table.values())))
        values = [[line.get(column) for column in columns] for line in table.values()]
        return Panel(row["name"], list(table), columns, values)

    svg = heat([read(row) for row in shown], ("tested on", "neighbours from"))
    caption = "k-NN accuracy in per cent: neighbours of one domain vote on images of another."
    alt = f"Heat maps of k-NN accuracy, domain by domain, for {_names(shown)}."
    return drawn(title, caption + others, svg, alt)


def knn_confusion(prepared: Prepared) -> Picture:
    """What neighbours call the forgotten classes."""
    title, key = "k-NN confusion of the forgotten classes", "knn_confusion"
    shown, others = chosen(prepared, key)
    if not shown:
        return Picture(title, f'Left out: no model\'s row has "{key}".')
    panels = [
        Panel(row["name"], row[key]["rows"], row[key]["columns"], row[key]["shares"])
        for row in shown
    ]
    svg = heat(panels, ("called", "forgotten class"))
    caption = "What nearest neighbours in feature space call each forgotten class, in per cent."
    alt = f"Heat maps of what forgotten classes are called, for {_names(shown)}."
    return drawn(title, caption + others, svg, alt)


def _names(rows: list[Row]) -> str:
    return ", ".join(row["name"] for row in rows)


def embeddings(prepared: Prepared) -> Picture:
    """t-SNE of the forgotten classes before (original) and after."""
    title, key = "t-SNE of the forgotten classes, before and after", "embedding"
    shown, others = chosen(prepared, key)
    if len(shown) < 2 or shown[0]["role"] != "original":
        return Picture(title, f'Left out: "{key}" is needed of the original and of another model.')
    known = next((row["classes"] for row in prepared.rows if row.get("classes")), None)

    def called(label: int) -> str:
        return "" if label < 0 else str(known[label] if known else label)

    labels = sorted({label for row in shown for label in row[key]["labels"] if label >= 0})
    panels = [
        Cloud(row["name"], row[key]["points"], [called(label) for label in row[key]["labels"]])
        for row in shown
    ]
    looks_of = marks([called(label) for label in labels])
    caption = (
        "Coloured: held-out images of the forgotten classes; grey: of others. Each model is "
        "embedded by itself: look whether the classes stand apart, not where."
    )
    alt = f"Embeddings of {', '.join(looks_of)} in {_names(shown)}."
    return drawn(title, caption + others, clouds(panels, looks_of), alt)
