"""The stage `fake` beside the real ones: by itself, as a fork, and both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.execution import process, warm
from schemas.stage import STAGES, StageSpec
from tests.support import scripted


@pytest.fixture
def fake(ready_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and the stage `fake` (scripted_stage.py) beside the real ones, through the real entry point."""
    monkeypatch.setattr(process, "COMMAND", scripted.FAKE)
    monkeypatch.setattr(warm, "COMMAND", scripted.ALONE)
    monkeypatch.setitem(STAGES, "fake", StageSpec(1, needs_device=True))
    return ready_home


@pytest.fixture(scope="session")
def warmed() -> Iterator[warm.Warm]:
    """One warm process for many tests: what it imports takes seconds."""
    with scripted.warmed() as process:
        yield process


@pytest.fixture
def forked(fake: Path, warmed: warm.Warm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`fake`, whose stages are forks of a warm process."""
    monkeypatch.setenv("FAKE_HEAVY", scripted.HEAVY)  # for the one that takes its place if it dies
    monkeypatch.setattr(warm, "_warm", warmed)
    return fake


@pytest.fixture(params=["fake", "forked"])
def either(request: pytest.FixtureRequest) -> Path:
    """Both, one after the other."""
    return request.getfixturevalue(request.param)
