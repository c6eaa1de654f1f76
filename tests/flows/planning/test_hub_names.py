"""A name on the Hub without a commit: resolved once, kept, and never a second time."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from flows.planning import config_file
from schemas.errors import StageError
from tests.support import hub as stub

SHA = "0" * 40
"""What the stub has for every repository."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stub.Hub]:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with stub.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        server.repos = {"own/model": False, "own/rows": False}
        yield server


def config(**model: Any) -> dict[str, Any]:
    sources = [
        {"path": "hub:own/rows", "kind": "sft", "weight": 1},
        {"path": "there.jsonl", "kind": "sft", "weight": 1},
    ]
    return {"model": {"path": "own/model", **model}, "data": {"preference": {"path": "hub:own/rows"}, "sft": sources}}


def revisions(raw: dict[str, Any]) -> list[Any]:
    data = raw["data"]
    places = [raw["model"], data["preference"], *data["sft"]]
    return [place.get("revision") for place in places]


def test_it_is_resolved_once_and_printed(hub: stub.Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "alignflow"):
        first, second = config(), config()
        config_file.pin(first)
        asked = list(hub.asked)
        config_file.pin(second)
    assert revisions(first) == revisions(second) == [SHA, SHA, SHA, None]
    assert hub.asked == asked == ["GET /api/models/own/model/revision/main", "GET /api/datasets/own/rows/revision/main"]
    assert [record.getMessage().partition(", which")[0] for record in caplog.records] == [
        f"model.path = own/model: main is at commit {SHA}",
        f"data.preference.path = own/rows: main is at commit {SHA}",
    ]


def test_what_names_a_commit_or_a_file_is_left_alone(hub: stub.Hub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    raws = [config(), config(revision="1" * 40)]
    for raw in raws:
        raw["data"] = {"preference": {"path": "a.jsonl"}}
    (tmp_path / "own" / "model").rename(tmp_path / "own" / "other")
    raws[0]["model"]["path"] = "./own/other"
    raws[0]["data"]["sft"] = [{"path": path} for path in ("hub:~/rows", "hub:https://example.org/rows", "hub:./own")]
    before = [dict(raw["model"]) for raw in raws]
    for raw in raws:
        config_file.pin(raw)
    assert [raw["model"] for raw in raws] == before and hub.asked == []


def test_a_branch_is_resolved_as_such(hub: stub.Hub) -> None:
    raw = config(revision="v2")
    config_file.pin(raw)
    assert raw["model"]["revision"] == SHA and hub.asked[0] == "GET /api/models/own/model/revision/v2"


def test_what_the_hub_does_not_have_is_refused_by_name(hub: stub.Hub) -> None:
    del hub.repos["own/model"]
    with pytest.raises(StageError, match=r"model\.path = own/model: no such file or folder in .*Fix: check path, name"):
        config_file.pin(config())


def test_a_commit_that_another_run_has_kept_meanwhile_stays(hub: stub.Hub, tmp_path: Path, monkeypatch: Any) -> None:
    kept = tmp_path / "home" / config_file.HUB_COMMITS
    ask = config_file._commit_of

    def slow(*asked: str) -> str | None:
        commit = ask(*asked)
        if asked[1] == "model":
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps({"model own/model main": "1" * 40, "model other/one main": "2" * 40}))
        return commit

    monkeypatch.setattr(config_file, "_commit_of", slow)
    raw = config()
    config_file.pin(raw)
    assert revisions(raw) == ["1" * 40, SHA, SHA, None]
    assert json.loads(kept.read_text()).keys() == {
        "model own/model main",
        "model other/one main",
        "dataset own/rows main",
    }
    kept.write_text("{")
    with pytest.raises(StageError, match=r"hub\.json.*Fix: repair it"):
        config_file.pin(config())


def test_where_the_hub_cannot_be_reached_its_cache_tells(
    hub: stub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = tmp_path / "cache" / "models--own--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("2" * 40)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    raw = config()
    config_file.pin(raw)
    assert revisions(raw) == ["2" * 40, None, None, None]  # the data sets are refused by what checks them


@pytest.mark.parametrize(
    "raw", [{}, {"model": 3, "data": 4}, {"model": {"path": 5}, "data": {"sft": [1, {"path": None}]}}]
)
def test_configs_that_are_wrong_are_left_to_those_who_say_so(raw: dict[str, Any], hub: stub.Hub) -> None:
    config_file.pin(raw)
    assert hub.asked == []
