"""Policies and scorers: loading, one forward over any layout, saving as plain transformers folders.

Shapes: B rows, T tokens of a row, N answer tokens, A answers, D hidden size.
"""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
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

from schemas.stage import StageError
from schemas.training import Training
from stages.engine import attention, cpu, lora
from stages.engine.batch import Batch, Layout, Tree, collate, tree_tokens
from stages.engine.logprobs import linear_logps

# Types whose every layer outside attention treats tokens one by one, whose attention is softmax(QK) over positions and
# passes keyword arguments down, and whose logits are the head's product as it is.
TREE_TYPES = frozenset(
    {
        "gemma",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # the others look at the batch's longest row
TOLERANCE = 1e-4
"""Largest difference of a log-probability (or score) between two layouts, float32; relative above 1."""


class Output(NamedTuple):
    """What a policy says about a batch's answer tokens."""

    logps_N: Tensor
    values_N: Tensor | None
    entropy_N: Tensor | None


class Saves(Protocol):
    """A tokenizer with its template, as far as saving a model needs it."""

    @property
    def pad_id(self) -> int: ...
    def save(self, folder: Path) -> None: ...


class _Trunk(nn.Module):
    """A transformers model, adapters perhaps around it, run over a batch up to its last hidden states."""

    def __init__(self, hf: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.hf = hf
        self.precision = precision
        self.dropouts: dict[str, Any] = {}
        """The dropouts of the config as loaded; all are 0 while the model is here."""

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model itself; adapters, where there are some, sit inside its layers."""
        return lora.plain(self.hf)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(self, batch: Batch) -> Tensor:
        """(B*T, D): the last hidden states, final norm included."""
        out = self.plain.base_model(**self.inputs(batch))
        return out.last_hidden_state.flatten(0, 1)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What transformers' forward takes. Padding stands on the right, so default positions are right there."""
        if batch.segments is None:
            return {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "use_cache": False}
        if reason := why_padded(self.plain.config):
            raise ValueError(f"{reason}; use the padded layout (choose_layout does)")
        return {
            "input_ids": batch.input_ids_BT,
            "position_ids": batch.position_ids_BT,
            # A mask of rank 4 is passed on as it is: transformers must not read sequences out of the positions.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.device),
            "segments": batch.segments,
            "use_cache": False,
        }

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


class Policy(_Trunk):
    """A causal language model, and a value head where asked for."""

    def __init__(self, hf: nn.Module, *, value_head: bool = False, precision: str = "fp32") -> None:
        super().__init__(hf, precision)
        self.value_head: nn.Linear | None = None
        if value_head:
            head = nn.Linear(self.plain.config.get_text_config().hidden_size, 1, device=self.device)
            head.load_state_dict({name: torch.zeros_like(value) for name, value in head.state_dict().items()})
            self.value_head = head

    def forward(self, batch: Batch, *, value: bool = False, entropy: bool = False, temperature: float = 1.0) -> Output:
        """log pi of every answer token, float32; the value before it and the entropy there (no gradient) if asked.

        pi is the model's distribution at `temperature`.
        """
        with self.autocast():
            logps_N, entropy_N, hidden_ND = self._logps(batch, value, entropy, temperature)
        return Output(logps_N, self._values(hidden_ND) if value else None, entropy_N)

    def _logps(
        self, batch: Batch, value: bool, entropy: bool, temperature: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The head works at `predict_N` alone; models with more than a linear head make their own logits."""
        head = self.plain.get_output_embeddings()
        if type(head) is cpu.Linear and self.plain.config.model_type in TREE_TYPES:
            hidden_ND = self.hidden(batch).index_select(0, batch.predict_N)
            given = (hidden_ND, head.weight, head.bias, batch.labels_N)
            return *linear_logps(*given, entropy=entropy, temperature=temperature), hidden_ND
        out = self.hf(**self.inputs(batch), output_hidden_states=value)
        logits_NV = out.logits.flatten(0, 1).index_select(0, batch.predict_N).float()
        log_probs_NV = (logits_NV / temperature).log_softmax(-1)
        logps_N = log_probs_NV.gather(-1, batch.labels_N[:, None]).squeeze(-1)
        entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1).detach() if entropy else None
        hidden_ND = out.hidden_states[-1].flatten(0, 1).index_select(0, batch.predict_N) if value else logps_N
        return logps_N, entropy_N, hidden_ND

    def _values(self, hidden_ND: Tensor) -> Tensor:
        if self.value_head is None:
            raise ValueError("this policy has no value head: load it with value_head=True")
        with torch.autocast(self.device.type, enabled=False):
            return self.value_head(hidden_ND.float()).squeeze(-1)

    @contextlib.contextmanager
    def reference(self) -> Iterator["Policy"]:
        """Adapters off: exactly the model that they were added to. Without adapters the policy as it stands."""
        with self.hf.disable_adapter() if isinstance(self.hf, PeftModel) else contextlib.nullcontext():
            yield self


class Scorer(_Trunk):
    """A reward model: one number for a prompt with an answer. Also a critic, with `every`."""

    def __init__(self, hf: nn.Module, *, precision: str = "fp32") -> None:
        super().__init__(hf, precision)
        scale = getattr(self.plain.config, "alignflow_score", None) or {"mean": 0.0, "std": 1.0}
        self.mean, self.std = float(scale["mean"]), float(scale["std"])

    def forward(self, batch: Batch, *, every: bool = False) -> Tensor:
        """scores_A at each answer's last token, float32; with `every` instead values_N where each token is predicted.

        Shifted and scaled by the config's `alignflow_score` where it is there.
        """
        index = batch.predict_N if every else batch.last_A
        with self.autocast():
            hidden = self.hidden(batch).index_select(0, index)
        with torch.autocast(self.device.type, enabled=False):
            raw = self.plain.get_submodule("score")(hidden.float()).squeeze(-1)
        return (raw - self.mean) / self.std


ModelT = TypeVar("ModelT", Policy, Scorer)


# --- layouts ---


def why_padded(config: PretrainedConfig) -> str | None:
    """Why a model cannot take shared and packed layouts; None when it can."""
    if config.model_type not in TREE_TYPES:
        return f"model type {config.model_type!r} is not on the list of those whose attention takes trees"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        return f"rope type {kind!r} of {config.model_type!r} depends on the whole batch"
    if getattr(config, "add_cross_attention", False):
        return f"{config.model_type!r} with cross-attention is not on the list of those whose attention takes trees"
    return None


@torch.no_grad()
def choose_layout(model: Policy | Scorer, wanted: Layout, trees: Sequence[Tree], pad_id: int) -> Layout:
    """The wanted layout where it is exact for this model, else `padded` with a warning.

    Exact: the model type is on the list, and on the longest and the shortest of these trees (the first batch's)
    log-probabilities or scores agree with the padded layout's within TOLERANCE.
    """
    if wanted == "padded":
        return wanted
    if reason := why_padded(model.plain.config):
        warnings.warn(f"layout {wanted!r} becomes 'padded': {reason}", stacklevel=2)
        return "padded"
    if not trees:
        return wanted
    ordered = sorted(trees, key=lambda tree: tree_tokens(tree, "packed"))
    difference = _difference(model, wanted, [ordered[-1], *ordered[:-1][:1]], pad_id)
    if not difference <= TOLERANCE:
        warnings.warn(f"layout {wanted!r} becomes 'padded': results differ by {difference:.2g}", stacklevel=2)
        return "padded"
    return wanted


def _difference(model: Policy | Scorer, layout: Layout, trees: Sequence[Tree], pad_id: int) -> float:
    """Largest difference between a layout and the padded one, in float32 and without dropout."""
    training, precision = model.training, model.precision
    model.eval()
    model.precision = "fp32"
    try:
        one, other = (_numbers(model, collate(trees, kind, pad_id)) for kind in (layout, "padded"))
    finally:
        model.train(training)
        model.precision = precision
    return float(((one - other).abs() / other.abs().clamp(min=1.0)).max())


def _numbers(model: Policy | Scorer, batch: Batch) -> Tensor:
    out = model(batch.to(model.device))
    return out.logps_N if isinstance(out, Output) else out


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


def device() -> torch.device:
    """This process's accelerator where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _load(
    folder: Path, auto: Any, names: Mapping[str, Any], fresh: Sequence[str] = (), **kwargs: Any
) -> PreTrainedModel:
    """The model in float32, dropouts 0, every weight from the folder except those that are to be `fresh`."""
    config = _config(folder, names, **kwargs)
    implementation = attention.NAME if why_padded(config) is None else None
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
    return StageError(f"the model cannot be used: {message}.", kind="model", field="model", value=folder, fix=fix)


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


def save_policy(policy: Policy, codec: Saves, folder: Path | str, base: str | None = None) -> None:
    """Write a plain transformers folder of the policy, adapters merged, value head left out. Changes nothing here.

    `base`: the digest of the artifact that it was trained from; an adapter is then written apart too (`lora.save`).
    """
    _save(policy, codec, Path(folder), base)


def save_scorer(
    scorer: Scorer, codec: Saves, folder: Path | str, mean: float = 0.0, std: float = 1.0, base: str | None = None
) -> None:
    """Write a plain transformers folder of the reward model: raw scores, and `alignflow_score` in its config.

    mean, std: of the raw scores on samples of the reference policy. A loaded scorer gives (raw - mean) / std.
    `base` as in `save_policy`.
    """
    if not (std > 0 and math.isfinite(std) and math.isfinite(mean)):
        raise ValueError(f"scores cannot be normalised by mean {mean} and std {std}")
    config = scorer.plain.config
    config.pad_token_id = codec.pad_id
    config.alignflow_score = {"mean": mean, "std": std}
    _save(scorer, codec, Path(folder), base)


def _save(model: _Trunk, codec: Saves, folder: Path, base: str | None) -> None:
    plain = model.plain
    for name, value in model.dropouts.items():
        setattr(plain.config, name, value)
    try:
        plain.save_pretrained(folder, state_dict=lora.merged(plain) if isinstance(model.hf, PeftModel) else None)
    finally:
        for name in model.dropouts:
            setattr(plain.config, name, 0.0)
    if base is not None and isinstance(model.hf, PeftModel):
        lora.save(model.hf, folder, base)
    for file in folder.rglob("*.safetensors"):  # safetensors lets nobody but the owner read what it writes
        file.chmod((folder / "config.json").stat().st_mode & 0o777)
    codec.save(folder)


def sums(values_N: Tensor, answer_N: Tensor, answers: int) -> Tensor:
    """Per-answer sums of per-token values, in answers' order."""
    return values_N.new_zeros(answers).index_add(0, answer_N, values_N)
