"""What the machine lacks is told from the words of whatever library noticed."""

import errno
import sqlite3
from pathlib import Path

import pytest

from flows.servers import supervisor
from stages.runtime.resources import out_of_resource


@pytest.mark.parametrize(
    ("error", "kind", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk", "make room there"),
        (sqlite3.OperationalError("database or disk is full"), "disk", "make room there"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk", "make room there"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "disk", "make it writable"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory", "lower it"),
        (MemoryError(), "memory", "lower it"),
    ],
)
def test_what_is_lacking_is_named_with_its_fix(error: Exception, kind: str, fix: str) -> None:
    problem = out_of_resource(error)
    assert problem is not None and problem.kind == kind
    assert problem.fix is not None and problem.fix.startswith(fix)
    assert problem.field == ("ALIGNFLOW_HOME" if kind == "disk" else "tokens_per_micro_batch")


def test_other_errors_are_no_lack() -> None:
    assert out_of_resource(ValueError("no such row")) is None


def test_a_server_that_finds_no_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    server = supervisor.Server("Prefect", "http://127.0.0.1:1", "/health", [], {})
    log = server.log
    log.parent.mkdir()
    log.write_text("Traceback\nsqlite3.OperationalError: database or disk is full\n\nThe above was the cause of\nExit")
    said = str(supervisor.failed(server))
    assert "Prefect does not run: sqlite3.OperationalError: database or disk is full. Fix: make room" in said
    log.write_text("ValueError: port")
    assert "The end of" in str(supervisor.failed(server)) and "ValueError: port" in str(supervisor.failed(server))
    log.write_text("")  # cut by the same full disk
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "No space left on device. Fix: make room" in str(supervisor.failed(server))
