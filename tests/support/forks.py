"""Processes of tests that are forks of one that has imported what takes seconds, and has done nothing else.

There is one such server for all processes of a test run, since its imports take ten seconds of a core: for training
that is killed, for ranks, for commands and for servers. What a fork starts is a fork again (imported.py).
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SERVER = "ALIGNFLOW_TESTS_FORK_SERVER"
"""The variable with the address of the server."""
PROGRAM = "ALIGNFLOW_TESTS_PYTHON"
"""The variable with the program that is PYTHON, for what wants its name alone."""
PYTHON = [sys.executable, str(Path(__file__).with_name("stand_in.py"))]
"""A Python that has imported everything: see stand_in.py."""
BE_PYTHON = ("tests.support.forks", "be_python")


_server: Any = forkserver._forkserver


def start(call: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Run a function that a module has by its name in a new process, which says what it says where this one does."""
    with Connection(os.dup(1)) as out, Connection(os.dup(2)) as err:
        process = serve().Process(target=_call, args=(call, arguments, out, err))
        process.start()
    return process


def _call(call: Callable[..., None], arguments: Sequence[object], out: Connection, err: Connection) -> None:
    for target, stream in ((1, out), (2, err)):
        os.dup2(stream.fileno(), target)
        stream.close()
    call(*arguments)


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


def start_as(
    be: tuple[str, str],
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    streams: Sequence[int] = (0, 1, 2),
) -> ForkServerProcess:
    """Start a module's function as a program: with these words, variables, folder, and the descriptors that become its
    stdin, stdout and stderr. It ends when this process ends, however that is, unless it becomes another program.
    """
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(Connection(os.dup(stream))) for stream in streams]
        return start(_be, be, [*words], dict(environment), folder, given)


def _be(
    be: tuple[str, str], words: list[str], environment: dict[str, str], folder: Path, streams: list[Connection]
) -> NoReturn:
    """What `start_as` starts; it leaves as Python does: nothing returns to multiprocessing, whose exits are others."""
    from prefect.context import refresh_global_settings_context

    from schemas.environment import PARENT

    _end_with_the_starter()
    os.environ.clear()
    os.environ.update(environment)
    starter = multiprocessing.parent_process()
    if starter is not None and os.environ.get(PARENT) == str(starter.pid):
        os.environ[PARENT] = str(os.getppid())
    os.chdir(folder)
    for target, stream in enumerate(streams):
        os.dup2(stream.fileno(), target)
        stream.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as this process lives
    sys.argv[:] = ["", *words]
    refresh_global_settings_context()
    code: object = 1
    try:
        module, name = be
        code = getattr(import_module(module), name)(words)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def be_python(words: list[str]) -> None:
    """Run as Python does with these arguments."""
    how, what, *more = words
    sys.argv[:] = [what if how == "-m" else how, *more]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _end_with_the_starter() -> None:
    starter = multiprocessing.parent_process()
    assert starter is not None

    def wait() -> None:
        wait_for([starter.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def use_what_is_there() -> None:
    """Never start a server: one that others have started is known."""
    _server.ensure_running = resource_tracker.ensure_running


def program(file: Path, *words: str) -> Path:
    """Write a program that is PYTHON with these words before its own."""
    line = shlex.join([*PYTHON, *words])
    file.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
    file.chmod(0o755)
    return file


@cache
def serve() -> ForkServerContext:
    """The server, which is started unless it runs: for this process and for all that it starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    if multiprocessing.parent_process() is not None:
        return context  # a fork knows the one that it comes from
    if address := os.environ.get(SERVER):
        use_what_is_there()
        _server._forkserver_address = address
        _server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # it lives as long as its starter
        return context
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[PROGRAM] = str(program(Path(folder, "python")))
    with contextlib.chdir(ROOT):  # where it finds what it imports
        _server.ensure_running()
    os.environ[SERVER] = _server._forkserver_address
    return context
