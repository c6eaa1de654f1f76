"""The whole command, stopped or killed while it trains: its exit code, and that nothing of it lives on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import EXIT_CODES
from tests.support import homes
from tests.support.journals import losses
from tests.support.processes import wait_for


def living(home: Path) -> list[int]:
    """Processes, other than this one, that work in a home: the command and all that it has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"ALIGNFLOW_HOME={home}".encode() in environment:  # of a dead one that is not yet reaped it is empty
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Path:
    """One home for all: the second run reuses what comes before the training, and goes on with that."""
    return homes.furnish(tmp_path_factory.mktemp("kept"), ready)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGINT, EXIT_CODES["preempted"]),
        (signal.SIGTERM, EXIT_CODES["preempted"]),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_nothing_outlives_the_command(how: signal.Signals, code: int, kept: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "run", "demo", "--set", "sft.epochs=100"]
    environment = {**os.environ, "ALIGNFLOW_HOME": str(kept)}

    def learned() -> int:
        return len(losses(kept, "work/*/metrics-*.jsonl"))

    before = learned()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    def trains() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        return learned() > before

    try:
        wait_for(trains, 240)
        assert len(living(kept)) >= 3  # the command, its Prefect server, the stage
        process.send_signal(how)
        assert process.wait(60) == code
        wait_for(lambda: not living(kept), 5)
    finally:
        for pid in living(kept):
            os.kill(pid, signal.SIGKILL)
        process.wait()
