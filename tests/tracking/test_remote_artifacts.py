"""Artifacts behind an MLflow server, as workers on other hosts see them: fetched, verified, missed, made anew."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow.artifacts
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INTERNAL_ERROR, RESOURCE_DOES_NOT_EXIST

from flows.servers import mlflow_prefect, supervisor
from schemas.errors import StageError
from schemas.stage import Artifact, Request
from stages import tracking
from stages.tracking import StageRun, mlflow_client
from tests.support import answered, forked_servers


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[tuple[str, Path]]:
    """A server's address, and the folder in which it keeps artifacts."""
    home = tmp_path_factory.mktemp("server")
    shutil.copy(database, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(home))
        server = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
        with forked_servers.running(server):
            yield server.url, home / "artifacts"


@pytest.fixture
def artifacts(store: tuple[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host that knows the server's address and nothing else; gives the server's folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store[0])
    return store[1]


def published(tmp_path: Path, who: str, model: bool = False) -> tuple[Request, Artifact]:
    """A finished stage that has published a folder."""
    request = Request(stage="sft", version=1, params={"who": who}, name="sft", experiment="remote")
    folder = tmp_path / who
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "text.txt").write_text(who)
    (folder / "config.json").write_text("{}")
    (folder / "empty").touch()
    with StageRun(request) as run:
        artifact = run.publish("folder", folder, model=model)
        run.finish({})
    return request, artifact


@pytest.mark.parametrize("model", [False, True])
def test_another_host_fetches_and_verifies(
    model: bool, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, artifact = published(tmp_path, f"fetched {model}", model)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "another"))
    found = tracking.find(request.key())
    assert found is not None and found.outputs == {"folder": artifact}
    assert (tracking.fetch(artifact) / "inner" / "text.txt").read_text() == f"fetched {model}"


def test_answers_for_the_evaluation_pages_reach_a_server_too(artifacts: Path) -> None:
    assert answered.read_back(answered.log(times=2)) == answered.EXPECTED


@pytest.mark.parametrize("model", [False, True])
def test_what_is_deleted_is_not_reused(model: bool, artifacts: Path, tmp_path: Path) -> None:
    request, _ = published(tmp_path, f"deleted {model}", model)
    assert tracking.find(request.key()) is not None
    (file,) = (path for path in artifacts.rglob("text.txt") if path.read_text() == f"deleted {model}")
    shutil.rmtree(file.parent.parent)
    assert tracking.find(request.key()) is None


@pytest.mark.parametrize("model", [False, True])
def test_what_is_altered_is_noticed_when_fetched_and_not_reused_again(
    model: bool, artifacts: Path, tmp_path: Path
) -> None:
    request, artifact = published(tmp_path, f"altered {model}", model)
    (file,) = (path for path in artifacts.rglob("text.txt") if path.read_text() == f"altered {model}")
    file.write_text(f"Altered {model}")  # as long as before
    with pytest.raises(StageError, match="was altered"):
        tracking.fetch(artifact)
    assert tracking.find(request.key()) is None


@pytest.mark.parametrize("name", ["pairs.jsonl", "folder"])
def test_a_local_input_travels(name: str, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / name
    if name == "folder":
        source.mkdir()
    (source / "row.json" if name == "folder" else source).write_text(f'{{"prompt": "{name}"}}\n')
    local = Artifact(uri=str(source), sha256=tracking.digest(source))
    request = Request(stage="validate", version=1, params={"path": name}, inputs={"source": local}, experiment="remote")
    sent = tracking.portable(request)
    assert sent.key() == request.key()
    assert tracking.portable(request) == sent  # stored once
    shutil.move(source, tmp_path / "gone")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "another"))
    fetched = tracking.fetch(sent.inputs["source"])
    assert fetched.name == name and tracking.digest(fetched) == local.sha256


# --- what is this host's trouble, or the server's, says nothing about an artifact ---


def lacking(error: BaseException) -> Callable[..., None]:
    """Something that fails so."""

    def fail(*given: object, **named: object) -> None:
        raise error

    return fail


TROUBLES = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    MemoryError("no memory"),
    MlflowException("The following failures occurred: [Errno 28] No space left on device"),
    MlflowException("API request to endpoint failed with error code 500 != 200. Response body: ''"),
    MlflowException("404, says a proxy", error_code=ENDPOINT_NOT_FOUND),
    MlflowException("The destination path does not exist", error_code=RESOURCE_DOES_NOT_EXIST),  # this host's
]


@pytest.mark.parametrize("error", TROUBLES, ids=lambda error: str(error)[:20])
def test_a_reader_in_trouble_condemns_nothing(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    request, artifact = published(tmp_path, f"trouble {error}")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "another"))
    with monkeypatch.context() as away:
        away.setattr("mlflow.artifacts.download_artifacts", lacking(error))
        with pytest.raises(type(error), match=re.escape(str(error))):
            tracking.fetch(artifact)
    assert not list((tmp_path / "another" / "cache" / "artifacts").glob("part-*"))
    assert tracking.find(request.key()) is not None
    assert tracking.digest(tracking.fetch(artifact)) == artifact.sha256


@pytest.mark.parametrize("what", ["read", "list", "ask"])
def test_a_server_in_trouble_condemns_nothing(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    request, artifact = published(tmp_path, f"server {what}")
    error = MlflowException("INTERNAL_ERROR: the disk of the server", error_code=INTERNAL_ERROR)
    with monkeypatch.context() as away:
        if what == "ask":
            away.setattr(mlflow_client.plain_client(), "get_run", lacking(error))
        else:
            away.setattr("mlflow.artifacts.list_artifacts", lacking(error))
            away.setattr("mlflow.artifacts.download_artifacts", lacking(error))
        with pytest.raises(MlflowException):
            tracking.find(request.key()) if what == "list" else tracking.fetch(artifact)
    assert tracking.find(request.key()) is not None


def test_a_folder_that_cannot_be_read_is_not_altered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("text")
    artifact = Artifact(uri=str(folder), sha256=tracking.digest(folder))
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("inner"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as away:
        away.setattr("os.scandir", scandir)
        with pytest.raises(PermissionError):
            tracking.fetch(artifact)
    assert tracking.fetch(artifact) == folder


def test_a_short_answer_is_asked_for_again(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, artifact = published(tmp_path, "short")
    real, asked = mlflow.artifacts.download_artifacts, list[str]()

    def download(**named: str) -> str:
        got = real(**named)
        if not asked:
            (Path(got) / "inner" / "text.txt").write_text("sho")
        asked.append(got)
        return got

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    assert (tracking.fetch(artifact) / "inner" / "text.txt").read_text() == "short" and len(asked) == 2
    assert tracking.find(request.key()) is not None


@pytest.mark.parametrize("how", ["altered", "a folder"])
def test_a_broken_copy_is_fetched_again(artifacts: Path, tmp_path: Path, how: str) -> None:
    _, artifact = published(tmp_path, f"broken {how}")
    file = tracking.fetch(artifact) / "inner" / "text.txt"
    file.unlink()
    file.write_text("Broken") if how == "altered" else file.mkdir()
    assert (tracking.fetch(artifact) / "inner" / "text.txt").read_text() == f"broken {how}"


def test_what_a_person_names_is_kept_by_its_digest(artifacts: Path, tmp_path: Path) -> None:
    _, artifact = published(tmp_path, "named")
    uri = artifact.uri
    folder = tracking.locate(uri)
    assert folder.parent.name == artifact.sha256 and tracking.locate(uri) == folder
    (folder / "left over").write_text("of another time")
    assert tracking.digest(tracking.locate(uri)) == artifact.sha256
    with pytest.raises(StageError, match="gone"):
        tracking.locate(f"{uri}-nothing")


@pytest.mark.parametrize("whose", ["of this home", "of another home", "of another machine"])
def test_what_a_server_of_this_machine_stores_is_synced(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    synced = list[Path]()
    monkeypatch.setattr("stages.tracking.store.sync_all", synced.append)
    monkeypatch.setattr("os.sync", lambda: synced.append(Path("/")))
    if whose == "of this home":
        monkeypatch.setenv("ALIGNFLOW_HOME", str(artifacts.parent))
    if whose == "of another machine":
        monkeypatch.setattr("stages.tracking.store.tracking_uri", lambda: "http://10.0.0.5:5000")
        monkeypatch.setattr("stages.tracking.run.arrived", lambda artifact, folder: True)
    _, artifact = published(tmp_path, f"synced {whose}")
    run = artifact.uri.removeprefix("runs:/").partition("/")[0]
    if whose == "of this home":
        assert {path.name for path in synced} == {"folder", "artifacts"} and all(run in str(path) for path in synced)
    else:
        assert set(synced) == ({Path("/")} if whose == "of another home" else set())


@pytest.mark.slow
def test_a_full_disk_condemns_nothing(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    request = Request(stage="sft", version=1, params={"who": "large"}, name="sft", experiment="remote")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "weights").write_bytes(os.urandom(3 * 2**20))
    with StageRun(request) as run:
        artifact = run.publish("folder", tmp_path / "large")
        run.finish({})
    small = tmp_path / "another"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setenv("ALIGNFLOW_HOME", str(small))
        with pytest.raises(Exception, match="No space left"):
            tracking.fetch(artifact)
        assert tracking.find(request.key()) is not None
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "third"))
    assert tracking.digest(tracking.fetch(artifact)) == artifact.sha256
