"""Shared fixtures: a home of its own for every test, and the real data and model beside the checkout, where there."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import forks, homes

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from stages.engine.data.trees import Batch

gc.disable()  # until all is imported, as in a stage's process
# Hundreds of processes import this project, and pytest rewrites every file of tests: kept, that is done once.
if "MUTANT" not in os.environ:  # a file changed twice within a second would be taken for the one before
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).resolve().parent.parent
PAPERS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")] + sorted(
    ROOT.glob("[a-z]*/README.md")
)
"""What users and contributors read; every command, config, row and diff in it is run by a test."""

# Set before anything imports Prefect, MLflow or torch, also for the processes that tests start. Nothing calls home;
# nothing is fetched from the Hub; tiny models are fastest on one thread.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Kinds of blocks are in the databases that homes get; to look through them again takes a second a server.
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
        "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }
)
for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "ALIGNFLOW_HOME", "ALIGNFLOW_EXPERIMENT"):
    os.environ.pop(name, None)


LONGEST = (
    *("system/test_up.py", "system/test_deployed.py", "flows/test_cli.py", "system/test_secrets.py"),
    *("flows/execution/test_process.py", "system/test_arrival.py", "faults/test_prefect.py", "faults/test_race.py"),
    *("flows/test_retrain.py", "tracking/test_database.py", "system/test_door.py", "flows/results/test_registry.py"),
    *("system/test_backends.py", "flows/execution/test_warm.py", "system/test_ui.py", "flows/results/test_clean.py"),
    *("system/test_private.py", "faults/test_command.py", "system/test_backup.py", "faults/test_kill.py"),
)
"""Files that take minutes, those that take most first."""


def pytest_configure(config: pytest.Config) -> None:
    """One process to fork from for all processes of a test run; it imports while they collect."""
    if config.getoption("numprocesses", None):
        forks.serve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with the most slow tests: the last of them would run on while the other
    processes have nothing left.

    Only between files; within one the order stays.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    turns = {ROOT / "tests" / name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (turns.get(item.path, len(turns)), -slow[item.path]))


def pytest_collection_finish() -> None:
    """What the imports have made stays: the garbage collector need not look at it, and seldom at the rest."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Names a failed test at once: a run that is stopped never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(
            f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-4000:]}", file=sys.__stderr__, flush=True
        )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ALIGNFLOW_HOME, set for this test and the processes that it starts."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("ALIGNFLOW_HOME", str(folder))
    return folder


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process starts by `sys.executable` is a fork that has imported everything (stand_in.py)."""
    forks.serve()
    monkeypatch.setattr(sys, "executable", os.environ[forks.PROGRAM])


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the databases of MLflow and Prefect, without runs: one for all processes of a test run."""
    from stages.runtime import workspace

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with workspace.lock(place / "ready.lock"):
        if not (place / "ready").exists():
            homes.make(place / "made")
            (place / "made").rename(place / "ready")
    return place / "ready"


@pytest.fixture(scope="session")
def database(ready: Path) -> Path:
    """An MLflow database without runs."""
    return ready / "mlflow.db"


@pytest.fixture
def ready_home(home: Path, ready: Path) -> Path:
    """An ALIGNFLOW_HOME in which the databases stand already."""
    return homes.furnish(home, ready)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data (`data/`) and a real tiny model (`models/tinystories-260k`)."""
    folder = Path(os.environ.get("ALIGNFLOW_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}: set ALIGNFLOW_SHARED to a folder with data/ and models/")
    return folder


@pytest.fixture(scope="session")
def tinystories(shared: Path) -> Path:
    """The folder of the 260k-parameter TinyStories model."""
    return shared / "models" / "tinystories-260k"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The folder of a tiny Llama with random weights."""
    from tests.support.architectures import save_tiny

    return save_tiny(tmp_path / "llama", "llama")


@pytest.fixture
def batch() -> "Batch":
    """Four random trees for a tiny model, in the shared layout."""
    from stages.engine.data.trees import collate
    from tests.support.architectures import random_trees

    return collate(random_trees(4), "shared", 2)


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> "Iterator[SyncPrefectClient]":
    """One Prefect server for all tests of a file, as `alignflow run` starts it, and a client for it."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING

    from flows.servers import local_prefect
    from tests.support import forked_servers

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(homes.furnish(tmp_path_factory.mktemp("prefect"), ready)))
        with forked_servers.begun(local_prefect.local_prefect()), get_client(sync_client=True) as client:
            # for the processes that a test starts
            patch.setenv("PREFECT_API_AUTH_STRING", str(PREFECT_API_AUTH_STRING.value()))
            yield client


@pytest.fixture(scope="module")
def server(prefect: "SyncPrefectClient") -> str:
    """The address of that server."""
    return str(prefect.api_url).rstrip("/")
