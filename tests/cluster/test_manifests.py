"""Manifests of container platforms: they parse, and what they start is a command of ours."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from letheon.launch import forget
from tests.cluster.manifest_schemas import schema_of
from tests.launch_tools import ROOT

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
yaml = pytest.importorskip("yaml", reason="needs PyYAML")
FOLDER = ROOT / "launch" / "containers"


def command_lines(file: Path) -> list[list[str]]:
    """What a manifest starts, as words."""
    found: list[list[str]] = []

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("command"), list):
                found.append([*part["command"], *part.get("args", [])])
            if isinstance(part.get("run"), str):
                text = part["run"].replace("\\\n", " ")
                found.extend(shlex.split(one) for one in text.splitlines() if "torchrun" in one)
            for value in part.values():
                walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)

    for document in yaml.safe_load_all(file.read_text()):
        walk(document)
    return found


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_a_manifest_starts_a_command_that_parses(file: Path) -> None:
    lines = command_lines(file)
    assert len(lines) == 1
    (words,) = lines
    module = words.index("-m")
    assert words[0] == "torchrun" and words[module + 1] == "letheon.launch.forget"
    (settings,) = forget.read(words[module + 2 :])
    assert settings.forget == "class:3,8" and settings.out == Path("/runs/spkd")
    from torch.distributed.run import get_args_parser

    variables = {"$SKYPILOT_NUM_NODES": "2", "$SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    plain = [word for word in words[1:module]]
    for name, value in variables.items():
        plain = [word.replace(name, value) for word in plain]
    args = get_args_parser().parse_args([*plain, "script"])
    assert args.max_restarts == 3 and "SIGUSR1" in args.signals_to_handle


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_a_manifest_has_the_keys_of_its_kind_alone(file: Path) -> None:
    documents = [*yaml.safe_load_all(file.read_text())]
    for document in documents:
        schema = schema_of(document)
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(document, schema)
        # A key that nobody knows, at any depth, is refused: such a misspelling would be ignored.
        for place in objects(document):
            place["numNode"] = 2
            if has_keys_of_the_user(place):
                del place["numNode"]
                continue
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(document, schema)
            del place["numNode"]
    mounted = {mount for one in documents for mount in names(one, "volumeMounts")}
    assert mounted == {volume for one in documents for volume in names(one, "volumes")}


@pytest.mark.slow  # schemas of thirteen releases are read
def test_what_kubernetes_reads_fits_its_own_schemas() -> None:
    """Of every release that the package knows; pods of a TrainJob as pods."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    documents = [*yaml.safe_load_all((FOLDER / "job.yaml").read_text())]
    train = yaml.safe_load((FOLDER / "trainjob.yaml").read_text())["spec"]
    (patch,), own = train["runtimePatches"], train["trainer"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container |= {key: own[key] for key in ("image", "command", "args", "env")}
    container["resources"] = own["resourcesPerNode"]
    documents += [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}]
    for document in documents:
        for version in kubernetes.utils.all_versions():
            kubernetes.validate(document, version, strict=True)
        document["spec"]["numNode"] = 2
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(document, kubernetes.latest_version(), strict=True)


def objects(part: Any) -> list[dict[str, Any]]:
    """Every object within, itself first."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = [part] if isinstance(part, dict) else []
    return own + [one for each in [*inner] for one in objects(each)]


def has_keys_of_the_user(place: dict[str, Any]) -> bool:
    """Labels, quantities and mounts have keys of the user's own."""
    keys = [key for key in place if key != "numNode"]
    free = {"job-name", "nvidia.com/gpu", "cpu", "memory"}
    return all(key in free or key.startswith("/") for key in keys)


def names(document: Any, key: str) -> set[str]:
    """The names in all lists under `key`."""
    return {item["name"] for one in objects(document) for item in one.get(key, ())}


KNOWN = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL",
    "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


def lint(text: str) -> list[str]:
    """What hadolint would complain about, as far as our file could have it."""
    found = []
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text)).split("\n")
    steps = [line.partition(" ")[::2] for line in lines if line.strip()]
    defaults = dict(rest.partition("=")[::2] for word, rest in steps if word == "ARG")
    first = next((word for word, _ in steps if word != "ARG"), "")
    if first != "FROM":
        found.append("the first instruction but ARG is FROM")
    for word, rest in steps:
        if word not in KNOWN:
            found.append(f"{word} is no instruction")
        image = re.sub(r"\$\{(\w+)\}", lambda name: defaults.get(name[1], ""), rest)
        if word == "FROM" and (":" not in image or image.endswith(":latest")):
            found.append("FROM pins no tag")
        if word == "WORKDIR" and not rest.startswith("/"):
            found.append("WORKDIR is not absolute")
        if word in ("CMD", "ENTRYPOINT") and not rest.startswith("["):
            found.append(f"{word} starts a shell, which keeps the signals")
        if word == "ADD":
            found.append("COPY copies, ADD does more")
        if word == "RUN" and "apt-get install" in rest:
            for needed in ("apt-get update", "-y", "--no-install-recommends",
                           "rm -rf /var/lib/apt/lists"):  # fmt: skip
                found += [f"apt-get without {needed}"] * (needed not in rest)
        if word == "RUN" and "pip install" in rest and "--no-cache-dir" not in rest:
            found.append("pip keeps its cache")
        if word == "RUN" and ("sudo" in rest.split() or rest.startswith("cd ")):
            found.append("sudo, or cd in place of WORKDIR")
    return found


def test_the_dockerfile_is_clean_and_the_lint_finds_faults() -> None:
    assert lint((ROOT / "Dockerfile").read_text()) == []
    bad = "RUN apt-get install g++\nFROM python\nWORKDIR x\nRUN pip install a\nCMD run\nADD a b\nGO"
    assert len(lint(bad)) == 11


def test_the_dockerfile_names_commands_of_ours() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert any(line.startswith("FROM ") for line in lines)
    (start,) = [line for line in lines if line.startswith("CMD ")]
    assert json.loads(start.removeprefix("CMD "))[0] == "letheon"
