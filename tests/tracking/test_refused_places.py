"""Places that runs cannot be kept in are refused in our own words, with a fix that works."""

import re
from pathlib import Path

import pytest

from flows import cli
from flows.servers import checks
from schemas import environment
from schemas.errors import StageError
from stages import tracking
from stages.runtime import workspace
from stages.tracking import mlflow_client


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("./mlruns", "folder of files"),
        ("file:///tmp/mlruns", "folder of files"),
        ("databricks", "Databricks"),
        ("databricks://profile", "Databricks"),
        ("uc:something", "neither a database nor"),
    ],
)
def test_addresses_of_a_kind_that_keeps_no_runs(
    uri: str, says: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for asks in (checks.check_tracking, tracking.setup, lambda: tracking.client().search_experiments()):
        with pytest.raises(StageError, match=rf"MLFLOW_TRACKING_URI = {re.escape(uri)}: .*{says}.*Fix: unset it"):
            asks()


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "http://h:5000", "https://u:p@h", "postgresql+psycopg2://h/d"])
def test_addresses_of_databases_and_servers(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracking.check_uri()


def test_a_server_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the port `discard`, where nobody listens
    with pytest.raises(StageError, match=r"127.0.0.1:9: there is no answer .*Fix: "):
        checks.check_tracking()


def test_an_experiment_in_the_trash_is_refused_until_it_is_restored(ready_home: Path) -> None:
    number = tracking.experiment("mine")
    tracking.client().delete_experiment(number)
    for asks in (lambda: tracking.experiment("mine"), lambda: checks.check_experiment("mine", placed=False)):
        with pytest.raises(StageError, match=rf"name = mine: .*in the trash.*restore --experiment-id {number}\)"):
            asks()
    tracking.client().restore_experiment(number)  # what the command of the fix does
    assert tracking.experiment("mine") == number


@pytest.mark.parametrize("name", ["feature%2Fhome", "100%", "what?"])
def test_homes_that_addresses_would_read_as_others(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / name))
    for asks in (environment.check_home, workspace.open_home):
        with pytest.raises(StageError, match=r"ALIGNFLOW_HOME = .*its path holds '[%?]'"):
            asks()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["two h\u00e4user a#b it's", "a+b&c"])
def test_other_homes_keep_an_artifact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / name))
    tracking.setup()
    run = tracking.client().create_run(tracking.experiment("x"))
    (tmp_path / "file.txt").write_text("kept")
    tracking.client().log_artifact(run.info.run_id, str(tmp_path / "file.txt"))
    (kept,) = (tmp_path / name).rglob("file.txt")
    assert kept.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {name, "file.txt"}


def test_mlflow_that_stays_away_ends_a_command_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(SystemExit) as ended:
        cli.end_without_mlflow(MlflowException("API request failed: Max retries exceeded with url"))
    assert ended.value.code == 75
    assert re.search(r"MLFLOW_TRACKING_URI = .*does not answer.*Fix: see that its server", capsys.readouterr().err)
    cli.end_without_mlflow(MlflowException("a bug"))  # others are not taken for it
    cli.end_without_mlflow(ConnectionError("of something else"))
    assert mlflow_client.is_transient(ConnectionError())
