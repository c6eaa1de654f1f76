"""A tiny model of words, data folders and a run kept in memory, for tests of training stages."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.stage import Artifact, Request
from schemas.training import LoRA, Training
from stages.engine.text import Codec

WORDS = "a b c d e f g h red blue green yes no good bad one two three".split()
LORA = LoRA(rank=2, alpha=4.0)


def model_folder(folder: Path, pad_is_end: bool = False, seed: int = 0) -> Path:
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
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
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
ANSWERS: list[dict[str, Any]] = [{"response": "yes good one"}, {"response": "no"}, {"response": "blue red two green a b"}]


def data_folder(folder: Path, **kinds: Sequence[Mapping[str, Any]]) -> Path:
    """A data folder: `preference=rows` makes train/preference.parquet, `eval_preference=rows` its held-out part."""
    for name, content in kinds.items():
        part, _, kind = name.rpartition("_")
        place = folder / (part or "train")
        place.mkdir(parents=True, exist_ok=True)
        pl.DataFrame([dict(r) for r in content], infer_schema_length=None).write_parquet(place / f"{kind}.parquet")
    return folder


class Run:
    """What a training stage needs of a StageRun, kept in memory."""

    def __init__(self, work: Path, stage: str, inputs: Mapping[str, Path], training: Training, seed: int = 0) -> None:
        self.work, self.key, self.inputs = work, "k", dict(inputs)
        self.work.mkdir(parents=True, exist_ok=True)
        artifacts = {name: Artifact(uri=str(path), sha256=str(path)) for name, path in inputs.items()}
        params = training.model_dump(mode="json")
        self.request = Request(stage=stage, version=1, params=params, inputs=artifacts, seed=seed)
        self.logged: dict[tuple[str, int | None], float] = {}
        self.tags: dict[str, object] = {}
        self.outputs: dict[str, Path] = {}

    def input(self, name: str) -> Path:
        return self.inputs[name]

    def has(self, name: str) -> bool:
        return name in self.inputs

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.logged |= {(name, step): value for name, value in values.items()}

    def params(self, values: Mapping[str, object]) -> None:
        pass

    def tag(self, name: str, value: object) -> None:
        self.tags[name] = value

    def progress(self, done: int, total: int, what: str) -> None:
        pass

    def publish(self, name: str, folder: Path, model: bool = False) -> Artifact:
        self.outputs[name] = folder
        return Artifact(uri=str(folder), sha256="")

    def steps(self, name: str) -> list[float]:
        """A metric's values over the steps."""
        found = [(step, value) for (key, step), value in self.logged.items() if key == name and step is not None]
        return [value for _, value in sorted(found)]
