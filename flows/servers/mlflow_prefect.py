"""How MLflow's and Prefect's servers are started, and who may reach them."""

import contextlib
import importlib.util
import ipaddress
import os
import shlex
import socket
import sys
from pathlib import Path

from flows.servers import databases
from flows.servers.supervisor import HOST, Server, address
from schemas.errors import refuse
from stages import tracking
from stages.runtime import workspace

# Passwords that MLflow or its handbook have used.
KNOWN_PASSWORDS = {"password", "password1234", "admin", "changeme"}

EXTRA = "install what servers need besides: pip install 'alignflow[server]'"

# Leases on disk: one kept in memory would be forgotten when the server restarts, and its name stay taken.
KEEP_LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


def mlflow_server(number: int, host: str = HOST) -> Server:
    """MLflow over MLFLOW_BACKEND_STORE_URI, else over the database that stages write to. Artifacts go through it, to
    MLFLOW_ARTIFACTS_DESTINATION, else to a folder of `home()`: clients need only its address.
    """
    url = address(host, number)
    backend = os.environ.get("MLFLOW_BACKEND_STORE_URI") or tracking.tracking_uri()
    artifacts = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION") or str(workspace.home() / "artifacts")
    needs("MLFLOW_BACKEND_STORE_URI", backend, "postgresql", "psycopg2")
    needs("MLFLOW_ARTIFACTS_DESTINATION", artifacts, "s3", "boto3")
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", host, "--port", str(number), "--workers", "1"]
    # Else uvicorn puts the working directory before all that Python imports: this folder holds no Python.
    command += ["--uvicorn-opts", f"--app-dir {shlex.quote(str(workspace.home() / 'logs'))}"]
    # Not as options: anybody on the machine may read a command line, and these hold passwords.
    environment = {"MLFLOW_BACKEND_STORE_URI": backend, "MLFLOW_ARTIFACTS_DESTINATION": artifacts}
    if has_passwords():
        command += ["--app-name", "basic-auth"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": os.environ.get("MLFLOW_AUTH_CONFIG_PATH") or str(auth_config())}
    if not is_loopback(host):
        environment |= {"MLFLOW_SERVER_ALLOWED_HOSTS": os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS") or allowed_hosts()}
    return Server("MLflow", url, f"{url}/health", command, environment)


def prefect_server(number: int, *more: str, host: str = HOST) -> Server:
    """Prefect over PREFECT_SERVER_DATABASE_CONNECTION_URL, else over the database that flows without a server write to;
    `more` options of `prefect server start`.
    """
    url = address(host, number)
    check_prefect_database()
    databases.check_prefect()
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", host, "--port", str(number), *more]
    environment = {**KEEP_LEASES, "PREFECT_HOME": str(workspace.home() / "prefect")}
    # Else its pages would ask 0.0.0.0, or port 4200 whatever the server's own is.
    environment |= {"PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL") or "/api"}
    return Server("Prefect", url, f"{url}/api/health", command, environment)


def needs(variable: str, uri: str, scheme: str, module: str) -> None:
    """Raise StageError when a uri of this scheme needs a module that is not installed."""
    if uri.startswith(scheme) and importlib.util.find_spec(module) is None:
        shown = tracking.without_passwords(uri)
        raise refuse(variable, shown, f"{module} is not installed.", EXTRA, kind="server")


def check_prefect_database() -> None:
    """Raise StageError for a Prefect database that it cannot use: its own error has 100 lines."""
    for variable in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        uri = os.environ.get(variable, "")
        if uri and not uri.startswith(("postgresql+asyncpg:", "sqlite+aiosqlite:")):
            fix = "begin it with postgresql+asyncpg:// (or sqlite+aiosqlite:///)"
            shown = tracking.without_passwords(uri)
            raise refuse(variable, shown, "Prefect has no driver for it.", fix, kind="server")


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
    asks = name == "MLflow" and (has_passwords() or not is_loopback(host))
    if asks and not os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY"):
        missing.append("MLFLOW_FLASK_SERVER_SECRET_KEY (any long random text)")
    if missing:
        fix = f"set {' and '.join(missing)} in the environment, or listen on {HOST}"
        raise refuse("--host", host, f"{name} needs a password there.", fix, kind="access")
    if asks:
        check_passwords()


def check_passwords() -> None:
    """Raise StageError when MLflow's first password is a known one, or what asks for it is not installed."""
    field = "MLFLOW_AUTH_ADMIN_PASSWORD"
    if os.environ.get(field, "").lower() in KNOWN_PASSWORDS:
        raise refuse(field, "***", "this password is publicly known.", "choose another", kind="access")
    if importlib.util.find_spec("flask_wtf") is None:
        raise refuse(field, "***", "flask_wtf is not installed.", EXTRA, kind="access")


def auth_config() -> Path:
    """MLflow's file about its users: their database is beside that of the runs. Holds no password."""
    path = workspace.home() / "mlflow-auth.ini"
    databases.check_users(workspace.home() / "mlflow-auth.db")
    lines = [
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = sqlite:///{workspace.home() / 'mlflow-auth.db'}",
        "admin_username = admin",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
    ]
    workspace.write_whole(path, "\n".join(lines) + "\n")
    return path


def allowed_hosts() -> str:
    """Names under which MLflow may be asked (others it refuses, against DNS rebinding): this machine's, and private
    addresses.
    """
    own = {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn(), own_address()}
    private = ["10.*", "192.168.*", *(f"172.{number}.*" for number in range(16, 32))]
    return ",".join([*sorted(own), *(f"{name}:*" for name in sorted(own)), *private])


def own_address() -> str:
    """The address by which this machine speaks to others. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # an address reserved for documentation
        return probe.getsockname()[0]
    return HOST
