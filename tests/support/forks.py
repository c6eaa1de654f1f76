"""Processes of tests that are forks of one that has imported what takes seconds, and has done nothing else.

There is one such server for all processes of a test run, since its imports take ten seconds of a core: for training
that is killed, for ranks, for commands and for servers.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVER = "ALIGNFLOW_TESTS_FORK_SERVER"
"""The variable with the address of a server that has been started for this process."""


_server: Any = forkserver._forkserver


def start(call: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Run a function that a module has by its name in a new process."""
    process = _context().Process(target=call, args=arguments)
    process.start()
    return process


def ended(process: ForkServerProcess, seconds: float = 300, story: Callable[[], str] = lambda: "") -> int:
    """The exit code; negative: the signal that killed it. 1: an exception, whose traceback is on stderr.

    One that hangs is killed, so that nothing waits for it. Raises AssertionError then, with what `story` tells.
    """
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    assert code is not None, f"the child hangs: {story()}"
    return code


def run(call: Callable[..., None], *arguments: object) -> int:
    """Run a function in a process of its own to its end."""
    return ended(start(call, *arguments))


def killed_after(seconds: float, call: Callable[..., None], *arguments: object) -> int:
    """Run a function in a process of its own and kill it (-9) after so many seconds; its exit code."""
    process = start(call, *arguments)
    process.join(seconds)
    process.kill()
    return ended(process)


def become(words: Sequence[str], environment: Mapping[str, str], folder: Path, out: Path, err: Path) -> None:
    """Let this fork be as a process that was started so; what it says goes behind what the two files hold. It ends with
    the process that has asked for it.
    """
    _end_with_the_starter()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, file in ((1, out), (2, err)):
        with file.open("a") as opened:
            os.dup2(opened.fileno(), descriptor)
    sys.argv[:] = words


def _end_with_the_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None

    def wait() -> None:
        wait_for([starter.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def serve_all() -> None:
    """Start the server, also for processes that this one starts."""
    _context()
    os.environ[SERVER] = _server._forkserver_address


def use_what_is_there() -> None:
    """Never start a server: one that others have started is known."""
    _server.ensure_running = resource_tracker.ensure_running


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    if address := os.environ.get(SERVER):
        use_what_is_there()
        _server._forkserver_address = address
        _server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it lives as long as its starter
    with contextlib.chdir(ROOT):  # where it finds that
        _server.ensure_running()
    return context
