"""Published models as MLflow's own users load and serve them."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.results import export, registry
from schemas.stage import Artifact, Request
from stages import tracking
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring.judges import RewardJudge
from stages.tracking import StageRun
from tests.support.models import model_folder

# MLflow's own imports warn of its own types, and its pipeline of how it is called.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

CHAT = [{"role": "user", "content": "red blue"}]


def published(folder: Path, stage: str, method: str = "none") -> Artifact:
    request = Request(stage=stage, version=1, params={"method": method}, name="dpo", experiment="tests")
    with StageRun(request) as run:
        artifact = run.publish("model", folder, model=True)
        run.finish({})
    return artifact


def said(folder: Path, new: int) -> str:
    """The likeliest answer by plain transformers."""
    model: Any
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids: Any = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=new, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_a_champion_is_loaded_and_served_by_mlflow(
    ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = said(model_folder(tmp_path / "model"), 6)
    artifact = published(tmp_path / "model", "align")
    again = published(model_folder(tmp_path / "again"), "align", "another")
    assert again.sha256 == artifact.sha256 and again.uri != artifact.uri, "equal models have equal digests"
    assert len(list(tracking.fetch(artifact).rglob("*.safetensors"))) == 1, "no second copy of the weights"
    run_id = tracking.client().get_logged_model(artifact.uri.removeprefix("models:/")).source_run_id
    registry.register_and_promote("assistant", artifact, run_id, {}, promote=True, expected=None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())

    import mlflow.pyfunc  # late: it warns
    import mlflow.transformers
    from mlflow.pyfunc.scoring_server import init

    pipeline: Any = mlflow.transformers.load_model("models:/assistant@champion")
    assert pipeline(CHAT, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]["content"] == plain
    served = TestClient(init(mlflow.pyfunc.load_model("models:/assistant@champion")))
    answer = served.post("/invocations", json={"messages": CHAT, "max_tokens": 6, "temperature": 1e-4})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"] if isinstance(answer.json(), dict) else answer.json()[0]["choices"]
    assert choice["message"] == {"role": "assistant", "content": plain}


def test_a_reward_model_scores_through_mlflow_as_in_training(ready_home: Path, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    save_scorer(load_scorer(base, seed=5), Codec.load(base), tmp_path / "reward", mean=0.5, std=2.0)
    answers = ["green", "yes no red"]
    expected = RewardJudge(tmp_path / "reward").score([CHAT, CHAT], answers)
    folder = tracking.fetch(published(tmp_path / "reward", "reward"))
    import mlflow.pyfunc  # late: it warns

    model = mlflow.pyfunc.load_model(str(folder))
    as_texts = model.predict(pd.DataFrame({"prompt": ["red blue"] * 2, "answer": answers}))
    as_messages = model.predict(pd.DataFrame({"prompt": [CHAT, CHAT], "answer": answers}))
    assert as_texts == as_messages == pytest.approx(expected, abs=1e-5) and expected[0] != expected[1]


def test_an_export_is_a_plain_folder(ready_home: Path, tmp_path: Path) -> None:
    """What MLflow alone needs stays in MLflow."""
    before = {path.name for path in model_folder(tmp_path / "model").iterdir()}
    artifact = published(tmp_path / "model", "align")
    export.export(artifact.uri, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before | {"README.md"}


def test_what_is_no_model_or_has_no_tokenizer_is_left_alone(ready_home: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("text", "config.json"):
        (tmp_path / "other" / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
        folder = tracking.fetch(published(tmp_path / "other", "align", name))
        assert {path.name for path in folder.iterdir()} == {"text", name}
