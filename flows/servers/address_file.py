"""Where the servers of this home answer, while `alignflow up` or `alignflow ui` runs: `up.json` in `home()`."""

import fcntl
import os
from pathlib import Path

from pydantic import ValidationError

from schemas import Strict
from stages.runtime import workspace


class Addresses(Strict):
    """What a running command publishes about itself. Holds no passwords."""

    pid: int
    mlflow: str
    prefect: str
    """With /api, as PREFECT_API_URL has it."""
    pools: list[str] = []
    """Work pools that it runs a worker for."""


def file() -> Path:
    """The addresses' file. It means something only while the lock beside it is held."""
    return workspace.home() / "up.json"


def lock_file() -> Path:
    """Locked by the command as long as it runs; the kernel frees it."""
    return workspace.home() / "up.lock"


def found() -> Addresses | None:
    """The addresses, or None when nothing runs for this home, or has only begun to."""
    if not file().exists() or not lock_file().exists():
        return None
    with lock_file().open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read()
    return None


def read() -> Addresses | None:
    """The file's content; None when it is gone or was written by another version."""
    try:
        return Addresses.model_validate_json(file().read_text())
    except (FileNotFoundError, ValidationError):
        return None


def adopt() -> Addresses | None:
    """Let this process use the running servers, as if they were exported. The environment takes precedence.

    Call it before Prefect is imported: that reads the environment once.
    """
    addresses = found()
    if addresses is not None:
        os.environ.setdefault("PREFECT_API_URL", addresses.prefect)
        os.environ.setdefault("MLFLOW_TRACKING_URI", addresses.mlflow)
    return addresses
