"""Models read from their folders: whole, without pickles or code from outside, as policies and scorers."""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from schemas.architectures import why_no_policy, why_no_scorer
from schemas.config.training import Half, Held, Training, held_type, published_type
from schemas.errors import StageError, refuse
from schemas.model_folder import (
    UNREADABLE,
    in_bf16,
    is_reward_model,
    read_json,
    stored,
    too_many_parts,
    why_unreadable,
)
from schemas.text import one_line
from stages.engine.distributed import rank
from stages.engine.models import cpu, lora, pieces, sharding, tree_attention
from stages.engine.models.held import Nf4, hold
from stages.engine.models.policy import ModelT, Policy, Scorer, device
from stages.engine.models.tree_attention import why_padded

log = logging.getLogger("alignflow")


def load_policy(
    folder: Path | str,
    training: Training | None = None,
    *,
    value_head: bool = False,
    trainable: bool = True,
    seed: int = 0,
    frozen: Half | None = None,
) -> Policy:
    """A causal LM from a local folder on this process's device, dropout 0; what learns of it is float32.

    With `training.lora` fresh adapters are added (a function of `seed`) and all else is frozen; `trainable=False` adds
    none, freezes everything and sets evaluation mode. `frozen`: without `training` the type in which it is held, and in
    which it multiplies. One to be sharded has no weights yet; where its files need transformers the first rank has
    them, on its CPU: `sharding.shard` comes next. Raises StageError for a folder that cannot be used.
    """
    path, shared_out = Path(folder), sharding.wanted(training)
    hf = _load(path, AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, shared_out=shared_out)
    return _prepare(Policy(hf, value_head=value_head), path, training, trainable, seed, frozen)


def load_scorer(
    folder: Path | str,
    training: Training | None = None,
    *,
    seed: int = 0,
    trainable: bool = True,
    on: Policy | Scorer | None = None,
    adapter: bool = False,
    frozen: Half | None = None,
) -> Scorer:
    """A reward model from its folder, or from a causal LM's folder with a fresh score head (a function of `seed`).

    `on`: a model under LoRA, or frozen, whose trunk weights this one uses instead of a copy: they have to be those of
    the folder, or with `adapter` those that the folder's adapter was trained on (`lora.base_of`). Where weights are
    sharded it gets copies: a weight can be a part of one sharded unit only.
    """
    path = Path(folder)
    fresh = not is_reward_model(read_config(path))
    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    changes = {"fresh": ("score.weight",), "num_labels": 1} if fresh else {}
    hf = _load(path, AutoModelForSequenceClassification, names, shared_out=sharding.wanted(training), **changes)
    if hf.config.num_labels != 1 or not isinstance(getattr(hf, "score", None), nn.Linear):
        raise _unusable(path, "its head is not one linear score", "use a decoder-only reward model")
    weight = hf.get_parameter("score.weight")
    if fresh and weight.device.type != "meta":
        generator = torch.Generator().manual_seed(seed)
        weight.data.normal_(0.0, 1 / math.sqrt(weight.shape[1] + 1), generator=generator)  # Huang et al. 2024
    own = sharding.wanted(training)
    if on is not None and not adapter:
        lora.share(hf, on.plain, copies=own)
    model = lora.put_on(hf, on.plain, path, copies=own) if on is not None and adapter else hf
    scorer = Scorer(model)
    return _prepare(scorer, path, training, trainable, seed, frozen, None if on is None else on.held)


def load_judge(
    folder: Path | str,
    training: Training | None = None,
    *,
    on: Policy | None = None,
    frozen: Half | None = None,
) -> Scorer:
    """A reward model that is not trained here; with `on` its adapter on the weights of that policy.

    Raises StageError for a language model: its score would be random.
    """
    check_judge(Path(folder))
    return load_scorer(folder, training, trainable=False, on=on, adapter=on is not None, frozen=frozen)


def check_judge(folder: Path) -> None:
    """Raise StageError for a folder that plainly holds no reward model, before its weights are read."""
    if not is_reward_model(check_folder(folder, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)):
        raise _unusable(folder, "it is a language model without a score", "give a reward model")
    tensors = stored(folder)
    if tensors and "score.weight" not in tensors:
        raise _unusable(folder, "its files hold no score.weight", "give a decoder-only reward model, whole")


def _load(
    folder: Path, auto: Any, names: Mapping[str, Any], fresh: Sequence[str] = (), *, shared_out: bool, **kwargs: Any
) -> PreTrainedModel:
    """The model in float32, dropouts 0, every weight from the folder except those that are to be `fresh`.

    `shared_out`: with stand-ins for weights that every rank will read its rows of (`pieces`); where the files need
    transformers whole on the first rank, and on the others shapes alone.
    """
    raw = read_config(folder)
    if problem := (why_no_policy if names is MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else why_no_scorer)(raw):
        raise _unusable(folder, problem[0], problem[1])
    check_folder(folder, names)
    if names is MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and is_reward_model(raw):
        raise _unusable(folder, "it is a reward model, not a language model", "give it as `reward_model`")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
    except Exception as error:  # each type's own class, on values of any type
        what = f"config.json does not describe a model: {one_line(error, 500)}"
        raise _unusable(folder, what, "give the config.json that belongs to the weights") from error
    for name in _dropouts(config):
        setattr(config, name, 0.0)
    implementation = tree_attention.NAME if why_padded(config) is None else None
    options = {"config": config, "dtype": torch.float32, "attn_implementation": implementation}
    if shared_out:
        with init_empty_weights(include_buffers=False):
            hf = auto.from_config(trust_remote_code=False, **options).eval()
        hf.tie_weights()
        if hf.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
            hf.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        try:
            if pieces.stand_in_for_all(hf, folder, fresh) or rank() > 0:
                return hf
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            fix = "check that it loads in plain transformers"
            raise _unusable(folder, f"its weights cannot be read: {one_line(error, 500)}", fix) from error
        log.info("%s: the first process reads all weights, whose names or shapes are not the model's own", folder.name)
    return load_whole(auto, folder, fresh=fresh, local_files_only=True, **options)


def check_folder(folder: Path, names: Mapping[str, Any], field: str = "model") -> dict[str, Any]:
    """Its config.json, where the folder holds plain weights of a type among `names`.

    Raises StageError for what cannot or must not be read: no config, an unknown type, quantized weights, pickles.
    """
    config = read_config(folder, field)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in names:
        why = "needs code from its folder, which is never run" if "auto_map" in config else "is unknown to transformers"
        raise _unusable(folder, f"the model type {kind!r} {why}", "give a model of a type that transformers has", field)
    if problem := why_unreadable(folder, config):
        raise _unusable(folder, problem[0], problem[1], field)
    return config


def read_config(folder: Path, field: str = "model") -> dict[str, Any]:
    """The folder's config.json. Raises StageError when it is not there or is not JSON."""
    if not folder.is_dir():
        raise _unusable(folder, "there is no such folder", "give the path of a model folder", field)
    if not (folder / "config.json").is_file():
        raise _unusable(folder, "the folder has no config.json", "give what save_pretrained wrote", field)
    try:
        config = read_json(folder / "config.json")
    except UNREADABLE as error:
        raise _unusable(folder, f"config.json cannot be read: {error}", "fix the file", field) from error
    check_parts(config, folder, field)
    return config


def check_parts(config: Mapping[str, Any], folder: Path, field: str = "model") -> None:
    """Raise StageError where a config asks for more layers and the like than any model has."""
    if problem := too_many_parts(config):
        raise _unusable(folder, problem[0], problem[1], field)


def load_whole(
    auto: Any, folder: Path, *, fresh: Sequence[str] = (), field: str = "model", **options: Any
) -> PreTrainedModel:
    """`auto.from_pretrained`, which must find every weight but the `fresh` ones.

    No pickle is read and no code of the folder is run. Raises StageError when the model cannot be loaded whole.
    """
    settings = {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True, **options}
    with quiet():
        try:
            model, info = auto.from_pretrained(str(folder), output_loading_info=True, **settings)
        except MemoryError:  # no fault of the folder's
            raise
        except Exception as error:  # of a config that contradicts itself, a weight file, a GGUF head
            fix = "check that it loads in plain transformers"
            raise _unusable(folder, f"the model cannot be loaded: {one_line(error, 500)}", fix, field) from error
    lacking = sorted({*info["missing_keys"]} - {*fresh}) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        what = f"{len(lacking)} weights are missing or misshapen: {', '.join(lacking[:3])}"
        raise _unusable(folder, what, "give a folder whose weights are whole and fit its config.json", field)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars: what matters in them is checked here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _unusable(folder: Path, message: str, fix: str, field: str = "model") -> StageError:
    return refuse(field, folder, message, fix, kind="model")


def _dropouts(config: PretrainedConfig) -> dict[str, float]:
    """The config's dropout probabilities that are not 0."""
    return {k: v for k, v in vars(config).items() if "drop" in k and isinstance(v, float) and v > 0}


def _prepare(
    model: ModelT,
    folder: Path,
    training: Training | None,
    trainable: bool,
    seed: int,
    frozen: Half | None,
    held: Held | None = None,
) -> ModelT:
    """Types of weights and products, adapters, gradient checkpointing, frozen or not, device.

    `held`: the type of weights that are another model's.
    """
    cpu.get_ready(model)
    adapters = training.lora if trainable and training else None
    parameters, half = sum(math.prod(one.shape) for one in stored(folder).values()), in_bf16(folder)
    if held is None and (adapters or not trainable):
        asked = training.frozen if training else frozen
        held = (adapters.base if adapters else None) or held_type(asked, parameters, half)
    model.held = held or "fp32"
    model.rounded = model.held == "bf16" and not half
    # Without training products are in bfloat16 where that is asked for by name: by default no number changes.
    model.precision = training.precision if training else "bf16" if frozen == "bf16" else "fp32"
    if training:
        model.publish = published_type(training.publish, parameters, half)
    model.dropouts = _dropouts(AutoConfig.from_pretrained(str(model.plain.name_or_path), trust_remote_code=False))
    if not trainable:
        model = model.requires_grad_(False).eval()
    elif adapters:
        model.hf = lora.add(model.hf, adapters, seed)
        if isinstance(model, Scorer):
            model.plain.get_submodule("score").requires_grad_(True)
    hold(model.plain, model.held, device())  # after peft, which makes adapters in the type that it finds
    if model.held == "nf4" and not any(isinstance(module, Nf4) for module in model.modules()):
        message = f"none of the layers of a {model.plain.config.model_type!r} can be held in four bits."
        raise refuse("lora.base", "nf4", message, "set it to bf16", kind="model")
    if trainable and training and training.gradient_checkpointing:
        checkpoint_layers(model.plain)
    return model if sharding.wanted(training) else model.to(device())


def checkpoint_layers(hf: PreTrainedModel) -> None:
    """Keep one tensor per layer for the backward pass and compute the rest again (in training mode)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)  # for 5.3
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
