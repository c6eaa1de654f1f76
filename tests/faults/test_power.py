"""The power goes right after a stage has finished: a real file system, of which only what was synced is left."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.execution import process as execution_process
from schemas.stage import STAGES, Request, StageSpec
from tests.support.forks import PYTHON
from tests.support.scripted import FAKE

FIND = "import sys; from stages import tracking; sys.exit(tracking.find(sys.argv[1]) is None)"


class Disk:
    """A file system in a file, whose unsynced writes can be dropped."""

    def __init__(self, folder: Path) -> None:
        self.image, self.place = folder / "disk", folder / "mounted"
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(64 * 2**20)

    def run(self, *command: object) -> None:
        """Run a command of the system; skip the test where this machine does not let it."""
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted from a file here: {done.stderr.strip()}")

    def mount(self) -> None:
        self.run("mount", "-o", "loop", self.image, self.place)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)

    def cut_the_power(self) -> None:
        """Put in its place what has reached the file: a copy of it shares no cache with the mounted system."""
        copy = self.image.with_name("after")
        shutil.copyfile(self.image, copy)
        self.unmount()
        self.image = copy
        self.mount()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    disk = Disk(tmp_path)
    disk.run("mkfs.ext4", "-qF", disk.image)
    disk.mount()
    yield disk
    disk.unmount()


@pytest.mark.slow
@pytest.mark.parametrize("model", [False, True])
def test_a_finished_stage_outlives_it(disk: Disk, database: Path, monkeypatch: pytest.MonkeyPatch, model: bool) -> None:
    home = disk.place / "home"
    home.mkdir()
    shutil.copy(database, home / "mlflow.db")
    os.sync()
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))
    monkeypatch.setattr(execution_process, "COMMAND", FAKE)
    monkeypatch.setitem(STAGES, "fake", StageSpec(1))
    request = Request(stage="fake", version=1, params={"model": model}, name="count", experiment="tests")
    (disk.place.parent / "request.json").write_text(request.model_dump_json())
    # Processes of their own: nothing here holds a file of the disk open.
    environment = execution_process.environment(request)
    stage = [*FAKE, "fake", str(disk.place.parent / "request.json")]
    assert subprocess.run(stage, env=environment, timeout=120).returncode == 0
    disk.cut_the_power()
    find = [*PYTHON, "-c", FIND, request.key()]
    assert subprocess.run(find, env=environment, timeout=120).returncode == 0, "the stage was done, and is lost"
