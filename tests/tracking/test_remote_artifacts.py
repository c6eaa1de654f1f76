"""Artifacts behind an MLflow server, as workers on other hosts see them: fetched, verified, missed, made anew."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.servers import mlflow_prefect, supervisor
from schemas.errors import StageError
from schemas.stage import Artifact, Request
from stages import tracking
from stages.tracking import StageRun


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[tuple[str, Path]]:
    """A server's address, and the folder in which it keeps artifacts."""
    home = tmp_path_factory.mktemp("server")
    shutil.copy(database, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(home))
        server = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
        with supervisor.running([server]):
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
