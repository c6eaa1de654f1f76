"""A flow's warm process (stages/warm.py), of which its stages are forks instead of importing everything anew."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from schemas.environment import WARM, launcher
from schemas.stage import Request

COMMAND = [sys.executable, "-P", "-m", "stages.warm"]
"""A stage's name and request follow for its stand-in; without them it is the process that forks."""

_NVIDIA = Path("/proc/driver/nvidia")


class Warm:
    """The warm process of one flow; it begins with the first stage that can use it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._asks: socket.socket | None = None

    def asks(self, request: Request, environment: Mapping[str, str]) -> int | None:
        """A descriptor, the caller's to close, on which a stage asks for its fork; None where it starts by itself."""
        if request.placement.ranks > 1 or sys.platform != "linux" or _NVIDIA.is_dir() or launcher():
            return None
        if self._process is None and not (request.spec.needs_device or request.stage == "base"):
            return None  # it imports little, and nobody needs the rest yet
        with self._guard:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    self._process = subprocess.Popen(
                        COMMAND,
                        env={**environment, WARM: str(theirs.fileno())},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,  # what stops it stops a stage too, and is said there
                        process_group=0,  # Ctrl-C goes to the flow alone
                        pass_fds=[theirs.fileno()],
                    )
            assert self._asks is not None
            return os.dup(self._asks.fileno())  # another thread may find the process dead, and close its own

    def end(self) -> None:
        """End the process, and with it the stages that are its forks."""
        if self._asks is not None:
            self._asks.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


_warm: Warm | None = None


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """Within this, stages that this process starts are forks where they can be. For those who start several."""
    global _warm
    _warm = own = Warm()
    try:
        yield
    finally:
        _warm = None
        own.end()


def asks(request: Request, environment: Mapping[str, str]) -> int | None:
    """`Warm.asks` of the flow around; None without one."""
    return None if _warm is None else _warm.asks(request, environment)
