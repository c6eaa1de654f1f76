"""A tiny model of words, data folders and a run kept in memory, for tests of training stages."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.config.data import Kind
from schemas.config.training import LoRA
from stages.engine.data.codec import Codec
from stages.engine.data.trees import Tree
from stages.engine.tables import kinds, table
from stages.engine.training.method import Method, Metrics

WORDS = [*"abcdefgh", "red", "blue", "green", "yes", "no", "good", "bad", "one", "two", "three"]
LORA = LoRA(rank=2, alpha=4.0)


def model_folder(folder: Path, pad_is_end: bool = False, seed: int = 0, tied: bool = False) -> Path:
    """A causal LM with two layers and a tokenizer of WORDS, large weights so that its distributions are not flat."""
    special = ["<pad>", "<end>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, "\n", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<end>" if pad_is_end else "<pad>",
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=vocabulary["<end>" if pad_is_end else "<pad>"],
        eos_token_id=vocabulary["<end>"],
        bos_token_id=None,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    Codec(tokenizer).save(folder)
    return folder


def taught(folder: Path, prompts: Sequence[str], *answers: str) -> Path:
    """Such a model that has learned to give these answers to the prompts, each as often as the others, and to end."""
    model, codec = AutoModelForCausalLM.from_pretrained(model_folder(folder)), Codec.load(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    asked = [codec.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    pairs = [(before, codec.answer(text)) for before in asked for text in answers]
    longest = max(len(before) + len(after) for before, after in pairs)
    ids, labels = ([], [])
    for before, after in pairs:
        rest = longest - len(before) - len(after)
        ids.append([*before, *after, *[codec.pad_id] * rest])
        labels.append([*[-100] * len(before), *after, *[-100] * rest])
    for _ in range(60):
        model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def row(number: int, prompt: str, **columns: Any) -> dict[str, Any]:
    """A row as stage `validate` writes it."""
    messages = [{"role": "user", "content": prompt}]
    return {"row": number, "prompt": messages, "prompt_id": sha256(prompt.encode()).hexdigest()[:16], **columns}


def rows(n: int, *columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """n rows with prompts of their own, going round through `columns`."""
    texts = [f"{WORDS[i % 8]} {WORDS[i // 8 % 8]}{' red' * (i % 3)}" for i in range(n)]
    return [row(i, text, **columns[i % len(columns)]) for i, text in enumerate(texts)]


PAIRS: list[dict[str, Any]] = [
    {"chosen": "yes good one", "rejected": "no", "margin": None},
    {"chosen": "yes", "rejected": "no bad two three bad", "margin": None},
    {"chosen": "good blue", "rejected": "bad bad", "margin": None},
]
THUMBS: list[dict[str, Any]] = [
    {"completion": "yes good one", "label": True},
    {"completion": "no", "label": False},
    {"completion": "good blue two", "label": True},
    {"completion": "bad bad bad green", "label": True},
]
RANKINGS: list[dict[str, Any]] = [
    {"responses": ["yes good", "no", "bad bad"], "winners": [0, 0, 1], "losers": [1, 2, 2], "margins": None},
    {"responses": ["no bad two", "yes"], "winners": [1], "losers": [0], "margins": None},
    {"responses": ["good", "good blue", "two", "bad"], "winners": [0, 1, 2], "losers": [3, 3, 3], "margins": None},
]
ANSWERS: list[dict[str, Any]] = [{"response": text} for text in ("yes good one", "no", "blue red two green a b")]


def data_folder(folder: Path, **kinds: Sequence[Mapping[str, Any]]) -> Path:
    """A data folder: `preference=rows` makes train/preference.parquet, `eval_preference=rows` its held-out part."""
    for name, content in kinds.items():
        part, _, kind = name.rpartition("_")
        place = folder / (part or "train")
        place.mkdir(parents=True, exist_ok=True)
        pl.DataFrame([dict(r) for r in content], infer_schema_length=None).write_parquet(place / f"{kind}.parquet")
    return folder


def given(folder: Path, part: str, kind: Kind) -> pl.DataFrame:
    """The rows of a kind that a data folder gives; some are expected."""
    found = table(folder, part, kind)
    assert found is not None, kinds(folder, part)
    return found


def logps(folder: Path, tree: Tree) -> list[list[float]]:
    """log pi of every answer token by plain transformers in float64: one sequence at a time, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    found = []
    for answer in tree.answers:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([[*tree.prompt, *answer]])).logits[0]
        before_TV = logits_TV[len(tree.prompt) - 1 : -1].log_softmax(-1)
        found.append([float(before_TV[t, token]) for t, token in enumerate(answer)])
    return found


def perturb(model: nn.Module, seed: int = 1, scale: float = 0.05) -> None:
    """Move all trained weights a little, as some steps of training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def one_step(method: Method[Any], step: int = 0) -> tuple[float, Metrics]:
    """Loss and metrics of one optimizer step, gradients left in the model: what the loop does on one rank."""
    micros = next(method.batches(step))
    totals = method.prepare(micros)
    loss, metrics = torch.zeros(()), dict[str, Tensor]()
    for micro in micros:
        summand, some = method.loss(micro, totals)
        summand.backward()
        loss = loss + summand.detach()
        metrics |= {name: metrics.get(name, 0.0) + value.detach() for name, value in some.items()}
    return float(loss), metrics


def gradient(model: nn.Module) -> Tensor:
    """All gradients end to end; they are cleared."""
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)
