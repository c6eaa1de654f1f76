"""What must stand before something long begins: servers, work pools, schedules, GPUs. Each check takes seconds, and
raises a StageError that names what is missing and how to fix it.
"""

import base64
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL
from prefect.utilities.templating import apply_values

from flows.execution import gpu_slots
from flows.servers.mlflow_prefect import is_loopback
from schemas.errors import StageError, refuse
from stages import tracking
from stages.runtime import workspace

log = logging.getLogger("alignflow")

ANSWER_SECONDS = 5.0
START = "start it: alignflow up (it runs in the foreground)"


def check_servers() -> None:
    """Whether the Prefect and MLflow servers that are set answer, and let us in. What is not set is not asked.

    Raises:
        StageError: one does not answer, is something else, or refuses the password or the name it was asked by.
    """
    if PREFECT_API_URL.value():
        check_prefect(str(PREFECT_API_URL.value()))
    check_tracking()


def check_tracking() -> None:
    """Whether the place that runs are kept in is one that can keep them, and answers where it is a server.

    Raises:
        StageError: it does not.
    """
    if tracking.tracking_uri().startswith("http"):
        check_mlflow(tracking.tracking_uri())


def check_prefect(url: str) -> None:
    """Whether a Prefect server answers at its API's address and lets us in."""
    fix = f"{START}; or correct PREFECT_API_URL; or unset it, then runs from here need no server"
    if not urlparse(url).path.strip("/"):
        raise unreachable("PREFECT_API_URL", url, "the address lacks its end.", f"write {url.rstrip('/')}/api")
    answer = ask(f"{url}/health", "PREFECT_API_URL", url, fix)
    check_name(answer, "PREFECT_API_URL", url, url)
    if answer.status_code != 200:
        raise unreachable("PREFECT_API_URL", url, f"no Prefect server is there ({answer.status_code}).", fix)
    # The credentials that Prefect's own client sends. It may have veiled them.
    values: list[Any] = [PREFECT_API_AUTH_STRING.value(), PREFECT_API_KEY.value()]
    password, key = (one.get_secret_value() if hasattr(one, "get_secret_value") else one for one in values)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if password:
        headers = {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"}
    allowed = ask(f"{url}/work_pools/filter", "PREFECT_API_URL", url, fix, headers=headers, json={"limit": 1})
    if allowed.status_code in (401, 403):
        raise not_let_in()


def not_let_in() -> StageError:
    """The problem of a Prefect server that refuses our password, or asks for one where we have none."""
    fix = "set it to that of the server, user:password (PREFECT_SERVER_API_AUTH_STRING, or in its passwords.json)"
    return refuse("PREFECT_API_AUTH_STRING", "***", "the Prefect server refuses the password.", fix, kind="access")


def check_name(answer: httpx.Response, field: str, value: str, url: str) -> None:
    """Raise StageError where a server (door.py, or MLflow by itself) turns away the name that it was asked by."""
    if answer.status_code == 403 and ("Host" in answer.text or "ALLOWED_HOSTS" in answer.text):
        fix = f"make the server's MLFLOW_SERVER_ALLOWED_HOSTS hold {urlparse(url).netloc.rpartition('@')[2]}"
        raise unreachable(field, value, "the server does not go by this name.", fix)


def check_mlflow(url: str) -> None:
    """Whether an MLflow server answers there and lets us in."""
    fix = f"{START}; or correct MLFLOW_TRACKING_URI; or unset it, then runs are kept in {workspace.home()}"
    shown = tracking.without_passwords(url)
    answer = ask(f"{url}/health", "MLFLOW_TRACKING_URI", shown, fix)
    check_name(answer, "MLFLOW_TRACKING_URI", shown, url)
    if answer.status_code != 200:
        raise unreachable("MLFLOW_TRACKING_URI", shown, f"no MLflow server is there ({answer.status_code}).", fix)
    who = (os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD"))
    password = httpx.BasicAuth(*who) if all(who) else None  # type: ignore[arg-type]
    search = f"{url}/api/2.0/mlflow/experiments/search"
    allowed = ask(search, "MLFLOW_TRACKING_URI", shown, fix, json={"max_results": 1}, auth=password)
    if allowed.status_code == 401:
        raise tracking.not_let_in()
    check_name(allowed, "MLFLOW_TRACKING_URI", shown, url)
    if allowed.status_code == 404:
        raise unreachable("MLFLOW_TRACKING_URI", shown, "something else than MLflow is there.", fix)


def ask(url: str, field: str, value: str, fix: str, **request: Any) -> httpx.Response:
    """The answer to a GET, or to a POST when there is something to send.

    Raises:
        StageError: nobody answers in time.
    """
    local = is_loopback(urlparse(url).hostname or "")
    try:
        with httpx.Client(timeout=ANSWER_SECONDS, trust_env=not local) as client:
            return client.request("POST" if "json" in request else "GET", url, **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(field, value, f"there is no answer ({type(error).__name__}).", fix) from error


def unreachable(field: str, value: str, message: str, fix: str) -> StageError:
    """A server's problem."""
    return refuse(field, tracking.without_passwords(value), message, fix, kind="server")


def check_experiment(name: str, placed: bool) -> None:
    """Whether an experiment keeps its artifacts where the stages can reach them: `placed` ones run on other hosts.

    Raises:
        StageError: they are in a folder of this host, or behind a server that is not set.
    """
    uri = tracking.tracking_uri()
    if placed and not uri.startswith(("http", "postgresql", "mysql")):
        fix = f"{START}; or set MLFLOW_TRACKING_URI to a server's address"
        message = "stages on work pools need an MLflow server."
        raise refuse("MLFLOW_TRACKING_URI", uri, message, fix, kind="server")
    experiment = tracking.existing_experiment(name)
    location = "" if experiment is None else str(experiment.artifact_location)
    if placed and location.startswith(("/", "file:", "./")):
        fix = "give the config another `name`, so that MLflow makes an experiment whose artifacts go through the server"
        message = f"this experiment keeps its artifacts in {location}, which workers on other hosts don't have."
        raise refuse("name", name, message, fix, kind="experiment")
    if location.startswith("mlflow-artifacts:") and not uri.startswith("http"):
        message = "this experiment keeps its artifacts with an MLflow server."
        fix = f"{START}, or set MLFLOW_TRACKING_URI to its address; or give the config another `name`"
        raise refuse("name", name, message, fix, kind="experiment")


def check_pools(names: Sequence[str], workers: bool = True) -> None:
    """Whether the Prefect server has these work pools. Warns of one that is paused or that no worker serves.

    Raises:
        StageError: a pool is missing.
    """
    with get_client(sync_client=True) as client:
        for name in dict.fromkeys(names):
            try:
                pool = client.read_work_pool(name)
            except ObjectNotFound as error:
                available = ", ".join(sorted(pool.name for pool in client.read_work_pools())) or "none"
                message = f"there is no such work pool; the server has {available}."
                fix = "create it and its deployments: alignflow deploy; "
                fix += "or place the stage elsewhere (pools: in the config)"
                raise refuse("pools", name, message, fix, kind="pool") from error
            if pool.is_paused:
                log.warning("work pool %s is paused: its runs wait. Resume it: prefect work-pool resume %s", name, name)
            if workers and not any(w.status == WorkerStatus.ONLINE for w in client.read_workers_for_work_pool(name)):
                how = "alignflow up --pool" if pool.type == "process" else "prefect worker start --pool"
                log.warning("no worker serves work pool %s: its runs wait. Start one: %s %s", name, how, name)


def check_schedules(path: Path) -> None:
    """Whether every cron line and timezone of a prefect.yaml is one that Prefect understands.

    Raises:
        StageError: the first that is not; or the file is missing or no YAML.
    """
    for field, schedule in schedules(deployments(path)):
        cron = schedule.get("cron")
        if cron is None:
            continue
        value = f"{cron} ({schedule.get('timezone') or 'UTC'})"
        fix = "give minute, hour, day, month and weekday (0 3 * * 1), and a timezone like Europe/Berlin"
        if "{{" in value:
            variables = ", ".join(re.findall(r"{{\s*\$(\w+)", value))
            message = f"it is taken from {variables}, which is not set."
            raise refuse(field, value, message, "set it in the environment", kind="schedule")
        try:
            CronSchedule(cron=cron, timezone=schedule.get("timezone"))
        except ValueError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]  # pydantic's point
            reason = (lines or [str(error)])[0].partition(" [type=")[0].removeprefix("Value error, ").rstrip(".")
            message = f"Prefect does not understand it: {reason}."
            raise refuse(field, value, message, fix, kind="schedule") from error


class _Loader(yaml.SafeLoader):
    """Prefect's reader of YAML 1.1, but `1e-3` is a number, as in our configs, and not a text."""


_POWER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _POWER, list("-+0123456789"))


def prefect_file(path: Path) -> dict[str, Any]:
    """What a prefect.yaml holds, with its `{{ }}` as they stand.

    Raises:
        StageError: the file is missing, cannot be read, or holds no deployments.
    """
    fix = "give a prefect.yaml with `deployments:`"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise refuse("file", path, f"it cannot be read ({error}).", fix, kind="file") from error
    if not isinstance(content, dict) or not content.get("deployments"):
        raise refuse("file", path, "it has no deployments.", fix, kind="file")
    return content


def deployments(path: Path) -> list[dict[str, Any]]:
    """The deployments of a prefect.yaml, with the environment's variables put in. Raises as `prefect_file` does."""
    listed = prefect_file(path)["deployments"]
    return apply_values(listed, dict(os.environ), remove_notset=False)  # type: ignore[no-any-return]


def schedules(deployments: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schedule of the deployments, with the name of its field."""
    for deployment in deployments:
        name = deployment.get("name")
        if deployment.get("schedule"):
            yield f"deployments[{name}].schedule", deployment["schedule"]
        for number, schedule in enumerate(deployment.get("schedules") or []):
            yield f"deployments[{name}].schedules[{number}]", schedule


def check_gpu(wanted: int = 1) -> None:
    """Whether this machine has the given number of GPUs that runs here may use.

    Raises:
        StageError: it has fewer.
    """
    available = [name for name in gpu_slots.names() if not name.startswith("slot-")]
    if len(available) >= wanted:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES={visible!r} shows no more)" if visible is not None else ""
    fix = "run it on a machine with GPUs, or place the stage on the pool cpu"
    message = f"this machine has {len(available)} that can be used{why}."
    raise refuse("GPUs", wanted, message, fix, kind="gpu")
