"""Sampling: equal to a loop without cache, whatever else is in the batch, for every kind of position and attention.

Shapes: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from schemas.config.training import LoRA, Training
from stages.engine.models.loading import load_policy
from stages.engine.models.policy import Policy
from stages.engine.sampling import draw, sample, seed_of, uniforms

END, PAD, VOCABULARY = 1, 0, 40
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": END, "pad_token_id": PAD}
LAYERS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, **LAYERS, num_key_value_heads=1),
    "mistral, window of 4": lambda: MistralConfig(**SIZES, **LAYERS, num_key_value_heads=1, sliding_window=4),
    "gpt2": lambda: GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "neox": lambda: GPTNeoXConfig(**SIZES, **LAYERS),
    "opt": lambda: OPTConfig(**SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32),
    "bloom": lambda: BloomConfig(**SIZES, hidden_size=16, n_layer=2, n_head=2),
}


def tiny(name: str = "llama") -> PreTrainedModel:
    """A tiny model with large enough weights that its next-token distributions differ from the uniform one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.4)
    return model


def prompts(n: int, longest: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def naive(model: PreTrainedModel, prompt: list[int], seed: int, max_new_tokens: int, temperature: float) -> list[int]:
    """One row, no padding, no cache: the whole sequence anew for every token."""
    answer: list[int] = []
    for number in uniforms(seed, max_new_tokens):
        logits_V = model(input_ids=torch.tensor([prompt + answer])).logits[0, -1].double()
        if temperature == 0:
            answer.append(int(logits_V.argmax()))
        else:
            cumulative_V = torch.softmax(logits_V / temperature, -1).cumsum(-1)
            answer.append(int((cumulative_V <= number * cumulative_V[-1]).sum()))
        if answer[-1] == END:
            break
    return answer


def run(model: PreTrainedModel | Policy, rows: list[list[int]], seeds: list[int], **settings: Any) -> list[list[int]]:
    whole: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, **settings}
    return sample(model, rows, seeds=seeds, stop_ids={END}, pad_id=PAD, **whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_naive_loop_without_cache(name: str) -> None:
    model, rows = tiny(name), prompts(10)
    seeds = [seed_of(7, i) for i in range(10)]
    expected = [naive(model, p, s, 12, 1.0) for p, s in zip(rows, seeds, strict=True)]
    assert run(model, rows, seeds, batch_size=4) == expected
    assert len({len(answer) for answer in expected}) > 1, "the test wants rows that end at different times"


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_temperature(temperature: float) -> None:
    model, rows, seeds = tiny(), prompts(6), list(range(6))
    expected = [naive(model, p, s, 12, temperature) for p, s in zip(rows, seeds, strict=True)]
    assert run(model, rows, seeds, temperature=temperature) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_an_answer_does_not_depend_on_its_batch(batch_size: int) -> None:
    model, rows = tiny(), prompts(17)
    seeds = [seed_of("x", i) for i in range(17)]
    expected = run(model, rows, seeds, batch_size=64)
    assert run(model, rows, seeds, batch_size=batch_size) == expected
    backwards = run(model, rows[::-1], seeds[::-1], batch_size=5)
    assert backwards == expected[::-1]


def test_same_seed_same_answer_and_other_seeds_others() -> None:
    model, row = tiny(), prompts(1)[0]
    answers = run(model, [row] * 8, [3, 3, 4, 5, 6, 7, 8, 9])
    assert answers[0] == answers[1]
    assert len({tuple(a) for a in answers}) > 2


def test_rows_end_at_the_stop_token_or_at_the_limit() -> None:
    answers = run(tiny(), prompts(40), list(range(40)), max_new_tokens=6)
    for answer in answers:
        assert 1 <= len(answer) <= 6
        assert END not in answer[:-1]
        assert answer[-1] == END or len(answer) == 6
    assert {answer[-1] == END for answer in answers} == {True, False}


def test_every_stop_id_stops_and_a_longer_limit_goes_on_from_the_same_tokens() -> None:
    model, rows, seeds = tiny(), prompts(20), list(range(20))
    settings: dict[str, Any] = {"temperature": 1.0, "seeds": seeds, "pad_id": PAD}
    long = sample(model, rows, max_new_tokens=12, stop_ids=set(), **settings)
    assert {len(a) for a in long} == {12}
    stopped = sample(model, rows, max_new_tokens=12, stop_ids={3, 4, 5, END}, **settings)
    for whole, cut in zip(long, stopped, strict=True):
        ends = [i for i, token in enumerate(whole) if token in {3, 4, 5, END}]
        assert cut == (whole[: ends[0] + 1] if ends else whole)
    assert sample(model, rows, max_new_tokens=5, stop_ids=set(), **settings) == [a[:5] for a in long]


def test_finished_rows_leave_the_batch() -> None:
    model, rows, seeds = tiny(), prompts(12), list(range(12))
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["input_ids"])), with_kwargs=True)
    answers = run(model, rows, seeds)
    hook.remove()
    assert sizes == [sum(len(a) > step for a in answers) for step in range(max(map(len, answers)))]
    assert sizes[-1] < sizes[0]


def test_draw_follows_the_distribution_and_never_takes_what_has_no_probability() -> None:
    logits_V = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf], dtype=torch.float64)
    probs_V = torch.softmax(logits_V, -1)
    n = 20_000
    uniform_B = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # an even grid: counts are exact to one per token
    token_B = draw(logits_V.expand(n, -1), 1.0, uniform_B)
    counts_V = torch.bincount(token_B, minlength=6).double()
    assert torch.allclose(counts_V / n, probs_V, atol=2 / n)
    edges_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits_V.expand(2, -1), 1.0, edges_B).tolist() == [1, 4]


def test_progress_counts_every_row_once() -> None:
    calls: list[tuple[int, int]] = []
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0, "stop_ids": {END}, "pad_id": PAD}
    sample(tiny(), prompts(9), seeds=list(range(9)), batch_size=4, progress=lambda *c: calls.append(c), **settings)
    assert calls == [(done, 9) for done in range(1, 10)]


def test_training_mode_and_gradient_checkpointing_come_back() -> None:
    model = tiny()
    expected = run(model, prompts(5), list(range(5)))
    model.activation_checkpointing_enable()
    model.train()
    assert run(model, prompts(5), list(range(5))) == expected
    assert model.training


@pytest.mark.parametrize("name", ["llama", "mistral, window of 4", "gpt2"])
def test_a_policy_in_training_samples_like_the_model_it_is(name: str, tmp_path: Path) -> None:
    """With the attention for trees, adapters around the model, a value head and gradient checkpointing."""
    model, rows, seeds = tiny(name), prompts(8), list(range(8))
    model.save_pretrained(tmp_path)
    training = Training(lora=LoRA(rank=2), gradient_checkpointing=True)
    policy = load_policy(tmp_path, training, value_head=True).train()
    assert run(policy, rows, seeds, batch_size=3) == run(model, rows, seeds)
    assert policy.training and policy.hf.training


def test_what_cannot_be_sampled_is_refused() -> None:
    model = tiny("gpt2")
    assert run(model, [], []) == []
    with pytest.raises(ValueError, match="one seed per prompt"):
        run(model, prompts(3), [1])
    with pytest.raises(ValueError, match="empty prompt"):
        run(model, [[]], [1])
    with pytest.raises(ValueError, match="60 tokens and 12 new ones exceed the model's 64 positions"):
        run(model, [[5] * 60], [1])


def test_seeds_are_functions_of_their_parts() -> None:
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(12)
    assert len({seed_of(s, i) for s in range(40) for i in range(40)}) == 1600
    assert uniforms(9, 20)[:7] == uniforms(9, 7)


def test_a_real_model_writes_readable_text(tinystories: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tinystories), AutoTokenizer.from_pretrained(tinystories)
    starts = ["Once upon a time", "Lily and Tom went to the", "The dog"]
    rows = [tokenizer(text)["input_ids"] for text in starts]
    answers = sample(model, rows, max_new_tokens=60, temperature=0.5, seeds=[1, 2, 3], stop_ids={2}, pad_id=0)
    words = " ".join(tokenizer.decode(answer) for answer in answers).lower().split()
    common = {"a", "the", "to", "and", "was", "she", "he", "they", "little", "girl", "with", "park", "play", "said"}
    assert sum(word.strip('.,"!') in common for word in words) > 0.25 * len(words)
    logits_BTV: Tensor = model(input_ids=torch.tensor([rows[0] + answers[0]])).logits
    logps_T = logits_BTV[0, len(rows[0]) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answers[0])[:, None])
    assert logps_T.mean() > -2.5, "about log 512 = 6.2 for random tokens"
