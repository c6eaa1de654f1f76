"""Files from outside never run code: a pickle that would leave a mark is put wherever something is read back."""

import contextlib
import importlib
import io
import json
import os
import pickle
import pkgutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow, Task
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.serializers import PickleSerializer
from prefect.states import Completed
from safetensors import SafetensorError

import flows
from flows.execution import work_pool
from schemas.config import BaseParams, SFTConfig
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from schemas.stage import STAGES, Request
from stages import base, tracking
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy, load_scorer
from stages.engine.training import checkpoint
from stages.tracking import mlflow_client
from stages.validate.readers import records
from tests.support import models
from tests.support.forks import run
from tests.support.killable_training import Case


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
        "model": models.model_folder(tmp_path / "model"),
        "data": models.data_folder(tmp_path / "data", sft=models.rows(12, *models.ANSWERS)),
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
    folder = models.model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(evil)
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.pyfunc.model}}\n")
    for load in (load_policy, load_scorer, lambda path: base.build(BaseParams(path=str(path)), 0, tmp_path / "out")):
        with pytest.raises((StageError, SafetensorError)):
            load(tracking.locate(str(folder)))
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of MLflow's own import
def test_a_pickle_as_a_registered_model(ready_home: Path, tmp_path: Path, mark: Path, evil: bytes) -> None:
    """Our loaders don't read it, and MLflow's own refuse."""
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    folder = models.model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    flavor = (
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl\n"
    )
    (folder / "MLmodel").write_text(flavor + "    cloudpickle_version: '3.0'\n    python_version: '3.11'\n")
    for name in ("python_model.pkl", "pytorch_model.bin"):
        (folder / name).write_bytes(evil)
    client = tracking.client()
    run_id = client.create_run(tracking.experiment("evil")).info.run_id
    client.log_artifacts(run_id, str(folder), "model")
    client.create_registered_model("evil")
    place = client.get_run(run_id).info.artifact_uri
    client.create_model_version("evil", f"{place}/model", run_id)
    found = tracking.locate("models:/evil/1")
    for load in (load_policy, load_scorer, lambda path: base.build(BaseParams(path=str(path)), 0, tmp_path / "out")):
        with pytest.raises((StageError, SafetensorError)):
            load(found)
    with pytest.raises(MlflowException, match=r"[Pp]ickle"):
        mlflow.pyfunc.load_model(str(found))
    assert not mark.exists()


CODE = "import os\nos.mkdir({place!r})\nclass Mine: pass\n"


@pytest.mark.parametrize("kind", ["llama", "mine"])
def test_code_of_a_model_folder(kind: str, tmp_path: Path, mark: Path) -> None:
    """`auto_map` of model, config and tokenizer: left out where transformers has the type, refused elsewhere."""
    folder = models.model_folder(tmp_path / "model")
    (folder / "mine.py").write_text(CODE.format(place=str(mark)))
    for file, names in (
        ("config.json", ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"]),
        ("tokenizer_config.json", ["AutoTokenizer"]),
    ):
        content = json.loads((folder / file).read_text())
        content["auto_map"] = {name: "mine.Mine" if name != "AutoTokenizer" else ["mine.Mine", None] for name in names}
        content |= {"model_type": kind} if file == "config.json" else {"tokenizer_class": "Mine"}
        (folder / file).write_text(json.dumps(content))
    out = tmp_path / "out"
    if kind == "llama":
        base.build(BaseParams(path=str(folder)), 0, out)
        assert not any("auto_map" in file.read_text() for file in out.glob("*.json"))
        assert not (out / "mine.py").exists()
        load_policy(folder)
        load_scorer(folder)
    else:
        with pytest.raises(StageError, match="never run"):
            base.build(BaseParams(path=str(folder)), 0, out)
        for load in (load_policy, load_scorer):
            with pytest.raises(StageError, match="never run"):
                load(folder)
    Codec.load(folder)
    assert not mark.exists()


def test_code_in_a_chat_template(tmp_path: Path, mark: Path) -> None:
    folder = models.model_folder(tmp_path / "model")
    call = f"__globals__['__builtins__']['__import__']('os').mkdir('{mark}')"
    for template in ("{{ raise_exception.%s }}", "{{ cycler.__init__.%s }}", "{{ messages.append.__self__.%s }}"):
        with pytest.raises(StageError):
            base.build(BaseParams(path=str(folder), chat_template=template % call), 0, tmp_path / "out")
    assert not mark.exists()


SUFFIXES = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cls", "ten")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # of torch's reader of tensors alone
def test_code_and_pickles_in_a_data_set(
    tmp_path: Path, mark: Path, evil: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loading script, a pickled table, and an archive of pickles under every name that a reader could know."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folders = {name: tmp_path / name for name in ("script", "table", *SUFFIXES)}
    for folder in folders.values():
        folder.mkdir()
    (folders["script"] / "script.py").write_text(CODE.format(place=str(mark)))
    (folders["table"] / "train.pkl").write_bytes(evil)
    for suffix in SUFFIXES:
        with tarfile.open(folders[suffix] / "train.tar", "w") as tar:
            member = tarfile.TarInfo(f"0.{suffix}")
            member.size = len(evil)
            tar.addfile(member, io.BytesIO(evil))
    for name, folder in folders.items():
        with contextlib.suppress(Exception):  # how it ends is for others to test
            list(records(ValidateParams(path=f"hub:{folder}", kind="prompt")))
        assert not mark.exists(), name
    with pytest.raises(StageError, match="scripts are no longer supported"):
        list(records(ValidateParams(path=f"hub:{folders['script']}", kind="prompt")))


def flows_and_tasks() -> list[Any]:
    """Every Prefect flow and task of the package `flows`."""
    modules = [importlib.import_module(f"flows.{found.name}") for found in pkgutil.iter_modules(flows.__path__)]
    found = {
        id(value): value for module in modules for value in vars(module).values() if isinstance(value, Flow | Task)
    }
    return list(found.values())


def test_what_prefect_keeps_is_json() -> None:
    """And no result outlives its process, so that none is read back."""
    kept = {one.name: (one.result_serializer, one.persist_result) for one in flows_and_tasks()}
    assert {"pipeline", "stage"} <= kept.keys()
    assert set(kept.values()) == {("json", False)}


def test_a_pickle_as_a_prefect_result(ready_home: Path, tmp_path: Path, mark: Path) -> None:
    """Who can write to the server may name a pickle as a run's result. Prefect would read it; we take MLflow's word."""
    storage = LocalFileSystem(basepath=str(tmp_path / "storage"))
    store = ResultStore(result_storage=storage, serializer=PickleSerializer())
    record = store.create_result_record(Mark(mark), key="result")
    store.persist_result_record(record)
    state = Completed(data=record.metadata)
    result = work_pool.outcome(state, Request(stage="sft", version=STAGES["sft"].version, params={}))
    assert result.status == "failed" and not mark.exists()
    ResultStore(result_storage=storage, serializer=PickleSerializer()).read("result")
    assert mark.exists()  # it would have worked


@pytest.mark.parametrize("before", [None, "true"])
def test_mlflow_may_not_unpickle(before: str | None, ready_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says; in this process and in those of stages, which inherit it or set it themselves."""
    if before is None:
        monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", before)
    mlflow_client._client_for.cache_clear()
    tracking.setup()
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
