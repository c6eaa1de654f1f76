"""MLflow's database in the home: made whole or not at all, migrated on a copy, and named when it cannot be used."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.errors import EXIT_CODES, StageError
from schemas.stage import Request, Result
from stages import tracking
from stages.runtime import databases
from stages.tracking import StageRun, mlflow_client
from stages.tracking import database as our_database
from stages.tracking.database import MLFLOW
from tests.conftest import ROOT
from tests.support.database_kills import OLD, ROW, old_database
from tests.support.forks import PYTHON

pytestmark = pytest.mark.usefixtures("forking")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of an older MLflow with one run."""
    path = tmp_path_factory.mktemp("old") / "mlflow.db"
    old_database(path)
    return path


def change(path: Path, *statements: str) -> None:
    """Change a database behind MLflow's back."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def rows(path: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT run_uuid, name FROM runs").fetchall()


def refused() -> StageError:
    """Why the home's database does not open."""
    with pytest.raises(StageError) as error:
        tracking.setup()
    assert EXIT_CODES[error.value.status] == 65 and error.value.problem.field == "database"
    return error.value


def garbage(path: Path) -> None:
    path.write_bytes(b"This is not a database. " * 500)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def schema_lost(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 4000 + path.read_bytes()[4100:])


@pytest.mark.parametrize("harm", [garbage, cut, schema_lost])
def test_a_damaged_one_is_named_with_its_backup(ready_home: Path, harm: Callable[[Path], None]) -> None:
    path = ready_home / "mlflow.db"
    backup = path.with_name(f"mlflow.db.before-{OLD}")
    shutil.copy(path, backup)
    harm(path)
    harmed = path.read_bytes()
    problem = refused().problem
    assert problem.value == str(path) and "it is damaged" in problem.message
    assert f"cp {backup} {path}" in str(problem.fix)
    assert path.read_bytes() == harmed, "it was touched"
    backup.unlink()
    assert "there is no backup here" in str(refused().problem.fix)


def test_damage_that_shows_later_is_named_too(ready_home: Path) -> None:
    """Each page behind the schema's is gone: opening it goes well."""

    def search() -> None:
        raise RuntimeError("(sqlite3.DatabaseError) database disk image is malformed [SQL: SELECT ...]")

    with pytest.raises(StageError, match=r"mlflow\.db: it is damaged \(database disk image is malformed\)"):
        mlflow_client.retrying(search)


def test_a_newer_one_is_named(ready_home: Path) -> None:
    path = ready_home / "mlflow.db"
    change(path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    problem = refused().problem
    assert "a newer MLflow" in problem.message and "ffffffffffff" in problem.message
    assert MLFLOW.installed in problem.message and "install the newer MLflow" in str(problem.fix)
    newest = MLFLOW.revisions()[1]
    shutil.copy(path, path.with_name(f"mlflow.db.before-{newest}"))  # what the newer one has kept for this one
    assert f"mlflow.db.before-{newest} {path}" in str(refused().problem.fix)


@pytest.mark.parametrize("left", ["tables", "on the way", "nothing"])
def test_one_that_was_never_finished_is_made_anew(ready_home: Path, left: str) -> None:
    """As homes were left by a kill while MLflow made the database in its place."""
    path = ready_home / "mlflow.db"
    if left == "nothing":
        path.write_bytes(b"")
    else:
        how = "DELETE FROM alembic_version" if left == "tables" else f"UPDATE alembic_version SET version_num = '{OLD}'"
        change(path, how)
    tracking.setup()
    assert databases.revision_of(path, MLFLOW) == MLFLOW.revisions()[1]
    assert path.with_name("mlflow.db.bad").exists()
    tracking.client().create_run(tracking.experiment("tests"))


def test_a_log_without_its_database_is_not_played_into_a_new_one(home: Path) -> None:
    (home / "mlflow.db-wal").write_bytes(b"left")
    tracking.setup()
    assert (home / "mlflow.db-wal.bad").read_bytes() == b"left"


def test_nothing_that_is_half_made_has_the_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = databases.give_name

    def give_name(beside: Path, path: Path) -> None:
        assert not path.exists() and databases.revision_of(beside, MLFLOW) == MLFLOW.revisions()[1]
        real(beside, path)

    monkeypatch.setattr(our_database, "give_name", give_name)
    tracking.setup()
    assert [path.name for path in home.glob(".*draft*")] == []


def test_a_migration_keeps_all_runs_and_a_copy(home: Path, old: Path) -> None:
    """Even where a kill has left the first step of an earlier migration, which MLflow makes in place."""
    path = home / "mlflow.db"
    shutil.copy(old, path)
    change(
        path,
        "ALTER TABLE endpoints ADD COLUMN routing_strategy TEXT",
        "CREATE TABLE budget_policies (left_over INTEGER)",
    )
    (home / ".mlflow.db.1.draft").write_text("of a killed process")
    tracking.setup()
    assert databases.revision_of(path, MLFLOW) == MLFLOW.revisions()[1] and rows(path) == [ROW]
    assert rows(path.with_name(f"mlflow.db.before-{OLD}")) == [ROW]
    assert [run.info.run_name for run in tracking.runs("attributes.status = 'FINISHED'")] == [ROW[1]]
    assert not list(home.glob(".*draft*"))


def test_none_is_migrated_below_another_process(home: Path, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "mlflow.db"
    shutil.copy(old, path)
    monkeypatch.setattr(our_database, "LOCK_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("SELECT * FROM runs").fetchall()
        problem = refused().problem
    assert "another process has it open" in problem.message and "alignflow up" in str(problem.fix)
    assert databases.revision_of(path, MLFLOW) == OLD and rows(path) == [ROW]


def test_a_migration_that_fails_changes_nothing(home: Path, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "mlflow.db"
    shutil.copy(old, path)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nOSError: No space left on device\n")
    monkeypatch.setattr("subprocess.run", lambda *given, **named: failed)
    problem = refused().problem
    assert "No space left on device" in problem.message and "it is unchanged" in problem.message
    assert databases.revision_of(path, MLFLOW) == OLD and rows(path) == [ROW]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kills"), [("make", 5), ("migrate", 2)])
def test_killed_at_many_moments_it_opens(what: str, kills: int) -> None:
    """More moments: python -m tests.support.database_kills make 40"""
    python = PYTHON[0] if what == "migrate" else sys.executable  # so that MLflow's own command is what is killed
    command = [python, "-m", "tests.support.database_kills", what, str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    came = json.loads(done.stdout.splitlines()[-1])
    assert came["broken"] == 0 and came["kills"] == kills, done.stderr


# --- A home that was moved --------------------------------------------------------------------------------------------


def publish(home: Path) -> Result:
    """The result of a stage that has published a model, in a home."""
    folder = home.parent / "made"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text("w")
    with StageRun(Request(stage="sft", version=1, params={}, name="sft", experiment="tests")) as run:
        run.publish("model", folder, model=True)
        return run.finish({})


@pytest.mark.parametrize("how", ["renamed", "copied"])
def test_a_home_that_was_moved_finds_what_it_has(
    ready_home: Path, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = publish(ready_home)
    other = tmp_path / "a way_" / "home"
    other.parent.mkdir(parents=True)
    shutil.copytree(ready_home, other)
    if how == "renamed":
        shutil.rmtree(ready_home)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(other))
    found = tracking.find(made.key)
    assert found is not None and found.outputs == made.outputs
    assert tracking.fetch(found.outputs["model"]).is_relative_to(other)
    run = tracking.client().get_run(str(made.run_id))
    assert run.info.artifact_uri == str(other / "artifacts" / str(made.run_id) / "artifacts")
    assert run.data.tags["home"] == str(other), "what a killed stage leaves is closed here from now on"
    new = tracking.client().create_run(tracking.experiment("tests"))
    assert str(new.info.artifact_uri).startswith(f"{other}/")
    if how == "copied":
        monkeypatch.setenv("ALIGNFLOW_HOME", str(ready_home))
        assert tracking.fetch(made.outputs["model"]).is_relative_to(ready_home), "the other is left as it was"


def test_artifacts_that_are_kept_elsewhere_stay_there(
    ready_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a folder that the user has given the experiment, and in a home that is known by two names."""
    client, elsewhere = tracking.client(), tmp_path / "disk" / "artifacts"
    client.create_experiment("tests", artifact_location=str(elsewhere))
    made = publish(ready_home)
    (tmp_path / "link").symlink_to(ready_home)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "link"))
    assert str(tracking.client().get_run(str(made.run_id)).info.artifact_uri).startswith(f"{elsewhere}/")
    moved = tmp_path / "moved"
    ready_home.rename(moved)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(moved))
    assert str(tracking.client().get_run(str(made.run_id)).info.artifact_uri).startswith(f"{elsewhere}/")
    assert tracking.find(made.key) is not None
