"""Where the servers of this home answer, while `alignflow up` or `alignflow ui` runs: `up.json` in `home()`."""

import contextlib
import fcntl
import os
from pathlib import Path

from pydantic import ValidationError

from flows.servers import passwords
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
    ours: list[str] = []
    """Which of the two servers it has started, MLflow or Prefect: those that our passwords are for."""


def file() -> Path:
    """The addresses' file. It means something only while the lock beside it is held."""
    return workspace.home() / "up.json"


def lock_file() -> Path:
    """Locked by the command as long as it runs; the kernel frees it."""
    return workspace.home() / "up.lock"


def found() -> Addresses | None:
    """The addresses; None when nothing runs for this home, has only begun to, or another version runs."""
    if not file().exists() or not lock_file().exists():
        return None
    with lock_file().open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError, ValidationError):
                return Addresses.model_validate_json(file().read_text())
    return None


def adopt() -> Addresses | None:
    """Let this process use the running servers, as if they and their passwords were exported. The environment takes
    precedence.

    Call it before Prefect is imported: that reads the environment once.
    """
    addresses = found()
    if addresses is not None:
        os.environ.setdefault("PREFECT_API_URL", addresses.prefect)
        os.environ.setdefault("MLFLOW_TRACKING_URI", addresses.mlflow)
        let_in(addresses)
    return addresses


def let_in(addresses: Addresses | None) -> None:
    """Give this process the passwords of the running servers that the environment names; no other server gets them."""
    if addresses is None:
        return
    named = {"Prefect": ("PREFECT_API_URL", addresses.prefect), "MLflow": ("MLFLOW_TRACKING_URI", addresses.mlflow)}
    ours = [name for name, (variable, url) in named.items() if os.environ.get(variable, "").rstrip("/") == url]
    os.environ.update(passwords.for_clients([name for name in ours if name in addresses.ours]))
