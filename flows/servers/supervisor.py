"""Servers as processes: started, watched, and ended with whoever started them, even when that one was killed."""

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from schemas.environment import SAFE_PATH, python_path
from schemas.errors import StageError, refuse
from schemas.text import show
from stages import tracking
from stages.runtime import workspace
from stages.runtime.process import die_with_parent
from stages.runtime.resources import lack_in

HOST = "127.0.0.1"
MLFLOW_PORT = 5000
"""The port that MLflow gets, unless it is taken or another is asked for."""
FREE_PORTS = range(20_000, 32_768)
"""Where a free port is looked for: below those that systems give to outgoing connections, one of which could take it
in the ten seconds until a server listens."""
START_SECONDS = 180.0
STOP_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
LOG_ROOM = 2**16
"""Bytes that the end of a log may need."""
ORPHAN_SECONDS = 3.0
"""The same when the starter has died: 5 s after that nothing is to be left."""
RESTARTS = 5
"""A server that stops so often within a minute is given up."""
RESTART_WINDOW = 60.0
BESIDES_SECONDS = 30.0
PR_SET_CHILD_SUBREAPER = 36

# No telemetry; no job runners of MLflow's own, which we have no use for.
QUIET = {
    "DO_NOT_TRACK": "1",
    **SAFE_PATH,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


@dataclass(frozen=True)
class Server:
    """A process to start and to watch: how, and where it answers."""

    name: str
    url: str
    health: str
    command: list[str]
    environment: dict[str, str]
    without: frozenset[str] = frozenset()
    """Variables of the environment that it must not see."""
    folder: Path | None = None
    """Its working directory; None: that of the command."""

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return workspace.home() / "logs" / f"{self.name.lower().replace(' ', '-')}.log"

    def healthy(self) -> bool:
        """Whether it does its work."""
        with contextlib.suppress(urllib.error.URLError, OSError):
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without a proxy
            direct.open(self.health, timeout=5).close()
            return True
        return False


@dataclass
class Running:
    """A server and the process that it runs in now."""

    server: Server
    process: subprocess.Popen[bytes]
    keep: Sequence[int] = ()
    """Descriptors that stay open as long as it lives."""
    stopped: list[float] = field(default_factory=list)
    """When it stopped by itself within the last minute, seconds of the monotonic clock."""
    restart_at: float | None = None

    def look_after(self) -> None:
        """Start it again when it has stopped: at once, then after pauses of 1, 2, 4 s, so that whatever it fails on
        gets time to come back.

        Raises:
            StageError: it has stopped five times within a minute.
        """
        now = time.monotonic()
        if self.restart_at is None and self.process.poll() is not None:
            self.stopped = [*(before for before in self.stopped if now - before < RESTART_WINDOW), now]
            if len(self.stopped) >= RESTARTS:
                raise failed(self.server)
            pause = 0 if len(self.stopped) == 1 else 2 ** (len(self.stopped) - 2)
            # What a guard that was killed itself has left: it led a session, and what it had started is in it.
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if os.getsid(process.pid) == self.process.pid:
                        process.kill()
            when = f"in {pause} s" if pause else "now"
            show(f"{self.server.name} stopped (exit code {self.process.returncode}); starting it again {when}.")
            self.restart_at = now + pause
        if self.restart_at is not None and now >= self.restart_at:
            self.process, self.restart_at = start(self.server, self.keep, "ab"), None


def port(wanted: int | None, usual: int, option: str, host: str = HOST) -> int:
    """The wanted port; without one the usual (0: none is), or a free one when that is taken.

    Raises:
        StageError: the wanted port is taken, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    free = random.SystemRandom().sample(FREE_PORTS, 20)
    for candidate in [wanted] if wanted is not None else [usual or free[0], *free, 0]:
        with socket.socket(family) as probe:
            # As servers do: a port in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((host, candidate))
                return probe.getsockname()[1]
    if wanted is None:
        fix = "give an address of this machine, or 0.0.0.0 for all of them"
        raise refuse("--host", host, "nothing can listen there.", fix, kind="input")
    raise refuse(option, wanted, "the port is taken.", "choose another, or leave it out", kind="input")


def address(host: str, number: int) -> str:
    """Where this machine reaches a server that listens at a host."""
    reached = {"0.0.0.0": HOST, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reached}:{number}"


@contextlib.contextmanager
def running(servers: Sequence[Server], keep: Sequence[int] = ()) -> Iterator[list[Running]]:
    """The servers, healthy; ended on the way out. `keep`: descriptors that stay open as long as they live.

    Raises:
        StageError: one does not start.
    """
    interrupt_on_sigterm()
    started: list[Running] = []
    try:
        for server in servers:
            started.append(Running(server, start(server, keep), keep))
        for one in started:
            until_healthy(one.server, one.process)
        yield started
    finally:
        for one in started:
            one.process.terminate()
        for one in started:
            one.process.wait()


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that what it has started is ended too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def start(server: Server, keep: Sequence[int] = (), log_mode: Literal["wb", "ab"] = "wb") -> subprocess.Popen[bytes]:
    """Start a server under a guard (below), its output in a log file: a new one, or what follows in the old one."""
    server.log.parent.mkdir(parents=True, exist_ok=True)
    hidden = server.without | {"PREFECT_API_URL"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | QUIET | server.environment
    environment["PYTHONPATH"] = python_path()
    with server.log.open(log_mode) as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.servers.supervisor", str(os.getpid()), *server.command],
            env=environment,
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep,
            umask=workspace.PRIVATE,
        )


def until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server does its work.

    Raises:
        StageError: it has ended, or does not answer in time; with the end of its log.
    """
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if server.healthy():
            return
        time.sleep(0.3)
    raise failed(server)


def failed(server: Server) -> StageError:
    """The end of a server's log; or what the machine lacks, where the log says so."""
    text = tracking.without_passwords(server.log.read_text(errors="replace"))
    full = shutil.disk_usage(server.log.parent).free < LOG_ROOM  # then the log may have been cut before it says so
    end = "\n".join(text.splitlines()[-50:])
    if lack := lack_in("No space left on device" if full else end):
        return StageError(
            lack.model_copy(update={"message": f"{server.name} does not run: {lack.message}"}), status="failed"
        )
    if "address already in use" in end.lower():  # taken since it was looked at
        why = f"{server.name} does not run: another program has taken its port."
        return refuse("port", server.url, why, "start it again", kind="port_taken", status="failed")
    tail = "\n".join(text.splitlines()[-15:])
    return StageError(f"{server.name} does not run. The end of {server.log}:\n{tail}", status="failed", kind="server")


def watch(
    running: Sequence[Running], besides: Callable[[], None] | None = None, often: Callable[[], None] | None = None
) -> None:
    """Start again what stops by itself, until Ctrl-C or SIGTERM; every half minute do what is to be done `besides`, and
    every half second what is to be done `often`.

    Raises:
        StageError: one stops again and again.
    """
    done = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for one in running:
                one.look_after()
            if besides is not None and time.monotonic() - done > BESIDES_SECONDS:
                besides()
                done = time.monotonic()
            if often is not None:
                often()
            time.sleep(0.5)


def guard(parent: int, command: list[str]) -> int:
    """Run a command, and end it and all that it has started when the parent ends, even by SIGKILL.

    Servers start workers, and workers runs: a signal to the first alone would leave the others behind.
    """
    interrupt_on_sigterm()
    die_with_parent(signal.SIGTERM)
    if sys.platform == "linux":  # what a dead child leaves behind becomes a child of this process
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        return 1
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # All below this process: first politely, then not; in more of a hurry when the parent has died.
        this, began = psutil.Process(), time.monotonic()
        signal_all(this.children(recursive=True), signal.SIGTERM)
        while below := this.children(recursive=True):
            if time.monotonic() - began > (STOP_SECONDS if os.getppid() == parent else ORPHAN_SECONDS):
                signal_all(below, signal.SIGKILL)
            psutil.wait_procs(below, timeout=0.1)  # reaps those that have become children of this process


def signal_all(processes: Sequence[psutil.Process], which: signal.Signals) -> None:
    """Send a signal to those of the processes that still exist."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(which)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
