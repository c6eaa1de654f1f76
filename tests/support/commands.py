"""`alignflow` as a user calls it, and what it says: its whole entry point, in a process of its own.

That process, and those of the stages that it runs, are forks of two that have imported what takes seconds.
"""

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

from flows import cli
from flows.execution import warm
from flows.servers import address_file
from schemas.environment import launcher
from schemas.stage import Request
from stages import __main__ as entry
from stages import warm as stages_warm
from tests.support import forked_servers, forks

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
    asks = None
    if words and words[0] in RUN_STAGES and "--dry-run" not in words:
        asks = engine().asks(Request(stage="sft", version=1, params={}), os.environ)
    with contextlib.nullcontext() if asks is None else socket.socket(fileno=asks) as stages:
        arguments = ([*map(str, words)], {**os.environ, **environment}, Path.cwd(), out, err, stages)
        return forks.start(_run, *arguments)


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
    """Be the process that forks; or its fork, which is a stage."""
    stages_warm.warm_up(asks)
    argv = stages_warm.serve(asks)
    if argv is not None:
        sys.exit(entry.start(argv))


def _run(
    words: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path, stages: socket.socket | None
) -> NoReturn:
    """Become the command, which was started so: nothing of it returns to multiprocessing, whose exits are others."""
    from prefect.context import refresh_global_settings_context

    forks.become(["alignflow", *words], environment, folder, out, err)
    if stages is not None:
        warm.warm, warm._warm = contextlib.nullcontext, _Given(stages)
    let_in = address_file.let_in

    def let_in_here(addresses: address_file.Addresses | None) -> None:
        """Prefect, which a command imports after this, is here already."""
        let_in(addresses)
        refresh_global_settings_context()

    address_file.let_in = let_in_here
    code: object = 1
    try:
        refresh_global_settings_context()
        with forked_servers.forked() if {*words[:1]} & FORKING else contextlib.nullcontext():
            cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
