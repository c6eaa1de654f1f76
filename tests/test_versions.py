"""The oldest versions that are taken, what breaks and is kept out, and the pins."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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
