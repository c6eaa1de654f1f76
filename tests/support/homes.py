"""A home in which the databases of MLflow and Prefect stand already: making them takes ten seconds of a core."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

DATABASES = ("mlflow.db", "prefect/prefect.db")

# Processes of their own, so that nothing in this one holds the files open while they are copied.
_MAKE = """
from flows.servers import mlflow_prefect, supervisor
from stages import tracking

tracking.setup()
with supervisor.running([mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"), "--no-ui")]):
    pass
"""


def make(home: Path) -> None:
    """Make both databases, without the servers of whichever test asks first."""
    left_out = ("MLFLOW_", "PREFECT_API_", "PREFECT_SERVER_REGISTER_BLOCKS_ON_START")
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    subprocess.run([sys.executable, "-c", _MAKE], env={**env, "ALIGNFLOW_HOME": str(home)}, check=True)
    for name in DATABASES:
        assert (home / name).stat().st_size > 0
        with contextlib.closing(sqlite3.connect(home / name)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def furnish(home: Path, ready: Path) -> Path:
    """Copy both databases to a home; returns the home."""
    for name in DATABASES:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ready / name, home / name)
    return home
