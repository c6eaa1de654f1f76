"""Policies and scorers: loading, one forward over any layout, saving as plain transformers folders.

Shapes: B rows, T tokens of a row, N answer tokens, A answers, D hidden size.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from schemas.errors import StageError, refuse
from schemas.training import Training
from stages.engine.models import cpu, lora, tree_attention
from stages.engine.models.policy import ModelT, Policy, Scorer, device
from stages.engine.models.tree_attention import why_padded

# --- layouts ---


# --- loading ---


def load_policy(
    folder: Path | str,
    training: Training | None = None,
    *,
    value_head: bool = False,
    trainable: bool = True,
    seed: int = 0,
) -> Policy:
    """A causal LM from a local folder, in float32 on this process's device, dropout 0.

    With `training.lora` fresh adapters are added (a function of `seed`) and all else is frozen; `trainable=False` adds
    none, freezes everything and sets evaluation mode. Raises StageError for a folder that cannot be used.
    """
    hf = _load(Path(folder), AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    policy = Policy(hf, value_head=value_head, precision=training.precision if training else "fp32")
    return _prepare(policy, training, trainable, seed)


def load_scorer(
    folder: Path | str,
    training: Training | None = None,
    *,
    seed: int = 0,
    trainable: bool = True,
    on: Policy | Scorer | None = None,
    adapter: bool = False,
) -> Scorer:
    """A reward model from its folder, or from a causal LM's folder with a fresh score head (a function of `seed`).

    `on`: a model under LoRA, or frozen, whose trunk weights this one uses instead of a copy: they have to be those of
    the folder, or with `adapter` those that the folder's adapter was trained on (`lora.base_of`).
    """
    path = Path(folder)
    fresh = not _is_scorer(path)
    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    changes = {"fresh": ("score.weight",), "num_labels": 1} if fresh else {}
    hf = _load(path, AutoModelForSequenceClassification, names, **changes)
    if hf.config.num_labels != 1 or not isinstance(getattr(hf, "score", None), nn.Linear):
        raise _unusable(path, "its head is not one linear score", "use a decoder-only reward model")
    if fresh:
        weight = hf.get_parameter("score.weight")
        generator = torch.Generator().manual_seed(seed)
        weight.data.normal_(0.0, 1 / math.sqrt(weight.shape[1] + 1), generator=generator)  # Huang et al. 2024
    if on is not None and not adapter:
        lora.share(hf, on.plain)
    model = lora.put_on(hf, on.plain, path) if on is not None and adapter else hf
    scorer = Scorer(model, precision=training.precision if training else "fp32")
    return _prepare(scorer, training, trainable, seed)


def load_judge(folder: Path | str, training: Training | None = None, *, on: Policy | None = None) -> Scorer:
    """A reward model that is not trained here; with `on` its adapter on the weights of that policy.

    Raises StageError for a language model: its score would be random.
    """
    if not _is_scorer(Path(folder)):
        raise _unusable(Path(folder), "it is a language model without a score", "give a reward model")
    return load_scorer(folder, training, trainable=False, on=on, adapter=on is not None)


def _load(
    folder: Path, auto: Any, names: Mapping[str, Any], fresh: Sequence[str] = (), **kwargs: Any
) -> PreTrainedModel:
    """The model in float32, dropouts 0, every weight from the folder except those that are to be `fresh`."""
    config = _config(folder, names, **kwargs)
    implementation = tree_attention.NAME if why_padded(config) is None else None
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # missing and misshapen weights are refused below
    transformers_logging.disable_progress_bar()
    try:
        hf, found = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            attn_implementation=implementation,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(folder, str(error), "check that the folder loads in plain transformers") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    lacking = sorted({*found["missing_keys"]} - {*fresh}) + sorted(str(key) for key in found["mismatched_keys"])
    if lacking:
        raise _unusable(folder, f"weights are missing or misshapen: {', '.join(lacking[:3])}", "save the model again")
    return hf


def _config(folder: Path, names: Mapping[str, Any], **kwargs: Any) -> PretrainedConfig:
    """The folder's config, checked before any weight is read, with all dropouts set to 0."""
    raw = _raw_config(folder)
    kind = raw.get("model_type")
    if kind not in names:
        why = "it needs code of its own, which is never run" if "auto_map" in raw else "transformers has no such model"
        raise _unusable(folder, f"model type {kind!r}: {why}", "use a decoder-only model of transformers' own")
    if raw.get("is_encoder_decoder"):
        raise _unusable(folder, f"model type {kind!r} is an encoder-decoder", "use a decoder-only model")
    if names is MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and _is_scorer(folder):
        raise _unusable(folder, "it is a reward model, not a language model", "give it as `reward_model`")
    if "quantization_config" in raw:
        raise _unusable(folder, "its weights are quantized", "pass it through stage `base`, which writes plain weights")
    if not any(folder.glob("*.safetensors")):
        raise _unusable(folder, "it holds no .safetensors file", "save it as safetensors; pickles are not read")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
    for name in _dropouts(config):
        setattr(config, name, 0.0)
    return config


def _raw_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise _unusable(folder, "there is no such folder", "give the path of a model folder")
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"no config.json to read: {error}", "give what save_pretrained wrote") from error


def _is_scorer(folder: Path) -> bool:
    architectures = _raw_config(folder).get("architectures") or [""]
    return architectures[0].endswith("ForSequenceClassification")


def _unusable(folder: Path, message: str, fix: str) -> StageError:
    return refuse("model", folder, f"the model cannot be used: {message}.", fix, kind="model")


def _dropouts(config: PretrainedConfig) -> dict[str, float]:
    """The config's dropout probabilities that are not 0."""
    return {k: v for k, v in vars(config).items() if "drop" in k and isinstance(v, float) and v > 0}


def _prepare(model: ModelT, training: Training | None, trainable: bool, seed: int) -> ModelT:
    """Adapters, gradient checkpointing, frozen or not, device."""
    cpu.get_ready(model)
    model.dropouts = _dropouts(AutoConfig.from_pretrained(str(model.plain.name_or_path), trust_remote_code=False))
    if not trainable:
        return model.requires_grad_(False).eval().to(device())
    if training and training.lora:
        model.hf = lora.add(model.hf, training.lora, seed)
        if isinstance(model, Scorer):
            model.plain.get_submodule("score").requires_grad_(True)
    if training and training.gradient_checkpointing:
        checkpoint_layers(model.plain)
    return model.to(device())


def checkpoint_layers(hf: PreTrainedModel) -> None:
    """Keep one tensor per layer for the backward pass and compute the rest again (in training mode)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)  # for 5.3
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


# --- saving ---
