"""Processes as tests look at them: what a command has started, whether it lives, and waiting for what it does."""

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def wait_for(condition: Callable[[], object], seconds: float = 600, story: Callable[[], object] = lambda: "") -> None:
    """Return as soon as a condition holds. The limit is only for a hang; `story` is asked then for what has happened.

    One that takes long, as it asks a server, is asked less often: it would take the core from what it waits for.

    Raises AssertionError.
    """
    end = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < end, f"it does not come: {story()}"
        time.sleep(min(5.0, max(0.05, 19 * (now - asked))))


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that run still; a dead one that nobody has asked after does no more."""
    return [pid for pid in pids if state(pid) not in ("", "Z")]


def state(pid: int) -> str:
    """A process's state as the kernel has it; empty when there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def left_after(pids: list[int], seconds: float) -> list[int]:
    """Those that still run after so many seconds; returns early when there are none."""
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.1)
    return alive(pids)


def below(process: subprocess.Popen[Any]) -> list[int]:
    """All processes that a command has started, directly or not; none when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    return []
