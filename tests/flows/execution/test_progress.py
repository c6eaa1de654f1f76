"""The bar of a long stage on Prefect's page: when it is made, how often it moves, and that it stops nothing."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.execution import progress

LOG = logging.getLogger("alignflow")


def said(bar: progress.Progress, seconds: list[float], now: float, line: str) -> None:
    seconds[0] = now
    bar.info("%s", line)


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "alignflow")  # as a run sets it


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str]]:
    """What Prefect was asked for."""
    asked: list[tuple[str, float, str]] = []

    def noted(what: str) -> Callable[..., str]:
        def note(*given: Any) -> str:
            percent, about = (given[0], given[2]) if what == "made" else (given[1], given[2])
            asked.append((what, percent, about))
            return "artifact"

        return note

    monkeypatch.setattr(progress, "create_progress_artifact", noted("made"))
    monkeypatch.setattr(progress, "update_progress_artifact", noted("moved"))
    return asked


def test_a_bar_is_made_late_and_moves_seldom(moved: list[tuple[str, float, str]]) -> None:
    seconds = [0.0]
    bar = progress.Progress(LOG, "dpo", lambda: seconds[0])
    said(bar, seconds, 19, "dpo  5/100 steps  accuracy 0.5  1:00 left")  # a short stage needs none
    assert moved == []
    said(bar, seconds, 21, "dpo: reading rows")  # says nothing of how far it is
    said(bar, seconds, 22, "dpo  10/100 steps  accuracy 0.6  0:50 left")
    said(bar, seconds, 41, "dpo  40/100 steps  accuracy 0.7")
    said(bar, seconds, 43, "dpo  50/100 steps  accuracy 0.75")
    bar.done()
    assert moved == [
        ("made", 10.0, "dpo: 10 of 100 steps accuracy 0.6"),
        ("moved", 50.0, "dpo: 50 of 100 steps accuracy 0.75"),
        ("moved", 100.0, "dpo: 100 of 100 steps accuracy 0.75"),
    ]


def test_a_short_stage_has_none_when_it_is_done(moved: list[tuple[str, float, str]]) -> None:
    progress.Progress(LOG, "dpo").done()
    assert moved == []


def test_prefect_has_the_bar(prefect: SyncPrefectClient, caplog: pytest.LogCaptureFixture) -> None:
    seconds = [0.0]

    @flow
    def staged() -> None:
        bar = progress.Progress(LOG, "eval dpo-s0", lambda: seconds[0])
        said(bar, seconds, 30, "eval dpo-s0  1/4 prompts")
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # nobody answers: the stage goes on
            said(bar, seconds, 60, "eval dpo-s0  2/4 prompts")
        said(bar, seconds, 90, "eval dpo-s0  3/4 prompts")

    staged()
    key = ArtifactFilter(key=ArtifactFilterKey(any_=["progress-eval-dpo-s0"]))
    (artifact,) = prefect.read_artifacts(artifact_filter=key)
    assert artifact.data == 75.0 and artifact.description == "eval dpo-s0: 3 of 4 prompts"
    assert "eval dpo-s0  2/4 prompts" in caplog.text
