"""SQLite databases that other programs keep in the home: which of their schemas one has, its backups, its damages."""

import contextlib
import errno
import importlib.util
import logging
import re
import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from schemas.errors import StageError, refuse
from stages.runtime.workspace import move_aside, sync

log = logging.getLogger("alignflow")

DAMAGED = r"database disk image is malformed|file is not a database|malformed database schema|file is encrypted"
"""What SQLite says of a file that is none of its own, or no more."""

BESIDE = ("-wal", "-shm", "-journal")
"""Ends of the names of files that belong to a database."""


NETWORK = r"9p|afs|beegfs|ceph|cifs|fuse\..*|glusterfs|gpfs|lustre|ncpfs|nfs4?|ocfs2|orangefs|smb3?|virtiofs|wekafs"
"""Kinds of file systems that several hosts may see."""


def on_network(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether a file is, or will be, on a file system that several hosts may see. mounts: the kernel's list."""
    if not mounts.exists():
        return False
    kinds = {}
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split()
        kinds[re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where)] = kind  # a blank is \\040 there
    path = path.resolve()
    above = next((kinds[str(one)] for one in (path, *path.parents) if str(one) in kinds), "")
    return re.fullmatch(NETWORK, above) is not None


@dataclass(frozen=True)
class Schema:
    """Whose schema a database has: the migrations that a program knows, and the tables that hold what must not go."""

    program: str
    package: str
    migrations: str
    """Folder of alembic's revisions, in the package."""
    holds: tuple[str, ...]
    """Without any, no database counts as empty."""
    table: str = "alembic_version"

    @property
    def installed(self) -> str:
        """Program and version."""
        return f"{self.program} {metadata.version(self.package)}"

    def revisions(self) -> tuple[frozenset[str], str | None]:
        """All revisions that are known, and the newest; none where the package keeps them elsewhere.

        Read as text: alembic would import each of them, which takes half a second in every process.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            return frozenset(), None
        known, followed = set[str](), set[str]()
        for file in (Path(spec.origin).parent / self.migrations).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            known.update(re.findall(r"""^revision\b[^=\n]*=\s*["'](\w+)["']""", text, re.MULTILINE))
            for line in re.findall(r"^down_revision\b[^=\n]*=(.*)$", text, re.MULTILINE):
                followed.update(re.findall(r"""["'](\w+)["']""", line))
        newest = known - followed
        return frozenset(known), newest.pop() if len(newest) == 1 else None


@contextlib.contextmanager
def opened(path: Path, seconds: float = 30.0) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit.

    Raises:
        StageError: the file is damaged; its backups are named.
        OSError: it is a folder, or may not be opened.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the database's place", str(path))
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        if re.search(DAMAGED, str(error)):
            raise damaged(path, error) from error
        if "unable to open" in str(error):
            raise PermissionError(errno.EACCES, "the database cannot be opened", str(path)) from error
        raise


def check(path: Path, schema: Schema) -> str | None:
    """The revision of a database that its program is about to open; None where there is none.

    One that was never finished and holds nothing is moved aside.

    Raises:
        StageError: it is damaged, or was made by a newer version.
    """
    if not path.exists():
        return None
    known, newest = schema.revisions()
    revision = revision_of(path, schema)
    if newest is None or revision == newest:
        return revision
    if revision is not None and revision not in known:
        raise newer(path, schema, revision)
    if schema.holds and is_empty(path, schema):
        aside = put_aside(path)
        log.warning("%s was never finished and holds nothing: moved to %s, a new one is made", path, aside.name)
        return None
    return revision


def revision_of(path: Path, schema: Schema) -> str | None:
    """The revision that a database has; None where it names none. Raises StageError when it is damaged."""
    with opened(path) as connection:
        if schema.table not in tables(connection):
            return None
        row = connection.execute(f"SELECT version_num FROM {schema.table}").fetchone()
    return None if row is None else str(row[0])


def is_empty(path: Path, schema: Schema) -> bool:
    """Whether none of the tables that matter has a row."""
    with opened(path) as connection:
        have = tables(connection).intersection(schema.holds)
        return not any(connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in have)


def tables(connection: sqlite3.Connection) -> set[str]:
    """Names of the tables of a database."""
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


# --- backups ---


def backup_of(path: Path, revision: str) -> Path:
    """Where a database is kept as it was before it left a revision."""
    return path.with_name(f"{path.name}.before-{revision}")


def check_and_back_up(path: Path, schema: Schema) -> None:
    """`check`, and a backup of a database that its program will migrate in its place, unless there is one.

    A later one would be worth less: the program may have been killed on the way.
    """
    revision = check(path, schema)
    _, newest = schema.revisions()
    if newest is None or revision in (None, newest):
        return
    target = backup_of(path, str(revision))
    if not target.exists():
        with opened(path) as live:
            copy_to(live, target)


def copy_to(live: sqlite3.Connection, target: Path) -> None:
    """Copy a database, which may be in use, to a new file that is whole and synced once it has its name."""
    beside = draft(target)
    try:
        with contextlib.closing(sqlite3.connect(beside)) as copy:
            live.backup(copy)
        give_name(beside, target)
    finally:
        discard(beside)


def backups(path: Path) -> list[Path]:
    """The copies of a database, newest first."""
    copies = [one for one in path.parent.glob(f"{path.name}.before-*") if not one.name.endswith(BESIDE)]
    return sorted(copies, key=lambda one: one.stat().st_mtime, reverse=True)


# --- drafts: files that become a database when they are whole ---


def draft(path: Path) -> Path:
    """A new name beside a path, for what is to be renamed to it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")


def discard(path: Path) -> None:
    """Remove a database file and what belongs to it."""
    for one in (path, *(path.with_name(path.name + end) for end in BESIDE)):
        one.unlink(missing_ok=True)


def discard_drafts(path: Path) -> None:
    """Remove what killed processes have left beside a path. For the holder of the database's lock."""
    for left in path.parent.glob(f".{path.name}.*.draft*"):
        left.unlink(missing_ok=True)


def put_aside(path: Path) -> Path:
    """`move_aside` a database with what belongs to it; returns its new path."""
    aside = move_aside(path)
    for end in BESIDE:
        beside = path.with_name(path.name + end)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + end))
    sync(path.parent)
    return aside


def give_name(beside: Path, path: Path) -> None:
    """Make a whole draft the database of that path, where there is none."""
    sync(beside)
    for end in BESIDE:  # of one that was taken away without them: they would be played into this one
        if path.with_name(path.name + end).exists():
            move_aside(path.with_name(path.name + end))
    beside.replace(path)
    sync(path.parent)


# --- what a person is told ---


LOST = {
    "prefect.db": "the history of flow runs begins anew (results are in MLflow)",
    "mlflow-auth.db": "MLflow's users and their grants have to be made again",
}
"""What goes with a database that is not MLflow's own."""


def damaged(path: Path, error: object) -> StageError:
    """The problem of a file that is no database, or no whole one."""
    have = backups(path)
    if have:
        fix = f"move it away with its -wal and -shm, and copy the backup there: cp {have[0]} {path}"
    else:
        lost = LOST.get(path.name, "stages run again")
        fix = (
            "there is no backup here: put back a copy of yours, or move it away with its -wal and -shm; "
            f"a new one is made then, and {lost}"
        )
    return refuse("database", path, f"it is damaged ({error}).", fix, kind="database")


def newer(path: Path, schema: Schema, revision: str) -> StageError:
    """The problem of a database that a newer version of its program has made."""
    known, _ = schema.revisions()
    ours = [one for one in backups(path) if one.name.partition(".before-")[2] in known]
    fix = f"install the newer {schema.program} again"
    if ours:
        fix += f"; or go back to the backup: move it away with its -wal and -shm, and cp {ours[0]} {path}"
    message = f"a newer {schema.program} has made it: {schema.installed} does not know its schema {revision}."
    return refuse("database", path, message, fix, kind="database")
