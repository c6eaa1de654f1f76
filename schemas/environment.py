"""The environment variables of alignflow: their names, and what each is set to now, typed and with its default."""

import math
import os
import re
import shlex
import tempfile
from pathlib import Path

from schemas.errors import refuse

HOME = "ALIGNFLOW_HOME"
ROOTS = "ALIGNFLOW_ROOTS"
API_KEYS = "ALIGNFLOW_API_KEYS"
JUDGE_HOSTS = "ALIGNFLOW_JUDGE_HOSTS"
GPUS = "ALIGNFLOW_GPUS"
EXPERIMENT = "ALIGNFLOW_EXPERIMENT"
KEEP_WORK = "ALIGNFLOW_KEEP_WORK"
DEVICE_LOCKS = "ALIGNFLOW_DEVICE_LOCKS"
DEVICE_SLOTS = "ALIGNFLOW_DEVICE_SLOTS"
LAUNCHER = "ALIGNFLOW_LAUNCHER"
RANK_MINUTES = "ALIGNFLOW_RANK_MINUTES"
PARENT = "ALIGNFLOW_PARENT"
REPLICAS = "ALIGNFLOW_REPLICAS"
WARM = "ALIGNFLOW_WARM"
LIVE = "ALIGNFLOW_LIVE"
LOGIN = "ALIGNFLOW_LOGIN"
IMAGE = "ALIGNFLOW_IMAGE"  # read by deploy/compose.yaml alone

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""As `-P`, for all that a process starts in turn: no file of the working directory is imported. Data may have come with
a `random.py` of its own."""


def python_path(*before: str) -> str:
    """PYTHONPATH for a process that we start: some folders, then its own without those that name no fixed place.

    An empty one, as `:/somewhere` has, means the working directory.
    """
    return os.pathsep.join([*before, *filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def home() -> Path:
    """Folder for everything that is stored; default `.alignflow` in the working directory.

    Raises:
        StageError: its path holds a character that means something else in the addresses of databases and artifacts:
            files would be written to another folder.
    """
    place = Path(os.environ.get(HOME) or ".alignflow").absolute()
    if odd := re.search(r"[%?\x00-\x1f\x7f\udc80-\udcff]", str(place)):
        message = f"its path holds {odd[0]!a}, which addresses of databases and artifacts give another meaning."
        raise refuse(HOME, place, message, "set it to a folder without: ALIGNFLOW_HOME=/some/folder", kind="home")
    return place


def roots() -> list[Path]:
    """Folders whose files a deployed run may read, resolved; relative ones count from the working directory."""
    return [Path(root).expanduser().resolve() for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]


def api_keys() -> list[str]:
    """Names of variables that a deployed run may send to an endpoint judge as its key."""
    return os.environ.get(API_KEYS, "").split(",")


def judge_hosts() -> list[str]:
    """Hosts, `host` or `host:port`, whose endpoint judges a deployed run may ask."""
    return [host.strip().lower() for host in os.environ.get(JUDGE_HOSTS, "").split(",") if host.strip()]


def gpus() -> int:
    """How many GPUs a worker's machine must have for stages that train or sample; default 0."""
    return int(os.environ.get(GPUS) or 0)


def experiment() -> str:
    """MLflow experiment of a single stage whose request names none."""
    return os.environ.get(EXPERIMENT) or "alignflow"


def keep_work() -> bool:
    """Whether checkpoints and journals of finished stages are kept."""
    return os.environ.get(KEEP_WORK) == "1"


def device_locks() -> Path:
    """Folder of the locks by which processes of this machine share its devices: one for all homes and users."""
    return Path(os.environ.get(DEVICE_LOCKS) or Path(tempfile.gettempdir()) / "alignflow-devices")


def device_slots() -> int:
    """How many stages may train or sample at once where no GPU is found; default 0, which means no limit."""
    return int(os.environ.get(DEVICE_SLOTS) or 0)


def launcher() -> list[str]:
    """Command put before a stage, as the Slurm pool does; default none."""
    return shlex.split(os.environ.get(LAUNCHER, ""))


def rank_minutes() -> float:
    """How long a rank waits for the others in a collective before it gives up; default 10.

    Raises:
        StageError: it is set to something else than minutes.
    """
    given = os.environ.get(RANK_MINUTES) or "10"
    try:
        minutes = float(given)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < 1e6:  # NaN neither
        fix = f"give minutes, as in {RANK_MINUTES}=30, or unset it"
        raise refuse(RANK_MINUTES, given, "this is not a time in minutes.", fix, kind="environment")
    return minutes


def parent() -> int | None:
    """The process that a stage dies with; None where nobody waits for it."""
    return int(os.environ.get(PARENT) or 0) or None


def replicas() -> int:
    """Copies of sharded weights among the processes that train together; default 1."""
    return int(os.environ.get(REPLICAS) or 1)


def live() -> bool:
    """Whether somebody looks at a terminal that shows how far a stage is."""
    return os.environ.get(LIVE) == "1"


def login() -> str:
    """On a server that alignflow starts: user and password, `user:password`, that a login link carries; else empty."""
    return os.environ.get(LOGIN, "")
