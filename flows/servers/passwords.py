"""The passwords of the servers that `alignflow up` and `ui` start: those of the environment, else made at the first
start and kept in `passwords.json` of `home()`, for its owner alone.
"""

import os
import secrets
from collections.abc import Collection
from pathlib import Path
from urllib.parse import quote

from pydantic import Field, ValidationError

from schemas import Strict
from schemas.errors import refuse
from stages.runtime import workspace

SHORTEST = 32
"""Characters: made ones have more, so that a shorter one was not made here."""
USER = "alignflow"
"""Our commands and workers in MLflow: a user who may do all to runs and models, and nothing to other users."""
MLFLOW_CONFIG = "MLFLOW_AUTH_CONFIG_PATH"
"""An operator's own configuration of MLflow's users, which may be of any kind."""
LOGIN = "/alignflow/login"
"""The page of both servers (door.py) that a login link leads to."""


class Passwords(Strict):
    """Made ones. None of them is ever changed here: who wants others deletes the file."""

    prefect: str = Field(min_length=SHORTEST)
    """user:password, as PREFECT_SERVER_API_AUTH_STRING has it."""
    mlflow: str = Field(min_length=SHORTEST)
    """Of MLflow's user USER."""
    mlflow_admin: str = Field(min_length=SHORTEST)
    """Of MLflow's user `admin`, whom only the server itself uses."""
    mlflow_cookies: str = Field(min_length=SHORTEST)
    """Signs MLflow's cookies."""


def file() -> Path:
    """Where they are kept."""
    return workspace.home() / "passwords.json"


def kept() -> Passwords | None:
    """The made passwords; None before the first start.

    Raises:
        StageError: the file is no such file.
    """
    try:
        with file().open() as opened:
            os.fchmod(opened.fileno(), 0o600)  # whatever a copy or a backup has made of it
            return Passwords.model_validate_json(opened.read())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        fix = "delete it: the next `alignflow up` or `ui` makes new passwords"
        raise refuse("passwords", file(), "the file does not hold passwords.", fix, kind="access") from error


def made() -> Passwords:
    """The made passwords, made now where there are none. Call it under the lock of `up`."""
    known = kept()
    if known is not None:
        return known
    names = {name: secrets.token_urlsafe(32) for name in Passwords.model_fields}
    new = Passwords(**names | {"prefect": f"{USER}:{names['prefect']}"})
    beside = file().with_suffix(".new")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(new.model_dump_json(indent=2) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    beside.replace(file())
    return new


def explicit(server: str) -> bool:
    """Whether the environment sets who may use a server of ours, so that nothing made is to be shown."""
    own = ("PREFECT_SERVER_API_AUTH_STRING",) if server == "Prefect" else ("MLFLOW_AUTH_ADMIN_PASSWORD", MLFLOW_CONFIG)
    return any(os.environ.get(name) for name in own)


def login(server: str) -> str | None:
    """User and password of a server of ours, `user:password`, for people's browsers and our commands; None where the
    environment says who may use it, or nothing was made. Beside an admin of MLflow whom it names there is our user.
    """
    known = kept()
    if known is None or (explicit(server) if server == "Prefect" else os.environ.get(MLFLOW_CONFIG)):
        return None
    return known.prefect if server == "Prefect" else f"{USER}:{known.mlflow}"


def link(server: str, url: str) -> str | None:
    """The address that logs a browser in; None where the environment has passwords, which we show to nobody. The
    fragment stays in the browser: no log has it.
    """
    word = None if explicit(server) else login(server)
    return word and f"{url}{LOGIN}#{quote(word, safe=':')}"


def for_clients(servers: Collection[str] = ("MLflow", "Prefect")) -> dict[str, str]:
    """The variables by which clients are let in: those set for clients; else those set for our servers, or made for
    them. `servers`: which of the servers are ours; nobody else's is sent a password of ours.
    """
    wanted: dict[str, str | None] = {name: os.environ.get(name) for name in CLIENTS}
    if "Prefect" in servers and not wanted["PREFECT_API_AUTH_STRING"]:
        wanted["PREFECT_API_AUTH_STRING"] = os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or login("Prefect")
    if "MLflow" in servers and not wanted["MLFLOW_TRACKING_PASSWORD"] and not wanted["MLFLOW_TRACKING_USERNAME"]:
        word = login("MLflow")
        if word is None and (first := os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD")):  # of MLflow's first user
            word = f"{os.environ.get('MLFLOW_AUTH_ADMIN_USERNAME') or 'admin'}:{first}"
        user, _, password = (word or "").partition(":")
        wanted |= {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return {name: value for name, value in wanted.items() if value}


CLIENTS = ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""The variables that clients read."""
