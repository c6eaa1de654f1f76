"""`alignflow ui`: MLflow and Prefect on 127.0.0.1, for as long as the command runs and not a second longer."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from schemas.stage import StageError
from stages import tracking

HOST = "127.0.0.1"
START_SECONDS = 180.0
STOP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1

# No telemetry; no job runners of MLflow's own, which we have no use for.
QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


# Leases on disk: one kept in memory would be forgotten when the server restarts, and its name stay taken.
KEEP_LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


@dataclass(frozen=True)
class Server:
    """A server to start: how, and where it answers."""

    name: str
    url: str
    health: str
    command: list[str]
    environment: dict[str, str]

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return tracking.home() / "logs" / f"{self.name.lower()}.log"


def port(wanted: int | None, usual: int, option: str) -> int:
    """The wanted port; without one the usual, or a free one when that is taken.

    Raises:
        StageError: the wanted port is taken.
    """
    for candidate in [wanted] if wanted is not None else [usual, 0]:
        with socket.socket() as probe:
            # As servers do: a port in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, candidate))
                return probe.getsockname()[1]
    raise StageError("the port is taken.", field=option, value=wanted, mend="choose another, or leave it out")


def mlflow_server(number: int) -> Server:
    """MLflow over the database that stages write to."""
    url = f"http://{HOST}:{number}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(number), "--workers", "1"]
    command += ["--backend-store-uri", tracking.tracking_uri()]
    command += ["--artifacts-destination", str(tracking.home() / "artifacts")]
    return Server("MLflow", url, f"{url}/health", command, {})


def prefect_server(number: int, *more: str) -> Server:
    """Prefect over the database that flows without a server write to; `more` options of `prefect server start`."""
    url = f"http://{HOST}:{number}"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(number), *more]
    return Server(
        "Prefect", url, f"{url}/api/health", command, {**KEEP_LEASES, "PREFECT_HOME": str(tracking.home() / "prefect")}
    )


def serve(mlflow_port: int | None, prefect_port: int | None) -> None:
    """Start what is not running elsewhere, say where it is, and wait for Ctrl-C. Ends everything it started.

    Raises:
        StageError: a port is taken, or a server does not start or stops by itself.
    """
    elsewhere = {
        "MLflow": tracking.without_passwords(tracking.tracking_uri())
        if tracking.tracking_uri().startswith("http")
        else None,
        "Prefect": tracking.without_passwords(os.environ.get("PREFECT_API_URL", "")) or None,
    }
    servers = []
    if elsewhere["MLflow"] is None:
        tracking.setup()
        servers.append(mlflow_server(port(mlflow_port, 5000, "--mlflow-port")))
    if elsewhere["Prefect"] is None:
        servers.append(prefect_server(port(prefect_port, 4200, "--prefect-port")))
    with running(servers) as processes:
        for name, url in elsewhere.items():
            if url is not None:
                say(f"{name:8} {url} (runs already: the environment says so)")
        for server in servers:
            say(f"{server.name:8} {server.url}")
        if elsewhere["Prefect"] is None:
            say(f"Runs show up by themselves. They start faster with: export PREFECT_API_URL={servers[-1].url}/api")
        say("Ctrl-C ends this.")
        wait(servers, processes)


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


@contextlib.contextmanager
def running(servers: list[Server]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The servers' processes, healthy; ended on the way out."""
    interrupt_on_sigterm()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for server in servers:
            processes.append(start(server))
        for server, process in zip(servers, processes, strict=True):
            until_healthy(server, process)
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that what it has started is ended too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def start(server: Server) -> subprocess.Popen[bytes]:
    """Start a server under a guard (below), its output in a log file."""
    server.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | QUIET | server.environment
    with server.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.servers", str(os.getpid()), *server.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers.

    Raises:
        StageError: it has ended, or does not answer in time; with the end of its log.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, OSError):
            direct.open(server.health, timeout=5).close()
            return
        time.sleep(0.3)
    raise failed(server)


def failed(server: Server) -> StageError:
    """What a server said last."""
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-15:])
    return StageError(f"{server.name} does not run. The end of {server.log}:\n{tail}", status="failed", kind="server")


def wait(servers: list[Server], processes: list[subprocess.Popen[bytes]]) -> None:
    """Return on Ctrl-C or SIGTERM; raise StageError when a server stops by itself."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for server, process in zip(servers, processes, strict=True):
                if process.poll() is not None:
                    raise failed(server)
            time.sleep(0.5)


def guard(parent: int, command: list[str]) -> int:
    """Run a command in this process's own group, and end the group when the parent ends, even by SIGKILL.

    Servers start workers; a signal to the server alone would leave them behind.
    """
    interrupt_on_sigterm()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    child = subprocess.Popen(command)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the group's signal reaches this process too
        os.killpg(0, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        if child.poll() is None:
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
