"""The servers' databases before a server opens them: damaged or newer ones are named, older ones are kept."""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.servers import mlflow_prefect
from schemas.errors import EXIT_CODES, StageError
from stages.runtime.databases import Schema


@pytest.fixture(params=["prefect", "users"])
def opening(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Schema, Callable[[], object]]:
    """A server's database, its schema, and what is called before the server starts."""
    if request.param == "users":
        monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "a long password")
        return home / "mlflow-auth.db", mlflow_prefect.USERS, lambda: mlflow_prefect.mlflow_server(1)
    (home / "prefect").mkdir()
    return home / "prefect" / "prefect.db", mlflow_prefect.PREFECT, lambda: mlflow_prefect.prefect_server(1)


def make(path: Path, schema: Schema, revision: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE {schema.table} (version_num TEXT)")
        connection.execute(f"INSERT INTO {schema.table} VALUES (?)", (revision,))
        connection.execute("CREATE TABLE users (name TEXT)")
        connection.execute("INSERT INTO users VALUES ('admin')")


def refused(start: Callable[[], object]) -> StageError:
    with pytest.raises(StageError) as error:
        start()
    assert EXIT_CODES[error.value.status] == 65
    return error.value


def test_a_damaged_one_is_named_with_its_backup(opening: tuple[Path, Schema, Callable[[], object]]) -> None:
    path, _, start = opening
    path.write_bytes(b"no database" * 1000)
    assert refused(start).problem.value == str(path)
    lost = "MLflow's users" if "auth" in path.name else "the history of flow runs"
    assert lost in str(refused(start).problem.fix) and "stages run again" not in str(refused(start).problem.fix)
    path.rename(path.with_suffix(".odd"))
    path.mkdir()
    with pytest.raises(IsADirectoryError, match="a folder is in the database's place"):
        start()
    path.rmdir()
    path.with_suffix(".odd").rename(path)
    backup = path.with_name(f"{path.name}.before-0123")
    backup.write_bytes(b"")
    assert f"cp {backup} {path}" in str(refused(start).problem.fix)


def test_a_newer_one_is_named(opening: tuple[Path, Schema, Callable[[], object]]) -> None:
    path, schema, start = opening
    make(path, schema, "ffffffffffff")
    problem = refused(start).problem
    assert f"a newer {schema.program}" in problem.message and problem.value == str(path)


def test_an_older_one_is_kept_and_a_current_one_is_not(opening: tuple[Path, Schema, Callable[[], object]]) -> None:
    path, schema, start = opening
    known, newest = schema.revisions()
    assert newest is not None and len(known) > 3, "where the package keeps its migrations has changed"
    older = sorted(known - {newest})[0]
    make(path, schema, older)
    start()
    copy = path.with_name(f"{path.name}.before-{older}")
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT name FROM users").fetchall() == [("admin",)]
    copy.unlink()
    path.unlink()
    make(path, schema, newest)
    start()
    assert not list(path.parent.glob("*.before-*"))


def test_a_database_that_is_elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
    monkeypatch.setenv(name, f"sqlite+aiosqlite:///{tmp_path}/other.db?timeout=60")
    assert mlflow_prefect.prefect_file() == tmp_path / "other.db"
    monkeypatch.setenv(name, "postgresql+asyncpg://me@host/prefect")
    assert mlflow_prefect.prefect_file() is None
