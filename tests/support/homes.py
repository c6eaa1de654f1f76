"""A home in which the databases of MLflow and Prefect stand already: making them takes ten seconds of a core."""

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from flows.servers import mlflow_prefect, supervisor
from stages import tracking
from tests.support import forked_servers, forks

DATABASES = ("mlflow.db", "prefect/prefect.db")


def make(home: Path) -> None:
    """Make both databases, without the servers of whichever test asks first. Processes of their own do, so that nothing
    in this one holds the files open while they are copied.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MLFLOW_", "PREFECT_API_", "PREFECT_SERVER_REGISTER_BLOCKS_ON_START")):
                patch.delenv(name)
        patch.setenv("ALIGNFLOW_HOME", str(home))
        assert forks.run(_make_mlflow, dict(os.environ)) == 0
        with forked_servers.running(mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"), "--no-ui")):
            pass
    for name in DATABASES:
        assert (home / name).stat().st_size > 0
        with contextlib.closing(sqlite3.connect(home / name)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _make_mlflow(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tracking.setup()


def furnish(home: Path, ready: Path) -> Path:
    """Copy both databases to a home; returns the home."""
    for name in DATABASES:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ready / name, home / name)
    return home
