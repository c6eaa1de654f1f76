"""MLflow's client: created, migrated, and asked again while it is away."""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from schemas import environment
from schemas.errors import StageError, stop_in
from schemas.stage import Request
from stages.runtime import databases
from stages.runtime.workspace import home, lock
from stages.tracking import database
from stages.tracking.problems import check_address, first_line, in_our_words, in_trash, is_transient

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger("alignflow")

# MLflow reads these when it is imported: no telemetry, no progress bars, no git, short waits on a server that is away.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

RETRY_SECONDS = 90.0
FIRST_SECONDS = 15.0
"""How long a command at a terminal waits for a server's first answer: a wrong address stays wrong."""

T = TypeVar("T")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file under `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def set_up_mlflow() -> None:
    """The variables that MLflow reads when it is imported: before whatever imports it first."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # not configurable: a pickle runs code


@cache
def value_classes() -> Any:
    """MLflow's value classes. Imported late: MLflow takes over a second, and much of tracking needs none of it."""
    set_up_mlflow()
    import mlflow.entities

    return mlflow.entities


class _Retrying:
    """MLflow's client, each of whose calls, and its own making, is tried again while its error is transient."""

    def __getattr__(self, name: str) -> Any:
        def asked(*given: Any, **named: Any) -> Any:
            answer = retrying(lambda: getattr(plain_client(), name)(*given, **named))
            _contact.made = True
            return answer

        return asked


@cache
def _client_for(uri: str) -> "MlflowClient":
    """A client whose database exists and is up to date; migrated under a lock, since two migrations at once clash."""
    set_up_mlflow()
    check_address(uri)
    from mlflow.tracking import MlflowClient  # late for the same reason as above

    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    path = Path(uri.removeprefix("sqlite:///"))
    with lock(path.with_suffix(".lock")):
        database.prepare(path)
        return MlflowClient(uri)


def plain_client() -> "MlflowClient":
    """MLflow's client for `tracking_uri()`, which asks once, for callers that must not wait or retry by themselves."""
    return _client_for(tracking_uri())


def client() -> "MlflowClient":
    """MLflow's client for `tracking_uri()`; what it is asked while MLflow is away is asked again."""
    return cast("MlflowClient", _Retrying())


def runs(condition: str, trashed: bool = False) -> "Iterator[Run]":
    """All runs, of all experiments, that meet a condition in MLflow's query language; newest first.

    `trashed`: those that somebody has deleted instead, which MLflow keeps until they are purged.
    """
    newest, views = ["attributes.start_time DESC"], value_classes().ViewType
    kept = {"view_type": views.ALL if trashed else views.ACTIVE_ONLY}
    experiments = [
        one.experiment_id for one in pages(lambda token: client().search_experiments(page_token=token, **kept))
    ]
    view = views.DELETED_ONLY if trashed else views.ACTIVE_ONLY
    yield from pages(
        lambda token: client().search_runs(
            experiments, condition, run_view_type=view, order_by=newest, page_token=token
        )
    )


def pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """All that a search finds: MLflow answers a thousand at a time. `search` takes the token of a page."""
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def setup() -> None:
    """Make the database, or bring it up to date."""
    retrying(plain_client)


@contextlib.contextmanager
def as_default() -> Iterator[None]:
    """Make `tracking_uri()` MLflow's default while this holds: its registry over a database looks models up there."""
    name = "MLFLOW_TRACKING_URI"
    before = os.environ.get(name)
    os.environ[name] = tracking_uri()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@dataclass
class _Clock:
    """Seconds that this process has waited for MLflow; the side thread's do not count."""

    waited: float = 0.0


clock = _Clock()


@dataclass
class _Contact:
    """Whether MLflow has answered this process, and how long a first answer may take."""

    made: bool = False
    patience: float = RETRY_SECONDS


_contact = _Contact()


def answer_soon() -> None:
    """For a command at a terminal: do not wait long for a server that has never answered it."""
    _contact.patience = FIRST_SECONDS


def retrying(call: Callable[[], T], seconds: float = RETRY_SECONDS) -> T:
    """The call's answer, tried again for `seconds` while its error is transient.

    Raises:
        StageError: what MLflow's error means, where that is known.
    """
    began = time.monotonic()
    if not _contact.made and tracking_uri().startswith("http"):
        seconds = min(seconds, _contact.patience)
    try:
        return _retrying(call, began + seconds)
    finally:
        if threading.current_thread() is threading.main_thread():
            clock.waited += time.monotonic() - began


def _retrying(call: Callable[[], T], end: float) -> T:
    pause = 0.1
    while True:
        try:
            return call()
        except StageError:  # said already, and no other try helps
            raise
        except Exception as error:
            if (stop := stop_in(error)) is not None:
                raise stop from None
            damage = re.search(databases.DAMAGED, str(error))
            if damage and tracking_uri().startswith("sqlite:///"):
                raise databases.damaged(Path(tracking_uri().removeprefix("sqlite:///")), damage[0]) from error
            if not is_transient(error) or time.monotonic() + pause > end:
                if known := in_our_words(error, tracking_uri(), first=not _contact.made):
                    raise known from error
                raise
            log.warning("MLflow: %s; trying again", first_line(error))
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def experiment_name(request: Request) -> str:
    """The MLflow experiment of a request: its own, else ALIGNFLOW_EXPERIMENT, else `alignflow`."""
    return request.experiment or environment.experiment()


def experiment(name: str) -> str:
    """Id of the experiment, made when it does not exist. Raises StageError where it is in MLflow's trash."""
    existing = existing_experiment(name)
    if existing is not None:
        return existing.experiment_id
    # With a server, it decides where artifacts are kept; without one, they are beside the database.
    location = str(home() / "artifacts") if tracking_uri().startswith("sqlite:") else None
    try:
        return client().create_experiment(name, artifact_location=location)
    except Exception:
        existing = existing_experiment(name)  # another process was quicker
        if existing is None:
            raise
        return existing.experiment_id


def existing_experiment(name: str) -> "Experiment | None":
    """MLflow's experiment of that name, None where there is none.

    Raises:
        StageError: it was deleted, and keeps its name until it is restored or purged.
    """
    existing = client().get_experiment_by_name(name)
    if existing is not None and existing.lifecycle_stage != "active":
        raise in_trash("experiment", name, existing.experiment_id)
    return existing


def behind_server(name: str) -> bool:
    """Whether an experiment's artifacts are kept by an MLflow server, and reached through it alone."""
    existing = existing_experiment(name)
    return existing is not None and str(existing.artifact_location).startswith("mlflow-artifacts:")
