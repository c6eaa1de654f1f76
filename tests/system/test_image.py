"""The Dockerfile as far as it can be judged without an engine: its parts, and what templates and compose expect."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from flows.servers import pools
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Instruction and argument of every line; continued lines joined, comments left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in whole.splitlines() if line]


def last_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    start = max(number for number, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[start:]


def environment(instructions: list[tuple[str, str]]) -> dict[str, str]:
    words = [word for name, value in last_stage(instructions) if name == "ENV" for word in shlex.split(value)]
    return dict(word.split("=", 1) for word in words)


def folders(instructions: list[tuple[str, str]]) -> set[str]:
    """Folders that the image's user owns."""
    (made,) = re.findall(r"install --directory --owner=10001 --group=10001 (.*)", dict(last_stage(instructions))["RUN"])
    return set(made.split())


def test_it_has_known_instructions_only_and_begins_from_an_image_that_can_be_named(
    instructions: list[tuple[str, str]],
) -> None:
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    assert {name for name, _ in instructions} <= known
    assert [value.split()[0] for name, value in instructions if name == "FROM"] == ["${BASE}"] * 2
    (base,) = [value.removeprefix("BASE=") for name, value in instructions if name == "ARG" and "BASE=" in value]
    assert ":" in base and not base.endswith(":latest")
    assert all(isinstance(json.loads(value), list) for name, value in instructions if name in ("ENTRYPOINT", "CMD"))


def test_what_it_copies_is_there_and_is_not_ignored(instructions: list[tuple[str, str]]) -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sources = [
        source
        for name, value in instructions
        if name == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    ]
    assert ignored[0] == "*" and {f"!{source.split('/')[0]}" for source in sources} == {
        x for x in ignored if x.startswith("!")
    }
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_versions_are_pinned_and_the_choice_of_torch_is_an_argument(instructions: list[tuple[str, str]]) -> None:
    arguments = dict(value.split("=", 1) for name, value in instructions if name == "ARG")
    assert arguments["TORCH"] in (ROOT / "constraints.txt").read_text().splitlines()
    torch, locked, project = [value for name, value in instructions if name == "RUN" and "pip install" in value]
    assert torch.endswith('"${TORCH}"')
    assert locked.endswith("--no-deps --require-hashes -r run.txt")
    assert project.endswith("--no-deps --no-build-isolation .")  # nothing more comes from an index


def test_it_runs_as_nobody_special_and_holds_no_secret(instructions: list[tuple[str, str]]) -> None:
    users = [value for name, value in last_stage(instructions) if name == "USER"]
    assert users == ["10001"]  # a number, by which Kubernetes sees that it is not root
    text = (DEPLOY / "Dockerfile").read_text()
    assert not re.search(r"(PASSWORD|TOKEN|SECRET|KEY|AUTH\w*)=", text, re.IGNORECASE)


def test_templates_and_compose_find_what_they_expect(instructions: list[tuple[str, str]]) -> None:
    set_here, owned = environment(instructions), folders(instructions)
    for pool in ("docker", "kubernetes"):
        variables = pools.read(pool)["variables"]["properties"]
        for name in ("ALIGNFLOW_HOME", "ALIGNFLOW_ROOTS", "DO_NOT_TRACK"):
            assert variables["env"]["default"][name] == set_here[name]
    assert {set_here["ALIGNFLOW_HOME"], set_here["ALIGNFLOW_ROOTS"]} <= owned
    volumes = pools.read("docker")["job_configuration"]["volumes"]
    assert {volume.split(":")[1] for volume in volumes} <= owned
    pod = pools.read("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert str(pod["securityContext"]["fsGroup"]) == dict(last_stage(instructions))["USER"]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        if service["image"].startswith("${ALIGNFLOW_IMAGE"):
            assert {Path(volume.split(":")[1]).as_posix() for volume in service.get("volumes", [])} <= owned
