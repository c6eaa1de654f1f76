"""Prefect for a run from this process: the server that the environment names, or one of our own."""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_HOME,
    PREFECT_LOGGING_LEVEL,
    temporary_settings,
)

from flows.servers import checks, mlflow_prefect, passwords, supervisor
from schemas.errors import StageError, refuse
from stages import tracking
from stages.runtime import workspace

log = logging.getLogger("alignflow")

RETRIES = 7
"""Of Prefect's own requests, each pause twice as long as the one before: a server may be away for four minutes."""

_own: ContextVar[str | None] = ContextVar("own", default=None)
"""Address of the server that `local_prefect` has started, within it: not shared with other hosts."""


def has_shared_server() -> bool:
    """Whether the Prefect server is one that other hosts may use too."""
    return PREFECT_API_URL.value() not in (None, _own.get())


def not_repeated(record: logging.LogRecord) -> bool:
    """False where Prefect repeats what is said already: that a stage or the run is done, has failed, or was stopped."""
    return not record.getMessage().startswith(("Task run failed with state", "Finished in state", "Crash detected!"))


def is_no_link(record: logging.LogRecord) -> bool:
    """False for the link to Prefect's page of the run: our own server has no pages."""
    return not record.getMessage().startswith("View at")


def refuse_no_server() -> None:
    """Raise StageError when the Prefect server that the environment names does not answer, or does not let us in."""
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
        try:
            if error is None:
                client.read_work_pools(limit=1)
        except PrefectHTTPStatusError as refused:
            if refused.response.status_code not in (401, 403):
                raise
            raise checks.not_let_in() from refused
    if error is not None:
        message = f"the Prefect server does not answer ({type(error).__name__})."
        fix = "start it (`alignflow ui`), or unset the variable: a run then brings a server of its own"
        raise refuse(
            "PREFECT_API_URL",
            tracking.without_passwords(str(PREFECT_API_URL.value())),
            message,
            fix,
            kind="server",
            status="failed",
        )


@contextlib.contextmanager
def looked_after(running: supervisor.Running) -> Iterator[None]:
    """Start a server again when it dies, as long as this holds: all that it knows is on disk, and clients ask again."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            try:
                running.look_after()
            except StageError as error:
                log.warning("%s", error)
                return

    side = threading.Thread(target=look, name="prefect", daemon=True)
    side.start()
    try:
        yield
    finally:
        over.set()
        side.join()


@contextlib.contextmanager
def local_prefect() -> Iterator[None]:
    """Prefect for a run from this process. Where no server is set, one runs over `home()` for as long as this does.

    It is ours and not the one that Prefect starts by itself: that one lives on when this process is killed.
    """
    # Our own lines come through, and little of Prefect's.
    logging.getLogger("prefect").setLevel(logging.WARNING)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addFilter(not_repeated)
    if PREFECT_API_URL.value():
        refuse_no_server()
        is_set = "PREFECT_CLIENT_MAX_RETRIES" in os.environ
        patience: dict[Any, Any] = {} if is_set else {PREFECT_CLIENT_MAX_RETRIES: RETRIES}
        with temporary_settings(patience):
            yield
        return
    logging.getLogger("prefect.flow_runs").addFilter(is_no_link)
    settings: dict[Any, Any] = {PREFECT_LOGGING_LEVEL: "WARNING"}
    if "PREFECT_HOME" not in os.environ:
        settings[PREFECT_HOME] = workspace.home() / "prefect"
    options = ("--no-ui", "--no-scheduler", "--no-late-runs", "--analytics-off")
    password = f"{passwords.USER}:{secrets.token_urlsafe(32)}"  # no other process is to use it
    with contextlib.ExitStack() as stack:
        tries = 0
        while True:
            tries += 1
            server = mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"), *options, password=password)
            try:
                with workspace.lock(workspace.home() / "prefect" / "start.lock"):  # two would both make the database
                    (running,) = stack.enter_context(supervisor.running([server]))
                break
            except StageError as error:
                if error.problem.kind != "port_taken" or tries == 3:
                    raise
        stack.enter_context(looked_after(running))
        settings |= {PREFECT_API_URL: f"{server.url}/api", PREFECT_API_AUTH_STRING: password}
        stack.enter_context(temporary_settings(settings))
        before = _own.set(f"{server.url}/api")
        try:
            yield
        finally:
            _own.reset(before)
            for handler in logging.getLogger("prefect.flow_runs").handlers:
                handler.flush()  # lines still on their way, before the server ends
