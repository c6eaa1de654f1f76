"""Servers of tests as forks of a process that has imported what they need, which takes each of them seconds otherwise.

For tests of what asks a server. Those of servers themselves, and of their guards, start them as the product does.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from flows.servers import supervisor
from tests.support import forks


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Whatever server is started within is a fork, and has no guard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "subprocess", SUBPROCESS)
        yield


@contextlib.contextmanager
def begun(servers: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """What starts servers, which are forks; those that are started later are none."""
    with contextlib.ExitStack() as stack:
        with forked():
            stack.enter_context(servers)
        yield


def running(*servers: supervisor.Server) -> contextlib.AbstractContextManager[None]:
    """The servers, healthy; ended on the way out."""
    return begun(supervisor.running(servers))


class _Server:
    """As much of `subprocess.Popen` as `supervisor` asks of a server, and tests."""

    def __init__(
        self, command: list[str], *, env: Mapping[str, str], cwd: Path | None, stdout: IO[bytes], **_: object
    ) -> None:
        words = command[command.index("-m", command.index("-m") + 1) :]  # behind the guard's
        streams = (0, stdout.fileno(), stdout.fileno())
        self._process = forks.start_as((__name__, "_serve"), words, env, cwd or Path.cwd(), streams)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        self._process.join(supervisor.STOP_SECONDS)
        self._process.kill()
        return forks.ended(self._process)


def _serve(words: list[str]) -> None:
    """Run as Python does with these arguments, in a session of its own."""
    os.setsid()
    forks.be_python(words)


SUBPROCESS = SimpleNamespace(Popen=_Server, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
"""What `supervisor` starts servers by."""
