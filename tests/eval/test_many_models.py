"""Pictures of tables with many models: all of them in a grid, none drawn by hundreds of artists."""

from __future__ import annotations

import re
import statistics
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from letheon.eval.report import page, pictures
from letheon.eval.report.grids import Cell, Grid
from letheon.eval.report.pictures import LOOKS, PANELS, Picture
from letheon.eval.report.rows import prepare
from letheon.eval.report.write import write_report
from tests.browser import needs_axe, needs_chromium, open_browser
from tests.eval.test_report import CLASSES, rich

CSS = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
DRAWN = ("heat", "clouds", "curves", "boxes")


def table(unlearned: int, retrained: int = 3, **more: Any) -> list[dict[str, Any]]:
    """Rows of an original, retrained models, a control and unlearned ones, all with everything."""
    roles = ["original", *["retrained"] * retrained, "control", *["unlearned"] * unlearned]
    return [rich(f"{role} <{n}>", role, n) | more for n, role in enumerate(roles)]


def cells(grid: Grid, name: str) -> dict[str, str]:
    """Head -> text of the one line of that name."""
    [line] = [line for line in grid.lines if line.name == name]
    return dict(zip(grid.heads, (cell.text for cell in line.cells), strict=True))


def whole(share: float) -> str:
    return f"{round(100 * share):d}"


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the functions that draw with matplotlib are asked for."""
    asked: dict[str, list[Any]] = {name: [] for name in DRAWN}
    for name in DRAWN:
        monkeypatch.setattr(
            pictures, name, lambda of, *_, _to=asked[name], **__: _to.append(of) or ""
        )
    return asked


def grid_of(picture: Picture) -> Grid:
    assert picture.image is None and picture.grid is not None
    return picture.grid


def test_the_form_changes_where_panels_become_many(panels: dict[str, list[Any]]) -> None:
    """Retrained models share a panel, so three of them count as one."""
    of_panels = (pictures.domain_matrix, pictures.knn_confusion)
    few = prepare(table(PANELS - 3))  # the original, the retrained and a control have panels too
    for draw in (*of_panels, pictures.embeddings):
        assert draw(few).image is not None
    assert [len(of) for of in panels["heat"]] == [PANELS, PANELS]
    assert [len(of) for of in panels["clouds"]] == [PANELS]
    more = prepare(table(PANELS - 2))
    for draw in of_panels:
        assert len(grid_of(draw(more)).lines) == len(more.rows) + 1
    plots = pictures.embeddings(more).plots
    assert plots is not None and len(plots.plots) == len(more.rows)
    assert len(panels["heat"]) == 2 and len(panels["clouds"]) == 1


def test_nothing_is_drawn_a_model_where_models_are_many(panels: dict[str, list[Any]]) -> None:
    prepared = prepare(table(LOOKS))
    drawn = pictures.draw_pictures(prepared)
    assert panels == {name: [] for name in DRAWN}
    names = {row["name"] for row in prepared.rows}
    for picture in drawn:
        if picture.grid:
            lacks = names - {line.name for line in picture.grid.lines}
            # changes are from the original
            assert lacks == ({"original <0>"} if "change" in picture.title else set())
        elif picture.plots:
            assert picture.plots.plots[0].name == "original <0>"
            assert {plot.name for plot in picture.plots.plots} == names
        else:
            assert {prepared.rows[mark.row]["name"] for mark in picture.marks} == names
    assert sum(picture.grid is not None for picture in drawn) == 5
    assert [line.row for line in grid_of(drawn[2]).lines] == [
        next(n for n, row in enumerate(prepared.rows) if row["name"] == line.name)
        for line in grid_of(drawn[2]).lines
    ]


def test_few_enough_models_are_drawn_as_they_were(panels: dict[str, list[Any]]) -> None:
    for draw in (pictures.class_change, pictures.cka_layers, pictures.relearn):
        drawn = draw(prepare(table(LOOKS - 1)))
        [picture] = drawn if isinstance(drawn, list) else [drawn]
        assert picture.image is not None and picture.grid is None
    assert len(panels["heat"]) == 1 and len(panels["curves"]) == 2


def test_a_domain_grid_has_what_the_panels_have(panels: dict[str, list[Any]]) -> None:
    """Each value in its column; the mean of the retrained ones, unknown where one is."""
    rows = table(20)
    rows[2]["domain_matrix"]["A"]["B"] = None
    rows[9]["domain_matrix"] = {"A": {"A": 0.0}}  # another set of domains
    prepared = prepare(rows)
    grid = grid_of(pictures.domain_matrix(prepared))
    for row in rows:
        told = cells(grid, row["name"])
        for of in "AB":
            for on in "AB":
                value = row["domain_matrix"].get(of, {}).get(on)
                assert told[f"{of} → {on}"] == ("–" if value is None else whole(value))
    mean = cells(grid, "retrained, mean of 3")
    pictures.domain_matrix(prepare(rows[:4]))
    [small] = [of for of in panels["heat"][0] if of.title == "retrained, mean of 3"]
    for of, line in zip(small.rows, small.values, strict=True):
        for on, value in zip(small.columns, line, strict=True):
            assert mean[f"{of} → {on}"] == ("–" if np.isnan(value) else whole(value))
    assert mean["A → B"] == "–" and mean["A → A"] != "–"
    last = [row["name"] for row in rows if row["role"] == "retrained"][-1]
    names = [line.name for line in grid.lines]
    assert {names[names.index("retrained, mean of 3") - 1 - k] for k in range(3)} == {
        "retrained <1>", "retrained <2>", last,
    }  # fmt: skip


def test_a_confusion_grid_begins_with_the_own_name_and_leaves_nothing_out() -> None:
    """Own name, then the names called most; what is summed up in a model's table has no number."""
    rows = table(20)
    for n, row in enumerate(rows):
        low = n / 1000
        row["knn_confusion"] = {
            "rows": ["dog", "cat"],
            "columns": ["cat", "dog", "ship", "other classes"],
            "shares": [[0.1, 0.2 + low, 0.3, 0.4 - low], [0.5, 0.25, 0.05, 0.2]],
        }
    rows[7]["knn_confusion"] = {
        "rows": ["dog"],
        "columns": ["dog", "bird", "other classes"],
        "shares": [[0.5, 0.125, 0.375]],
    }
    grid = grid_of(pictures.knn_confusion(prepare(rows)))
    assert grid.heads == [
        "dog → dog", "dog → ship", "dog → cat", "dog → bird", "dog → the rest",
        "cat → cat", "cat → dog", "cat → ship", "cat → the rest",
    ]  # fmt: skip
    told = [*cells(grid, rows[20]["name"]).values()]
    assert told == ["22", "30", "10", "–", "38", "50", "25", "5", "20"]
    told = [*cells(grid, rows[7]["name"]).values()]
    assert told == ["50", "–", "–", "12", "38", "–", "–", "–", "–"]


def test_a_confusion_grid_of_many_classes_stays_narrow() -> None:
    """Eighteen forgotten classes have their own names and the rest each; sums stay whole."""
    names = [f"c{k}" for k in range(40)]
    shares = np.random.default_rng(0).dirichlet(np.ones(40), (15, 18))
    rows = table(10)
    for row, own in zip(rows, shares, strict=True):
        row["knn_confusion"] = {"rows": names[:18], "columns": names, "shares": own.tolist()}
    grid = grid_of(pictures.knn_confusion(prepare(rows)))
    assert grid.heads == [head for n in names[:18] for head in (f"{n} → {n}", f"{n} → the rest")]
    told = cells(grid, rows[4]["name"])
    for k in range(18):
        assert told[f"c{k} → c{k}"] == whole(shares[4, k, k])
        assert told[f"c{k} → the rest"] == whole(1 - shares[4, k, k])


def test_changes_layers_and_steps_are_the_rows_own() -> None:
    rows = table(LOOKS)
    prepared = prepare(rows)
    change = grid_of(pictures.class_change(prepared))
    layers = grid_of(pictures.cka_layers(prepared))
    [relearned] = pictures.relearn(prepared)
    steps = grid_of(relearned)
    assert change.heads == ["cat", "✗ dog", "ship"]
    assert "✗: to be forgotten" in pictures.class_change(prepared).caption
    for row in rows[1:]:
        own = round(100 * (row["accuracy_by_class"][1] - rows[0]["accuracy_by_class"][1]))
        told = cells(change, row["name"])
        assert told == {"cat": "0", "✗ dog": f"{own:+d}" if own else "0", "ship": "–"}
        assert cells(layers, row["name"])["layer1"] == f"{row['cka_by_layer']['layer1']:.2f}"
        assert cells(steps, row["name"]) == {"step 0": "0", "step 5": "50"}
    assert cells(layers, "unrelated features") == {"conv1": "0.02", "layer1": "0.03"}


def test_many_classes_of_many_models_are_told_by_their_quartiles() -> None:
    rng = np.random.default_rng(3)
    rows = [row | {"accuracy_by_class": rng.random(40).tolist()} for row in table(LOOKS)]
    for row in rows:
        row |= {"classes": [f"c{k}" for k in range(40)], "forgotten": [1, 4, 5]}
    grid = grid_of(pictures.class_change(prepare(rows)))
    base = rows[0]["accuracy_by_class"]
    for row in rows[1:]:
        changes = [a - b for a, b in zip(row["accuracy_by_class"], base, strict=True)]
        told = cells(grid, row["name"])
        for side, of in (
            ("forgotten", [c for k, c in enumerate(changes) if k in (1, 4, 5)]),
            ("others", [c for k, c in enumerate(changes) if k not in (1, 4, 5)]),
        ):
            quartiles = statistics.quantiles(of, n=4, method="inclusive")
            ends = (min(of), *quartiles, max(of))
            names = ("lowest", "lower quartile", "median", "upper quartile", "highest")
            for name, value in zip(names, ends, strict=True):
                assert int(told[f"{side}, {name}"]) == pytest.approx(100 * value, abs=0.51)


def test_small_plots_keep_every_point_where_it_is() -> None:
    rows = table(PANELS)
    rng = np.random.default_rng(0)
    for row in rows:
        points = rng.permutation(50)[:40].reshape(20, 2) * [1.0, 3.0] - 20
        row["embedding"] = {"points": points, "labels": [1] * 5 + [2] * 7 + [-1] * 8}
    plots = pictures.embeddings(prepare(rows)).plots
    assert plots is not None and [name for name, _ in plots.key] == ["others", "dog", "ship"]
    assert len({shape.look for _, shape in plots.key}) == 3
    for row in rows:
        [plot] = [plot for plot in plots.plots if plot.name == row["name"]]
        points, labels = np.asarray(row["embedding"]["points"]), [-1, 1, 2]
        kinds = np.asarray(row["embedding"]["labels"])
        found, true = [], []
        for label, shape in zip(labels, plot.shapes, strict=True):
            spots = np.array([*map(int, re.findall(r"\d+", re.sub(r"[mh][^M]*", "", shape.path)))])
            own = points[kinds == label]
            assert len(spots) == own.size
            spots = spots.reshape(-1, 2)
            found += spots[np.lexsort(spots.T[::-1])].tolist()
            true += own[np.lexsort(own.T[::-1])].tolist()
        where, places = np.array(true), np.array(found)
        for axis, sign in ((0, 1), (1, -1)):
            line = np.polyfit(where[:, axis], places[:, axis], 1)
            assert np.sign(line[0]) == sign  # up is up
            assert np.abs(np.polyval(line, where[:, axis]) - places[:, axis]).max() < 1.5
        assert places.min() >= 0 and places.max() <= 128


def test_points_of_many_models_name_the_nearest_and_tell_all() -> None:
    """Looks do not repeat: the nearest and the controls have their own, the rest one together."""
    rows = table(LOOKS + 30)
    for n, row in enumerate(rows):
        row["gap"] = ((n * 37) % 101) / 200
    prepared = prepare(rows)
    looks = pictures.assign_looks(prepared)
    unlearned = [row for row in rows if row["role"] == "unlearned"]
    nearest = {row["name"] for row in sorted(unlearned, key=lambda row: float(row["gap"]))[:12]}
    faint = [row["name"] for row in unlearned if row["name"] not in nearest]
    [grey] = {looks[name] for name in faint}
    own = [looks[name] for name in (*nearest, "control <4>", "original <0>", "retrained <1>")]
    assert grey not in own and len(set(own)) == len(own)
    picture = pictures.trade_off(prepared)
    assert f"Grey: the {len(faint)} others, further from the retrained" in picture.caption
    told = {mark.text.partition(":")[0] for mark in picture.marks}
    assert told == {row["name"] for row in rows}
    for row in rows:
        del row["gap"], row["FA"], row["RA"], row["TFA"], row["TRA"]
        row |= {"FA": 0.5, "RA": 0.5}
    bare = prepare([row for row in rows if row["role"] != "retrained"])
    assert pictures.trade_off(bare).caption.endswith(f"Grey: the {LOOKS + 30 - 12} others.")


def test_the_page_holds_every_name_and_value(tmp_path: Path) -> None:
    """As text, escaped; no script, no picture of a panel a model."""
    rows = table(LOOKS)
    write_report(rows, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<img") == 2 and "<script" not in text  # the two scatters
    section = unescape(text[text.index('aria-label="Domain matrix, table"') :])
    body = section[: section.index("</table>")]
    for row in rows:
        [line] = re.findall(rf'<th scope="row">{re.escape(row["name"])}</th>(.*?)</tr>', body)
        values = [whole(v) for of in row["domain_matrix"].values() for v in of.values()]
        assert re.findall(r">([^<>]+)</td>", line) == values
    assert text.count('aria-label="Embedding of ') == len(rows)
    assert "original <0>" not in text and "original &lt;0&gt;" in text


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_shows_many_models_within_the_screen(width: int, tmp_path: Path) -> None:
    """No picture is wider than the screen or taller than it; each small plot has its ink."""
    write_report(table(LOOKS), tmp_path)
    with open_browser(tmp_path / "profile") as browser:
        browser.open((tmp_path / "report.html").as_uri(), width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        grids = browser.run("[...document.querySelectorAll('.tall')].map(e => e.offsetHeight)")
        assert len(grids) == 5 and max(grids) <= 900
        boxes = "[...document.querySelectorAll('.plots svg path')].map(e => e.getBBox().width)"
        assert min(browser.run(boxes)) > 0
        assert not browser.problems


@pytest.mark.slow
@needs_chromium
@needs_axe
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_wrong_with_many_models(width: int, tmp_path: Path) -> None:
    """Colored tables and small plots, every section open."""
    write_report(table(LOOKS), tmp_path)
    with open_browser(tmp_path / "profile") as browser:
        browser.open((tmp_path / "report.html").as_uri(), width)
        browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert browser.violations() == []


def test_colors_of_cells_can_be_read_and_are_all_there() -> None:
    """The contrast of WCAG 2.2, 4.5 to 1, on each of the colors a cell can have."""

    def luminance(color: str) -> float:
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        lines = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * lines[0] + 0.7152 * lines[1] + 0.0722 * lines[2]

    found = dict(re.findall(r"td\.([hc]\d+) \{ ([^}]*)\}", CSS))
    assert set(found) == {f"{kind}{step}" for kind in "hc" for step in range(11)}
    for style in found.values():
        below = luminance(style.partition("background: ")[2][:7])
        above = 1.0 if "color: #fff" in style.replace("background", "") else 0.0
        assert (max(below, above) + 0.05) / (min(below, above) + 0.05) >= 4.5


def test_the_color_of_a_cell_follows_its_value() -> None:
    rows = table(LOOKS)
    rows[6]["domain_matrix"] = {"A": {"A": 0.0, "B": 1.0}, "B": {"A": 0.52, "B": None}}
    grid = grid_of(pictures.domain_matrix(prepare(rows)))
    [line] = [line for line in grid.lines if line.name == rows[6]["name"]]
    assert line.cells == [Cell("0", "h0"), Cell("100", "h10"), Cell("52", "h5"), Cell("–")]
    for row in rows:
        row["accuracy_by_class"] = [0.5, 0.5, 0.5]
    rows[6]["accuracy_by_class"] = [0.1, 0.9, 0.5]
    grid = grid_of(pictures.class_change(prepare(rows)))
    [line] = [line for line in grid.lines if line.name == rows[6]["name"]]
    assert line.cells == [Cell("-40", "c0"), Cell("+40", "c10"), Cell("0", "c5")]
    assert CLASSES == ["cat", "dog", "ship"]
