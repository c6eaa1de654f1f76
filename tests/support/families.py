"""Tokenizers as the families of models have them: what ends a turn, what pads, and whether a space begins a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.support.architectures import tiny_config

TEXTS = [
    "hello there, how are you today?",
    "the blue bird sat in a tree. No, it flew away!",
    "user model assistant",
] * 4

LINES = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '\\n') }}{% endfor %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] }}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A type of model with the tokenizer that goes with it."""

    kind: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    end: str
    """What ends an answer."""


def byte_level(special: Sequence[str], plain: Sequence[str] = (), **names: str) -> PreTrainedTokenizerFast:
    """GPT-2's way: bytes, and no space before a text. `plain` are added tokens that are not special."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, special, alphabet)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return _fast(tokenizer, names)


def sentence_piece(special: Sequence[str], space_first: bool, **names: str) -> PreTrainedTokenizerFast:
    """SentencePiece's way: a space is a letter, and with `space_first` one begins every text (Llama 2, Mistral)."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if space_first else replace
    strip = [decoders.Strip(" ", 1, 0)] if space_first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _train(tokenizer, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], ["\n"])
    return _fast(tokenizer, names)


def _train(tokenizer: Tokenizer, special: Sequence[str], alphabet: Sequence[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def _fast(tokenizer: Tokenizer, names: dict[str, str]) -> PreTrainedTokenizerFast:
    template = names.pop("template", None)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def _gpt2() -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return byte_level([end], bos_token=end, eos_token=end, pad_token=end, template=LINES)


def _inst() -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return sentence_piece(["<unk>", "<s>", "</s>"], True, **names, template=INST)


def _chatml() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(special, eos_token="<|im_end|>", pad_token="<|im_end|>", template=CHATML)


def _turns() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<end_of_turn>"}
    return sentence_piece(special, False, **names, template=TURNS)


FAMILIES = {
    "gpt2": Family("gpt2", _gpt2, "<|endoftext|>"),
    "llama": Family("llama", _inst, "</s>"),
    "mistral": Family("mistral", _inst, "</s>"),
    "qwen2": Family("qwen2", _chatml, "<|im_end|>"),
    "qwen3": Family("qwen3", _chatml, "<|im_end|>"),
    "gemma": Family("gemma", _turns, "<end_of_turn>"),
}
"""The padding of each is what ends an answer, as where somebody wrote `tokenizer.pad_token = tokenizer.eos_token`."""


def config_for(kind: str, tokenizer: PreTrainedTokenizerFast, **changes: object) -> PretrainedConfig:
    """A tiny config of that type that goes with the tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tiny_config(kind, **{"vocab_size": len(tokenizer), **ids, **changes})


def save_language_model(folder: Path, family: Family, **changes: object) -> Path:
    """A tiny language model of the family with large random weights; returns its folder."""
    return _save(folder, family, AutoModelForCausalLM, changes)


def save_reward_model(folder: Path, family: Family, **changes: object) -> Path:
    """A tiny reward model as transformers saves it, made without alignflow; returns its folder."""
    return _save(folder, family, AutoModelForSequenceClassification, {"num_labels": 1, **changes})


def _save(folder: Path, family: Family, auto: type, changes: dict[str, object]) -> Path:
    tokenizer = family.tokenizer()
    torch.manual_seed(11)
    model = auto.from_config(config_for(family.kind, tokenizer, **changes), dtype=torch.float32)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
