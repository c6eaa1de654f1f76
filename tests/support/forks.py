"""Processes of tests that are forks of one that has imported what takes seconds, and has done nothing else.

There is one such server in a process of pytest, since Python has one: for training that is killed, for ranks, and for
commands.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
    """Let this fork be as a process that was started so; what it says goes behind what the two files hold."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, file in ((1, out), (2, err)):
        with file.open("a") as opened:
            os.dup2(opened.fileno(), descriptor)
    sys.argv[:] = words


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    with contextlib.chdir(ROOT):  # where it finds that
        forkserver.ensure_running()
    return context
