"""What is made of results files: the README's table, pictures, ratios and exponents."""

from __future__ import annotations

import csv
import json
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from letheon.engine.distributed import Ranks
from letheon.eval.inference.extract import extract

ROOT = Path(__file__).parents[2]
HEAD = "name,variant,mode,metric,unit,x,median,p20,p80,n,device,versions,revision,power_limit\n"


def results(path: Path, *cells: tuple[str, str, str, str, float]) -> Path:
    lines = [
        f"{n},{v},,{m},s,{x!r},{value},{value},{value},1,cpu,,,".replace("'", '"')
        for n, v, m, x, value in cells
    ]
    path.write_text(HEAD + "\n".join(lines) + "\n")
    return path


def end_to_end(path: Path, ours: float) -> Path:
    x = "small, 64 px: spkd"
    return results(
        path,
        ("end_to_end", "baseline", "wall", x, 12.0),
        ("end_to_end", "ours fp32", "wall", x, ours),
        ("end_to_end", "ours fp32", "part data", x, ours / 2),
        ("end_to_end", "ours fp32", "ratio", x, 12 / ours),
    )


def test_the_readme_shows_the_committed_results() -> None:
    from plot import RESULTS, WRITE, between, summary, tables
    from tables.opening import opening
    from tables.results import results_pages

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert between(text) == summary(RESULTS), f"run {WRITE}"
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert between(page) == tables(RESULTS), f"run {WRITE}"
    assert between(page, "opening") == opening(RESULTS), f"run {WRITE}"
    tables_of_pages = [*results_pages(ROOT / "docs" / "results")]
    assert len(tables_of_pages) >= 3
    for path, marker, table in tables_of_pages:
        assert between(path.read_text(encoding="utf-8"), marker) == table, f"run {WRITE}"
    shown = re.findall(r"\(docs/pictures/([^)]+)\)", text)
    assert shown and all((ROOT / "docs" / "pictures" / name).is_file() for name in shown)


def test_a_page_has_the_verdict_and_the_images_of_each_run(tmp_path: Path) -> None:
    from tables.gather import Options, main

    near = [0.01 * k for k in range(19)]
    kinds = [("original", "original", 1.0), ("good", "unlearned", 0.1), ("bad", "unlearned", 0.9)]
    kinds += [(f"retrain-seed{k}", "retrained", value) for k, value in enumerate(near)]
    rows = [{"name": name, "role": role, "RA": value} for name, role, value in kinds]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metrics.json").write_text(json.dumps({"rows": rows}))
    lines = ["name,role,RA", *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "table" / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    phases = {
        "a": {"forget_reads": 3, "retain_reads": 40},
        "b": {"forget_reads": 0, "retain_reads": 7},
    }
    (tmp_path / "runs" / "bad" / "run.json").write_text(json.dumps({"reads": {"phases": phases}}))
    other = tmp_path / "other"
    other.mkdir()
    later = [{**rows[0], "RA": 0.5}, {"name": "bad-seed2", "role": "unlearned", "RA": 0.8}]
    (other / "metrics.json").write_text(json.dumps({"rows": later}))
    lines = ["name,role,RA", *(",".join(map(str, row.values())) for row in later)]
    (other / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "costs.csv").write_text("name,epochs_of_finetune\nbad,1.25\n")
    tables, runs = (tmp_path / "table", other), (tmp_path / "runs", other)
    main(Options(tables, runs, tmp_path / "page.csv", tmp_path / "costs.csv"))
    with (tmp_path / "page.csv").open(newline="") as file:
        found = {row["name"]: row for row in csv.DictReader(file)}
    assert found["bad"]["verdict_p"] == "0.05"  # 1 of 20: it alone lies as far
    assert float(found["good"]["verdict_p"]) > 0.5
    assert found["original"]["verdict_p"] == ""
    assert found["bad"]["images_read"] == "50" and found["good"]["images_read"] == ""
    assert len(found) == len(rows) + 1 and found["bad-seed2"]["RA"] == "0.8"
    assert found["original"]["RA"] == "1.0"  # the first table's
    costs = {name: row["epochs_of_finetune"] for name, row in found.items()}
    assert costs["bad"] == "1.25" and not costs["good"] and not costs["bad-seed2"]


def test_runs_of_one_method_are_a_row(tmp_path: Path) -> None:
    from tables.results import as_markdown, percent, read_rows

    path = tmp_path / "page.csv"
    lines = ["name,role,FA", "salun-seed1,unlearned,0.1", "salun-seed2,unlearned,0.3"]
    lines += ["a-seed3,retrained,0", "b,retrained,0", "original,original,1", "odd-b,control,"]
    path.write_text("\n".join(lines) + "\n")
    assert as_markdown(read_rows(path), [percent("FA", "FA")]).splitlines()[2:] == [
        "| original | 100.0 |",
        "| retrained, 2 | 0.0 ± 0.0 |",
        "| odd-b (control) | - |",
        "| salun | 20.0 ± 14.1 |",
    ]


def test_a_cell_that_nobody_measured_says_so(tmp_path: Path) -> None:
    from tables.opening import opening

    x = "small, 32 px"
    results(
        tmp_path / "retrain_cpu.csv",
        ("retrain", "plain", "processor", x, 500.0),
        ("retrain", "fast", "processor", x, 100.0),
    )
    lines = opening(tmp_path).splitlines()
    assert lines[2].endswith("s of processor time | fast recipe: 100 s, no less accurate | 5.0 |")
    assert all("not measured" in line and "nan" not in line for line in lines[3:])


@pytest.mark.parametrize("file", ["end_to_end_cpu.csv", "end_to_end_cpu_x10.csv"])
def test_a_run_of_another_scale_stands_beside_the_first(tmp_path: Path, file: str) -> None:
    from tables.opening import opening

    x = "resnet18, 224 px, imagenette-224{}: all, one pass"
    first, scaled = (
        [
            ("end_to_end", "baseline", "wall", x.format(of), 100.0 * times),
            ("end_to_end", "ours fp32", "process", x.format(of), 1.0),
            ("end_to_end", "ours fp32", "wall", x.format(of), 25.0 * times),
        ]
        for of, times in (("", 1.0), (", 60 a class", 8.0))
    )
    if file == "end_to_end_cpu.csv":
        results(tmp_path / file, *first, *scaled)
    else:
        results(tmp_path / "end_to_end_cpu.csv", *first)
        results(tmp_path / file, *scaled)
    found = [line for line in opening(tmp_path).splitlines() if "four methods" in line]
    assert [line.split(" | ")[1:] for line in found] == [
        ["the field's scripts: 100 s", "one command, then the table: 25 s", "4.0 |"],
        ["the field's scripts: 800 s", "one command, then the table: 200 s", "4.0 |"],
    ]
    assert "6 photographs a class" in found[0] and "60 photographs a class" in found[1]
    (tmp_path / "end_to_end_cpu.csv").unlink()
    assert "four methods" in opening(tmp_path)


JOBS = ("spkd", "all")


def test_the_table_is_written_between_the_markers_and_checked(tmp_path: Path) -> None:
    from plot import END, START, Options, main

    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    for path in (readme, page):
        path.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    results(
        tmp_path / "end_to_end_cpu.csv",
        *(("end_to_end", "baseline", "wall", f"small, 64 px: {job}", 12.0) for job in JOBS),
        *(("end_to_end", "ours fp32", "wall", f"small, 64 px: {job}", 3.0) for job in JOBS),
        *(("end_to_end", "ours fp32", "ratio", f"small, 64 px: {job}", 4.0) for job in JOBS),
    )
    told = {"readme": readme, "page": page, "results": tmp_path, "pictures": tmp_path / "pictures"}
    assert main(Options(**told, check=True)) == 1
    assert main(Options(**told)) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| small, 64 px | 12.0 | 3.0 | 4.00 | - | - |" in text
    assert "| small, 64 px | SPKD | 1 | 12.0 | 3.0 | 4.00 | - | - | - |" in page.read_text()
    assert main(Options(**told, check=True)) == 0
    assert main(Options(readme, page, results=tmp_path / "none")) == 2
    assert "<svg" in (tmp_path / "pictures" / "end_to_end_cpu.svg").read_text()


def test_a_lost_ratio_is_told_and_seconds_alone_are_not(tmp_path: Path) -> None:
    from regression import Options, lost, main, read

    old = read(end_to_end(tmp_path / "old.csv", 3.0))
    new = end_to_end(tmp_path / "new.csv", 6.0)
    fallen = lost(read(new), old, 0.15)
    assert {(key[3], before, now) for key, before, now in fallen} == {
        ("ratio", 4.0, 2.0), ("wall", 4.0, 2.0),
    }  # fmt: skip
    slower = results(
        tmp_path / "slower.csv",
        ("end_to_end", "baseline", "wall", "small, 64 px: spkd", 120.0),
        ("end_to_end", "ours fp32", "wall", "small, 64 px: spkd", 30.0),
    )
    assert lost(read(slower), old, 0.15) == []
    assert main(Options(new, tmp_path / "old.csv")) == 0
    assert main(Options(new, tmp_path / "old.csv", strict=True)) == 1
    assert main(Options(tmp_path / "none.csv", new)) == 2


def test_exponents() -> None:
    from bench_growth import exponent, exponent_rows

    assert abs(exponent([10, 100, 1000], [3 * 10**1.5, 3 * 100**1.5, 3 * 1000**1.5]) - 1.5) < 1e-9
    points = {
        n: {"time": [n * 1e-6] * 3, "memory": [float(64 * n)]} for n in (10**3, 10**4, 10**5, 10**6)
    }
    rows = {r.metric: r.median for r in exponent_rows("order of an epoch", points)}
    assert rows["time exponent"] == 1.0
    # Only the last two peaks are above what an allocator does by itself.
    assert rows["memory exponent"] == 1.0


def test_a_point_of_a_growth_curve_is_measured() -> None:
    from bench_growth import CURVES, measure

    for name, curve in CURVES.items():
        if curve.over in ("images", "classes", "layers"):
            found = measure(name, curve.points[0], 1)
            assert found["time"][0] > 0 and found["memory"][0] >= 0


def test_update_gap_and_shares_of_a_job() -> None:
    import torch
    from bench_end_to_end import _jobs, _sum, update_gap
    from end_to_end.sides import Spent
    from harness import PARTS

    start, ours, theirs = ({"w": torch.tensor([0.0, v])} for v in (0.0, 1.1, 1.0))
    assert abs(update_gap(start, ours, theirs) - 0.1) < 1e-6
    spent = {p: Spent(6.0, 3.0, dict.fromkeys(PARTS, 1.0)) for p in ("salun", "evaluate")}
    shares = {p: s for p, s in _jobs()["salun"].items() if p in spent}
    total = _sum([spent[p] for p in shares], list(shares.values()))
    assert total.wall == pytest.approx(7.0) and total.parts["data"] == pytest.approx(7 / 6)


def test_retraining_ratios_are_seed_by_seed() -> None:
    from bench_retrain import summary_rows

    runs = {
        "plain": [{"processor": t, "wall": t, "accuracy": 0.5} for t in (10.0, 20.0, 30.0)],
        "fast": [{"processor": t, "wall": t, "accuracy": 0.6} for t in (2.0, 5.0, 5.0)],
    }
    found = {(r.variant, r.metric): r for r in summary_rows(runs, "x", "cpu")}
    assert found["fast", "ratio, processor"].median == 5.0  # of 5, 4 and 6
    assert found["fast", "accuracy"].median == 0.6 and ("plain", "ratio, wall") not in found


def test_a_method_repeated_beside_a_command_that_ran_once() -> None:
    from bench_end_to_end import ONE_PASS, SETTINGS, timings
    from end_to_end.sides import TOGETHER, Spent

    def runs(*walls: float) -> list[Spent]:
        return [Spent(wall, wall, {"data": wall}) for wall in walls]

    spent = {
        ("baseline", "salun"): runs(10, 20), ("baseline", "evaluate"): runs(3, 6),
        ("ours fp32", "salun"): runs(5, 5), ("ours fp32", "evaluate"): runs(3, 3),
        ("ours fp32", TOGETHER): runs(4),
    }  # fmt: skip
    setting = SETTINGS["small, 64 px"]
    rows = timings(setting, ["baseline", "ours fp32"], spent, "cpu", ["salun"])
    found = {(r.x.rpartition(": ")[2], r.variant, r.metric): r for r in rows}
    assert found["salun", "ours fp32", "ratio"].n == 2
    assert found["salun", "ours fp32", "wall"].median == 6  # 5 and a third of 3
    assert found[ONE_PASS, "ours fp32", "ratio"].n == 1
    assert found[ONE_PASS, "ours fp32", "ratio"].median == pytest.approx(13 / 7, rel=1e-3)


def test_mypy_reads_every_benchmark() -> None:
    import tomllib

    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    folders = {path.parent.name for path in (ROOT / "benchmarks").glob("*/*.py")}
    assert set(told["modules"]) == scripts and folders <= set(told["packages"])


def test_a_larger_scale_ends_where_the_photographs_do(tmp_path: Path) -> None:
    from end_to_end.photographs import fit_counts, gather

    for side, count in {"train": 20, "val": 10}.items():
        for label in "ab":
            (tmp_path / "photos" / side / label).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "photos" / side / label / f"{number}.jpg").write_bytes(b"")
    photos = tmp_path / "photos"
    assert fit_counts(photos, (6, 2, 2), 2) == fit_counts(None, (6, 2, 2), 2) == (12, 4, 4)
    assert fit_counts(photos, (12, 3, 3), 10) == (20, 5, 5)  # val holds 10 for the last two
    assert gather(photos, tmp_path / "out", (20, 5, 5)) == "photos"
    found = {side: len([*(tmp_path / "out" / side).glob("*/*.jpg")])
             for side in ("train", "val", "downstream/near")}  # fmt: skip
    assert found == {"train": 40, "val": 10, "downstream/near": 10}


@pytest.mark.slow
def test_the_end_to_end_benchmark_runs_and_finds_equal_results(tmp_path: Path) -> None:
    import csv

    out = tmp_path / "out.csv"
    told = ["--out", str(out), "--settings", "small, 64 px", "--scale", "0.1", "--no-bf16"]
    told += ["--methods", "spkd", "--repeats", "1"]
    script = ROOT / "benchmarks" / "bench_end_to_end.py"
    ended = subprocess.run(
        [sys.executable, str(script), *told], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = list(csv.DictReader(out.open(newline="")))
    for side in ("baseline", "ours fp32"):
        found = {r["metric"]: float(r["median"]) for r in rows
                 if r["variant"] == side and r["x"].endswith(": spkd")}  # fmt: skip
        parts = sum(value for metric, value in found.items() if metric.startswith("part "))
        assert parts == pytest.approx(found["wall"], rel=0.01)
        assert found["part compute"] > 0 and found["part data"] > 0
        assert found["part evaluation"] > 0


def test_memory_is_read_anew() -> None:
    """Another 256 MiB are 268 MB more, and stay in the largest size until that is reset."""
    from harness import memory, reset_peak

    reset_peak()
    before = memory("VmRSS")
    held = mmap.mmap(-1, 256 << 20)  # not of the allocator, which may have as much to spare
    held.write(bytes(len(held)))
    assert memory("VmRSS") - before > 200
    held.close()
    assert memory("VmHWM") - before > 200
    reset_peak()
    assert memory("VmHWM") - before < 200


def test_the_stand_ins_of_the_memory_benchmark_are_shown_as_a_set_is() -> None:
    from bench_eval import Numbers, Zeros

    outputs = extract(Zeros(32, 16), Numbers(600, Ranks()), Ranks())  # type: ignore[arg-type]
    assert outputs.features.shape == (600, 32) and outputs.logits.shape == (600, 16)


def test_the_first_run_follows_the_page() -> None:
    from end_to_end.first_run import read_commands

    assert read_commands(0)[0] == "make forget" and len(read_commands(0)) > 2
    page = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
    for name in ("seconds", "wheel"):
        assert page.count(f"<!-- {name}:start -->") == page.count(f"<!-- {name}:end -->") == 1
