"""Whether the parts of a model folder fit together, from its JSON files alone: no weight is read, nothing imported."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def why_unusable(folder: Path, scorer: bool) -> tuple[str, str] | None:
    """What does not fit, and its fix; None for a folder in order. `scorer`: a reward model is wanted.

    What the files do not tell (no tokenizer.json, no `vocab_size`) is left to those who load them.
    """
    try:
        config = _read(folder / "config.json")
        tokens = last_token(_read(folder / "tokenizer.json"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its JSON files cannot be read: {error}", "name the folder that save_pretrained wrote"
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter, which names its model elsewhere", "merge the adapter into its model and save that"
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if tokens is not None and isinstance(rows, int) and tokens >= rows:
        return f"the tokenizer has {tokens + 1} tokens, the model only {rows}", "give the tokenizer that belongs to it"
    return _why_head_unusable(config, scorer)


def is_reward_model(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a sequence classifier; a language model's else."""
    return any("SequenceClassification" in name for name in config.get("architectures") or [])


def _why_head_unusable(config: dict[str, Any], scorer: bool) -> tuple[str, str] | None:
    classifier = is_reward_model(config)
    if scorer and not classifier:
        return "it is a language model without a score", "train a reward model from it (stage `reward`), or name one"
    if classifier and not scorer:
        return "it is a reward model, not a language model", "give it as `reward_model`"
    labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers' default is two
    if scorer and labels != 1:
        fix = "give a classifier with one label, whose logit is the score"
        return f"a reward model has one score, this one has {labels}", fix
    return None


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def last_token(tokenizer: dict[str, Any]) -> int | None:
    """The highest id that a tokenizer.json may give; None where it lists none."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=None)
