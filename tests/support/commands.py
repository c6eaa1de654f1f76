"""`alignflow` as a user calls it, and what it says: its whole entry point, in a process of its own.

That process, its servers, and those of the stages that it runs are forks of one that has imported what takes seconds.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from flows import cli
from flows.execution import warm
from flows.servers import address_file
from schemas.environment import launcher
from schemas.stage import Request
from stages import __main__ as entry
from stages import warm as stages_warm
from tests.support import forked_servers, forks
from tests.support.forks import ROOT

RUN_STAGES = {"run", "sweep", "retrain"}
FORKING = {*RUN_STAGES, "up"}
"""Commands whose servers are forks too."""


def alignflow(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """How the command ends, with more variables in its environment."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = begun(words, out, err, environment)
        code = forks.ended(process, 600, lambda: out.read_text() + err.read_text())
        return subprocess.CompletedProcess([*map(str, words)], code, out.read_text(), err.read_text())


def begun(words: Sequence[object], out: Path, err: Path, environment: Mapping[str, str] = {}) -> ForkServerProcess:
    """The command as it begins. What it says goes behind what the two files hold, which may be one."""
    with open(os.devnull) as nothing, out.open("a") as said, err.open("a") as told:
        streams = [one.fileno() for one in (nothing, said, told)]
        everything = {**os.environ, **environment}
        return forks.start_as((__name__, "be"), ["", "alignflow", *map(str, words)], everything, Path.cwd(), streams)


@cache
def engine() -> warm.Warm:
    """A warm process for all flows of this one, each of which would import everything in one of its own."""
    asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        forks.start(_fork_stages, theirs)
    atexit.register(asks.close)  # before multiprocessing waits for it
    return _Given(asks)


class _Given(warm.Warm):
    """A warm process that others have started, and end."""

    def __init__(self, asks: socket.socket) -> None:
        super().__init__()
        self._given = asks

    def asks(self, request: Request, environment: Mapping[str, str]) -> int | None:
        return None if request.placement.ranks > 1 or launcher() else os.dup(self._given.fileno())


def _fork_stages(asks: socket.socket) -> None:
    """Be the process that forks, which has imported all; or its fork, which is a stage."""
    argv = stages_warm.serve(asks)
    if argv is not None:
        sys.exit(entry.start(argv))


def be(words: list[str]) -> None:
    """Be the command, which is the first of the words."""
    from prefect.context import refresh_global_settings_context

    sys.argv[:], command = words, {*words[1:2]}
    if command & RUN_STAGES:
        warm.warm, warm._warm = contextlib.nullcontext, engine()
    let_in = address_file.let_in

    def let_in_here(addresses: address_file.Addresses | None) -> None:
        """Prefect, which a command imports after this, is here already."""
        let_in(addresses)
        refresh_global_settings_context()

    address_file.let_in = let_in_here
    with forked_servers.forked() if command & FORKING else contextlib.nullcontext():
        cli.main()


def folder_with(folder: Path) -> Path:
    """The folder, with the program `alignflow` in it, for PATH."""
    folder.mkdir(parents=True)
    program = folder / "alignflow"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/support/stand_in.py alignflow "$@"\n')
    program.chmod(0o755)
    return folder
