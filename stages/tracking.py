"""Where runs, metrics and artifacts are kept: the one place that talks to MLflow.

`StageRun` is what a stage sees of it. Training never waits here: metrics go to a journal file, and a side thread ships
them. `find` looks up a finished run by its key, `fetch` brings an artifact, and both check its digest.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import quote, unquote, urlencode, urlparse

from schemas.stage import Artifact, Problem, Request, Result, StageError

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger("alignflow")

# MLflow reads these when it is imported: no telemetry, no progress bars, no git, short waits on a server that is away.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

# Stages that make or judge a model; their runs carry its name as the tag `model`.
WITH_MODEL = {"base", "sft", "reward", "align", "evaluate"}

# Tag of a finished run whose artifact was found to be gone or altered.
BAD = "artifact.bad"

SHIP_SECONDS = 2.0
METRICS_PER_BATCH = 1000
ENTRIES_PER_BATCH = 100
RETRY_SECONDS = 90.0
PROGRESS_SECONDS = 5.0
# MLflow's own limits, in characters.
PARAM_LENGTH = 6000
TAG_LENGTH = 5000
KEY_LENGTH = 250

# What the errors say of a locked database, and of a server that is away or busy.
PASSING = (
    r"database (table )?is locked|error code (429|502|503|504)|too many (429|502|503|504) error|max retries exceeded"
    r"|connection (refused|reset|aborted|timed out)|failed to establish|read timed out"
)

T = TypeVar("T")


# --- Places -----------------------------------------------------------------------------------------------------------


def home() -> Path:
    """Folder of everything that is kept here: ALIGNFLOW_HOME, else `.alignflow` in the working directory."""
    return Path(os.environ.get("ALIGNFLOW_HOME") or ".alignflow").absolute()


def work_folder(key: str) -> Path:
    """Folder of a stage's lock, checkpoints and journal; it outlives a crash."""
    return home() / "work" / key


def clear_work(key: str) -> None:
    """Drop the checkpoints and journals of a stage that is done. ALIGNFLOW_KEEP_WORK=1 keeps them."""
    if os.environ.get("ALIGNFLOW_KEEP_WORK") == "1":
        return
    for path in work_folder(key).iterdir():
        if path.is_dir() and path.name != "asks":
            shutil.rmtree(path)
        elif path.name.startswith("metrics-"):
            path.unlink()


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file under `home()`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@contextlib.contextmanager
def lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on a file. The kernel frees it when the holder dies. `waiting` is logged before a wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                log.info("%s", waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file unless another process does; whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# --- MLflow's client --------------------------------------------------------------------------------------------------


@cache
def _entities() -> Any:
    """MLflow's value classes. Imported late: MLflow takes over a second, and much of this module needs none of it."""
    import mlflow.entities

    return mlflow.entities


@cache
def _client_for(uri: str) -> "MlflowClient":
    """A client whose database exists and is up to date; migrated under a lock, since two migrations at once clash."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # no wish of the user's: a pickle runs code
    from mlflow.exceptions import MlflowException  # late for the same reason as above
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    with lock(database.with_suffix(".lock")):
        if not database.exists():
            database.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer don't lock each other out
        client = MlflowClient(uri)
        try:
            client.search_experiments(max_results=1)
        except MlflowException as error:
            if "out-of-date" not in str(error):
                raise
            log.info("migrating %s to this version of MLflow", database)
            subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True, capture_output=True)
        return MlflowClient(uri)


def client() -> "MlflowClient":
    """MLflow's client for `tracking_uri()`."""
    return _client_for(tracking_uri())


def setup() -> None:
    """Make the database, or bring it up to date."""
    client()


def _passing(error: Exception) -> bool:
    """Whether trying again can help: a locked database, a server that is away."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return re.search(PASSING, str(error), re.IGNORECASE) is not None


def without_passwords(text: str) -> str:
    """The text with its addresses as they may be shown: what stands before `@` is nobody else's business."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def _first_line(error: Exception) -> str:
    return without_passwords((str(error).splitlines() or [type(error).__name__])[0])[:200]


@dataclass
class _Clock:
    """Seconds that this process has waited for MLflow; those of the side thread are nobody's wait."""

    waited: float = 0.0


clock = _Clock()


def retrying(call: Callable[[], T], seconds: float = RETRY_SECONDS) -> T:
    """The call's answer, tried again for so many seconds while its error is a passing one."""
    began = time.monotonic()
    try:
        return _retrying(call, began + seconds)
    finally:
        if threading.current_thread() is threading.main_thread():
            clock.waited += time.monotonic() - began


def _retrying(call: Callable[[], T], end: float) -> T:
    pause = 0.1
    while True:
        try:
            return call()
        except Exception as error:
            if not _passing(error) or time.monotonic() + pause > end:
                raise
            log.warning("MLflow: %s; trying again", _first_line(error))
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def experiment_name(request: Request) -> str:
    """The MLflow experiment of a request: its own, else ALIGNFLOW_EXPERIMENT, else `alignflow`."""
    return request.experiment or os.environ.get("ALIGNFLOW_EXPERIMENT") or "alignflow"


def experiment(name: str) -> str:
    """Id of the experiment, made when it does not exist."""
    found = retrying(lambda: client().get_experiment_by_name(name))
    if found is not None:
        return found.experiment_id
    # With a server, the server says where artifacts lie; alone, they lie beside the database.
    location = str(home() / "artifacts") if tracking_uri().startswith("sqlite:") else None
    try:
        return retrying(lambda: client().create_experiment(name, artifact_location=location))
    except Exception:
        found = client().get_experiment_by_name(name)  # another process was quicker
        if found is None:
            raise
        return found.experiment_id


def behind_server(name: str) -> bool:
    """Whether an experiment's artifacts are kept by an MLflow server, and reached through it alone."""
    found = retrying(lambda: client().get_experiment_by_name(name))
    return found is not None and str(found.artifact_location).startswith("mlflow-artifacts:")


# --- Artifacts --------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """sha256 of a file's content, or of a folder's sorted relative paths and contents.

    Raises:
        StageError: there is no such file or folder.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise StageError(f"{path} does not exist.", kind="artifact", mend="give the path of a file or folder")
    total = hashlib.sha256()
    for inner in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{inner.relative_to(path).as_posix()}\0{digest(inner)}\n".encode())
    return total.hexdigest()


def _location(uri: str) -> str:
    """Where the files of an artifact really lie: a path, or the address in an artifact store."""
    if uri.startswith("runs:/"):
        run_id, _, inner = uri.removeprefix("runs:/").partition("/")
        run = retrying(lambda: client().get_run(run_id))
        return f"{run.info.artifact_uri}/{inner}".rstrip("/")
    if uri.startswith("models:/m-"):
        return retrying(lambda: client().get_logged_model(uri.removeprefix("models:/"))).artifact_location
    return uri


def _local(location: str) -> Path | None:
    """The path behind a location on this machine's disk, else None."""
    parsed = urlparse(location)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return Path(location) if parsed.scheme == "" else None


def _download(location: str, sha256: str) -> Path:
    """A copy of a remote artifact, kept by its digest."""
    folder = home() / "cache" / "artifacts" / sha256
    target = folder / location.rstrip("/").rpartition("/")[2]  # a file's name says of what kind it is
    with lock(folder.with_suffix(".lock")):
        if target.exists() and digest(target) == sha256:
            return target
        shutil.rmtree(folder, ignore_errors=True)
        from mlflow.artifacts import download_artifacts  # late: see _entities

        beside = folder.with_suffix(".part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        got = retrying(
            lambda: download_artifacts(artifact_uri=location, dst_path=str(beside), tracking_uri=tracking_uri())
        )
        folder.mkdir(parents=True)
        Path(got).replace(target)
        shutil.rmtree(beside, ignore_errors=True)
    return target


def portable(request: Request) -> Request:
    """The request with inputs that any host can fetch: what lies on this host's disk is stored in MLflow first.

    The key stays the same: it goes by digests, not by uris.
    """
    inputs = {
        name: artifact if artifact.uri.startswith(("runs:/", "models:/")) else _stored(artifact, request)
        for name, artifact in request.inputs.items()
    }
    return request.model_copy(update={"inputs": inputs})


def _stored(artifact: Artifact, request: Request) -> Artifact:
    """A local file or folder as an artifact of a run of its own, tagged `stage` = source; stored once per digest."""
    query = f"tags.stage = 'source' and tags.sha256 = '{artifact.sha256}' and attributes.status = 'FINISHED'"
    name = experiment(experiment_name(request))
    for run in retrying(lambda: client().search_runs([name], query)):
        kept = Artifact(uri=f"runs:/{run.info.run_id}/{run.data.tags['artifact']}", sha256=artifact.sha256)
        if _intact(kept):
            return kept
    path = fetch(artifact)
    tags = {"stage": "source", "sha256": artifact.sha256, "artifact": f"source/{path.name}"}
    run_id = retrying(lambda: client().create_run(name, tags=tags, run_name=f"source {path.name}")).info.run_id
    store = client().log_artifacts if path.is_dir() else client().log_artifact
    retrying(lambda: store(run_id, str(path), tags["artifact"] if path.is_dir() else "source"))
    retrying(lambda: client().set_terminated(run_id))
    return Artifact(uri=f"runs:/{run_id}/{tags['artifact']}", sha256=artifact.sha256)


def fetch(artifact: Artifact) -> Path:
    """Local folder of an artifact, its digest verified. The uri is `runs:/`, `models:/`, a path or a store's address.

    Raises:
        StageError: the artifact is gone or has been altered.
    """
    mend = "run the pipeline again: the stage that makes it notices and makes it anew"
    try:
        location = _location(artifact.uri)
        folder = _local(location) or _download(location, artifact.sha256)
    except StageError:
        raise
    except Exception as error:
        if _passing(error):
            raise
        message = f"the artifact is gone ({error})."
        _mark_bad(artifact, message)
        raise StageError(message, kind="artifact", field="uri", value=artifact.uri, mend=mend) from error
    if not folder.exists():
        raise StageError("the artifact is gone.", kind="artifact", field="uri", value=artifact.uri, mend=mend)
    found = digest(folder)
    if found != artifact.sha256:
        message = f"the artifact was altered: its sha256 is {found}, it should be {artifact.sha256}."
        if _local(location) is None:
            _mark_bad(artifact, message)
        raise StageError(message, kind="artifact", field="uri", value=artifact.uri, mend=mend)
    return folder


def locate(uri: str) -> Path:
    """Local folder of what a person names: a path, `runs:/ID/model`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        StageError: there is no such folder, run or model.
    """
    path = Path(uri).expanduser()
    if path.exists():
        return path.absolute()
    mend = "give a model folder, runs:/RUN_ID/model, models:/NAME@ALIAS or models:/NAME/VERSION"
    try:
        location = _location(registered(uri))
        folder = _local(location) or _copied(location)
    except StageError:
        raise
    except Exception as error:
        if _passing(error):
            raise
        message = f"MLflow has no such model ({error})."
        raise StageError(message, kind="artifact", field="uri", value=uri, mend=mend) from error
    if not folder.exists():
        raise StageError("there is no such model.", kind="artifact", field="uri", value=uri, mend=mend)
    return folder


def registered(uri: str) -> str:
    """The source behind `models:/NAME@ALIAS`, `models:/NAME/VERSION` and `runs:/ID/model`; other uris as they are."""
    if uri.startswith("runs:/"):
        return _model_of_run(uri)
    name = uri.removeprefix("models:/")
    if not uri.startswith("models:/") or name.startswith("m-"):
        return uri
    if "@" in name:
        found = retrying(lambda: client().get_model_version_by_alias(*name.rsplit("@", 1)))
    else:
        found = retrying(lambda: client().get_model_version(*name.rsplit("/", 1)))
    return str(found.source)


@contextlib.contextmanager
def as_default() -> Iterator[None]:
    """Make `tracking_uri()` MLflow's default while this holds: its registry over a database looks models up there."""
    name = "MLFLOW_TRACKING_URI"
    before = os.environ.get(name)
    os.environ[name] = tracking_uri()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _model_of_run(uri: str) -> str:
    """`runs:/ID/model` as the LoggedModel that the run has made: its files don't lie among the run's own."""
    run_id, _, inner = uri.removeprefix("runs:/").partition("/")
    outputs = retrying(lambda: client().get_run(run_id)).outputs if inner == "model" else None
    return f"models:/{outputs.model_outputs[0].model_id}" if outputs and outputs.model_outputs else uri


def _copied(location: str) -> Path:
    """A copy of a remote folder whose digest is not known, kept by its address."""
    target = home() / "cache" / "located" / hashlib.sha256(location.encode()).hexdigest()
    from mlflow.artifacts import download_artifacts  # late: see _entities

    target.mkdir(parents=True, exist_ok=True)
    return Path(retrying(lambda: download_artifacts(artifact_uri=location, dst_path=str(target))))


def _intact(artifact: Artifact) -> bool:
    """Whether a published artifact is still what it was. Of one in a remote store only whether it is there: its digest
    is verified when it is fetched, and `find` takes no run with the tag that a wrong one leaves.
    """
    try:
        location = _location(artifact.uri)
        if _local(location) is None:
            return _is_there(location)
        fetch(artifact)
    except StageError as error:
        log.info("%s", error)
        return False
    except Exception as error:
        if _passing(error):
            raise
        log.info("%s is gone: %s", artifact.uri, error)
        return False
    return True


def _entries(location: str) -> list[Any]:
    """What lies in a folder of a remote store; nothing where there is no such folder."""
    from mlflow.artifacts import list_artifacts  # late: see _entities

    return list(retrying(lambda: list_artifacts(artifact_uri=location, tracking_uri=tracking_uri())))


def _is_there(location: str) -> bool:
    """Whether a remote file or folder exists."""
    above, _, name = location.rstrip("/").rpartition("/")
    return any(entry.path.rpartition("/")[2] == name for entry in _entries(above))


def _sizes(location: str) -> dict[str, int]:
    """The files of a remote folder: path in it -> bytes."""
    found: dict[str, int] = {}
    for entry in _entries(location):
        name = entry.path.rpartition("/")[2]
        if entry.is_dir:
            found |= {f"{name}/{inner}": size for inner, size in _sizes(f"{location}/{name}").items()}
        else:
            found[name] = entry.file_size or 0  # of an empty file, None
    return found


def _arrived(artifact: Artifact, folder: Path) -> bool:
    """Whether all of a folder has been stored: by digest here, by names and sizes in a remote store."""
    location = _location(artifact.uri)
    if _local(location) is not None:
        return _intact(artifact)
    sent = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return digest(folder) == artifact.sha256 and _sizes(location) == sent


def _mark_bad(artifact: Artifact, message: str) -> None:
    """Let `find` take the run that made a remote artifact no more, so that the stage makes it anew."""
    if artifact.uri.startswith("models:/m-"):
        run_id = client().get_logged_model(artifact.uri.removeprefix("models:/")).source_run_id
    elif artifact.uri.startswith("runs:/"):
        run_id = artifact.uri.removeprefix("runs:/").partition("/")[0]
    else:
        return
    retrying(lambda: client().set_tag(str(run_id), BAD, shortened(f"{artifact.uri}: {message}", TAG_LENGTH)))


# --- Reuse ------------------------------------------------------------------------------------------------------------


def _runs_with(key: str, condition: str) -> "list[Run]":
    """Runs of a stage key that fit a condition on their attributes, newest first, in any experiment."""
    experiments = [e.experiment_id for e in retrying(lambda: client().search_experiments())]
    query = f"tags.`stage.key` = '{key}' and {condition}"
    return list(retrying(lambda: client().search_runs(experiments, query, order_by=["attributes.start_time DESC"])))


def _result_of(run_id: str) -> Result | None:
    """The result that a finished run has left, else None."""
    location = _location(f"runs:/{run_id}/result.json")
    path = _local(location)
    if path is not None:
        return Result.model_validate_json(path.read_text()) if path.exists() else None
    if not any(file.path == "result.json" for file in retrying(lambda: client().list_artifacts(run_id))):
        return None
    with tempfile.TemporaryDirectory() as folder:
        got = retrying(lambda: client().download_artifacts(run_id, "result.json", folder))
        return Result.model_validate_json(Path(got).read_text())


def find(key: str) -> Result | None:
    """A finished run of this key whose outputs still exist with their digests, else None."""
    for run in _runs_with(key, "attributes.status = 'FINISHED'"):
        if BAD in run.data.tags:
            continue
        result = _result_of(run.info.run_id)
        if result is not None and all(_intact(artifact) for artifact in result.outputs.values()):
            return result.model_copy(update={"reused": True})
    return None


def note_reuse(result: Result, pipeline_run: str | None) -> None:
    """Say on a reused run which pipeline run took it: find such runs by `tags.pipeline.reused_by LIKE '%ID%'`."""
    if not pipeline_run or not result.run_id:
        return
    run_id = result.run_id
    tags = retrying(lambda: client().get_run(run_id)).data.tags
    if tags.get("pipeline.run") == pipeline_run:
        return
    others = [name for name in tags.get("pipeline.reused_by", "").split() if name != pipeline_run]
    value = " ".join([*others, pipeline_run])
    while len(value) > TAG_LENGTH:
        value = value.partition(" ")[2]  # forget the oldest
    retrying(lambda: client().set_tag(run_id, "pipeline.reused_by", value))
    # For "the last comparison": a run that is taken again counts as new.
    retrying(lambda: client().set_tag(run_id, "pipeline.reused_at", str(time.time_ns() // 1_000_000)))


def compare_link(run_ids: list[str], view: Literal["CHART", "ARTIFACT"] = "CHART") -> str | None:
    """Address of MLflow's page that shows evaluations side by side; without a server, as `alignflow ui` would serve it.

    CHART shows their metrics as bars, ARTIFACT the answers to each prompt. The best judged come first, since MLflow
    draws ten runs until it is asked for more.
    """
    if not run_ids:
        return None
    runs = [retrying(lambda run_id=run_id: client().get_run(run_id)) for run_id in run_ids]
    experiments = sorted({run.info.experiment_id for run in runs})
    uri = tracking_uri()
    server = without_passwords(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    chosen = ", ".join(f"'{run_id}'" for run_id in run_ids)
    query = {"searchFilter": f"attributes.run_id IN ({chosen})", "compareRunsMode": view}
    query |= {"orderByKey": "metrics.`eval/judge_score`", "orderByAsc": "false"}
    page = f"experiments/{experiments[0]}/runs"
    if len(experiments) > 1:
        page, query["experiments"] = "compare-experiments/s", json.dumps(experiments)
    return f"{server}/#/{page}?{urlencode(query, quote_via=quote)}" + (
        "" if uri.startswith("http") else "  (start `alignflow ui`)"
    )


# --- What death leaves behind --------------------------------------------------------------------------------------


def place() -> dict[str, str]:
    """Tags that say where a run is made: whose locks tell whether it lives."""
    return {"host": socket.gethostname(), "home": str(home())}


def journal_file(key: str, run_id: str) -> Path:
    """Where a run's metrics are written down until its stage is done."""
    return work_folder(key) / f"metrics-{run_id}.jsonl"


def close_left() -> list[str]:
    """Close the runs that stages of this home have left RUNNING by their death, as KILLED with the tag `problem`.

    Returns their ids. A run lives as long as its stage's lock is held; those of other hosts and homes are left alone. A
    stage that is asked for again goes on in the same run.
    """
    experiments = [e.experiment_id for e in retrying(lambda: client().search_experiments())]
    query = f"attributes.status = 'RUNNING' and tags.host = '{socket.gethostname()}'"
    left = retrying(lambda: client().search_runs(experiments, query))
    mine = [run for run in left if run.data.tags.get("home") == str(home()) and "stage.key" in run.data.tags]
    return [run.info.run_id for run in mine if _close(run.data.tags["stage.key"], run.info.run_id)]


def _close(key: str, run_id: str) -> bool:
    """Close one run as KILLED, its journal shipped, unless its stage lives or has ended it since it was found."""
    with lock_if_free(work_folder(key) / "lock") as free:
        if not free or retrying(lambda: client().get_run(run_id)).info.status != "RUNNING":
            return False
        if journal_file(key, run_id).exists():
            Journal(journal_file(key, run_id), run_id).close()
        problem = "the process was killed, or its machine went down. Mend: start it again: it goes on"
        retrying(lambda: client().set_tag(run_id, "problem", problem))
        retrying(lambda: client().set_terminated(run_id, "KILLED"))
    log.info("run %s was left RUNNING by a process that died: closed as KILLED", run_id)
    return True


# --- Acceptable to MLflow ---------------------------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as flat names with dots: {"a": {"b": 1}} -> {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def acceptable_name(name: str) -> str:
    """A name that MLflow takes: other characters become `_`, and a long one ends in a digest."""
    clean = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII).strip("/") or "_"
    return shortened(clean, KEY_LENGTH)


def shortened(text: str, limit: int) -> str:
    """The text, or its start and a digest of the whole when it is longer than the limit."""
    if len(text) <= limit:
        return text
    end = f"...{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"
    return text[: limit - len(end)] + end


# --- The journal of metrics -------------------------------------------------------------------------------------------


def _points_of(run_id: str) -> dict[tuple[str, int], bool]:
    """(name, step) of all metrics that MLflow has of a run, and whether their value is finite."""
    found: dict[tuple[str, int], bool] = {}
    for name in retrying(lambda: client().get_run(run_id)).data.metrics:
        for point in retrying(lambda name=name: client().get_metric_history(run_id, name)):
            found[name, point.step] = math.isfinite(point.value)
    return found


class Journal:
    """Metrics in a local file, shipped to MLflow by a side thread; nobody waits for it, and no line is lost.

    Each line holds its timestamp, so that shipping a line twice (after a crash, or when an answer got lost) leaves one
    point in MLflow. A point that is already there, from before a resume, is not written again.
    """

    def __init__(self, path: Path, run_id: str, known: Mapping[tuple[str, int], bool] | None = None) -> None:
        """`known`: points (name, step) that MLflow has and this journal has not, and whether their value is finite."""
        self.run_id = run_id
        self._seen: dict[tuple[str, int], bool] = dict(known or {})
        """Points that are written down, and whether their value is finite: a step that fails is done again."""
        self._waiting: list[tuple[str, float, int, int]] = []
        self._guard = threading.Lock()
        self._closing = threading.Event()
        self._error: Exception | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._read(path)
        self._file = path.open("a", buffering=1)
        self._thread = threading.Thread(target=self._ship_on, name="metrics", daemon=True)
        self._thread.start()

    def _read(self, path: Path) -> None:
        """Take up what an earlier process has left; a last line cut short by its death is dropped."""
        if not path.exists():
            return
        text = path.read_text()
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            write_whole(path, text)
        for line in text.splitlines():
            name, value, step, when = json.loads(line)
            self._waiting.append((name, float(value), step, when))
            self._seen[name, step] = math.isfinite(float(value))

    def add(self, values: Mapping[str, float], step: int | None) -> None:
        """Write values down; `step` None is a final value, of which the last one counts."""
        when = time.time_ns() // 1_000_000
        with self._guard:
            for name, value in values.items():
                point = (acceptable_name(name), float(value), step or 0, when)
                place, finite = (point[0], point[2]), math.isfinite(value)
                known = self._seen.get(place)
                if step is not None and known is not None and (known or not finite):
                    continue
                self._seen[place] = finite
                # repr: NaN and infinity are no JSON numbers
                self._file.write(json.dumps([point[0], repr(point[1]), *point[2:]]) + "\n")
                self._waiting.append(point)

    def _ship_on(self) -> None:
        while not self._closing.wait(SHIP_SECONDS):
            try:
                self._ship()
                self._error = None
            except Exception as error:  # kept and tried again; `close` raises what remains
                if self._error is None:
                    log.warning("metrics wait, MLflow does not answer: %s", _first_line(error))
                self._error = error

    def _ship(self) -> None:
        while batch := self._waiting[:METRICS_PER_BATCH]:
            client().log_batch(self.run_id, metrics=[self._metric(point) for point in batch])
            with self._guard:
                del self._waiting[: len(batch)]

    def _metric(self, point: tuple[str, float, int, int]) -> "Metric":
        name, value, step, when = point
        return _entities().Metric(name, value, when, step)

    def close(self) -> None:
        """Ship what is left. Raises MLflow's error when it stays away; the journal is kept for the next start."""
        self._closing.set()
        self._thread.join()
        retrying(self._ship)
        self._file.close()


@cache
def code_version() -> str:
    """The package's version, and in a checkout the git commit: `0.1.0+1a2b3c4d5e6f`, with `.dirty` where changed."""
    try:
        version = metadata.version("alignflow")
    except metadata.PackageNotFoundError:  # run from a plain folder
        version = "unknown"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty=.dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or not one that answers
        return version
    return f"{version}+{commit}" if commit else version


# --- A stage's run ----------------------------------------------------------------------------------------------------


def label(request: Request) -> str:
    """Short name of a request for people: `sft`, `dpo`, `eval dpo`."""
    if request.stage == "evaluate":
        return f"eval {request.name}" if request.name else "eval"
    return request.name or request.stage


class StageRun:
    """One MLflow run of a stage; use it as a context manager. On rank > 0 all its methods that write do nothing.

    Leaving the block closes the MLflow run: FINISHED, KILLED on a preemption, FAILED on any other error.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.key = request.key()
        self.work = work_folder(self.key)
        self.rank = int(os.environ.get("RANK", "0"))
        self.run_id = ""
        self.outputs: dict[str, Artifact] = {}
        self.result: Result | None = None
        self._fetched: dict[str, Path] = {}
        self._pace = Pace()
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def label(self) -> str:
        """The request's short name."""
        return label(self.request)

    def __enter__(self) -> Self:
        if self.rank == 0:
            continued = self._open()
            journal = journal_file(self.key, self.run_id)
            elsewhere = continued and not journal.exists()  # another host has begun the run
            self._journal = Journal(journal, self.run_id, _points_of(self.run_id) if elsewhere else None)
            self._describe()
        return self

    def _open(self) -> bool:
        """Continue the run that a stopped process has left for this key, else start one; whether it continues."""
        left = _runs_with(self.key, "attributes.status != 'FINISHED'")
        if left:
            self.run_id = left[0].info.run_id
            log.info("continuing run %s, which was left %s", self.run_id, left[0].info.status)
            retrying(lambda: client().update_run(self.run_id, status="RUNNING"))
            if "problem" in left[0].data.tags:
                retrying(lambda: client().delete_tag(self.run_id, "problem"))
            return True
        name = experiment(experiment_name(self.request))
        tags = {"stage.key": self.key, "mlflow.source.name": f"stages {self.request.stage}", **place()}
        self.run_id = retrying(lambda: client().create_run(name, tags=tags, run_name=self.label)).info.run_id
        return False

    def _describe(self) -> None:
        """Tags, parameters and the full config."""
        request = self.request
        tags = {
            "stage": request.stage,
            "stage.version": str(request.version),
            "stage.key": self.key,
            "pipeline.run": request.pipeline_run,
            "method": request.params.get("method") if request.stage == "align" else None,
            "model": request.name if request.stage in WITH_MODEL else None,
            "code.version": code_version(),
        }
        tags |= place() | {f"input.{name}": artifact.sha256 for name, artifact in request.inputs.items()} | request.tags
        self._tags({name: value for name, value in tags.items() if value is not None})
        self.text(request.model_dump_json(indent=2), "config.json")
        self.params({**request.params, "seed": request.seed, **request.about})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.rank > 0:
            return
        status = "FINISHED"
        if error is not None:
            preempted = isinstance(error, StageError) and error.status == "preempted"
            status = "KILLED" if preempted or isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            try:
                self._journal.close()
            finally:
                retrying(lambda: client().set_terminated(self.run_id, status))
        except Exception as second:
            if error is None:
                raise
            log.warning("MLflow does not hear how the run ended: %s", _first_line(second))  # the first error matters

    def finish(self, metrics: Mapping[str, float]) -> Result:
        """Log the final metrics and leave the result where `find` looks for it."""
        # Training metrics have their points already; one more, at step 0, would bend their curves.
        self.metrics({name: value for name, value in metrics.items() if not name.startswith("train/")})
        self.result = Result(
            status="done", key=self.key, run_id=self.run_id, outputs=self.outputs, metrics=dict(metrics)
        )
        self.text(self.result.model_dump_json(indent=2), "result.json")
        return self.result

    def fail(self, problem: Problem, trace: str | None = None) -> None:
        """Write down on the run why the stage stops; where even that cannot be written, say so."""
        try:
            self.tag("problem", str(problem))
            if trace:
                self.text(without_passwords(trace), "traceback.txt")
        except Exception as error:
            log.warning("MLflow does not hear why the stage stops: %s", _first_line(error))

    def has(self, name: str) -> bool:
        """Whether the request brings an input of that name."""
        return name in self.request.inputs

    def input(self, name: str) -> Path:
        """Local folder of an input, verified once.

        Raises:
            StageError: the request has no such input, or the artifact is gone or altered.
        """
        if name not in self.request.inputs:
            have = ", ".join(sorted(self.request.inputs)) or "none"
            message = f"stage {self.request.stage} needs the input {name!r}; the request has {have}."
            raise StageError(
                message, kind="input", field=f"inputs.{name}", value="missing", mend="add it to the request"
            )
        if name not in self._fetched:
            self._fetched[name] = fetch(self.request.inputs[name])
        return self._fetched[name]

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step, or without one as final. Returns at once; NaN and infinity are logged as such."""
        if self.rank == 0:
            self._journal.add(values, step)

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters, flat; long values are shortened (config.json has them whole), known names are left alone."""
        if self.rank > 0:
            return
        known = retrying(lambda: client().get_run(self.run_id)).data.params
        flat = {acceptable_name(name): value for name, value in flatten(values).items()}
        param = _entities().Param
        new = [param(name, shortened(value, PARAM_LENGTH)) for name, value in flat.items() if name not in known]
        for start in range(0, len(new), ENTRIES_PER_BATCH):
            batch = new[start : start + ENTRIES_PER_BATCH]
            retrying(lambda batch=batch: client().log_batch(self.run_id, params=batch))

    def tag(self, name: str, value: object) -> None:
        """Set a tag of the run."""
        if self.rank == 0:
            self._tags({name: value})

    def _tags(self, values: Mapping[str, object]) -> None:
        tag = _entities().RunTag
        tags = [tag(acceptable_name(name), shortened(str(value), TAG_LENGTH)) for name, value in values.items()]
        retrying(lambda: client().log_batch(self.run_id, tags=tags))

    def file(self, path: Path, folder: str = "") -> None:
        """Log a file as an artifact of the run, in a folder of it."""
        if self.rank == 0:
            retrying(lambda: client().log_artifact(self.run_id, str(path), folder or None))

    def text(self, text: str, name: str) -> None:
        """Log a text as an artifact file of that name."""
        if self.rank == 0:
            clean = text.encode(errors="replace").decode()  # a lone surrogate cannot be written
            retrying(lambda: client().log_text(self.run_id, clean, name))

    def table(self, columns: Mapping[str, list[Any]], name: str) -> None:
        """Log a table that MLflow's UI shows side by side across runs, e.g. as `eval/samples.json`.

        Written here and not by MLflow's `log_table`, which appends to what a killed process has left.
        """
        if self.rank > 0:
            return
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.text(json.dumps({"columns": list(columns), "data": rows}), name)
        self._tables = [*getattr(self, "_tables", []), {"path": name, "type": "table"}]
        self.tag("mlflow.loggedArtifacts", json.dumps(self._tables))

    def dataset(self, name: str, path: str, digest: str, rows: int) -> None:
        """Log which data the run has seen, with a sha256 of all of it (MLflow's own looks at the first rows only)."""
        if self.rank > 0:
            return
        entities = _entities()
        dataset = entities.Dataset(
            name=shortened(name, 500),
            digest=digest[:36],
            source_type="local",
            source=json.dumps({"uri": path}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        context = [entities.InputTag("mlflow.data.context", self.request.stage)]
        logged = [entities.DatasetInput(dataset=dataset, tags=context)]
        retrying(lambda: client().log_inputs(self.run_id, datasets=logged))

    def publish(self, name: str, folder: Path, model: bool = False) -> Artifact:
        """Store a folder as an output of the stage; a model becomes a LoggedModel, visible once it is whole."""
        if self.rank > 0:
            return Artifact(uri="", sha256="")
        self._verify_source()
        sha256 = digest(folder)
        uri = self._publish_model(folder, sha256) if model else self._publish_folder(name, folder)
        self.outputs[name] = Artifact(uri=uri, sha256=sha256)
        if not _arrived(self.outputs[name], folder):
            message = f"{folder} changed while it was published."
            raise StageError(message, status="failed", kind="artifact", mend="run the stage again")
        self.tag(f"output.{name}", sha256)
        return self.outputs[name]

    def _verify_source(self) -> None:
        """Raise StageError when the file that the stage has read is not what it was when the stage was asked for."""
        source = self.request.inputs.get("source")
        if source is not None and digest(self.input("source")) != source.sha256:
            raise StageError(
                "it changed while it was read; nothing is published.",
                kind="source_changed",
                field="source",
                value=source.uri,
                mend="start the run again once nothing writes to it",
            )

    def _publish_folder(self, name: str, folder: Path) -> str:
        taken = {file.path for file in retrying(lambda: client().list_artifacts(self.run_id))}
        place = name
        while place in taken:
            place += "-again"  # a killed process has left part of it
        retrying(lambda: client().log_artifacts(self.run_id, str(folder), place))
        return f"runs:/{self.run_id}/{place}"

    def _publish_model(self, folder: Path, sha256: str) -> str:
        entities, request = _entities(), self.request
        run = retrying(lambda: client().get_run(self.run_id))
        model = retrying(
            lambda: client().create_logged_model(
                run.info.experiment_id,
                name=re.sub(r"[^\w\- ]", "_", self.label),
                source_run_id=self.run_id,
                tags={"sha256": sha256, "stage": request.stage, "stage.key": self.key},
                params={k: shortened(v, PARAM_LENGTH) for k, v in flatten(request.params).items()},
                model_type=request.stage,
            )
        )
        try:
            retrying(lambda: client().log_model_artifacts(model.model_id, str(folder)))
        except BaseException:
            client().finalize_logged_model(model.model_id, entities.LoggedModelStatus.FAILED)
            raise
        retrying(lambda: client().finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY))
        output = [entities.LoggedModelOutput(model.model_id, 0)]
        retrying(lambda: client().log_outputs(self.run_id, output))
        return f"models:/{model.model_id}"

    def progress(self, done: int, total: int, what: str) -> None:
        """Say on stderr, every few seconds and at the end, how far the stage is: `sft  120/400 steps  0:34 left`."""
        if self.rank > 0:
            return
        now = time.monotonic()
        if done <= self._pace.done or total != self._pace.total:
            self._pace = Pace(began=now, first=done, total=total)
        pace = self._pace
        pace.done = done
        if done < total and now - pace.said < PROGRESS_SECONDS:
            return
        pace.said = now
        left = ""
        if pace.first < done < total:
            left = f"  {_clock((now - pace.began) / (done - pace.first) * (total - done))} left"
        sys.stderr.write(f"{self.label}  {done}/{total} {what}{left}\n")
        sys.stderr.flush()


@dataclass
class Pace:
    """How fast a piece of work goes: when it was first heard of, how far it was then, and what was said last."""

    began: float = 0.0
    first: int = 0
    total: int = -1
    done: int = -1
    said: float = -math.inf


def _clock(seconds: float) -> str:
    whole = math.ceil(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
