"""The report: numbers that survive every format, pictures that are there or excused, a page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from letheon.errors import InputError, NotMeasurable
from letheon.eval.metrics.reference import reference
from letheon.eval.metrics.registry import metrics
from letheon.eval.metrics.scores import scores
from letheon.eval.probes.embedding import embed
from letheon.eval.report import definitions, pictures, schema, write
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_csv, as_json, as_latex, as_markdown
from tests.patience import PATIENCE

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs" / "metrics.schema.json").read_text(encoding="utf-8")
)
CLASSES = ["cat", "dog", "ship"]


def row(name: str, role: str, seed: int = 0, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    share = lambda: float(rng.uniform(0.2, 0.9))  # noqa: E731
    metrics = ("FA", "RA", "TFA", "TRA", "svc_efficacy_confidence", "knn", "cka_retrained")
    return {
        "name": name,
        "role": role,
        **{metric: share() for metric in metrics},
        "seconds": 10.0 + 100 * share(),
        **more,
    }


def rich(name: str, role: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed + 50)
    return row(
        name,
        role,
        seed,
        classes=CLASSES,
        forgotten=[1],
        accuracy_by_class=[0.9, float(rng.random()), None],
        cka_by_layer={"conv1": 0.9, "layer1": float(rng.random())},
        cka_floor_by_layer={"conv1": 0.02, "layer1": 0.03},
        domain_matrix={a: {b: float(rng.random()) for b in "AB"} for a in "AB"},
        knn_confusion={"rows": ["dog"], "columns": CLASSES, "shares": rng.random((1, 3)) / 3},
        relearn={"head only": {"steps": [0, 5], "accuracy": torch.tensor([0.0, 0.5])}},
        embedding={"points": rng.normal(size=(8, 2)), "labels": [1] * 4 + [-1] * 4},
    )


def full() -> list[dict[str, Any]]:
    return [
        rich("Original", "original", 0),
        *(rich(f"Retrained {k}", "retrained", k + 1) for k in range(3)),
        rich("Head distillation", "control", 8),
        rich("SalUn | $50_% <b>", "unlearned", 9),
    ]


class Page(HTMLParser):
    """Images, links, ids and element balance of a page."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(of)
        assert tag not in ("script", "link", "iframe")
        self.ids += [of["id"]] if of.get("id") else []
        self.targets += [of["href"]] if of.get("href") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("report")
    paths = write.write_report(full(), out / "new", heading="Made <up>")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_all_formats_are_written(written: dict[str, str]) -> None:
    names = {"report.html", "metrics.csv", "table.md", "metrics.tex", "metrics.json",
             "audit.md", "audit.json", "page.json"}  # fmt: skip
    assert set(written) == names


def test_json_keeps_to_the_published_schema(written: dict[str, str]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    document = json.loads(written["metrics.json"])
    jsonschema.validate(document, SCHEMA)
    by_name = {line["name"]: line for line in document["rows"]}
    given = full()[5]
    assert by_name[given["name"]]["RA"] == given["RA"]
    assert by_name[given["name"]]["embedding"]["points"] == given["embedding"]["points"].tolist()
    bare = json.loads(as_json(prepare([{"name": "one", "FA": 0.5}])))
    jsonschema.validate(bare, SCHEMA)
    assert bare["reference"] is None
    for broken in (
        document | {"version": 2},
        document | {"rows": [{"name": "x"}]},
        document | {"rows": [{"name": "x", "role": "control", "FA": 50}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_the_published_schema_is_generated_from_the_metrics() -> None:
    assert schema.schema() == SCHEMA


def test_a_model_left_out_is_named_in_every_format(tmp_path: Path) -> None:
    write.write_report([row("A", "unlearned")], tmp_path, {"B": "weights hold NaN"})
    document = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, SCHEMA)
    assert document["left_out"] == {"B": "weights hold NaN"}
    for name in ("table.md", "metrics.tex", "report.html"):
        assert "Left out: B: weights hold NaN." in (tmp_path / name).read_text(encoding="utf-8")


def test_scores_are_added_against_the_mean_of_the_retrained() -> None:
    rows = full()
    prepared = prepare(rows)
    assert prepared.reference is not None and prepared.reference.seeds == 3
    mean = {k: float(np.mean([r[k] for r in rows[1:4]])) for k in ("FA", "RA", "TRA")}
    got = prepared.of_role("unlearned")[0]
    given = rows[5]
    want = np.prod([1 - abs(given[k] - mean[k]) for k in mean])
    assert got["tow"] == pytest.approx(want)
    assert got["aus"] == pytest.approx((1 - rows[0]["TRA"] + given["TRA"]) / (1 + given["TFA"]))
    # A retrained model against the mean of the other two.
    own = prepared.of_role("retrained")[0]
    others = reference(rows[2:4]).mean
    assert own["average_gap"] == scores(rows[1], rows[0], others)["average_gap"]
    assert prepared.reference.bands["average_gap"].seeds == 3


def test_a_single_retrained_model_is_not_its_own_yardstick() -> None:
    prepared = prepare([row("R", "retrained"), row("U", "unlearned", 1)])
    own, other = prepared.of_role("retrained")[0], prepared.of_role("unlearned")[0]
    assert "tow" not in own and "tow" in other
    assert "no band" in prepared.sentence
    assert "one seed, no spread" in as_markdown(prepared)


def test_a_given_score_is_kept() -> None:
    prepared = prepare([row("R", "retrained"), row("U", "unlearned", 1, tow=0.123)])
    assert prepared.of_role("unlearned")[0]["tow"] == 0.123


def test_csv_has_full_precision(written: dict[str, str]) -> None:
    lines = list(csv.DictReader(io.StringIO(written["metrics.csv"])))
    assert [line["name"] for line in lines] == [r["name"] for r in full()]
    for line, given in zip(lines, full(), strict=True):
        assert float(line["TFA"]) == given["TFA"]
    digest = prepare([row("x", "control", conditions={"digest": "abc"}, why=None)])
    assert next(csv.DictReader(io.StringIO(as_csv(digest))))["weights"] == "abc"


def test_markdown_cells_and_definitions(written: dict[str, str]) -> None:
    text = written["table.md"]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables[:3]}
    assert len(widths) == 1
    assert "SalUn \\| $50_% <b>" in text
    given = full()[5]
    assert f"{100 * given['FA']:.2f}" in text
    assert "**FA %**: Top-1 accuracy" in text
    assert "H-Mean†" in text and "unverified" in text


def test_latex_is_escaped_and_balanced(written: dict[str, str]) -> None:
    text = written["metrics.tex"]
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"SalUn | \$50\_\%" in body
    assert not re.search(r"(?<!\\)%", body)
    opened = body.count(r"\begin{tabular}")
    assert opened == body.count(r"\end{tabular}") == body.count(r"\toprule") > 1
    for block in body.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(\w+)\}", block)[1])  # type: ignore[index]
        lines = [line for line in block.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {columns}
    hard = prepare([{"name": "a\\b~^{}#&", "FA": 0.5}])
    assert r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}\{\}\#\&" in as_latex(hard)


def test_page_is_one_file_with_every_picture_and_its_words(written: dict[str, str]) -> None:
    text = written["report.html"]
    page = Page(text)
    assert len(page.images) == 8
    for image in page.images:
        assert str(image["src"]).startswith("data:image/svg+xml;base64,")
        assert len(str(image["alt"])) > 20
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert "url(" not in text and "@import" not in text
    assert "Made &lt;up&gt;" in text
    assert "SalUn | $50_% &lt;b&gt;" in text and "<b>" not in text
    assert 'name="viewport"' in text
    anchors = {target[1:] for target in page.targets}
    assert anchors and anchors <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    words = " ".join(page.words)
    for key in ("FA", "tow", "knn", "seconds"):
        assert definitions.define(key).text in words
    assert "Left out" not in words


def test_the_page_lists_the_nearest_first_controls_apart_and_every_model(tmp_path: Path) -> None:
    rows = [row("O", "original", FA=0.9, RA=0.9, TFA=0.9, TRA=0.9, gap=0.5)]
    rows += [row("R", "retrained", gap=0.0), row("C", "control", gap=0.01)]
    rows += [rich(f"U{k}", "unlearned", k) | {"gap": (k * 7 % 11) / 20} for k in range(11)]
    write.write_report(rows, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    summary = text[text.index("<h2>Summary") : text.index("</section>")]
    names = re.findall(r'<th scope="row">(\w+)<', summary)
    nearest = sorted(range(11), key=lambda k: k * 7 % 11)
    assert names == ["O", "R", *(f"U{k}" for k in nearest), "C"]
    assert summary.index("Controls") < summary.index(">C<")
    assert 'class="best">0.00' in summary
    alts = {str(image["alt"]).partition(" ")[0]: str(image["alt"]) for image in Page(text).images}
    assert all(f"U{k}" in alts["Heat"] for k in range(11))
    marks = pictures.assign_looks(prepare(rows))
    assert len(set(marks.values())) == len(rows)


def test_no_name_can_bring_markup_into_the_page(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    rows = [
        rich(evil, "unlearned", 1)
        | {"classes": [evil, "b", "c"], "why": {"knn": evil}, "knn": None}
    ]
    tile = {"image": "data:image/png;base64,AA==", "name": evil}
    answer = {"model": evil, "name": evil, "share": "9%", "right": False}
    near = {"model": evil, "tiles": [{"tile": tile, "right": True}]}
    examples = {
        "sentence": evil, "domain": evil,
        "answers": [{"tile": tile, "kind": evil, "models": [answer]}],
        "neighbors": [{"tile": tile, "kind": evil, "models": [near]}],
    }  # fmt: skip
    write.write_report(rows, tmp_path, heading=evil, facts={evil: evil}, examples=examples)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)  # refuses script, link and iframe
    assert "<script" not in text and "<img src=x" not in text and "{{ 7 * 7 }}" in text
    assert not any("onerror" in image for image in page.images)
    assert all(str(image["src"]).startswith("data:image/") for image in page.images)


def test_the_same_rows_give_the_same_bytes(written: dict[str, str], tmp_path: Path) -> None:
    write.write_report(full(), tmp_path, heading="Made <up>")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == written["report.html"]


def test_several_retrained_models_share_one_heat_map_and_one_cloud(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pictures of a panel a model do not grow with the retrained ones; theirs holds the mean."""
    panels: list[Any] = []
    monkeypatch.setattr(pictures, "heat", lambda of, labels: panels.append(of) or "")
    monkeypatch.setattr(pictures, "clouds", lambda of, looks: panels.append(of) or "")
    rows = full()
    rows[2]["domain_matrix"]["A"]["B"] = None  # not known of one, so not of the mean
    prepared = prepare(rows, {}, None)
    of_domains = pictures.domain_matrix(prepared)
    pictures.knn_confusion(prepared)
    of_clouds = pictures.embeddings(prepared)
    domains, confusion, points = panels
    others = ["Original", "SalUn | $50_% <b>", "Head distillation"]
    for of in (domains, confusion):
        assert {panel.title for panel in of} == {*others, "retrained, mean of 3"} and len(of) == 4
    [mean] = [panel.values for panel in domains if panel.title.startswith("retrained")]
    for i, one in enumerate("AB"):
        for j, to in enumerate("AB"):
            known = [row["domain_matrix"][one][to] for row in rows[1:4]]
            if None in known:
                assert np.isnan(mean[i][j])
            else:
                assert mean[i][j] == pytest.approx(sum(known) / 3)
    assert [panel.title for panel in points] == ["Original", "Retrained 0", *others[1:]]
    assert "Of 3 retrained models the first" in of_clouds.caption
    assert of_domains.alt.endswith("for Original, retrained, mean of 3, SalUn | $50_% <b>, "
                                   "Head distillation.")  # fmt: skip


def test_missing_ingredients_are_excused_not_drawn(tmp_path: Path) -> None:
    write.write_report([{"name": "alone", "knn": 0.5}], tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.images == []
    words = " ".join(page.words)
    assert words.count("Left out:") == 8
    for said in ("cka_by_layer", "domain_matrix", "knn_confusion", "embedding", "relearn"):
        assert f'"{said}"' in words


def test_pictures_cope_with_little(tmp_path: Path) -> None:
    """One class missing, other layers, None in a curve, one retrained model, 40 classes."""
    rows = [
        rich("Original", "original", 0) | {"accuracy_by_class": [0.5] * 39 + [None]},
        rich("R", "retrained", 1) | {"accuracy_by_class": [0.4] * 40},
        rich("U", "unlearned", 2)
        | {"accuracy_by_class": [0.1] * 40, "cka_by_layer": {"conv1": None, "layer1": 0.5}},
        rich("V", "unlearned", 3) | {"cka_by_layer": {"other": 0.5}, "seconds": None},
    ]
    write.write_report(rows, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 8
    words = " ".join(page.words)
    assert "other names: V" in words
    assert "One retrained model: no band can be drawn" in words
    assert "40 classes" in words


def test_reasons_for_empty_cells_are_told(tmp_path: Path) -> None:
    rows = [
        row("A", "unlearned"),
        row("B", "control", 1) | {"knn": None, "why": {"knn": "no <samples>"}},
    ]
    write.write_report(rows, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "B, k-NN %: no &lt;samples&gt;" in text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{"FA": 0.1}], "without a name"),
        ([{"name": "x"}, {"name": "x"}], "several rows named x"),
        ([{"name": "x", "role": "best"}], "role 'best'"),
        ([{"name": "x", "FA": float("nan")}], "nan at x.FA"),
        ([{"name": "x", "relearn": {"a": {"accuracy": [0.1, float("inf")]}}}], "x.relearn.a"),
        ([{"name": "x", "FA": 97.0}], "not per cent"),
        ([{"name": "x", "FA": {1, 2}}], "set at x.FA"),
    ],
)
def test_bad_rows_are_the_users_error_and_write_nothing(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        write.write_report(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_extra_is_named_and_tables_still_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install 'matplotlib>="):
        write.write_report(full(), tmp_path / "page")
    assert not (tmp_path / "page").exists()
    written = write.write_report(full(), tmp_path / "tables", page=False)
    assert [path.suffix for path in written] == [".csv", ".md", ".tex", ".json", ".md", ".json"]


def test_every_metric_has_a_definition_and_a_place() -> None:
    unverified = {key for key, metric in metrics().items() if not metric.verified}
    assert unverified == {"agl", "agr", "h_lr", "h_mean"}
    for key in unverified:
        assert "unverified" in definitions.define(key).text
    part = definitions.define("cka_original_forget")
    assert part.title == "CKA to original (forget)" and part.group == "Representation and probes"
    assert definitions.define("mystery").text.startswith("No definition")
    assert definitions.order(["mystery", "TRA", "cka_original_floor", "FA", "cka_original"]) == [
        "FA",
        "TRA",
        "cka_original",
        "cka_original_floor",
        "mystery",
    ]
    assert [definitions.format_value(*c) for c in (("FA", 0.5), ("tow", 0.5), ("FA", None))] == [
        "50.00",
        "0.500",
        "–",
    ]


def test_embedding_keeps_separate_classes_apart_and_is_seeded() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = rng.normal(size=(60, 8)) + 20 * np.eye(8)[labels]
    got = embed(features, labels, np.array([2]), most=15)
    points, shown = np.array(got["points"]), np.array(got["labels"])
    assert (shown == 2).sum() == 15 and (shown == -1).sum() == 15
    gone, rest = points[shown == 2], points[shown == -1]
    spread = np.linalg.norm(gone - gone.mean(0), axis=1).max()
    assert np.linalg.norm(rest - gone.mean(0), axis=1).min() > spread
    assert got == embed(features, labels, np.array([2]), most=15)
    with pytest.raises(NotMeasurable, match="at least 4"):
        embed(features[:3], labels[:3], np.array([0]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on PATH")
@pytest.mark.parametrize("width", [400, 1200])
def test_chromium_renders_the_page_without_overflow(width: int, tmp_path: Path) -> None:
    """Content, not pixels: ink in every part of the page, and nothing wider than the screen."""
    write.write_report(full(), tmp_path)
    frame = (
        f'<body style="margin:0"><iframe id="f" src="report.html" '
        f'style="width:{width}px;height:9000px;border:0"></iframe><script>'
        "onload = () => { const d = document.getElementById('f').contentDocument;"
        " document.body.dataset.wide = d.documentElement.scrollWidth;"
        " document.body.dataset.images = [...d.images].filter(i => i.naturalWidth > 0).length;"
        " document.body.dataset.tall = d.body.scrollHeight; }</script></body>"
    )
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
    ]
    base = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}"]
    url = (tmp_path / "frame.html").as_uri()
    dom = subprocess.run(
        [*base, "--virtual-time-budget=10000", "--dump-dom", url],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    ).stdout  # fmt: skip
    told = dict(re.findall(r'data-(\w+)="(\d+)"', dom))
    assert int(told["wide"]) <= width
    assert int(told["images"]) == 8
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*base, f"--window-size={max(width, 500)},9000", f"--screenshot={shot}", url],
        capture_output=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    ink = np.asarray(Image.open(shot).convert("L"))[: int(told["tall"]), :width] < 200
    bands = np.array_split(ink, 10)
    assert all(band.mean() > 0.003 for band in bands)
    assert len(np.unique(np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_a_name_that_is_no_utf8_is_printed_in_every_format(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    rows = [{"name": name, "FA": 0.5, "classes": [name, "tea"], "forgotten": [0]}]
    *paths, facts = write.write_report(rows, tmp_path)
    assert facts.name == "page.json"  # has no row
    for path in paths:
        assert "caf\ufffd" in path.read_text(encoding="utf-8"), path.name


def test_a_broken_picture_leaves_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(prepared: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr(write, "draw_pictures", broken)
    with pytest.raises(RuntimeError, match="no such font"):
        write.write_report([{"name": "one", "FA": 0.5}], tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"metrics.csv", "table.md", "metrics.tex", "metrics.json"}
