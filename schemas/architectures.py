"""What a type of model can do, told from its config.json alone: answer, be sampled, carry a score."""

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Encoders that transformers offers as language models: without `is_decoder` a token sees what follows it.
# fmt: off
ENCODERS = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
})
# fmt: on
# Their forward gives no `past_key_values` whose rows can be chosen, or attends to what follows.
NOT_SAMPLED = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"), "is recurrent"),
    **dict.fromkeys(("cpmant", "git", "minimax", "openai-gpt", "reformer", "xlm", "xlnet"), "has a cache of its own"),
}
# Their classifiers have another head than one linear `score` of the last token.
OTHER_HEADS = frozenset({"ctrl", "modernbert-decoder", "reformer", "xlm", "xlnet"})

_DECODER = "use a decoder-only model with a key-value cache (Llama, Mistral, Qwen, Gemma, GPT-2 and the like)"
_NO_REWARD = "set reward: null (DPO and KTO need no reward model)"


def why_no_policy(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why a model of this config cannot be a policy, and the fix; None for one that can or that is not known here."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if config.get("is_encoder_decoder") or kind in types("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"):
        return f"model type {kind!r} is an encoder-decoder, which reads a prompt and writes an answer apart", _DECODER
    if kind in ENCODERS and not config.get("is_decoder"):
        what = f"model type {kind!r} is an encoder: without is_decoder each token sees what follows it"
        return what, f"{_DECODER}, or set is_decoder: true in config.json if it was trained so"
    if kind in NOT_SAMPLED:
        return f"model type {kind!r} {NOT_SAMPLED[kind]}, and answers cannot be sampled from it here", _DECODER
    known = types("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    if known and kind not in known:
        return _unknown(config, "language model")
    return None


def why_no_scorer(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why no reward model can be of this config's type, and the fix; None where one can."""
    kind = config.get("model_type")
    known = types("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES")
    if not isinstance(kind, str) or not known:
        return None
    if config.get("is_encoder_decoder") or kind in types("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"):
        return f"model type {kind!r} is an encoder-decoder, whose score is not one of the last token", _DECODER
    if kind in ENCODERS or kind in OTHER_HEADS or "bert" in kind:
        return f"model type {kind!r} has another head than one score of the last token", _DECODER
    return None if kind in known else _unknown(config, "sequence classifier")


def why_none_trained(config: Mapping[str, Any], uses: str | None) -> tuple[str, str] | None:
    """Why no reward model can be trained from this language model, and the fix. `uses`: what would need one, if any."""
    problem = why_no_scorer(config)
    if problem is None:
        return None
    fix = _NO_REWARD if uses is None else f"{_NO_REWARD} and take {uses} out, or name a finished one (reward_model)"
    return f"no reward model can be trained from model.path: {problem[0]}", fix


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for, by its config; None where it has no limit or does not say."""
    for part in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None


def _unknown(config: Mapping[str, Any], what: str) -> tuple[str, str]:
    kind = config["model_type"]
    if "auto_map" in config:
        why = f"the model type {kind!r} needs code from its folder, which is never run"
    elif kind in types("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        why = f"transformers has no {what} of model type {kind!r}"
    else:
        why = f"the model type {kind!r} is unknown to transformers as a {what}"
    return why, "give a model of a type that transformers has"


@cache
def types(mapping: str) -> frozenset[str]:
    """The model types of one of the installed transformers' mappings, read from its source: importing it takes
    seconds. Empty where it is not installed or not as expected.
    """
    spec = importlib.util.find_spec("transformers")
    file = Path(spec.origin).parent / "models/auto/modeling_auto.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        return frozenset()
    # Not by `ast`: in Python before 3.11.8, two threads that parse at once may fail with "recursion depth mismatch".
    table = re.search(
        rf"^{mapping} = OrderedDict\($(.*?)^\)$", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return frozenset(re.findall(r'^\s*\(\s*"([^"]+)",', table[1], re.MULTILINE)) if table else frozenset()
