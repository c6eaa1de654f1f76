"""Planted secrets, found nowhere: not in logs, databases, artifacts or results, whether a stage ends well or not."""

import logging
from pathlib import Path

import pytest

from flows import runner
from schemas.stage import STAGES
from stages import tracking
from tests.test_runner import FAKE, fake_request

SECRETS = {
    "HF_TOKEN": "hf_planted0000000000000000000000001",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000002",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/key/0000000000000000000003",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-4",
    "PREFECT_API_KEY": "pnu_planted00000000000005",
    "MY_JUDGES_KEY": "sk-planted-judge-000006",
}


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_secrets_of_the_environment_are_written_nowhere(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runner, "COMMAND", FAKE)
    monkeypatch.setitem(STAGES, "fake", 1)
    caplog.set_level(logging.DEBUG)
    judge = {"judge": "endpoint", "api_key_env": "MY_JUDGES_KEY"}
    ends = [runner.run_stage(fake_request(steps=2, end=end, judge=judge)).status for end in (None, "refuse", "bug")]
    assert ends == ["done", "refused", "failed"]
    found = everything_in(home)
    assert any("mlflow.db" in path.name for path in found) and any("artifacts" in path.parts for path in found)
    assert any(b"MY_JUDGES_KEY" in content for content in found.values())  # the variable's name is no secret
    for value in SECRETS.values():
        assert value not in caplog.text
        assert [path for path, content in found.items() if value.encode() in content] == []


def test_a_password_in_a_servers_address_is_not_shown(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage fails, since nobody listens there; what it says of that names the address without its password."""
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:planted-password-7@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Exception, match=r"127\.0\.0\.1") as failed:
        tracking.retrying(lambda: tracking.client().search_experiments(), seconds=0)
    assert "planted-password-7" not in tracking._first_line(failed.value)
    said = tracking.without_passwords("see http://someone:planted-password-7@127.0.0.1:9/#/x and sqlite:///a@b")
    assert said == "see http://127.0.0.1:9/#/x and sqlite:///a@b"
