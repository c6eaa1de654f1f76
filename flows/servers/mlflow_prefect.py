"""How MLflow's and Prefect's servers are started, and who may reach them."""

import contextlib
import importlib.util
import ipaddress
import os
import shlex
import socket
import sys
from pathlib import Path

import psutil

from flows.servers import passwords
from flows.servers.passwords import Passwords
from flows.servers.supervisor import HOST, Server, address
from schemas.environment import LOGIN
from schemas.errors import refuse
from stages import tracking
from stages.runtime import databases, workspace
from stages.runtime.databases import Schema

PREFECT = Schema("Prefect", "prefect", "server/database/_migrations/versions/sqlite", holds=())
USERS = Schema("MLflow", "mlflow", "server/auth/db/migrations/versions", ("users",), table="alembic_version_auth")

# Passwords that MLflow or its handbook have used.
KNOWN_PASSWORDS = {"password", "password1234", "admin", "changeme"}
SHORTEST_PASSWORD = 12
"""MLflow takes no shorter one, and says so only in its log."""

EXTRA = "install what servers need besides: pip install 'alignflow[server]'"

# Leases on disk: one kept in memory would be forgotten when the server restarts, and its name stay taken.
KEEP_LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


def mlflow_server(number: int, host: str = HOST, made: Passwords | None = None) -> Server:
    """MLflow over MLFLOW_BACKEND_STORE_URI, else over the database that stages write to. Artifacts go through it, to
    MLFLOW_ARTIFACTS_DESTINATION, else to a folder of `home()`: clients need only its address. It asks for passwords
    where the environment has some, or some were made.
    """
    url = address(host, number)
    backend = os.environ.get("MLFLOW_BACKEND_STORE_URI") or tracking.tracking_uri()
    artifacts = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION") or str(workspace.home() / "artifacts")
    needs("MLFLOW_BACKEND_STORE_URI", backend, "postgresql", "psycopg2")
    needs("MLFLOW_ARTIFACTS_DESTINATION", artifacts, "s3", "boto3")
    # Not as options: anybody on the machine may read a command line, and these hold passwords.
    environment = {"MLFLOW_BACKEND_STORE_URI": backend, "MLFLOW_ARTIFACTS_DESTINATION": artifacts}
    environment |= {"MLFLOW_SERVER_ALLOWED_HOSTS": allowed_hosts(host)}
    # Without --app-dir uvicorn puts the working directory before all that Python imports; this folder holds no Python.
    door = f"--http flows.servers.door:Mlflow --app-dir {shlex.quote(str(workspace.home() / 'logs'))}"
    options = ["--host", host, "--port", str(number), "--workers", "1", "--uvicorn-opts", door]
    if has_passwords() or made is not None:
        options += ["--app-name", "basic-auth"]
        environment |= mlflow_users(made)
    command = [sys.executable, "-P", "-m", "stages.tracking.mlflow_server", "server", *options]
    return Server("MLflow", url, f"{url}/health", command, environment)


def mlflow_users(made: Passwords | None) -> dict[str, str]:
    """What MLflow's server is told about its users: what the environment says, else what was made."""
    own = {"MLFLOW_AUTH_CONFIG_PATH": os.environ.get("MLFLOW_AUTH_CONFIG_PATH") or str(auth_config())}
    if made is None:
        return own
    own |= {
        "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD") or made.mlflow_admin,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or made.mlflow_cookies,
    }
    if os.environ.get("MLFLOW_AUTH_CONFIG_PATH"):  # users of another kind, perhaps: they are the operator's
        return {name: value for name, value in own.items() if name in os.environ}
    return own | {LOGIN: f"{passwords.USER}:{made.mlflow}"}


def prefect_server(number: int, *more: str, host: str = HOST, password: str | None = None) -> Server:
    """Prefect over PREFECT_SERVER_DATABASE_CONNECTION_URL, else over the database that flows without a server write to;
    `more` options of `prefect server start`; `password`: user:password, which counts before the environment's.
    """
    url = address(host, number)
    for variable in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        uri = os.environ.get(variable, "")
        if uri and not uri.startswith(("postgresql+asyncpg:", "sqlite+aiosqlite:")):  # its own error has 100 lines
            fix = "begin it with postgresql+asyncpg:// (or sqlite+aiosqlite:///)"
            shown = tracking.without_passwords(uri)
            raise refuse(variable, shown, "Prefect has no driver for it.", fix, kind="server")
    check_prefect()
    module = "flows.servers.door"
    command = [sys.executable, "-P", "-m", module, "server", "start", "--host", host, "--port", str(number), *more]
    environment = {**KEEP_LEASES, "PREFECT_HOME": str(workspace.home() / "prefect")}
    # Flow runs that ended 90 days ago go, as events do sooner; left to itself Prefect keeps runs for ever.
    vacuum = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"
    environment |= {vacuum: os.environ.get(vacuum) or "events,flow_runs"}
    # Else its pages would ask 0.0.0.0, or port 4200 whatever the server's own is.
    environment |= {"PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL") or "/api"}
    environment |= {"MLFLOW_SERVER_ALLOWED_HOSTS": allowed_hosts(host)}
    origins = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
    environment |= {origins: os.environ.get(origins) or url}  # by default every page in the world
    if password is not None:
        environment |= {"PREFECT_SERVER_API_AUTH_STRING": password, LOGIN: password}
    return Server("Prefect", url, f"{url}/api/health", command, environment)


def needs(variable: str, uri: str, scheme: str, module: str) -> None:
    """Raise StageError when a uri of this scheme needs a module that is not installed."""
    if uri.startswith(scheme) and importlib.util.find_spec(module) is None:
        shown = tracking.without_passwords(uri)
        raise refuse(variable, shown, f"{module} is not installed.", EXTRA, kind="server")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def has_passwords() -> bool:
    """Whether MLflow is to ask for passwords: it has a first one, or a configuration of its own."""
    return any(os.environ.get(name) for name in ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH"))


def check_access(name: str, host: str) -> None:
    """Whether a server that other machines reach asks for a password.

    Raises:
        StageError: it would not; or what MLflow needs for it is missing.
    """
    missing = []
    if name == "Prefect" and not is_loopback(host) and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        missing.append("PREFECT_SERVER_API_AUTH_STRING (user:password)")
    if name == "MLflow" and not is_loopback(host) and not has_passwords():
        missing.append("MLFLOW_AUTH_ADMIN_PASSWORD")
    if missing:
        fix = f"set {' and '.join(missing)} in the environment, or listen on {HOST}"
        raise refuse("--host", host, f"{name} needs a password there.", fix, kind="access")
    check_passwords(name)


def check_passwords(server: str) -> None:
    """Raise StageError when a password of the environment is a known or a short one, or what asks for it is not
    installed.
    """
    field = "PREFECT_SERVER_API_AUTH_STRING" if server == "Prefect" else "MLFLOW_AUTH_ADMIN_PASSWORD"
    value = os.environ.get(field)
    if value is not None and server == "Prefect" and ":" not in value:
        raise refuse(field, "***", "it lacks its user.", "write it as user:password", kind="access")
    password = None if value is None else value.partition(":")[2] if server == "Prefect" else value
    if password is not None and password.lower() in KNOWN_PASSWORDS:
        raise refuse(field, "***", "this password is publicly known.", "choose another", kind="access")
    if password is not None and len(password) < SHORTEST_PASSWORD:
        fix = f"choose one of {SHORTEST_PASSWORD} characters or more: openssl rand -hex 24"
        raise refuse(field, "***", "the password is too short.", fix, kind="access")
    if server == "MLflow" and importlib.util.find_spec("flask_wtf") is None:
        raise refuse(field, "***", "flask_wtf is not installed.", EXTRA, kind="access")


def auth_config() -> Path:
    """MLflow's file about its users: their database is beside that of the runs. Holds no password."""
    path = workspace.home() / "mlflow-auth.ini"
    databases.check_and_back_up(workspace.home() / "mlflow-auth.db", USERS)  # before a newer MLflow migrates it
    lines = [
        "[mlflow]",
        "default_permission = NO_PERMISSIONS",
        f"database_uri = sqlite:///{workspace.home() / 'mlflow-auth.db'}",
        "admin_username = admin",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds = 60",  # checking a password takes a tenth of a second, on purpose
    ]
    workspace.write_whole(path, "\n".join(lines) + "\n")
    return path


def allowed_hosts(host: str) -> str:
    """Names under which the servers may be asked (others are refused, against DNS rebinding): those of loopback, of a
    server that others reach this machine's own names and addresses too, and those that the environment adds. Without
    the first our own workers and checks would be turned away.
    """
    more = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS")
    own = {"localhost", "127.0.0.1", "[::1]"}
    if not is_loopback(host):
        own |= {socket.gethostname(), socket.getfqdn(), "host.docker.internal"}
        addresses = [one for ends in psutil.net_if_addrs().values() for one in ends]
        own |= {one.address for one in addresses if one.family == socket.AF_INET}
        own |= {f"[{one.address.partition('%')[0]}]" for one in addresses if one.family == socket.AF_INET6}
    elif host not in own:
        own.add(f"[{host}]" if ":" in host else host)  # another address of loopback
    # MLflow reads patterns, in which brackets have a meaning of their own.
    names = [name.replace("[", "[[]") for name in sorted(own)]
    return ",".join([*names, *(f"{name}:*" for name in names), *([more] if more else [])])


# --- Prefect's database ---


def check_prefect() -> None:
    """Keep a copy of Prefect's database before a newer Prefect migrates it.

    Raises:
        StageError: it is damaged, or a newer Prefect has made it.
    """
    path = prefect_file()
    if path is not None:
        with workspace.lock(workspace.home() / "prefect" / "start.lock"):  # not while another run's server makes it
            databases.check_and_back_up(path, PREFECT)


def prefect_file() -> Path | None:
    """Where Prefect's server will keep its database; None where that is no file."""
    for variable in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        uri = os.environ.get(variable)
        if uri:
            path = uri.partition(":///")[2].partition("?")[0]
            return Path(path) if uri.startswith("sqlite") and path and not path.startswith(":memory:") else None
    return workspace.home() / "prefect" / "prefect.db"
