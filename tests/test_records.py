"""The record of a run: verified to the bit, run again from its settings, and disposed of."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from letheon.engine.checkpoints.model_file import load_model
from letheon.engine.checkpoints.weights_file import pack_tensors
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.recipe import Recipe
from letheon.engine.runs.loggers import broken_link
from letheon.engine.runs.manifest import read_manifest
from letheon.engine.runs.reads import prove, read_reads
from letheon.engine.runs.run_folder import Record, check_free, failure_reason, is_unfinished
from letheon.errors import InputError, RunFailed
from letheon.eval.inference.cache import stored_outputs
from letheon.launch import forget
from letheon.launch.command import parse
from letheon.launch.records import dispose, verify
from letheon.launch.records.checks import check_run
from letheon.launch.records.replay import expand_config, replay_run
from letheon.launch.train import Settings as Training
from letheon.loaders.datasets.digits import upstream
from letheon.methods.saliency import load_masks, save_masks
from letheon.methods.spkd import Spkd
from tests.launch_tools import Scripts
from tests.pool import on_ranks
from tests.world import run_of

SALUN = ("salun", "--density", "0.3", "random-label", "--epochs", "1", "--lr", "0.02")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture
def run(scripts: Scripts, original: Path, folder: Path) -> Path:
    """A finished run that forgot two classes; made once."""
    if not (folder / "run").exists():
        args = ("--weights", original, "--forget", "class:3,8", "--out", folder / "run", *SALUN)
        assert scripts("forget", *args).code == 0
    return folder / "run"


def states(path: Path) -> dict[str, str]:
    return {name: state for name, state, _ in check_run(path)}


def test_a_run_is_what_its_record_says(run: Path) -> None:
    assert states(run) == {
        "manifest": "ok", "signature": "unknown", "files": "ok", "weights": "ok", "log": "ok",
        "request": "ok", "reads": "ok", "ancestry": "ok",
    }  # fmt: skip
    manifest = read_manifest(run)
    assert manifest["settings"]["method"]["name"] == "salun"
    assert manifest["settings"]["method"]["inner"]["name"] == "random-label"
    assert manifest["metrics"]["weights"] == json.loads((run / "run.json").read_text())["weights"]
    assert set(manifest["files"]) == {p.name for p in run.iterdir()} - {"manifest.json"}


def test_single_flipped_bits_are_found_in_every_file(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    draw = random.Random(5)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for _ in range(6):
            broken = bytearray(whole)
            broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(broken)
            assert "mismatch" in states(copy).values(), path.name
        path.write_bytes(whole)
    assert "mismatch" not in states(copy).values()


def test_headers_of_weights_are_under_the_digest(run: Path, tmp_path: Path) -> None:
    """Class names, preset and all else the loader believes: each bit of it, or no effect."""
    whole = (run / "weights.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    facts = whole[8 : 8 + size]
    start = facts.index(b"__metadata__")
    end = facts.index(b"}", facts.index(b"letheon_version"))
    copy = tmp_path / "weights.safetensors"
    before = load_model(run / "weights.safetensors")
    draw = random.Random(7)
    for _ in range(60):
        broken = bytearray(whole)
        broken[8 + draw.randrange(start, end)] ^= 1 << draw.randrange(8)
        copy.write_bytes(broken)
        try:
            after = load_model(copy, tell=lambda line: None)
        except InputError:
            continue
        assert (after.class_names, after.preset, after.name) == (
            before.class_names, before.preset, before.name,
        ), broken  # fmt: skip


def test_settings_run_again_to_the_bit(scripts: Scripts, run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert scripts("forget", "--config", run / "settings.json", "--out", again).code == 0
    for name in ("weights.safetensors", "reads.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    settings = [json.loads((path / "settings.json").read_text()) for path in (run, again)]
    assert [s.pop("out") for s in settings] == [str(run), str(again)]
    assert settings[0] == settings[1]


def test_what_is_said_beside_settings_wins(run: Path, tmp_path: Path) -> None:
    config = ["--config", str(run / "settings.json")]
    [settings] = forget.read([*config, "--out", "x", "--seed", "7", "--lr=0.5", "--leak"])
    assert (settings.out, settings.seed, settings.forget) == (Path("x"), 7, "class:3,8")
    assert settings.method.recipe.lr == 0.5 and settings.method.leak  # type: ignore[attr-defined]
    [settings] = forget.read([*config, "--out", "x", "finetune", "--epochs", "2"])
    assert settings.method.name == "finetune" and settings.method.recipe.lr != 0.02
    file = tmp_path / "settings.json"
    method = {"name": "train", "sizes": [8, 16], "grow_at": [3], "recipe": {"lr": 0.3}}
    file.write_text(json.dumps({"model": "small", "overwrite": True, "method": method}))
    training = parse(Training, expand_config([f"--config={file}", "--out", "x"]))
    assert training.method.recipe.lr == 0.3 and tuple(training.method.sizes) == (8, 16)
    assert not training.overwrite
    file.write_text('{"method": {"recipe": {}}}')
    for words, message in (
        (["--config", str(file)], "does not name its method"),
        (["--config", str(tmp_path / "none.json")], "cannot be read"),
        (["--config", str(file), "+", "spkd"], "beside a file of settings"),
    ):
        with pytest.raises(InputError, match=message):
            expand_config(words, ["spkd"])


def test_every_read_is_counted_by_sample(run: Path) -> None:
    """Beside the labels, which say what each phase must have read."""
    counts, mask, earlier = read_reads(run)
    labels = upstream()[0].labels
    assert np.array_equal(mask.numpy(), np.isin(labels, (3, 8))) and earlier is None
    assert list(counts) == ["mixed/relabelled"] and counts["mixed/relabelled"].eq(1).all()
    wrong = {"retain/x": mask.int()}
    assert not prove(wrong, mask)["clean"] and prove(wrong, ~mask)["clean"]
    assert not prove({"forget/x": torch.ones(3, dtype=torch.int32)}, torch.zeros(3).bool())["clean"]


def reads_on(ranks: Ranks) -> tuple[dict[str, list[int]], list[bool]]:
    """What a run of two phases an epoch, over images that do not divide, has read."""
    method = Spkd(recipe=Recipe(epochs=3, batch_size=8, lr=0.01))
    run = run_of(method, ranks)
    run_method(method, run)
    return {name: count.tolist() for name, count in run.reads.items()}, run.forget.tolist()


def test_reads_are_those_of_all_ranks() -> None:
    (alone, forget), (both, _) = reads_on(Ranks()), on_ranks(2, reads_on)[0]
    assert both == alone
    assert alone == {
        "forget/ascend": [3 if flag else 0 for flag in forget],
        "retain/restore": [0 if flag else 3 for flag in forget],
    }
    assert prove({k: torch.tensor(v) for k, v in alone.items()}, torch.tensor(forget))["clean"]


def test_verify_ends_with_3_on_a_mismatch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["letheon verify", *map(str, words)])
        try:
            verify.start()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert call(run, copy) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 16 and sum(" ok " in line for line in out) == 14
    request = json.loads((copy / "request.json").read_text())
    (copy / "request.json").write_text(json.dumps({**request, "classes": [3, 9]}))
    assert call(copy, "--json") == 3
    shown = capsys.readouterr()
    found = {check["name"]: check for check in json.loads(shown.out)[str(copy)]}
    assert found["files"]["text"] == "request.json was changed" and "expected what" in shown.err
    assert call(copy, "--key", "00") == 3 and call(tmp_path) == 2
    # What was asked for and could not be done is no success, though nothing contradicts the record.
    versions = json.loads((copy / "versions.json").read_text())
    (copy / "versions.json").write_text(json.dumps(versions | {"world": 2}))
    monkeypatch.setattr(verify, "check_run", lambda *_: [])
    capsys.readouterr()
    assert call(copy, "--replay") == 3
    shown = capsys.readouterr()
    assert " replay    unknown " in shown.out
    assert "error: got 1 of 1 runs not replayed: it ran on 2 ranks" in shown.err


def test_a_log_shows_what_was_taken_out(run: Path, tmp_path: Path) -> None:
    lines = [*(run / "metrics.jsonl").read_text().splitlines()] * 2
    file = tmp_path / "metrics.jsonl"
    for content, number in ((lines[:2], None), (lines[1:2], 1), ([lines[0], "{"], 2), ([], None)):
        file.write_text("".join(f"{line}\n" for line in content))
        assert broken_link(file) == number
    file.write_text('{"kind": "phase"}\n{"kind": "note"}\n')  # of an earlier version
    assert broken_link(file) is None


def test_packed_tensors_have_equal_bytes(tmp_path: Path) -> None:
    facts = {f"fact {k}": str(k) for k in range(20)}
    tensors = {f"t{k}": torch.arange(k + 1.0) for k in range(5)}
    packed = {pack_tensors(tensors, dict(sorted(facts.items(), key=lambda _: random.random())))
              for _ in range(5)}  # fmt: skip
    assert len(packed) == 1
    file = tmp_path / "x.safetensors"
    file.write_bytes(packed.pop())
    with safe_open(file, "pt") as opened:
        assert facts.items() <= opened.metadata().items()
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(file).items())


def test_disposal_removes_only_what_is_the_runs_own(
    run: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy, cache = tmp_path / "runs" / "x", tmp_path / "runs"
    shutil.copytree(run, copy)
    train = read_manifest(run)["facts"]["data"]["train"]
    ours, theirs, older = (cache / (letter * 32) for letter in "abc")
    for place, images in ((ours, train), (theirs, "0" * 64)):
        place.mkdir()
        (place / "facts.json").write_text(json.dumps({"images": images, "samples": 3}))
    older.mkdir()
    (older / "facts.json").write_text('{"samples": 3}')
    parts = cache / f"{'d' * 32}.parts" / "0-of-1"
    parts.mkdir(parents=True)
    (parts / "000000.json").write_text("{")  # damaged
    (parts / "000001.json").write_text(json.dumps({"origin": {"images": train}}))
    (copy / "state").mkdir()
    (copy / "state" / "000001.json").write_text("{}")
    assert stored_outputs(cache, train) == [ours, parts.parent]
    words = ["letheon dispose", str(copy), "--cache", str(cache)]
    monkeypatch.setattr(sys, "argv", words)
    dispose.start()
    out = capsys.readouterr().out
    assert f"{older}: outputs that do not say of which images; not removed" in out
    assert ours.exists() and f"{original}: a model trained on it" in out
    monkeypatch.setattr(sys, "argv", [*words, "--yes"])
    dispose.start()
    assert not ours.exists() and not (copy / "state").exists()
    assert (
        theirs.exists()
        and older.exists()
        and original.exists()
        and (copy / "weights.safetensors").exists()
    )
    [entry] = json.loads((copy / "disposal.json").read_text())
    assert {item["path"] for item in entry["removed"]} == {
        str(ours), str(parts.parent), str(copy / "state"),
    }  # fmt: skip
    assert "digits" in {item["path"] for item in entry["left"]}
    assert "mismatch" not in states(copy).values()


def test_signed_manifests(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    from letheon.engine.runs.signature import sign

    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(pem)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    signature = sign(tmp_path / "key.pem", (copy / "manifest.json").read_bytes())
    (copy / "manifest.sig").write_text(signature)
    assert states(copy)["signature"] == "ok"
    public = private.public_key().public_bytes_raw().hex()
    assert check_run(copy, public)[1].state == "ok"
    assert check_run(copy, "0" * 64)[1].state == "mismatch"
    flipped = signature.replace(signature[30], "0" if signature[30] != "0" else "1", 1)
    (copy / "manifest.sig").write_text(flipped)
    assert states(copy)["signature"] == "mismatch"


@pytest.mark.slow
def test_a_run_is_replayed_to_the_bit(original: Path, tmp_path: Path) -> None:
    """Other weights in the record are noticed, and data that are gone are no mismatch."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    assert replay_run(run).state == "ok"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"weights": "0" * 64}))
    found = replay_run(run)
    assert found.state == "mismatch" and "the record says 000000000000" in found.text
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"data": str(tmp_path / "gone")}))
    assert replay_run(run).state == "unknown"


def test_bits_of_a_mask_are_verified(tmp_path: Path) -> None:
    """A flipped bit of one density is refused there, and is nothing to another."""
    masks = {d: {"a": torch.arange(80) % 3 < 3 * d} for d in (0.3, 0.7)}
    file = tmp_path / "m.safetensors"
    save_masks(file, masks, {"weights": "w", "request": "r"})
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    errors = []
    for density in (0.3, 0.7):
        try:
            assert torch.equal(
                load_masks(file, density, {"weights": "w", "request": "r"}, ["a"])["a"],
                masks[density]["a"],
            )
        except InputError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "bits are not those that were saved" in errors[0]


def test_a_run_that_had_only_started_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("settings.json", "versions.json", "origin.json.partial"):
        (tmp_path / name).write_text("{}")
        check_free(tmp_path, overwrite=False, resume=True)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="an unfinished run"):
        check_free(tmp_path, overwrite=False, resume=True)


def test_a_run_that_the_disk_ended_may_go_on(tmp_path: Path) -> None:
    record = Record(tmp_path / "run", Ranks(), {})
    record.write("origin.json", {})
    record.fail(RunFailed("numbers"))
    assert not is_unfinished(record.folder)
    failure = RunFailed("full")
    failure.__cause__ = OSError(28, "full")
    record.fail(failure)
    assert is_unfinished(record.folder) and failure_reason(record.folder) == "full"
