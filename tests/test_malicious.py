"""Files from outside never run code: a pickle that would leave a mark is put wherever something is read back."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flows.pipeline import pipeline, run_node
from schemas.config import BaseParams, SFTConfig
from schemas.stage import StageError
from stages import base, tracking
from stages.engine import checkpoint
from stages.engine.models import load_policy, load_scorer
from tests import tiny
from tests.faults import Case, run


class Mark:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def evil(mark: Path) -> bytes:
    """The pickle; it works."""
    content = pickle.dumps(Mark(mark))
    pickle.loads(content)
    mark.rmdir()
    return content


def reseal(folder: Path) -> None:
    """As one who can write files would: a manifest that fits what lies there."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"] = {
        path.name: {"size": path.stat().st_size, "sha256": tracking.digest(path)}
        for path in sorted(folder.iterdir())
        if path.name != checkpoint.MANIFEST
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "rank-0.safetensors", "loop.json", "more.pkl"])
def test_a_pickle_in_a_checkpoint(name: str, tmp_path: Path, mark: Path, evil: bytes) -> None:
    inputs = {
        "model": tiny.model_folder(tmp_path / "model"),
        "data": tiny.data_folder(tmp_path / "data", sft=tiny.rows(12, *tiny.ANSWERS)),
    }
    case = Case(SFTConfig(batch_size=4, checkpoint_steps=1), inputs)
    assert run(case.train, tmp_path / "work") == 0
    newest = tmp_path / "work" / "checkpoints" / "step-3"
    (newest / name).write_bytes(evil)
    reseal(newest)
    assert checkpoint.fault(newest, "key") is None  # its manifest is right
    # A file that nobody asks for does no harm; one that is read stops the run.
    assert run(case.train, tmp_path / "work") == (0 if name == "more.pkl" else 1)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "python_model.pkl"])
def test_a_pickle_as_a_model(name: str, tmp_path: Path, mark: Path, evil: bytes) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(evil)
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.pyfunc.model}}\n")
    for load in (load_policy, load_scorer, lambda path: base.build(BaseParams(path=str(path)), 0, tmp_path / "out")):
        with pytest.raises((StageError, SafetensorError)):
            load(tracking.locate(str(folder)))
    assert not mark.exists()


def test_what_prefect_keeps_is_json() -> None:
    assert (pipeline.result_serializer, run_node.result_serializer) == ("json", "json")
    assert (pipeline.persist_result, run_node.persist_result) == (False, False)


def test_mlflow_may_not_unpickle(home: Path) -> None:
    tracking.client()
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
