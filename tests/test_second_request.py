"""A request after another: what was forgotten earlier is not taught again, and is reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import letheon
from letheon.engine.checkpoints.model_file import load_model
from letheon.engine.checkpoints.weights_file import write_weights
from letheon.engine.recipe import Recipe
from letheon.engine.runs.reads import prove, read_reads
from letheon.errors import InputError
from letheon.launch.options import Forgetting
from letheon.launch.records import checks as checks_module
from letheon.launch.records.checks import check_run
from letheon.loaders.datasets.digits import upstream
from letheon.loaders.forget_request import Request, leave_out_earlier, request_samples, resolve
from letheon.methods.finetune import Finetune
from tests.launch_tools import Scripts
from tests.loaders.test_request import TEN

LABELS = upstream()[0].labels


def phases(run: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(x["forget_read"], x["retain_read"]) for x in lines if x["kind"] == "phase"]


@pytest.fixture(scope="module")
def first(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: class 3 forgotten."""
    out = tmp_path_factory.mktemp("first") / "three"
    method = Finetune(Recipe(epochs=1, lr=0.01))
    letheon.forget(original, train="digits", forget=[3], method=method, out=out)
    return out


def test_earlier_requests_are_no_retain_images(
    first: Path, scripts: Scripts, tmp_path: Path
) -> None:
    short = ("finetune", "--epochs", "1")
    kept, three = int((~np.isin(LABELS, (3, 8))).sum()), int((LABELS == 3).sum())
    again = ("forget", "--weights", first, "--forget", "class:8")
    ended = scripts(*again, "--out", tmp_path / "eight", *short)
    assert ended.code == 0, ended.err
    assert f"left out {three} training images forgotten earlier: class:id=3" in ended.err
    assert phases(tmp_path / "eight") == [(0, kept)]
    request = json.loads((tmp_path / "eight" / "request.json").read_text())
    assert request["classes"] == [8] and request["earlier"][0]["classes"] == [3]
    # A checkpoint alone, without its folder, knows its ancestry.
    (tmp_path / "moved.safetensors").write_bytes(
        (tmp_path / "eight" / "weights.safetensors").read_bytes()
    )
    model = load_model(tmp_path / "moved.safetensors")
    assert [one.classes for one in model.requests] == [(3,), (8,)]
    # The option reads them again, and then they are no longer forgotten.
    ended = scripts(*again, "--relearn-earlier", "--out", tmp_path / "relearned", *short)
    assert ended.code == 0 and phases(tmp_path / "relearned") == [(0, kept + three)]
    assert [one.classes for one in load_model(tmp_path / "relearned").requests] == [(8,)]
    # Evaluation measures each earlier request by itself; RA is without it.
    ended = scripts(
        "evaluate", "--original", first, "--runs", tmp_path / "eight", "--out", tmp_path / "table",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = json.loads((tmp_path / "table" / "metrics.json").read_text())["rows"]
    assert [row["counts"]["RA"][1] for row in rows] == [kept, kept]
    assert all(0 <= row["earlier"]["class:id=3"] <= 1 for row in rows)
    # Another set under the numbers of the record is refused, with both digests; a record that was
    # edited is, by its manifest.
    facts = json.loads((tmp_path / "eight" / "run.json").read_text())
    facts["data"]["train"] = "0" * 64
    (tmp_path / "eight" / "manifest.json").unlink()  # as a run of an earlier version
    (tmp_path / "eight" / "run.json").write_text(json.dumps(facts))
    told = ("evaluate", "--original", first, "--runs", tmp_path / "eight")
    ended = scripts(*told)
    assert ended.code == 2 and "--other-images: got other train images than eight" in ended.err
    assert f"{len(LABELS)} then" in ended.err and "000000000000 then" in ended.err
    assert scripts(*told, "--other-images").code == 0


def test_python_hands_the_ancestry_on(first: Path) -> None:
    method = Finetune(Recipe(epochs=1, lr=0.01))
    eight = letheon.forget(first, train="digits", forget=[8], method=method)
    nine = letheon.forget(eight, train="digits", forget=[9], method=method)
    read = [line["retain_read"] for line in nine.metrics if line["kind"] == "phase"]
    assert read == [int((~np.isin(LABELS, (3, 8, 9))).sum())]
    assert [one.classes for one in nine.requests] == [(3,), (8,), (9,)]


def test_what_is_left_out() -> None:
    """Samples and classes; what the new request names again stays to be forgotten."""
    earlier = (request_samples("samples:x", [0, 5], TEN), resolve("class:2", TEN))
    data, forget = leave_out_earlier(TEN, resolve("class:0", TEN), earlier)
    assert data.train.numbers.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]  # type: ignore[attr-defined]
    assert np.flatnonzero(forget).tolist() == [0, 1]
    assert data.test is data.train and data.train.digest != TEN.train.digest
    assert leave_out_earlier(TEN, resolve("class:0", TEN), ())[0] is TEN
    other = Request("samples:x", (), (0,), earlier[0].digest, data="f" * 64)
    with pytest.raises(InputError, match="digest ffffffffffff, for images of digest") as caught:
        leave_out_earlier(TEN, None, (other,))
    assert caught.value.option == "relearn_earlier"
    assert "relearn_earlier" in Forgetting.__dataclass_fields__
    rest = resolve("class:1,2,3,4,5", TEN)
    with pytest.raises(InputError, match="no training image to be retained"):
        leave_out_earlier(TEN, resolve("class:0", TEN), (rest,))


def test_a_request_must_have_the_digest_beside_it() -> None:
    facts = {"text": "class:3", "classes": [3], "samples": None, "notes": [], "digest": "0" * 64}
    with pytest.raises(InputError, match="expected 000000000000"):
        Request.from_facts(facts, "request.json")
    with pytest.raises(InputError, match="cannot be read"):
        Request.from_facts({}, "request.json")


def test_verify_goes_by_the_numbers_of_the_set(
    original: Path, scripts: Scripts, tmp_path: Path
) -> None:
    """The second run has numbers of its own, as the first one's samples lie before its own."""
    for name, samples in (("one", range(0, 60, 3)), ("two", range(1, 300, 7))):
        (tmp_path / name).write_text("\n".join(map(str, samples)))
    start = original
    for name in ("one", "two"):
        args = ("--weights", start, "--forget", f"samples:{tmp_path / name}", "--data", "digits")
        start = tmp_path / f"run-{name}"
        ended = scripts("forget", *args, "--out", start, "spkd", "--epochs", "1")
        assert ended.code == 0, ended.err
    checks = {check.name: check for check in check_run(start)}
    assert checks["reads"].state == "ok" and "17 forgotten earlier" in checks["reads"].text
    counts, forget, earlier = read_reads(start)
    asked = {*range(1, 300, 7)}
    assert {*forget.nonzero().flatten().tolist()} == asked and len(forget) == len(LABELS)
    assert earlier is not None
    assert {*earlier.nonzero().flatten().tolist()} == {*range(0, 60, 3)} - asked
    assert len(counts) == 2
    for name, count in counts.items():
        read = {*count.nonzero().flatten().tolist()}
        every = {*range(len(LABELS))} - asked - {*range(0, 60, 3)}
        assert read == (asked if name.startswith("forget") else every)
    # A record that counts a read of what was forgotten earlier, or that hides it, is found.
    request = json.loads((start / "request.json").read_text())
    for part in (earlier, None):
        spoiled = {name: count + 1 for name, count in counts.items()}
        flags = {"forget": forget, **({} if part is None else {"earlier": part})}
        plain = {name: flag.to(torch.uint8) for name, flag in flags.items()}
        write_weights(tmp_path / "reads.safetensors", {**spoiled, **plain}, {})
        manifest = {"facts": {"reads": prove(spoiled, forget, part)}, "request": request}
        words = "not left out" if part is None else "was not to read"
        with pytest.raises(InputError, match=words):
            checks_module._reads(tmp_path, manifest)
