"""Benchmarks that are cut off: what they keep, and how they go on."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path: Path) -> None:
    from collections.abc import Iterator

    from harness import Results, Row, row
    from plot import read

    def rows() -> Iterator[Row]:
        yield row("a", "ours", [1.0], device="cpu")
        yield row("b", "ours", [2.0, 4.0], device="cpu")
        raise KeyboardInterrupt

    results = Results(tmp_path / "new" / "out.csv")
    with pytest.raises(KeyboardInterrupt):
        results.add(rows())
    assert [(r["name"], r["median"]) for r in read(tmp_path / "new" / "out.csv")] == [
        ("a", "1.0"), ("b", "3.0"),
    ]  # fmt: skip
    Results(tmp_path / "new" / "out.csv", append=True).add([row("c", "ours", [1.0], device="cpu")])
    assert [r["name"] for r in read(tmp_path / "new" / "out.csv")] == ["a", "b", "c"]
    Results(tmp_path / "new" / "out.csv")
    assert read(tmp_path / "new" / "out.csv") == []


def test_a_verdict_on_photographs_gives_both_ways_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verdict import bench_verdict as bench

    for place in ("train/a", "val/a"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(9):
            (tmp_path / "photos" / place / f"{number}.jpg").write_bytes(b"")
    calls: list[list[str]] = []
    odd: set[str] = set()
    pace = [1.0]

    def call(*words: object) -> float:
        calls.append([*map(str, words)])
        verb, out = calls[-1][0], Path(calls[-1][calls[-1].index("--out") + 1])
        runs = [out / m.split()[0] for m in bench.METHODS] if out.name == "all" else [out]
        for run in runs:
            run.mkdir(parents=True)
            text = "odd" if run.name in odd and out.name == "all" else "same"
            (run / "run.json").write_text(json.dumps({"weights": text}))
        seconds = {"all": 20.0, "table": 10.0}.get(out.name, 5.0 if verb == "forget" else 1.0)
        return pace[0] * seconds

    monkeypatch.setattr(bench, "call", call)
    options = bench.Options(epochs=1, photos=tmp_path / "photos", out=tmp_path / "out.csv")
    bench.main(options)
    [joint], table = [c for c in calls if "+" in c], [c for c in calls if c[0] == "evaluate"]
    alone = [c for c in calls if c[0] == "forget" and "+" not in c and "retrain" not in c]
    tails = [call[call.index("--out") + 2 :] for call in alone]
    assert " + ".join(" ".join(t) for t in tails) in " ".join(joint) and len(tails) == 10
    text = (tmp_path / "out.csv").read_text()
    assert len(table) == 1 and "resnet18" in calls[0] and "8 a class" in text
    rows = [r for r in csv.DictReader(text.splitlines()) if r["variant"] == "one command"]
    assert {r["metric"]: float(r["median"]) for r in rows} == {
        "processor": 30,
        "ratio, processor": 2,
    }
    pace[0] = 3.0
    bench.main(options)  # added, not written over
    assert (tmp_path / "out.csv").read_text().count("ratio, processor") == 2
    monkeypatch.chdir(tmp_path)
    kept = replace(options, resume=Path("kept"))  # as a user writes it
    pace[0] = 7.0
    bench.main(kept)
    assert all(Path(c[c.index("--out") + 1]).is_absolute() for c in calls)
    count, text = len(calls), (tmp_path / "out.csv").read_text()
    bench.main(kept)  # all of it is known, and no row is doubled
    assert len(calls) == count and (tmp_path / "out.csv").read_text() == text
    (run,) = tmp_path.glob("kept/fisher")
    shutil.rmtree(run)
    lines = (tmp_path / "kept" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept" / "journal.jsonl").write_text(
        "".join(line for line in lines if not line.startswith('["fisher"'))
    )
    bench.main(kept)
    assert len(calls) == count + 1 and "fisher" in calls[-1]
    odd.add("fisher")
    with pytest.raises(SystemExit, match="other weights: fisher"):
        bench.main(options)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_end_to_end_run_goes_on_behind_the_last_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Cut off before process `stop`, it ends with the rows of one that was not, each once."""
    import bench_end_to_end as bench
    from plot import read

    left = [10**6]
    started: list[str] = []

    def step(side: Any, step: str, methods: Any) -> list[Any] | None:
        if (side.name, step) == ("baseline", "together") or step == "prepare":
            return None
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        started.append(f"{side.name} {step}")
        return [len(side.name) + 2.0, 1.0, {"compute": 1.0}]

    made: list[Path] = []
    monkeypatch.setattr(bench, "_step", step)
    monkeypatch.setattr(bench, "starting_models", lambda setting, root: made.append(root))
    monkeypatch.setattr(bench, "gather", lambda photos, out, counts: out.mkdir(parents=True))
    monkeypatch.setattr(bench, "differences", lambda *_: [])

    def run(name: str) -> list[tuple[str, ...]]:
        bench.main(
            bench.Options(
                out=tmp_path / f"{name}.csv", settings=("small, 64 px",), methods=("ft", "spkd"),
                repeats=2, bf16=False, resume=tmp_path / name,
            )
        )  # fmt: skip
        columns = ("variant", "metric", "x", "median", "n")
        return [tuple(r[c] for c in columns) for r in read(tmp_path / f"{name}.csv")]

    whole, processes = run("whole"), [*started]
    started.clear(), made.clear()
    left[0] = stop
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    left[0] = 10**6
    assert run("cut") == whole
    assert started == processes and len(made) == 1
    assert run("cut") == whole and started == processes  # nothing is left to do
    with pytest.raises(SystemExit, match="name a new folder"):
        bench.main(bench.Options(out=tmp_path / "cut.csv", resume=tmp_path / "cut"))


def test_a_row_that_was_lost_comes_back_and_none_is_doubled(tmp_path: Path) -> None:
    """Two repeats may take equally long; a file that was cut off gets what it lacks."""
    from harness import Results, row

    rows = [row("a", "b", [seconds], metric="process", device="cpu") for seconds in (2, 2, 3)]
    whole = Results(tmp_path / "out.csv")
    whole.add(rows)
    lines = (tmp_path / "out.csv").read_text().splitlines(keepends=True)
    assert len(lines) == 4
    for left in range(1, 5):
        (tmp_path / "out.csv").write_text("".join(lines[:left]))
        Results(tmp_path / "out.csv", append=True, once=True).add(rows)
        assert (tmp_path / "out.csv").read_text() == "".join(lines)


def test_its_own_rows_do_not_change_the_revision_of_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness

    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    monkeypatch.setattr(harness, "__file__", str(folder / "harness.py"))
    for file in (folder / "results" / "a.csv", tmp_path / "engine.py"):
        file.write_text("before")

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    revision = harness.revision.__wrapped__
    git("init", "-q"), git("add", "."), git("commit", "-qm", "one")
    clean = revision()
    (folder / "results" / "a.csv").write_text("rows")
    assert revision() == clean and not clean.endswith("+")
    (tmp_path / "engine.py").write_text("after")
    assert revision() == f"{clean}+"


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    from end_to_end.journal import NAME, Journal

    first = Journal(tmp_path, {"a": 1})
    assert not first.goes_on and first.keep("one", lambda: [1.5]) == [1.5]
    with (tmp_path / NAME).open("a") as file:
        file.write('["two", [2')
    again = Journal(tmp_path, {"a": 1})
    assert again.goes_on and again.keep("one", lambda: [0.0]) == [1.5] and "two" not in again
    assert again.keep("two", lambda: None) is None
    assert "two" in Journal(tmp_path, {"a": 1})
