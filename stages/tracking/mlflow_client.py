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
from schemas.errors import StageError, refuse
from schemas.stage import Request
from stages.runtime import databases
from stages.runtime.workspace import home, lock
from stages.tracking import database

if TYPE_CHECKING:
    from mlflow.entities import Run
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

# Errors of a locked database, and of a server that is away or busy.
TRANSIENT = (
    r"database (table )?is locked|error code (429|502|503|504)|too many (429|502|503|504) error|max retries exceeded"
    r"|connection (refused|reset|aborted|timed out)|failed to establish|read timed out"
)

T = TypeVar("T")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file under `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@cache
def value_classes() -> Any:
    """MLflow's value classes. Imported late: MLflow takes over a second, and much of tracking needs none of it."""
    import mlflow.entities

    return mlflow.entities


class _Retrying:
    """MLflow's client, each of whose calls, and its own making, is tried again while its error is transient."""

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: retrying(lambda: getattr(plain_client(), name)(*given, **named))


def check_uri() -> None:
    """Raise StageError for a tracking address of a kind that runs cannot be kept in."""
    uri, fix = tracking_uri(), f"unset it, then runs are kept in {home()}; or set it to an MLflow server's address"
    if re.match(r"(sqlite:///|https?://|postgresql|mysql|mssql)", uri):
        return
    if uri.startswith("databricks"):
        what = "Databricks keeps runs and models in its own way, which alignflow does not speak."
    elif re.match(r"file:|[^:]*$", uri):
        what = "this is a folder of files (./mlruns), which MLflow no longer keeps runs in."
    else:
        what = "this is neither a database nor an http(s) address."
    raise refuse("MLFLOW_TRACKING_URI", without_passwords(uri), what, fix, kind="server")


@cache
def _client_for(uri: str) -> "MlflowClient":
    """A client whose database exists and is up to date; migrated under a lock, since two migrations at once clash."""
    check_uri()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # not configurable: a pickle runs code
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


def is_transient(error: Exception) -> bool:
    """Whether trying again can help: a locked database, a server that is away."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return re.search(TRANSIENT, str(error), re.IGNORECASE) is not None


def is_missing(error: Exception) -> bool:
    """Whether MLflow says that there is no such run, model or artifact, or that none can have this name.

    Everything else, a 404 of whatever answers in MLflow's place included, says nothing about them.
    """
    missing = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
    return getattr(error, "error_code", None) in missing


def not_let_in() -> StageError:
    """The problem of a server that refuses our user and password, or asks for some where we have none."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    fix = "set both to those of a user of that server (of `alignflow`: in passwords.json of its home)"
    field = "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
    return refuse(field, f"{user}, ***", "MLflow refuses them.", fix, kind="access")


def without_passwords(text: str) -> str:
    """The text with its addresses as they may be shown: credentials before `@` are stripped."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def first_line(error: Exception) -> str:
    return without_passwords((str(error).splitlines() or [type(error).__name__])[0])[:200]


@dataclass
class _Clock:
    """Seconds that this process has waited for MLflow; the side thread's do not count."""

    waited: float = 0.0


clock = _Clock()


def retrying(call: Callable[[], T], seconds: float = RETRY_SECONDS) -> T:
    """The call's answer, tried again for `seconds` while its error is transient."""
    began = time.monotonic()
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
        except Exception as error:
            damage = re.search(databases.DAMAGED, str(error))
            if damage and not isinstance(error, StageError) and tracking_uri().startswith("sqlite:///"):
                raise databases.damaged(Path(tracking_uri().removeprefix("sqlite:///")), damage[0]) from error
            if getattr(error, "error_code", None) == "UNAUTHENTICATED":
                raise not_let_in() from error
            if not is_transient(error) or time.monotonic() + pause > end:
                raise
            log.warning("MLflow: %s; trying again", first_line(error))
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def experiment_name(request: Request) -> str:
    """The MLflow experiment of a request: its own, else ALIGNFLOW_EXPERIMENT, else `alignflow`."""
    return request.experiment or environment.experiment()


def experiment(name: str) -> str:
    """Id of the experiment, made when it does not exist."""
    existing = client().get_experiment_by_name(name)
    if existing is not None:
        check_active(existing)
        return existing.experiment_id
    # With a server, it decides where artifacts are kept; without one, they are beside the database.
    location = str(home() / "artifacts") if tracking_uri().startswith("sqlite:") else None
    try:
        return client().create_experiment(name, artifact_location=location)
    except Exception:
        existing = client().get_experiment_by_name(name)  # another process was quicker
        if existing is None:
            raise
        return existing.experiment_id


def check_active(existing: Any) -> None:
    """Raise StageError for an experiment that somebody has put into MLflow's trash."""
    if existing.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {existing.experiment_id}"
        fix = f"restore it (MLFLOW_TRACKING_URI={without_passwords(tracking_uri())} {restore}), or give another `name`"
        message = "this MLflow experiment is in the trash, where no run can be added."
        raise refuse("name", existing.name, message, fix, kind="experiment")


def behind_server(name: str) -> bool:
    """Whether an experiment's artifacts are kept by an MLflow server, and reached through it alone."""
    existing = client().get_experiment_by_name(name)
    return existing is not None and str(existing.artifact_location).startswith("mlflow-artifacts:")
