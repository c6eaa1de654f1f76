"""Where files are kept on this disk: the home folder, a stage's work folder, locks, whole files."""

import contextlib
import errno
import fcntl
import logging
import math
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from schemas.environment import home, keep_work

log = logging.getLogger("alignflow")


SAY_SECONDS = 60.0
PRIVATE = 0o077
"""The umask of what runs for a home: prompts, models and digests of passwords are for their owner alone."""


def open_home() -> Path:
    """The home folder, made where it is missing and closed to others, as one of an older version is too."""
    place = home()
    place.mkdir(mode=0o777 & ~PRIVATE, parents=True, exist_ok=True)
    for part in (place, *place.glob("mlflow-auth.*")):
        with contextlib.suppress(OSError):
            status = part.stat()
            # A folder that is more than a home keeps its mode: the user's own, one above it, or one like /tmp.
            shared = Path.home().is_relative_to(part) or status.st_mode & stat.S_ISVTX
            if status.st_mode & PRIVATE and status.st_uid == os.geteuid() and not shared:
                part.chmod(stat.S_IMODE(status.st_mode) & ~PRIVATE)
    return place


def work_folder(key: str) -> Path:
    """Folder of a stage's lock, checkpoints and journal; it outlives a crash."""
    return home() / "work" / key


def clear_work(key: str) -> None:
    """Drop the checkpoints and journals of a stage that is done. ALIGNFLOW_KEEP_WORK=1 keeps them."""
    if keep_work():
        return
    for path in work_folder(key).iterdir():
        if (path.is_dir() and path.name != "asks") or path.name.startswith("metrics-"):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_aside(path: Path) -> Path:
    """Rename what cannot be used, so that its place is free and a person can look at it; returns its new path."""
    aside = path.with_name(f"{path.name}.bad")
    number = 0
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.bad.{number}")
    path.rename(aside)
    return aside


def place() -> dict[str, str]:
    """Tags that name where a run is made: its locks show whether it is alive."""
    return {"host": socket.gethostname(), "home": str(home())}


@contextlib.contextmanager
def lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel frees it when the holder dies. `waiting` is logged meanwhile."""
    _make_folder(path.parent)
    with path.open("a") as file:
        said = -math.inf
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if waiting else fcntl.LOCK_EX)
                break
            except BlockingIOError:
                if time.monotonic() - said > SAY_SECONDS:  # again and again: who waits is not stuck
                    said = time.monotonic()
                    log.info("%s", waiting)
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file unless another process does; whether it is held."""
    _make_folder(path.parent)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _make_folder(folder: Path) -> None:
    if folder.is_relative_to(home()):
        open_home()
    folder.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    _make_folder(path.parent)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return once the content of a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder: its names are on the server already
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_all(path: Path) -> None:
    """`sync` a file, or a folder with all that is in it, and the folders above, in which its name may be new."""
    if path.is_dir():
        for folder, _, files in os.walk(path, topdown=False, onerror=_raise):
            for name in files:
                if (Path(folder) / name).is_file():
                    sync(Path(folder) / name)
            sync(Path(folder))
    else:
        sync(path)
    for above in path.absolute().parents:
        if not os.access(above, os.R_OK):  # another user's: this process has made no name in it
            return
        sync(above)
        if os.path.ismount(above):
            return


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its folders, sorted.

    Raises:
        OSError: a folder cannot be listed. `Path.rglob` would leave it out without a word.
    """
    names = (Path(inner) / name for inner, _, names in os.walk(folder, onerror=_raise) for name in names)
    return sorted(path for path in names if path.is_file())


def _raise(error: OSError) -> None:
    raise error
