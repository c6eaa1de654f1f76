"""Tiny models with random weights, one per architecture, and random trees to feed them."""

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from stages.engine.data.trees import Tree

VOCABULARY = 61
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
KINDS = {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_GROUPED, "head_dim": 16},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {**_SIZES, "tie_word_embeddings": False},
    "gemma": {**_GROUPED, "head_dim": 8},
    "olmo2": _GROUPED,
    "phi": _SIZES,
    "phi3": {**_GROUPED, "sliding_window": 5},
    "smollm3": {**_GROUPED, "use_sliding_window": True, "sliding_window": 6},
    "starcoder2": {**_GROUPED, "sliding_window": 7},
}
"""model_type -> config. The windows are shorter than the sequences below; Qwen2's is in its last two layers."""
SCORERS = sorted(KINDS.keys() & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys())
"""Those of which transformers has a sequence classifier."""


def tiny_config(kind: str, **changes: object) -> PretrainedConfig:
    """The config of a tiny model, its dropouts left as the architecture has them."""
    special = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return CONFIG_MAPPING[kind](**{**special, **KINDS.get(kind, {}), **changes})


def tiny_model(kind: str, **changes: object) -> PreTrainedModel:
    """A causal LM with weights large enough that attention is far from uniform."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.05))
    return model.eval()


def save_tiny(folder: Path, kind: str, **changes: object) -> Path:
    """Save a tiny causal LM; returns its folder."""
    tiny_model(kind, **changes).save_pretrained(folder)
    return folder


def random_trees(
    n: int, *, seed: int = 0, prompt: tuple[int, int] = (2, 14), answer: tuple[int, int] = (1, 12), k: int = 3
) -> list[Tree]:
    """Trees with 1 to k answers; lengths between the given bounds; the first answer is a single token."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high)))

    trees = [Tree(tokens(*prompt), tuple(tokens(*answer) for _ in range(draw.randint(1, k)))) for _ in range(n)]
    return [Tree(trees[0].prompt, (trees[0].answers[0][:1], *trees[0].answers[1:])), *trees[1:]]


class NoTokenizer:
    """Stands where a model is saved without a tokenizer."""

    lead, end = "", "</s>"

    def pad_apart(self) -> int:
        return 2

    def save(self, folder: Path) -> None:
        pass
