"""Kill (-9) the making and the migration of MLflow's database at many moments, and count what does not open again.

`python -m tests.support.database_kills make 40` prints one JSON object. A process of its own that forks, so that no
child has to import MLflow.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stages import tracking
from stages.runtime.databases import revision_of
from stages.runtime.workspace import home
from stages.tracking import mlflow_client
from stages.tracking.database import MLFLOW

OLD = "5d2d30f0abce"
"""The revision of an older MLflow."""
ROW = ("r1", "kept from before")


def old_database(path: Path) -> None:
    """A database as an older MLflow has made it, with one run."""
    from alembic import command
    from mlflow.store.db.utils import InitialBase, _get_alembic_config, create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(f"sqlite:///{path}")
    InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config = _get_alembic_config(str(engine.url))
        config.attributes["connection"] = connection
        command.upgrade(config, OLD)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (1, 'e', 'active')")
        columns = "run_uuid, name, source_type, entry_point_name, user_id, status, start_time, lifecycle_stage"
        values = (*ROW, "LOCAL", "", "me", "FINISHED", 1, "active")
        marks = ", ".join("?" * len(values))
        connection.execute(f"INSERT INTO runs ({columns}, experiment_id) VALUES ({marks}, 1)", values)


def fork(call: Callable[[], object]) -> int:
    """Start a call in a child."""
    child = os.fork()
    if child:
        return child
    try:
        mlflow_client._client_for.cache_clear()
        call()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def killed(home: Path, seconds: float) -> bool:
    """Open the home's database in a child, killed after so long; whether it was still at it."""
    os.environ["ALIGNFLOW_HOME"] = str(home)
    child = fork(tracking.setup)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def opens(old: bool) -> None:
    """The database opens, has the newest schema, takes a run, and has what it had. Raises AssertionError."""
    tracking.setup()
    path = home() / "mlflow.db"
    assert revision_of(path, MLFLOW) == MLFLOW.revisions()[1]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [run.info.run_name for run in tracking.runs("attributes.status != ''")] == ([ROW[1]] if old else [])
    tracking.client().create_run(tracking.experiment("tests"))
    assert not list(path.parent.glob(".*draft*")), "a draft was left behind"
    if old:
        with contextlib.closing(sqlite3.connect(path.with_name(f"{path.name}.before-{OLD}"))) as copy:
            assert copy.execute("SELECT run_uuid, name FROM runs").fetchall() == [ROW]


def main(what: str, kills: int) -> dict[str, object]:
    """Kill so often, at moments that are spread over the whole time it takes; what came of it."""
    with contextlib.suppress(Exception):
        mlflow_client._client_for("http://127.0.0.1:9")  # imports MLflow once, for all children
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401 - the same

    done = broken = 0
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old.db"
        if what == "migrate":
            old_database(old)

        def new_home(name: str) -> Path:
            home = Path(folder) / name
            home.mkdir()
            if what == "migrate":
                shutil.copy(old, home / "mlflow.db")
            return home

        began = time.monotonic()
        os.environ["ALIGNFLOW_HOME"] = str(new_home("whole"))
        assert os.waitpid(fork(tracking.setup), 0)[1] == 0
        whole = time.monotonic() - began
        tries = 0
        while done < kills and tries < 4 * kills:
            tries += 1
            home = new_home(str(tries))
            done += killed(home, whole * (tries * 0.618034 % 1))  # multiples of it are spread evenly, however many
            broken += os.waitpid(fork(lambda: opens(what == "migrate")), 0)[1] != 0
            shutil.rmtree(home)
    return {"what": what, "kills": done, "tries": tries, "broken": broken, "seconds": round(whole, 2)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
