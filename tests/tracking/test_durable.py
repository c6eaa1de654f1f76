"""A power cut after a stage: what it published is on the disk, and what is not is made again instead of refused."""

import os
from pathlib import Path

import pytest

from schemas.stage import Artifact, Request, Result
from stages import tracking
from stages.runtime import workspace
from stages.tracking import StageRun, mlflow_client
from stages.tracking.reuse import runs_with


def request(number: int = 1) -> Request:
    return Request(stage="sft", version=1, params={"number": number}, name="sft", experiment="tests")


def finished(asked: Request, folder: Path, model: bool = False) -> Result:
    """A stage that publishes a folder with a folder in it, and logs a file of its own."""
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    (folder / "inner" / "weights").write_text("w" * 1000)
    with StageRun(asked) as run:
        run.publish("model", folder, model=model)
        return run.finish({"eval/loss": 0.25})


class PowerCut:
    """Remembers what was synced, and drops the rest: the least that a disk may hold after a power cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[Path, float] = {}
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.synced[path] = path.stat().st_mtime_ns

        monkeypatch.setattr("os.fsync", fsync)

    def __call__(self, folder: Path) -> None:
        """Empty the files that were not synced after their last write, and remove names that their folder had not."""
        for above, folders, files in os.walk(folder, topdown=False):
            for name in files:
                path = Path(above) / name
                if self.synced.get(path) != path.stat().st_mtime_ns:
                    path.write_text("")
            if self.synced.get(Path(above)) != Path(above).stat().st_mtime_ns:
                for name in (*folders, *files):
                    workspace.remove(Path(above) / name)


@pytest.mark.parametrize("model", [False, True])
def test_what_is_finished_outlives_a_power_cut(
    ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: bool
) -> None:
    cut = PowerCut(monkeypatch)
    result = finished(request(), tmp_path / "model", model)
    cut(ready_home / "artifacts")
    assert tracking.find(request().key()) == result.model_copy(update={"reused": True})
    assert ready_home in cut.synced  # the name of `artifacts` itself


def test_it_is_synced_before_mlflow_calls_it_finished(
    ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = PowerCut(monkeypatch)
    at_the_end: list[set[str]] = []
    real = mlflow_client.plain_client().set_terminated

    def set_terminated(run_id: str, status: str) -> None:
        at_the_end.append({path.name for path in cut.synced})
        real(run_id, status)

    monkeypatch.setattr(mlflow_client.plain_client(), "set_terminated", set_terminated)
    finished(request(), tmp_path / "model")
    assert at_the_end[0] >= {"result.json", "weights", "inner"}


def test_a_source_that_is_stored_for_others_is_synced(
    ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = PowerCut(monkeypatch)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    source = Artifact(uri=str(tmp_path / "pairs.jsonl"), sha256=tracking.digest(tmp_path / "pairs.jsonl"))
    sent = tracking.portable(request().model_copy(update={"inputs": {"source": source}}))
    cut(ready_home / "artifacts")
    assert tracking.digest(tracking.fetch(sent.inputs["source"])) == source.sha256


@pytest.mark.parametrize("left", [b"", b'{"status": "done", "key', b"\xff\xfe\x00", b'{"status": "done"}', None])
def test_a_result_that_cannot_be_read_was_not_done(
    ready_home: Path, tmp_path: Path, left: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """As homes were left by a power cut before stages synced: FINISHED, result.json empty."""
    result = finished(request(), tmp_path / "model")
    file = tracking.locate(f"runs:/{result.run_id}/result.json")
    if left is None:
        file.unlink()
    else:
        file.write_bytes(left)
    assert tracking.find(request().key()) is None
    assert ("counts as not done" in caplog.text) == (left is not None)
    again = finished(request(), tmp_path / "model")
    assert again.run_id != result.run_id
    assert tracking.find(request().key()) == again.model_copy(update={"reused": True})
    assert len(runs_with(request().key(), "attributes.status = 'FINISHED'")) == 2


def test_a_result_of_another_version_is_read(ready_home: Path, tmp_path: Path) -> None:
    result = finished(request(), tmp_path / "model")
    file = tracking.locate(f"runs:/{result.run_id}/result.json")
    text = file.read_text().replace('"status"', '"new": [1], "status"', 1).replace('"sha256"', '"size": 1, "sha256"')
    file.write_text(text)
    assert tracking.find(request().key()) == result.model_copy(update={"reused": True})
