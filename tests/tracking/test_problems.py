"""MLflow's own errors in our words: addresses that keep no runs, servers that are away or something else, the trash."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.servers import checks
from schemas import environment
from schemas.errors import StageError
from stages import __main__ as entry
from stages import tracking
from stages.tracking import mlflow_client, problems
from tests.support.live_servers import free_port

URI = "MLFLOW_TRACKING_URI"


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has answered yet, and nobody waits long."""
    monkeypatch.setattr(mlflow_client, "_contact", mlflow_client._Contact(patience=0.2))
    mlflow_client._client_for.cache_clear()
    yield
    mlflow_client._client_for.cache_clear()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("./mlruns", "folder of files"),
        ("file:///tmp/mlruns", "folder of files"),
        ("/tmp/mlruns", "folder of files"),
        ("databricks", "Databricks keeps"),
        ("databricks://profile", "Databricks keeps"),
        ("uc:something", "neither a database nor"),
    ],
)
def test_an_address_that_cannot_keep_runs_is_refused(
    home: Path, address: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URI, address)
    asks: list[Callable[[], Any]] = [tracking.setup, lambda: tracking.behind_server("demo")]
    for ask in asks:
        with pytest.raises(StageError, match=f"{URI} = {address}: .*{says}.* Fix: unset it") as error:
            ask()
        assert error.value.status == "refused"


@pytest.mark.parametrize(
    "address", ["http://h:1", "https://u:p@h/x", "sqlite:////a/b.db", "postgresql+psycopg2://u:p@h/d", "mysql://h/d"]
)
def test_servers_and_databases_are_taken(address: str) -> None:
    problems.check_address(address)


def test_a_server_that_never_answers_is_an_address_to_correct(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, f"http://me:secret-word@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StageError, match="MLflow does not answer") as error:
        tracking.behind_server("demo")
    assert error.value.status == "refused" and f"correct {URI}" in str(error.value)
    assert "secret-word" not in str(error.value)
    # One that has answered before is away: the same command again goes on where this one stops.
    mlflow_client._contact.made = True
    with pytest.raises(StageError, match="it resumes") as error:
        mlflow_client.retrying(lambda: tracking.plain_client().get_experiment_by_name("demo"), seconds=0.2)
    assert error.value.status == "failed" and problems.is_transient(error.value)


def _mlflow_error(message: str, code: int | None = None) -> Exception:
    from mlflow.exceptions import MlflowException

    return MlflowException(message) if code is None else MlflowException(message, error_code=code)


def _forbidden() -> Exception:
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    return _mlflow_error("Permission denied", PERMISSION_DENIED)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: _mlflow_error("API request to endpoint /api failed with error code 404 != 200. Body: '<html>'"),
            "something else than MLflow is there: API request",
        ),
        (
            lambda: _mlflow_error("API request was successful but the response body was not in a valid JSON format"),
            "something else than MLflow is there: API request",
        ),
        (
            lambda: _mlflow_error("API request to http://h/ failed with exception Invalid URL 'http://'"),
            "MLflow does not answer: API request",
        ),
        (_forbidden, "MLFLOW_TRACKING_USERNAME = ada: MLflow forbids it: Permission denied"),
        (
            lambda: _mlflow_error("The run abc0 must be in the 'active' state. Current state is deleted."),
            "run = abc0: this run is in MLflow's trash. Fix: restore it in MLflow's UI, or by: mlflow runs restore",
        ),
    ],
)
def test_what_its_errors_mean(make: Callable[[], Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, "http://h:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    error = make()
    with pytest.raises(StageError) as known:
        tracking.retrying(lambda: (_ for _ in ()).throw(error))
    assert words in str(known.value) and known.value.__cause__ is error


def test_an_error_that_is_not_known_stays_what_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, "http://h:5000")
    missing = _mlflow_error("No such run", 1001)  # RESOURCE_DOES_NOT_EXIST
    for error in (missing, ValueError("failed with error code 404")):
        with pytest.raises(type(error)) as same:
            tracking.retrying(lambda error=error: (_ for _ in ()).throw(error))
        assert same.value is error


def test_an_experiment_in_the_trash_is_refused_until_it_is_restored(ready_home: Path) -> None:
    number = tracking.experiment("tiny")
    tracking.client().delete_experiment(number)
    asks: list[Callable[[str], Any]] = [tracking.experiment, tracking.behind_server]
    for ask in asks:
        with pytest.raises(
            StageError, match=r"experiment = tiny: .*mlflow experiments restore --experiment-id"
        ) as error:
            ask("tiny")
        assert error.value.status == "refused"
    tracking.client().restore_experiment(number)
    assert tracking.experiment("tiny") == number and not tracking.behind_server("tiny")


@pytest.mark.parametrize("name", ["feature%2Fhome", "what?", "a\nb", "caf\udce9"])
def test_a_home_that_addresses_would_misread_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.HOME, str(tmp_path / name))
    with pytest.raises(StageError, match="its path holds"):
        environment.home()
    monkeypatch.setenv(environment.HOME, str(tmp_path / "a;b#c ü'd\"e\\f&g:h,i$j{k}[l]*@=+!~"))
    assert environment.home().parent == tmp_path


def test_other_homes_keep_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "two h\u00e4user a#b it's [x]*"
    monkeypatch.setenv(environment.HOME, str(tmp_path / name))
    tracking.setup()
    run = tracking.client().create_run(tracking.experiment("x"))
    (tmp_path / "file.txt").write_text("kept")
    tracking.client().log_artifact(run.info.run_id, str(tmp_path / "file.txt"))
    (kept,) = (tmp_path / name).rglob("file.txt")
    assert kept.read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {name, "file.txt"}


def test_a_run_asks_its_server_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StageError, match=r"there is no answer .*Fix: start it"):
        checks.check_tracking()


def test_a_stop_that_comes_within_mlflow_is_a_stop() -> None:
    """Its clients make errors of their own of whatever they meet; SIGTERM raises wherever it comes."""

    def call() -> None:
        try:
            raise StageError("stopped", status="preempted", kind="preempted")
        except StageError as error:
            raise _mlflow_error(f"API request failed with exception {error}") from error

    with pytest.raises(StageError, match=r"^stopped$") as stop:
        tracking.retrying(call)
    assert stop.value.status == "preempted"
    with pytest.raises(Exception, match="API request") as wrapped:
        call()
    assert entry.stopped(wrapped.value, "k", None).status == "preempted"  # of calls that are not tried again
