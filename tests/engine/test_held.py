"""Weights that are only read in bfloat16 and in four bits: the numbers that they give, and what they take."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from schemas.config import methods, training
from schemas.config.training import Held, LoRA, Training
from schemas.errors import StageError
from stages.engine import blocks
from stages.engine.data.trees import Batch, collate
from stages.engine.models.held import NF4_BLOCK, Nf4
from stages.engine.models.loading import load_judge, load_policy, load_scorer
from stages.engine.models.lora import base_of
from stages.engine.models.policy import Policy
from stages.engine.models.saving import save_policy, save_scorer
from tests.engine.test_models import PAD, stir
from tests.support.architectures import KINDS, NoTokenizer, random_trees, save_tiny, tiny_model

KNOWN = ["llama", "gpt2", "gemma", "phi"]  # tied weights, Conv1D, a layer of the type's own, biases


def lora(base: Held, **changes: object) -> Training:
    return Training.model_validate({"lora": LoRA(rank=4, alpha=8, base=base), **changes})


def in_bf16(folder: Path, kind: str, **changes: object) -> Path:
    tiny_model(kind, **changes).bfloat16().save_pretrained(folder)
    return folder


def embedding(model: Policy) -> Any:
    return model.plain.get_input_embeddings()


def head(model: Policy) -> Any:
    return model.plain.get_output_embeddings()


def held_bytes(model: nn.Module) -> int:
    """Of everything that never learns, each tensor once."""
    tensors = itertools.chain((p for p in model.parameters() if not p.requires_grad), model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


# --- blocks ---


def test_a_number_becomes_the_nearest_of_its_blocks_multiples() -> None:
    values_RC = torch.tensor([[0.5, -4.0, 3.2, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0, -7.0]])
    table = (-1.0, 0.0, 0.5, 1.0)
    codes_RC, scales_Rb = blocks.encode(values_RC, table, 4)  # the fifth is a block of its own
    assert scales_Rb.tolist() == [[4.0, pytest.approx(0.3)], [0.0, 7.0]]
    assert codes_RC.tolist() == [[1, 0, 3, 1, 3], [1, 1, 1, 1, 0]]
    expected_RC = torch.tensor([[0.0, -4.0, 4.0, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0, -7.0]])
    torch.testing.assert_close(blocks.decode(codes_RC, scales_Rb, table, 4), expected_RC)


def test_two_places_to_a_byte_come_back() -> None:
    codes_RC = torch.arange(14, dtype=torch.uint8).view(2, 7)
    packed = blocks.pack(codes_RC)
    assert packed.shape == (2, 4) and packed[0, 0] == 0 * 16 + 1  # the first in the upper half
    assert torch.equal(blocks.unpack(packed, 7), codes_RC)


def test_the_dynamic_tables_are_fine_near_one_and_reach_seven_decades() -> None:
    for table, sign in ((blocks.SIGNED, 1), (blocks.UNSIGNED, 0)):
        values = torch.tensor(table)
        assert len(set(table)) == 256 and table == tuple(sorted(table)) and 1.0 in table and 0.0 in table
        assert (values < 0).sum() == 127 * sign
        # Half a step of the largest decade: 0.9 over 64 or 128 steps.
        numbers = torch.linspace(0.1, 1, 1000)[None]
        codes, scales = blocks.encode(numbers, table, 1000)
        error = (blocks.decode(codes, scales, table, 1000) - numbers).abs().max()
        assert error <= 0.9 / (64 if sign else 128) / 2 * 1.01
    assert min(abs(value) for value in blocks.SIGNED if value) == pytest.approx(0.55e-6)


# --- bfloat16 ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KNOWN)
def test_weights_from_files_in_bf16_give_the_same_numbers_in_half_the_memory(
    kind: str, precision: str, tmp_path: Path
) -> None:
    folder, batch = in_bf16(tmp_path, kind), collate(random_trees(4), "shared", PAD)
    whole, half = (load_policy(folder, lora(base, precision=precision), seed=1) for base in ("fp32", "bf16"))
    assert held_bytes(half) < 0.6 * held_bytes(whole) and half.numbers == f"{precision}/bf16"
    found = []
    for policy in (whole, half):
        stir(policy)
        logps_N = policy(batch).logps_N
        logps_N.sum().backward()
        found.append((logps_N.detach(), *(p.grad for p in policy.parameters() if p.requires_grad)))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and other.dtype == torch.float32
        torch.testing.assert_close(
            other, one, rtol=1e-4 if precision == "fp32" else 0.05, atol=1e-5 + 0.01 * (precision == "bf16")
        )


def test_a_weight_that_two_layers_share_stays_one(tmp_path: Path) -> None:
    policy = load_policy(in_bf16(tmp_path, "llama"), trainable=False, frozen="bf16")
    assert embedding(policy).weight is head(policy).weight
    assert policy.precision == "bf16", "what trains nothing multiplies as it is asked to be held"
    gemma = in_bf16(tmp_path / "gemma", "gemma3_text", **KINDS["gemma"])
    tiny_gemma = load_policy(gemma, trainable=False, frozen="bf16")
    assert head(tiny_gemma).weight.dtype == torch.float32, "its embedding is of its own kind"


def test_large_models_are_held_in_bf16_and_published_as_their_base_is(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = in_bf16(tmp_path / "half", "llama")
    assert load_policy(llama, trainable=False).held == load_policy(half, Training(lora=LoRA())).held == "fp32"
    assert load_policy(half, Training()).publish == "fp32"
    parameters = sum(p.numel() for p in load_policy(llama).parameters())
    monkeypatch.setattr(training, "LARGE", parameters + 1)
    assert load_policy(half, Training()).publish == load_policy(half, trainable=False).held == "fp32"
    monkeypatch.setattr(training, "LARGE", parameters)
    by_itself = load_policy(half, trainable=False)
    assert by_itself.held == load_policy(half, Training(lora=LoRA())).held == "bf16"
    assert by_itself.precision == "fp32", "by default no number changes"
    assert load_policy(llama, trainable=False).held == load_policy(llama, Training(lora=LoRA())).held == "fp32"
    assert load_policy(half, trainable=False, frozen="fp32").held == load_policy(half, Training()).held == "fp32"
    assert [load_policy(folder, Training()).publish for folder in (llama, half)] == ["fp32", "bf16"]
    assert load_policy(half, Training(publish="fp32")).publish == "fp32"
    judge = load_scorer(half, Training(lora=LoRA()))
    assert judge.held == "bf16" and judge.plain.get_parameter("score.weight").dtype == torch.float32


# --- four bits ---


def test_a_type_without_layers_that_four_bits_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match=r"none of the layers of a 'gpt2' can be held in four bits\. Fix: set it to bf16"
    ):
        load_policy(save_tiny(tmp_path, "gpt2"), lora("nf4"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_in_four_bits_adapters_learn_and_both_exports_give_the_same_model(kind: str, tmp_path: Path) -> None:
    start, batch = save_tiny(tmp_path / "start", kind), collate(random_trees(4), "padded", PAD)
    policy = load_policy(start, lora("nf4", publish="fp32"))
    reference_N = policy(batch).logps_N
    quantised = [m for m in policy.modules() if isinstance(m, Nf4)]
    assert quantised and head(policy).weight.dtype == torch.bfloat16
    # Half a byte a weight, and a scale of two bytes for each block; rows here are shorter than a block.
    assert all(m.weight.nbytes == m.in_features * m.out_features / 2 for m in quantised)
    assert all(m.scales_Ob.nbytes == 2 * m.out_features * -(-m.in_features // NF4_BLOCK) for m in quantised)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = -policy(batch).logps_N.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        after_N = policy(batch).logps_N
        with policy.reference():
            assert torch.equal(policy(batch).logps_N, reference_N), "the reference is the same weights, adapters off"
    save_policy(policy, NoTokenizer(), tmp_path / "saved", base="a digest")
    assert base_of(tmp_path / "saved") == "a digest in nf4", "no model that holds its base whole may borrow it"

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(plain_logps(merged, batch), after_N, atol=2e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    state = {n.replace(".base_layer", ""): m for n, m in policy.plain.named_modules() if isinstance(m, Nf4)}
    assert len(state) == len(quantised)
    layers: list[tuple[str, Any]] = list(base.named_modules())
    for name, module in layers:
        if name in state:
            error = (module.weight - state[name].whole(torch.float32)).norm() / module.weight.norm()
            assert 0.05 < error < 0.11, "about 9 % of a normal distribution"
            module.weight.data = state[name].whole(torch.float32)
        elif type(module) in (nn.Linear, nn.Embedding):
            module.weight.data = module.weight.data.bfloat16().float()
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "saved" / "adapter"))
    torch.testing.assert_close(plain_logps(adapted, batch), after_N, atol=2e-4, rtol=1e-4)


def plain_logps(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    logits_NV = logits.flatten(0, 1)[batch.predict_N]
    return logits_NV.log_softmax(-1).gather(-1, batch.labels_N[:, None]).squeeze(-1)


# --- published ---


def test_a_model_published_in_bf16_is_the_rounded_one(llama: Path, tmp_path: Path) -> None:
    policy = load_policy(llama, lora("bf16", publish="bf16"))
    stir(policy)
    save_policy(policy, NoTokenizer(), tmp_path / "half")
    policy.publish = "fp32"
    save_policy(policy, NoTokenizer(), tmp_path / "whole")
    half, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype="auto") for n in ("half", "whole"))
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    for name, value in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16()), name
    size = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert size[0] < 0.65 * size[1], "a tied weight is written once"
    scorer = load_scorer(llama, Training(publish="bf16"), seed=3)
    save_scorer(scorer, NoTokenizer(), tmp_path / "reward", mean=0.2, std=1.5)
    assert load_judge(tmp_path / "reward", frozen="bf16").held == "bf16"


def test_settings_that_came_later_are_asked_for_by_name() -> None:
    assert "base" not in methods.DPO(lora=LoRA()).model_dump()["lora"]
    assert methods.DPO(lora=LoRA(base="nf4")).model_dump()["lora"]["base"] == "nf4"
