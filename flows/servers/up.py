"""`alignflow up`: MLflow, Prefect, work pools and their workers on this machine, as long as the command runs.

`alignflow ui` is the same without workers. Nothing that they start outlives them, and everything that they keep is
in `home()`, or where the servers' own settings put it.
"""

import contextlib
import fcntl
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.execution import gpu_slots
from flows.servers import address_file, automations, checks, mlflow_prefect, passwords, pools, supervisor
from flows.servers.address_file import Addresses
from flows.servers.supervisor import HOST, Server
from schemas.environment import DEVICE_SLOTS, HOME, PARENT, ROOTS, roots
from schemas.errors import refuse
from schemas.text import show
from stages import tracking
from stages.runtime import workspace

# What only the servers need to know. Runs may be anybody's code.
SERVERS_ONLY = frozenset(
    {
        PARENT,
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_AUTH_CONFIG_PATH",
        "MLFLOW_ARTIFACTS_DESTINATION",
        "MLFLOW_BACKEND_STORE_URI",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    }
)


def up(
    wanted: Sequence[str] = pools.PROCESS_POOLS,
    host: str = HOST,
    mlflow_port: int | None = None,
    prefect_port: int | None = None,
    limit: int | None = None,
    often: Callable[[], None] | None = None,
    ready: Callable[[Addresses], None] | None = None,
) -> None:
    """Start what is not running elsewhere, with workers for each wanted pool, each of which takes up at most `limit`
    runs at a time (None: as cores and memory allow); print the addresses, and let `ready` have them; wait for Ctrl-C,
    doing `often` what is given.

    Where it already runs for this home, report that and return.

    Raises:
        StageError: a port is taken, a server would be open to everybody, something does not start, or stops again and
            again.
    """
    if mlflow_port and mlflow_port == prefect_port:
        raise refuse("--prefect-port", prefect_port, "it is MLflow's.", "give each its own", kind="input")
    if not all(wanted):
        raise refuse("--pool", "", "the name is empty.", "name a work pool, such as cpu or gpu", kind="input")
    wanted = list(dict.fromkeys(wanted))
    workspace.open_home()
    with address_file.lock_file().open("a") as lock:
        for tries in itertools.count():
            if taken(lock):
                break
            running = address_file.found()
            if running is not None:  # else it has only begun, or just died
                say_where(running, wanted)
                if ready is not None:
                    ready(running)
                return
            if tries >= 5 and address_file.file().exists():
                message = "another version of alignflow runs its servers there."
                raise refuse(HOME, workspace.home(), message, "end that one first, or use another home", kind="servers")
        address_file.file().unlink(missing_ok=True)
        # For the servers' guards to hold. Those of a command that was killed end in seconds: wait for them.
        with (workspace.home() / "up-guards.lock").open("a") as guards:
            fcntl.flock(guards, fcntl.LOCK_EX)
            keep = [guards.fileno()]
            bring_up(wanted, host, mlflow_port, prefect_port, limit or pools.runs_at_once(), keep, often, ready)
        address_file.file().unlink(missing_ok=True)


def taken(lock: IO[str]) -> bool:
    """Take the lock, unless another command holds it. Tries for a second: who looks for addresses holds it shortly."""
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def say_where(running: Addresses, wanted: Sequence[str]) -> None:
    """Say where the command that runs already has its servers.

    Raises:
        StageError: it runs without the wanted workers.
    """
    show(f"Already running for {workspace.home()}, as process {running.pid}:")
    for name, url in (("MLflow", running.mlflow), ("Prefect", running.prefect.removesuffix("/api"))):
        show(f"{name:8} {shown(name, url, running)}")
    lacking = [pool for pool in wanted if pool not in running.pools]
    if lacking:
        fix = "end that process (Ctrl-C, or SIGTERM), then start this again"
        raise refuse("--pool", ", ".join(lacking), "no worker of it serves these.", fix, kind="input")
    if wanted:
        show(f"workers  {', '.join(running.pools)}")


def bring_up(
    wanted: Sequence[str],
    host: str,
    mlflow_port: int | None,
    prefect_port: int | None,
    limit: int,
    keep: Sequence[int],
    often: Callable[[], None] | None,
    ready: Callable[[Addresses], None] | None,
) -> None:
    """Servers, then pools and workers. Workers end first, so that their runs can still report how they ended."""
    # Servers that the environment names, and that are therefore not started: name -> address.
    mlflow, prefect = tracking.tracking_uri(), os.environ.get("PREFECT_API_URL")
    elsewhere = ({"MLflow": mlflow} if mlflow.startswith("http") else {}) | ({"Prefect": prefect} if prefect else {})
    if elsewhere:
        checks.check_servers()  # those that the environment names
    ours = to_start(elsewhere, host, mlflow_port, prefect_port)
    urls = elsewhere | {server.name: server.url for server in ours}
    if "Prefect" not in elsewhere:
        urls["Prefect"] += "/api"
    where = Addresses(pid=os.getpid(), mlflow=urls["MLflow"], prefect=urls["Prefect"], pools=list(wanted))
    where = where.model_copy(update={"ours": [server.name for server in ours]})
    settings: dict[Any, Any] = {PREFECT_API_URL: where.prefect}  # with the password where it has one
    if password := passwords.for_clients(where.ours).get("PREFECT_API_AUTH_STRING"):
        settings[PREFECT_API_AUTH_STRING] = password
    with supervisor.running(ours, keep) as servers, temporary_settings(settings):
        if wanted:
            with get_client(sync_client=True) as client:
                for pool in [one for one in wanted if one in pools.templates()]:
                    pools.apply(client, pool)
            checks.check_pools(wanted, workers=False)  # those that have no template must already exist
        workers = [one for pool in wanted for one in workers_of(pool, where, limit)]
        with supervisor.running(workers, keep) as at_work:
            # For other commands of this home.
            public = {name: tracking.without_passwords(getattr(where, name)) for name in ("mlflow", "prefect")}
            workspace.write_whole(address_file.file(), where.model_copy(update=public).model_dump_json(indent=2))
            say_all(where, elsewhere, limit)
            if ready is not None:
                ready(where.model_copy(update=public))
            supervisor.watch([*servers, *at_work], automations.RunWatch() if wanted else None, often)
            show("Stopping the servers." if not wanted else "Stopping workers and servers.")


def to_start(elsewhere: dict[str, str], host: str, mlflow_port: int | None, prefect_port: int | None) -> list[Server]:
    """The servers that are not elsewhere. All that can be refused is refused before the first starts."""
    for name in ("MLflow", "Prefect"):
        if name not in elsewhere:
            mlflow_prefect.check_access(name, host)
    ours, made = [], None if elsewhere.keys() == {"MLflow", "Prefect"} else passwords.made()
    if "MLflow" not in elsewhere:
        number = supervisor.port(mlflow_port, supervisor.MLFLOW_PORT, "--mlflow-port", host)
        ours.append(mlflow_prefect.mlflow_server(number, host, made))
        if not os.environ.get("MLFLOW_BACKEND_STORE_URI"):
            tracking.setup()
    if "Prefect" not in elsewhere:
        number = supervisor.port(prefect_port, 4200, "--prefect-port", host)
        ours.append(mlflow_prefect.prefect_server(number, host=host, password=passwords.login("Prefect")))
    return ours


def shown(name: str, url: str, where: Addresses) -> str:
    """A server's address for a person: one that logs the browser in, where the password was made here."""
    login = passwords.link(name, url) if name in where.ours else None
    page = "/#/experiments?workflowType=machine_learning" if name == "MLflow" and not login else ""
    return tracking.without_passwords(url) + page + (f"   log in: {login}" if login else "")


def say_all(where: Addresses, elsewhere: dict[str, str], limit: int) -> None:
    """Say where everything is."""
    for name, url in (("MLflow", where.mlflow), ("Prefect", where.prefect.removesuffix("/api"))):
        note = " (already running, from the environment)" if name in elsewhere else ""
        show(f"{name:8} {shown(name, url, where)}{note}")
    if where.pools:
        show(f"workers  {', '.join(where.pools)}; at most {limit} {'run' if limit == 1 else 'runs'} at a time each")
        if "gpu" in where.pools and not gpu_slots.names():
            show("No GPU here: stages placed on the pool gpu run on the CPU.")
        show("In another terminal: alignflow deploy")
    elif "Prefect" not in elsewhere:
        show(f"Runs appear there. They start faster with: export PREFECT_API_URL={where.prefect}")
    show("Press Ctrl-C to stop.")


@dataclass(frozen=True)
class Worker(Server):
    """A process that takes up a pool's runs. It is healthy once the server has heard of it."""

    pool: str = ""
    title: str = ""
    began: float = field(default_factory=time.time)

    def healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            for worker in client.read_workers_for_work_pool(self.pool):
                heard = worker.last_heartbeat_time
                # Of this process, and not of one before it with the same name.
                if worker.name == self.title and heard is not None and heard.timestamp() >= self.began:
                    return True
        return False


def workers_of(pool: str, where: Addresses, limit: int) -> list[Worker]:
    """A pool's workers on this machine. Where runs are processes, one takes up whole runs and one placed stages, each
    as many as the limit says; elsewhere a run waits for a job on another machine, and only one worker without limit
    is there.
    """
    if pool not in pools.PROCESS_POOLS:
        return [worker(pool, pool, [], where, limit)]
    options = {pool: "default", f"{pool} stages": pools.STAGES_QUEUE}
    limited = ["--limit", str(limit)]
    return [worker(pool, name, ["--work-queue", queue, *limited], where, limit) for name, queue in options.items()]


def worker(pool: str, name: str, options: Sequence[str], where: Addresses, limit: int) -> Worker:
    """A worker for a pool. It starts again under its name, so the server lists it once."""
    title = f"{name} on {socket.gethostname()}"
    command = [sys.executable, "-P", "-m", "flows.worker", "--pool", pool, "--name", title, *options]
    command += ["--install-policy", "never", "--no-create-pool-if-not-found"]
    environment = worker_environment(where, limit)
    calm = workspace.home() / "logs"  # no settings file of the folder that `up` was called in is read
    return Worker(f"worker {name}", where.prefect, "", command, environment, SERVERS_ONLY, calm, pool=pool, title=title)


def worker_environment(where: Addresses, limit: int) -> dict[str, str]:
    """What runs need to know: the servers, this home, the folders that a config's files may be in, and how many of
    them may train at a time where there is no GPU.
    """
    return passwords.for_clients(where.ours) | {
        DEVICE_SLOTS: os.environ.get(DEVICE_SLOTS) or str(limit),
        HOME: str(workspace.home()),
        ROOTS: os.pathsep.join(map(str, roots() or [Path.cwd()])),
        "MLFLOW_TRACKING_URI": where.mlflow,
        # A template says `python`, which is to be this one on every machine.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PREFECT_API_URL": where.prefect,
        "PREFECT_HOME": os.environ.get("PREFECT_HOME") or str(workspace.home() / "prefect"),
    }
