"""The servers' own SQLite databases, looked at before a server opens them: Prefect's, and that of MLflow's users."""

import os
from pathlib import Path

from stages.runtime import databases, workspace
from stages.runtime.databases import Schema

PREFECT = Schema("Prefect", "prefect", "server/database/_migrations/versions/sqlite", holds=())
USERS = Schema("MLflow", "mlflow", "server/auth/db/migrations/versions", ("users",), table="alembic_version_auth")


def check_prefect() -> None:
    """Keep a copy of Prefect's database before a newer Prefect migrates it.

    Raises:
        StageError: it is damaged, or a newer Prefect has made it.
    """
    path = prefect_file()
    if path is not None:
        with workspace.lock(workspace.home() / "prefect" / "start.lock"):  # not while another run's server makes it
            databases.check_and_back_up(path, PREFECT)


def prefect_file() -> Path | None:
    """Where Prefect's server will keep its database; None where that is no file."""
    for variable in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        uri = os.environ.get(variable)
        if uri:
            path = uri.partition(":///")[2].partition("?")[0]
            return Path(path) if uri.startswith("sqlite") and path and not path.startswith(":memory:") else None
    return workspace.home() / "prefect" / "prefect.db"
