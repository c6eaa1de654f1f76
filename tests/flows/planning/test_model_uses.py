"""A model that cannot do what the config asks of it is refused before anything starts, and by stage `base`."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flows.planning.config_checks import check
from schemas.architectures import ENCODERS, NOT_SAMPLED, OTHER_HEADS, types, why_no_policy, why_no_scorer
from schemas.config import BaseParams, PipelineConfig
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from stages.base import build, check_fit
from stages.engine.data.codec import Codec
from stages.engine.data.examples import encode, fitting
from stages.engine.sampling import sample, why_not_sampled
from stages.validate import check as validate
from stages.validate.context import Context
from tests.support.families import FAMILIES, save_language_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PREFERENCE = {"kind": "preference", "eval_fraction": 0.3}


def folder_of(folder: Path, family: str = "qwen2", **config: Any) -> Path:
    """A model's folder with another config.json: nothing of it is loaded."""
    save_language_model(folder, FAMILIES[family])
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def problems(folder: Path, tmp_path: Path, **config: Any) -> dict[str, str]:
    """What a run with this model is refused for, by field."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"prompt": "hello", "chosen": "a", "rejected": "b"}) + "\n")
    whole = {
        "name": "x",
        "align": {},
        "model": {"path": str(folder)},
        "data": {"preference": {"path": str(rows), **PREFERENCE}},
    }
    return {
        str(p.field): f"{p.message} Fix: {p.fix}" for p in check(PipelineConfig.model_validate({**whole, **config}))
    }


@pytest.mark.parametrize(
    ("kind", "says"),
    [("roberta", "an encoder"), ("t5", "encoder-decoder"), ("falcon_mamba", "is recurrent"), ("nonsense", "unknown")],
)
def test_types_that_cannot_be_policies(kind: str, says: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", model_type=kind, architectures=None)
    found = problems(folder, tmp_path, reward=None, align={})
    assert found.keys() == {"model.path"} and says in found["model.path"] and repr(kind) in found["model.path"]
    with pytest.raises(StageError, match=says):
        check_fit(folder)


def test_an_encoder_that_was_trained_as_a_decoder_is_taken(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", model_type="roberta", architectures=None, is_decoder=True)
    assert problems(folder, tmp_path, reward=None, align={}) == {}


@pytest.mark.parametrize("kind", ["cohere", "granitemoe"])
def test_types_without_a_classifier_and_a_reward_stage(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", model_type=kind, architectures=None)
    found = problems(folder, tmp_path, align={"dpo": {}})
    assert found.keys() == {"reward"} and "Fix: set reward: null" in found["reward"]
    assert "align.ppo" in problems(folder, tmp_path, align={"ppo": {}, "dpo": {}})["reward"]
    assert problems(folder, tmp_path, align={"dpo": {}}, reward=None) == {}  # as the fix says
    gold = {"judge": {"judge": "reward"}}
    assert "gold" in problems(folder, tmp_path, reward=None, gold={}, evaluate=gold)


def test_pickles_and_quantized_weights_are_told_before_a_run(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in problems(folder, tmp_path)["model.path"]
    folder = folder_of(tmp_path / "quantized", quantization_config={"bits": 4})
    assert "quantized" in problems(folder, tmp_path)["model.path"]


def test_answers_longer_than_the_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")  # of 96 positions
    found = problems(folder, tmp_path, evaluate={"max_new_tokens": 96}, align={"ppo": {"max_new_tokens": 200}})
    assert found.keys() == {"evaluate.max_new_tokens", "align.ppo.max_new_tokens"}
    assert "96 positions" in found["evaluate.max_new_tokens"] and "below 96" in found["evaluate.max_new_tokens"]
    assert problems(folder, tmp_path, evaluate={"max_new_tokens": 95}) == {}


def test_a_reward_model_that_is_an_encoder_is_told_as_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rm", model_type="bert", architectures=["BertForSequenceClassification"])
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": {"0": "score"}}))
    found = problems(folder_of(tmp_path / "model"), tmp_path, reward_model=str(folder))
    assert "another head" in found["reward_model"]


def test_every_listed_type_is_one_of_transformers() -> None:
    known = types("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    assert len(known) > 100 and {*NOT_SAMPLED, *ENCODERS} <= known
    assert types("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES") >= OTHER_HEADS
    for name in ("CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM"):
        mapping = f"MODEL_FOR_{name}_MAPPING_NAMES"
        assert types(mapping) == getattr(modeling_auto, mapping).keys(), mapping
    for kind in ("llama", "mistral", "qwen3", "gemma", "gpt2"):
        assert why_no_policy({"model_type": kind}) is None and why_no_scorer({"model_type": kind}) is None


# --- what stage base tries ---


def tiny(kind: str, **changes: Any) -> Any:
    config: PretrainedConfig = CONFIG_MAPPING[kind](**{**SIZES, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("bert", {}, "see what follows"),
        ("mamba", {"state_size": 4}, "past_key_values"),
        ("bert", {"is_decoder": True}, None),
        ("llama", {}, None),
    ],
)
def test_models_are_tried_before_anything_is_trained(kind: str, changes: dict[str, Any], says: str | None) -> None:
    reason = why_not_sampled(tiny(kind, **changes))
    assert reason is None if says is None else reason is not None and says in reason


def test_base_refuses_what_its_config_did_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.base.why_not_sampled", lambda model: "its tokens see what follows them")
    folder = save_language_model(tmp_path / "model", FAMILIES["qwen2"])
    with pytest.raises(StageError, match=r"model\.path = .*cannot be sampled .*see what follows"):
        build(BaseParams(path=str(folder)), 0, tmp_path / "base")


@torch.no_grad()
def test_rows_of_a_hybrid_leave_their_batch_when_they_end() -> None:
    """Its layers without attention keep states where others keep keys and values."""
    linear = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")}
    linear |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 16, "num_key_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    experts["shared_expert_intermediate_size"] = 16
    model = tiny("qwen3_next", **linear, **experts, layer_types=["linear_attention", "full_attention"])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter) * 0.15)
    prompts = [[5, 6, 7, 8, 9, 10], [12, 13], [14, 15, 16]]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "pad_id": 0}
    free = [sample(model, [prompt], seeds=[0], stop_ids=[-1], **settings)[0] for prompt in prompts]
    stop = free[1][1]  # the second ends after two tokens
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert sample(model, prompts, seeds=[0, 0, 0], stop_ids=[stop], **settings) == expected
    assert len({len(ids) for ids in expected}) > 1


# --- positions ---


def test_rows_beyond_the_models_positions_are_too_long(tmp_path: Path) -> None:
    codec = Codec.load(folder_of(tmp_path / "model", max_position_embeddings=30))
    assert codec.positions == 30
    rows = [{"prompt": f"hello {i}", "response": "the bird flew away " * 4} for i in range(10)]
    pl.DataFrame(rows).write_ndjson(tmp_path / "rows.jsonl")
    params = ValidateParams(path=str(tmp_path / "rows.jsonl"), kind="sft")
    with pytest.raises(StageError, match=r"model has 30 positions, fewer than max_length = 1024.* rows of at most 30"):
        validate(Context(params, codec), tmp_path / "out")
    codec.positions = None  # then only max_length counts
    assert validate(Context(params, codec), tmp_path / "out").kept == 10


def test_no_row_within_the_models_positions(tmp_path: Path) -> None:
    codec = Codec.load(save_language_model(tmp_path / "model", FAMILIES["qwen2"]))
    row = {"prompt": [{"role": "user", "content": "hello"}], "response": "the bird flew away"}
    examples = encode([row], lambda r: [r["response"]], codec)
    with pytest.raises(StageError, match=r"a model of 8 positions.*give rows of at most 8 tokens"):
        fitting(examples, 1024, 8)
    with pytest.raises(StageError, match=r"max_length = 8.*set max_length to at least"):
        fitting(examples, 8, 1024)
