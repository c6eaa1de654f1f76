"""MLflow's database in the home: made beside and renamed, migrated on a copy; a kill leaves the one that was there."""

import logging
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

from schemas.errors import StageError, refuse
from stages.runtime import databases
from stages.runtime.databases import Schema, copy_to, discard, discard_drafts, draft, give_name, opened
from stages.runtime.process import die_with_parent

log = logging.getLogger("alignflow")

MLFLOW = Schema("MLflow", "mlflow", "store/db_migrations/versions", holds=("runs", "registered_models"))

LOCK_SECONDS = 10.0
"""How long a migration waits for other processes to close the database."""


def prepare(path: Path) -> None:
    """Make the database where there is none, or migrate it to the schema of this MLflow, and see that it knows where
    its artifacts are. For the holder of its lock.

    Raises:
        StageError: it is damaged, a newer MLflow has made it, or it cannot be migrated.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_drafts(path)
    revision = databases.check(path, MLFLOW)
    _, newest = MLFLOW.revisions()
    if not path.exists():
        make(path)
        return
    if newest is not None and revision != newest:
        migrate(path, revision or "unknown")
    relocate(path)


def make(path: Path) -> None:
    """A database without runs. It takes its name once it is whole."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH  # late: see value_classes
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    beside = draft(path)
    try:
        SqlAlchemyStore(f"sqlite:///{beside}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        if not databases.on_network(path):  # SQLite forbids it there
            with opened(beside) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer don't lock each other out
        give_name(beside, path)
    finally:
        discard(beside)


def migrate(path: Path, revision: str) -> None:
    """Migrate a copy, and put it in the database's place in one transaction, while no other process has it open.

    Not by a rename: a process that still had the old file open would write into nothing. `mlflow.db.before-REVISION`
    is kept.
    """
    log.info("migrating %s to the schema of %s", path, MLFLOW.installed)
    beside, before = draft(path), databases.backup_of(path, revision)
    try:
        with opened(path, seconds=LOCK_SECONDS) as live:
            alone(live, path)
            copy_to(live, before)
            upgrade(before, beside, path)
            with opened(beside) as new:
                new.backup(live)
    finally:
        discard(beside)


def alone(live: sqlite3.Connection, path: Path) -> None:
    """Keep all other processes from the database as long as the connection is open.

    Raises:
        StageError: one has it open, perhaps an older MLflow that could not use the new schema.
    """
    live.execute("PRAGMA locking_mode=EXCLUSIVE")
    try:
        live.execute("BEGIN EXCLUSIVE")
        live.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        message = f"it has to be migrated to {MLFLOW.installed}, and another process has it open."
        fix = "end the servers (`alignflow up`, `ui`) and the runs of this home, then start this again"
        raise refuse("database", path, message, fix, kind="database") from error


def upgrade(before: Path, beside: Path, path: Path) -> None:
    """Make a migrated copy of a copy.

    What a killed migration has left of its first step is taken away: its columns, tables and indexes hold nothing yet,
    since all from the first row on is one transaction.
    """
    command = [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", f"sqlite:///{beside}"]
    left: list[tuple[str, str]] = []
    while True:
        discard(beside)
        shutil.copyfile(before, beside)
        with opened(beside) as connection:
            for kind, name in sorted(left, key=lambda one: ("index", "column", "table").index(one[0])):
                take_away(connection, kind, name)
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=die_with_parent)
        if done.returncode == 0:
            break
        more = left_behind(done.stderr)
        if more is None or more in left:
            raise unmigrated(path, before, (done.stderr.strip().splitlines() or ["without a word"])[-1])
        left.append(more)
    if databases.revision_of(beside, MLFLOW) != MLFLOW.revisions()[1]:
        raise unmigrated(path, before, "MLflow has stopped on the way")


def relocate(path: Path) -> None:
    """Let the database find its artifacts where they are, after the home was renamed, or copied from another place.

    MLflow keeps whole paths. Those below another home are changed where what they name is beside the database: other
    folders that an experiment keeps its artifacts in are left alone.
    """
    here = path.with_name("artifacts")
    with opened(path) as connection:
        listed = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE '/%/artifacts'"
        )
        for (place,) in listed.fetchall():
            if place == str(here) or not moved(connection, Path(place), here):
                continue
            log.warning("this home was at %s: its runs and models are found here now", Path(place).parent)
            connection.execute("BEGIN IMMEDIATE")
            for table, column in PATHS.items():
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {below(column)}",
                    (str(here), len(place) + 1, place, len(place) + 1, f"{place}/"),
                )
            home = "UPDATE tags SET value = ? WHERE key = 'home' AND value = ?"
            connection.execute(home, (str(here.parent), str(Path(place).parent)))
            connection.execute("COMMIT")


PATHS = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
"""Where MLflow keeps whole paths of artifacts: table -> column."""


def moved(connection: sqlite3.Connection, place: Path, here: Path) -> bool:
    """Whether artifacts that the database has in one folder are in another, which is not the same by another name."""
    if place.exists() and here.exists() and place.samefile(here):
        return False
    some = f"SELECT artifact_uri FROM runs WHERE {below('artifact_uri')} ORDER BY start_time DESC LIMIT 50"
    runs = connection.execute(some, (len(str(place)) + 1, f"{place}/"))
    return any((here / Path(uri).relative_to(place)).exists() for (uri,) in runs)


def below(column: str) -> str:
    """The condition that a path begins with another; LIKE would take `_` for any character, and A for a."""
    return f"substr({column}, 1, ?) = ?"


def left_behind(said: str) -> tuple[str, str] | None:
    """Kind and name of what MLflow could not make because it is there: a table, an index, or a column of a table."""
    made = re.search(r"(table|index) (\w+) already exists", said)
    column, altered = re.search(r"duplicate column name: (\w+)", said), re.search(r"ALTER TABLE (\w+) ADD COLUMN", said)
    if column and altered:
        return "column", f"{altered[1]} DROP COLUMN {column[1]}"
    return (made[1], made[2]) if made else None


def take_away(connection: sqlite3.Connection, kind: str, name: str) -> None:
    """Drop what a killed migration has left; a table that has rows stays."""
    if kind == "column":
        connection.execute(f"ALTER TABLE {name}")
    elif kind == "index" or connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() is None:
        connection.execute(f"DROP {kind} {name}")


def unmigrated(path: Path, before: Path, why: str) -> StageError:
    """The problem of a database that stays as it is."""
    fix = f"see that its disk has room for three copies of it; a backup is {before}"
    message = f"it could not be migrated to the schema of {MLFLOW.installed} ({why}); it is unchanged."
    return refuse("database", path, message, fix, kind="database")
