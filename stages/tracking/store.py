"""Files and folders kept in MLflow: stored, brought, and their digests verified."""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from schemas.errors import StageError, refuse
from schemas.stage import Artifact, Request
from stages.runtime.workspace import files_below, home, lock, sync_all
from stages.tracking.mlflow_client import (
    client,
    experiment,
    experiment_name,
    pages,
    retrying,
    tracking_uri,
)
from stages.tracking.names import TAG_LENGTH, shortened
from stages.tracking.problems import is_missing, is_transient

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger("alignflow")

# Tag of a finished run whose artifact was found to be altered.
BAD = "artifact.bad"
REMOVED = "artifact.removed"
"""Tag of a run whose models and folders were removed to make room."""

AGAIN = "run the pipeline again: the stage that makes it notices and runs again"
MODEL_URIS = "give a model folder, runs:/RUN_ID/model, models:/NAME@ALIAS or models:/NAME/VERSION"


def digest(path: Path) -> str:
    """sha256 of a file's content, or of a folder's sorted relative paths and contents.

    Raises:
        StageError: there is no such file or folder.
        OSError: it cannot be read now.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise StageError(f"{path} does not exist.", kind="artifact", fix="give the path of a file or folder")
    total = hashlib.sha256()
    for inner in files_below(path):
        total.update(f"{inner.relative_to(path).as_posix()}\0{digest(inner)}\n".encode())
    return total.hexdigest()


def location_of(uri: str) -> str:
    """Where the files of an artifact really are: a path, or the address in an artifact store."""
    if uri.startswith("runs:/"):
        run_id, _, inner = uri.removeprefix("runs:/").partition("/")
        run = client().get_run(run_id)
        return f"{run.info.artifact_uri}/{inner}".rstrip("/")
    if uri.startswith("models:/m-"):
        return client().get_logged_model(uri.removeprefix("models:/")).artifact_location
    return uri


def local_path(location: str) -> Path | None:
    """The path behind a location on this machine's disk, else None."""
    parsed = urlparse(location)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return Path(location) if parsed.scheme == "" else None


def _download(location: str, sha256: str) -> Path:
    """A copy of a remote artifact, kept by its digest; what differs from that is not kept."""
    folder = _cached(sha256)
    target = folder / location.rstrip("/").rpartition("/")[2]  # the name of a file shows its kind
    with lock(folder.with_suffix(".lock")):
        if _still(target, sha256):
            os.utime(folder)  # when it was last of use
            return target
        got = _copied(location)
        if digest(got) != sha256:  # a connection can end early without a word: only a second copy is believed
            shutil.rmtree(got.parent)
            got = _copied(location)
        if digest(got) == sha256:
            _put(got, folder)
            return target
        return got


def _cached(sha256: str) -> Path:
    """The folder of the copy that has this digest."""
    return home() / "cache" / "artifacts" / sha256


def _still(copy: Path, sha256: str) -> bool:
    """Whether a cached copy is there and whole. One that cannot be read is as good as none."""
    try:
        return copy.exists() and digest(copy) == sha256
    except OSError as error:
        log.warning("the copy %s cannot be read (%s): it is fetched again", copy, error)
        return False


def _copied(location: str) -> Path:
    """A new copy of a remote file or folder, in a folder of its own.

    Raises:
        StageError: there is no such file or folder.
    """
    from mlflow.artifacts import download_artifacts  # late: see value_classes

    above = home() / "cache" / "artifacts"
    above.mkdir(parents=True, exist_ok=True)
    beside, uri = tempfile.mkdtemp(prefix="part-", dir=above), tracking_uri()
    try:
        return Path(retrying(lambda: download_artifacts(artifact_uri=location, dst_path=beside, tracking_uri=uri)))
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)  # the next try needs its room
        # Any failure may be this host's (a full disk) or the server's. What is missing, the store itself says.
        if not isinstance(error, Exception) or is_transient(error) or _is_there(location):
            raise
        raise _gone(location) from error


def _put(got: Path, folder: Path) -> None:
    """Make a whole copy the one that is kept in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    got.replace(folder / got.name)
    shutil.rmtree(got.parent, ignore_errors=True)


def portable(request: Request) -> Request:
    """The request with inputs that any host can fetch: what is on this host's disk is stored in MLflow first.

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
    for run in pages(lambda token: client().search_runs([name], query, page_token=token)):
        kept = Artifact(uri=f"runs:/{run.info.run_id}/{run.data.tags['artifact']}", sha256=artifact.sha256)
        if intact(kept):
            return kept
    path = fetch(artifact)
    tags = {"stage": "source", "sha256": artifact.sha256, "artifact": f"source/{path.name}"}
    run_id = client().create_run(name, tags=tags, run_name=f"source {path.name}").info.run_id
    store = client().log_artifacts if path.is_dir() else client().log_artifact
    store(run_id, str(path), tags["artifact"] if path.is_dir() else "source")
    stored = Artifact(uri=f"runs:/{run_id}/{tags['artifact']}", sha256=artifact.sha256)
    keep(stored.uri)
    client().set_terminated(run_id)
    return stored


def keep(uri: str) -> None:
    """Return once what was stored would survive a power cut, as far as its disk is this machine's.

    A server on another machine syncs its own disk, or not.
    """
    location = location_of(uri)
    path = local_path(location)
    if path is None and location.startswith("mlflow-artifacts:"):  # what `alignflow up` keeps is in the same home
        path = home() / "artifacts" / urlparse(location).path.lstrip("/")
    if path is not None and path.exists():
        sync_all(path)
    elif urlparse(tracking_uri()).hostname in ("localhost", "127.0.0.1", "::1"):
        os.sync()  # a server here, with a folder that it alone knows


def fetch(artifact: Artifact) -> Path:
    """Local folder of an artifact, its digest verified. The uri is `runs:/`, `models:/`, a path or a store's address.

    What this host or the server lacks (room, memory, file handles, an answer) is raised as it is: it says nothing
    about the artifact.

    Raises:
        StageError: the artifact is gone or has been altered.
    """
    location = _located(artifact.uri)
    path = local_path(location)
    folder = path or _download(location, artifact.sha256)
    if not folder.exists():
        raise _gone(artifact.uri)
    actual = digest(folder)
    if actual != artifact.sha256:
        message = f"the artifact was altered: its sha256 is {actual}, it should be {artifact.sha256}."
        if path is None:
            shutil.rmtree(folder.parent, ignore_errors=True)  # the copy; the artifact itself is left as it is
            _mark_bad(artifact, message)
        raise refuse("uri", artifact.uri, message, AGAIN, kind="artifact")
    return folder


def _located(uri: str) -> str:
    """`location_of`; of a run or model that MLflow does not have, a StageError."""
    try:
        return location_of(uri)
    except Exception as error:
        if not is_missing(error):
            raise
        raise _gone(uri, f" ({error})") from error


def _gone(uri: str, why: str = "") -> StageError:
    """An artifact that is not there."""
    return refuse("uri", uri, f"the artifact is gone{why}.", AGAIN, kind="artifact")


def locate(uri: str) -> Path:
    """Local folder of what a person names: a path, `runs:/ID/model`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        StageError: there is no such folder, run or model.
    """
    path = Path(uri).expanduser()
    if path.exists():
        return path.absolute()
    try:
        location = location_of(registered(uri))
    except Exception as error:
        if not is_missing(error):
            raise
        message = f"MLflow has no such model ({error})."
        raise refuse("uri", uri, message, MODEL_URIS, kind="artifact") from error
    folder = local_path(location) or _kept(location)
    if not folder.exists():
        raise refuse("uri", uri, "there is no such model.", MODEL_URIS, kind="artifact")
    return folder


def _kept(location: str) -> Path:
    """A new copy of a remote folder whose digest is not known beforehand, kept by the digest that it has."""
    got = _copied(location)
    folder = _cached(digest(got))
    with lock(folder.with_suffix(".lock")):
        if _still(folder / got.name, folder.name):
            shutil.rmtree(got.parent, ignore_errors=True)
        else:
            _put(got, folder)
        os.utime(folder)
    return folder / got.name


def registered(uri: str) -> str:
    """The source behind `models:/NAME@ALIAS`, `models:/NAME/VERSION` and `runs:/ID/model`; other uris as they are."""
    if uri.startswith("runs:/"):  # the LoggedModel that the run has made: its files are not among the run's own
        run_id, _, inner = uri.removeprefix("runs:/").partition("/")
        outputs = client().get_run(run_id).outputs if inner == "model" else None
        return f"models:/{outputs.model_outputs[0].model_id}" if outputs and outputs.model_outputs else uri
    name = uri.removeprefix("models:/")
    if not uri.startswith("models:/") or name.startswith("m-"):
        return uri
    if "@" in name:
        actual = client().get_model_version_by_alias(*name.rsplit("@", 1))
    elif "/" in name:
        actual = client().get_model_version(*name.rsplit("/", 1))
    else:
        raise refuse("uri", uri, "it names no version.", MODEL_URIS, kind="artifact")
    return str(actual.source)


def intact(artifact: Artifact) -> bool:
    """Whether a published artifact is still what it was. Of one in a remote store only whether it is there: its digest
    is verified when it is fetched, and `find` takes no run with the tag that a wrong one leaves.

    What cannot be read now is neither: that error is raised.
    """
    try:
        location = _located(artifact.uri)
        if local_path(location) is None:
            return _is_there(location)
        fetch(artifact)
    except StageError as error:
        if error.problem.kind != "artifact":  # of MLflow itself: a wrong password, a damaged database
            raise
        log.info("%s", error)
        return False
    return True


def entries(location: str) -> list[Any]:
    """The entries of a folder of a remote store; none where there is no such folder."""
    from mlflow.artifacts import list_artifacts  # late: see value_classes

    return list(retrying(lambda: list_artifacts(artifact_uri=location, tracking_uri=tracking_uri())))


def _is_there(location: str) -> bool:
    """Whether a remote file or folder exists."""
    above, _, name = location.rstrip("/").rpartition("/")
    return any(entry.path.rpartition("/")[2] == name for entry in entries(above))


def sizes(location: str) -> dict[str, int]:
    """The files of a remote folder: path in it -> bytes."""
    actual: dict[str, int] = {}
    for entry in entries(location):
        name = entry.path.rpartition("/")[2]
        if entry.is_dir:
            actual |= {f"{name}/{inner}": size for inner, size in sizes(f"{location}/{name}").items()}
        else:
            actual[name] = entry.file_size or 0  # of an empty file, None
    return actual


def arrived(artifact: Artifact, folder: Path) -> bool:
    """Whether all of a folder has been stored: by digest here, by names and sizes in a remote store."""
    location = location_of(artifact.uri)
    if local_path(location) is not None:
        return intact(artifact)
    sent = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_below(folder)}
    return digest(folder) == artifact.sha256 and sizes(location) == sent


def _mark_bad(artifact: Artifact, message: str) -> None:
    """Keep `find` from reusing the run that made a remote artifact, so that the stage runs again."""
    if artifact.uri.startswith("models:/m-"):
        run_id = client().get_logged_model(artifact.uri.removeprefix("models:/")).source_run_id
    elif artifact.uri.startswith("runs:/"):
        run_id = artifact.uri.removeprefix("runs:/").partition("/")[0]
    else:
        return
    client().set_tag(str(run_id), BAD, shortened(f"{artifact.uri}: {message}", TAG_LENGTH))


# --- the large files of a run, removed to make room: its models and folders; numbers, request and result stay ---


def needs_server(run: "Run") -> bool:
    """Whether the files of a run are reached through an MLflow server alone, and none is set."""
    return str(run.info.artifact_uri).startswith("mlflow-artifacts:") and not tracking_uri().startswith("http")


def model_locations() -> dict[str, list[str]]:
    """Run -> where the files of its models are, whole or not."""
    experiments = [experiment.experiment_id for experiment in client().search_experiments()]
    found: dict[str, list[str]] = {}
    for model in pages(lambda token: client().search_logged_models(experiments, page_token=token)):
        found.setdefault(str(model.source_run_id), []).append(str(model.artifact_location))
    return found


def folder_locations(run: "Run") -> list[str]:
    """Where the folders are that a run has stored among its own files."""
    root = str(run.info.artifact_uri)
    return [f"{root}/{entry.path.rpartition('/')[2]}" for entry in entries(root) if entry.is_dir]


def stored_size(location: str) -> int:
    """Bytes of all files at a location; 0 where there are none."""
    return sum(sizes(location).values())


def remove_stored(run: "Run", location: str) -> None:
    """Remove what is at a location, and note on its run that it is gone: the run is not reused from then on."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # late: see value_classes

    note = "removed to make room: nothing had used it for long"
    client().set_tag(run.info.run_id, BAD, note)  # first: were this killed, a run without files must not be reused
    path = local_path(location)
    if path is None:
        above, _, name = location.rpartition("/")
        get_artifact_repository(above, tracking_uri=tracking_uri()).delete_artifacts(name)
    else:
        shutil.rmtree(path)
    client().set_tag(run.info.run_id, REMOVED, note)  # last: what is half removed is looked at again
