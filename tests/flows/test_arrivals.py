"""Data that arrives: told once per content, and not before the file is whole."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.filters import EventFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import arrivals
from flows.planning import config_file
from flows.results import announce, history
from flows.servers import automations
from schemas.errors import StageError
from stages import tracking
from tests.support.processes import wait_for


@pytest.fixture
def told(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What Prefect was told; it takes everything but files that are called `refused`."""
    events: list[dict[str, str]] = []

    def emit(event: str, name: str, finding: str, **about: str) -> bool:
        assert event == "data.changed" and about["kind"] == "data" and name == about["path"]
        events.append(about)
        return "refused" not in name

    monkeypatch.setattr(announce, "emit", emit)
    monkeypatch.setattr(automations, "read", lambda name: SimpleNamespace(enabled=True))
    return events


@pytest.fixture(autouse=True)
def _server() -> Any:
    with temporary_settings({PREFECT_API_URL: "http://prefect.example/api"}):
        yield


def test_a_file_is_told_once_per_content(told: list[dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("one\n")
    sha256 = arrivals.arrived(file, "feedback")
    assert sha256 == tracking.digest(file)
    assert told == [
        {"kind": "data", "path": str(file), "sha256": sha256, "setting": f"data.feedback.path={file}"},
    ]
    assert arrivals.arrived(file) is None and len(told) == 1
    file.write_text("two\n")
    assert arrivals.arrived(file) == tracking.digest(file) != sha256 and len(told) == 2


@pytest.mark.parametrize("name", ["pairs #2.jsonl", "a: b.jsonl", "[x].jsonl", "it's.jsonl", "plain.jsonl", "ä.jsonl"])
def test_a_setting_names_the_file_that_arrived(name: str, told: list[dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / name).write_text("one\n")
    arrivals.arrived(tmp_path / name)
    raw: dict[str, Any] = {}
    config_file.apply(raw, told[0]["setting"])
    assert raw == {"data": {"preference": {"path": str(tmp_path / name)}}}
    assert history.run_name("a", ["data.preference.path=/x/plain.jsonl"]) == "a data.preference.path=plain.jsonl"


@pytest.mark.parametrize("there", [None, SimpleNamespace(enabled=False)])
def test_nothing_is_told_where_nobody_listens(
    there: object, told: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be kept as told, and the data would never be trained on."""
    monkeypatch.setattr(automations, "read", lambda name: there)
    (tmp_path / "pairs.jsonl").write_text("one\n")
    with pytest.raises(StageError, match="Fix: alignflow deploy"):
        arrivals.arrived(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(automations, "read", lambda name: SimpleNamespace(enabled=True))
    assert told == [] and arrivals.arrived(tmp_path / "pairs.jsonl") is not None


def test_what_prefect_has_not_taken_is_told_again(told: list[dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "refused.jsonl"
    file.write_text("one\n")
    for _ in range(2):
        with pytest.raises(StageError, match="has not taken the event"):
            arrivals.arrived(file)
    assert len(told) == 2


def test_without_a_server_nothing_is_told(told: list[dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("one\n")
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(StageError, match="no Prefect server is set"):
        arrivals.arrived(tmp_path / "pairs.jsonl")
    with pytest.raises(StageError, match="does not exist"):
        arrivals.arrived(tmp_path / "none.jsonl")
    assert told == []


def test_a_file_of_a_watched_folder_is_told_when_it_is_whole(
    told: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_ROOTS", str(tmp_path))
    folder, now = tmp_path / "incoming", [0.0]
    folder.mkdir()
    watch = arrivals.FolderWatch(folder, lambda: now[0])

    def passes(seconds: float) -> list[str]:
        """What was told in so many seconds of looks."""
        before = len(told)
        for _ in range(int(seconds)):
            now[0] += 1
            watch()
        return [Path(one["path"]).name for one in told[before:]]

    read: list[Path] = []
    digest = tracking.digest
    monkeypatch.setattr(arrivals.tracking, "digest", lambda path: read.append(path) or digest(path))
    for name in (".pairs.jsonl.x7a", "notes.txt", ".hidden.csv"):
        (folder / name).write_text("x")
    file = folder / "pairs.jsonl"
    file.write_text("one\n")
    assert passes(8) == []
    with file.open("a") as still:  # somebody still writes
        still.write("two\n")
    assert passes(10) == []
    assert passes(4) == ["pairs.jsonl"]
    assert passes(60) == [] and read == [file]  # nor is it read again and again
    file.touch()  # the same content
    assert passes(60) == []
    file.write_text("three\n")
    (folder / "more.parquet").write_text("x")
    assert passes(15) == ["more.parquet", "pairs.jsonl"]
    again = arrivals.FolderWatch(folder, lambda: now[0])  # after a restart: nothing is new
    now[0] += 100
    again()
    now[0] += 100
    again()
    assert len(told) == 3


def test_what_goes_wrong_is_a_warning_and_tried_again(
    told: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALIGNFLOW_ROOTS", str(tmp_path))
    (tmp_path / "refused.csv").write_text("x")
    now = [0.0]
    watch = arrivals.FolderWatch(tmp_path, lambda: now[0])
    for _ in range(35):
        watch()
        now[0] += 1
    assert len(told) >= 2 and "refused.csv" in caplog.text and "has not taken the event" in caplog.text


def test_a_folder_that_workers_may_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_ROOTS", str(tmp_path / "inputs"))
    with pytest.raises(StageError, match=r"--watch = .*: workers read files below .*inputs only\. Fix: add it to"):
        arrivals.FolderWatch(tmp_path)
    with pytest.raises(StageError, match=r"--watch = .*none: it is not a folder"):
        arrivals.FolderWatch(tmp_path / "none")


def test_an_arrival_is_an_override_of_the_retraining(monkeypatch: pytest.MonkeyPatch) -> None:
    """As deploy/automations.yaml takes it from the event."""
    import yaml

    from flows.planning import config_file

    (one,) = [
        one
        for one in yaml.safe_load(Path("deploy/automations.yaml").read_text())["automations"]
        if one["name"] == "alignflow data changed"
    ]
    assert one["actions"][0]["parameters"] == {
        "data": {"__prefect_kind": "jinja", "template": "{{ event.payload.setting }}"}
    }
    raw = config_file.raw_of("demo", ["data.preference.path=/data/new.jsonl"])
    assert raw["data"]["preference"]["path"] == "/data/new.jsonl"
    assert json.dumps(raw)


def test_the_server_itself_says_that_it_has_an_event(
    prefect: SyncPrefectClient, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with temporary_settings({PREFECT_API_URL: server}):
        assert announce.emit("data.changed", "/d/pairs.jsonl", "new", kind="data", setting="x=1")
    resource = EventResourceFilter(id=["alignflow.data./d/pairs.jsonl"])
    wait_for(lambda: prefect.read_events(EventFilter(resource=resource), limit=9).events, 20)
    (event,) = prefect.read_events(EventFilter(resource=resource), limit=9).events
    assert event.event == "alignflow.data.changed" and event.payload["setting"] == "x=1"
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert not announce.emit("data.changed", "/d/pairs.jsonl", "new", kind="data")
    assert "the Prefect server has not taken an event" in caplog.text
