"""Stages as forks of a process that is itself a fork, and so has already imported what stages/warm.py imports."""

import os
import socket
import sys
from collections.abc import Mapping

from flows.execution import warm
from schemas.environment import launcher
from schemas.stage import Request
from stages import __main__ as entry
from stages import warm as stages_warm
from tests.support import forks


class Warm(warm.Warm):
    """A flow's warm process: for flows in forks, and for those in pytest's own process."""

    def asks(self, request: Request, environment: Mapping[str, str]) -> int | None:
        if request.placement.ranks > 1 or launcher():
            return None
        with self._guard:
            if self._asks is None:
                asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    self._forked = forks.start(_fork_stages, theirs)
                self._asks = asks
            return os.dup(self._asks.fileno())

    def end(self) -> None:
        if self._asks is not None:
            self._asks.close()
            self._forked.kill()
            self._forked.join()


def _fork_stages(asks: socket.socket) -> None:
    """Run as the process that forks; in its forks, run as the stage."""
    argv = stages_warm.serve(asks)
    if argv is not None:
        sys.exit(entry.start(argv))
