"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) through peft: added, merged, saved apart, and
several models on the weights of one.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from schemas.config.training import Held, LoRA
from schemas.errors import StageError, refuse
from stages.engine.models.held import Nf4
from stages.engine.models.pieces import origin, stand_in

TRAINED = "default"
"""The adapter in training."""
GIVEN = "given"
"""A finished one that a model was published with."""
PART = ".lora_"
"""In the names of an adapter's weights."""
FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
"""Where it is in the model's folder, beside the merged weights: peft's names and format."""
BASE = "base_model_name_or_path"
SETTINGS = ("r", "lora_alpha", "target_modules", "fan_in_fan_out")
"""All that is taken from a config on disk; peft's own reader would take any field."""


def plain(hf: nn.Module) -> PreTrainedModel:
    """The transformers model itself; adapters, where there are some, sit inside its layers."""
    return hf.get_base_model() if isinstance(hf, PeftModel) else hf  # type: ignore[return-value]


# --- in training ---


def add(hf: nn.Module, lora: LoRA, seed: int) -> PeftModel:
    """The model with fresh adapters (they change nothing yet), everything else frozen. Heads get none by default.

    An adapter that already exists stays in force, frozen. Raises StageError where no adapter fits.
    """
    inner = plain(hf)
    # All linear layers but the head; what is inside an adapted layer is not one.
    linear = [
        f"{inner.base_model_prefix}.{name}"
        for name, module in inner.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | LoraLayer) and ".base_layer" not in name and PART not in name
    ]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works
        lora_dropout=lora.dropout,
        target_modules=sorted(linear) if lora.target == "all-linear" else lora.target,
        # GPT-2's layers keep their weights the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in inner.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = _inject(hf, config, TRAINED)
        except ValueError as error:
            raise _bad_target(lora, str(error)) from error
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings(), getattr(inner, "score", None))
    if any(isinstance(module, LoraLayer) for module in ends):
        raise _bad_target(lora, "embeddings and heads take none")  # tied ones could not be merged; a score trains whole
    return adapted


def _inject(hf: nn.Module, config: LoraConfig, name: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks it
        if not isinstance(hf, PeftModel):
            return get_peft_model(hf, config, adapter_name=name)  # type: ignore[arg-type]
        hf.add_adapter(name, config)
    hf.base_model.set_adapter([*hf.active_adapters, name])  # type: ignore[operator]
    for parameter_name, parameter in hf.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)
    return hf


def _bad_target(lora: LoRA, why: str) -> StageError:
    message = f"no adapter can be added: {why}."
    return refuse("lora.target", lora.target, message, "use all-linear")


def merged(inner: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of the model without adapters, the trained one's products added to the weights.

    What it made is on the CPU in that type, one weight after the other: a device may have no room for another copy.
    """
    state = {unwrapped(name): value for name, value in inner.state_dict().items() if PART not in name}
    adapted = {id(m.get_base_layer()): m for m in inner.modules() if isinstance(m, LoraLayer)}
    for name, module in inner.named_modules():
        if id(module) in adapted or isinstance(module, Nf4):
            key = unwrapped(f"{name}.weight")
            weight = module.whole(torch.float32) if isinstance(module, Nf4) else state[key]
            whole = weight + product(adapted[id(module)]) if id(module) in adapted else weight
            state[key] = whole.to("cpu", dtype)
    return state


def unwrapped(name: str) -> str:
    """The name of a weight in the model without adapters."""
    return name.replace(".base_layer.", ".")


def product(module: LoraLayer) -> Tensor:
    """What the trained adapter adds to its layer's weight."""
    return module.get_delta_weight(TRAINED).detach()  # type: ignore[operator]  # each kind of layer has its own


# --- apart from its model ---


def save(hf: PeftModel, folder: Path, base: str) -> None:
    """Write the trained adapter alone to `folder`/adapter, for peft. `base`: the digest of the artifact it belongs to.

    Not by peft's own `save_pretrained`, whose files hold a path and a set in no fixed order: an artifact's digest must
    depend on its content alone.
    """
    place, config = folder / FOLDER, hf.peft_config[TRAINED]
    written = {"peft_type": "LORA", BASE: base, "inference_mode": True}
    written |= {name: getattr(config, name) for name in SETTINGS}
    if isinstance(written["target_modules"], set):
        written["target_modules"] = sorted(written["target_modules"])
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    state = get_peft_model_state_dict(hf, adapter_name=TRAINED)
    save_file({name: value.detach().contiguous() for name, value in state.items()}, place / WEIGHTS)


def label(base: str, held: Held, rounded: bool) -> str:
    """What an adapter's base is called, of its digest: what learned on weights in four bits, or `rounded` from those of
    the files, belongs to those alone.
    """
    return f"{base} in {held}" if held == "nf4" or rounded else base


def base_of(folder: Path) -> str | None:
    """The `label` of the artifact that the adapter in a model folder belongs to; None where there is no adapter."""
    place = folder / FOLDER
    return str(_read(place)[BASE]) if (place / CONFIG).is_file() else None


def put_on(hf: PreTrainedModel, base: PreTrainedModel, folder: Path, *, copies: bool = False) -> PeftModel:
    """A model that was loaded merged from `folder`, as its adapter, frozen, on the weights of `base`.

    `base` has to be, or to have begun as, the artifact that `base_of` names. Raises StageError for a broken adapter.
    """
    share(hf, base, copies=copies)
    place = folder / FOLDER
    try:
        settings = _read(place)
        adapted = _inject(hf, LoraConfig(**{name: settings[name] for name in SETTINGS}), GIVEN)
        state = load_file(place / WEIGHTS)
        set_peft_model_state_dict(adapted, state, adapter_name=GIVEN)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(place, str(error)) from error
    if lacking := get_peft_model_state_dict(adapted, adapter_name=GIVEN).keys() ^ state.keys():
        raise _unusable(place, f"weights are missing or too many: {', '.join(sorted(lacking)[:3])}")
    return adapted.requires_grad_(False)


def share(hf: PreTrainedModel, base: PreTrainedModel, *, copies: bool = False) -> None:
    """Let a model's trunk use the very tensors of another of its type, which have to hold the same and stay frozen.

    `copies`: its own tensors, of the same values.
    """
    theirs = {unwrapped(name): parameter for name, parameter in base.base_model.named_parameters() if PART not in name}
    for name, _ in list(hf.base_model.named_parameters()):
        module, _, last = name.rpartition(".")
        tensor = theirs[name]
        if copies:
            place = origin(tensor)
            tensor = (
                nn.Parameter(tensor.detach().clone()) if place is None else stand_in(tensor.shape, place, tensor.dtype)
            )
        setattr(hf.base_model.get_submodule(module), last, tensor)
    for name, module in base.base_model.named_modules():
        if isinstance(module, Nf4):
            module.lend(hf.base_model.get_submodule(name.removesuffix(".base_layer")))


def _read(place: Path) -> dict[str, Any]:
    """The settings that `save` wrote."""
    try:
        settings = json.loads((place / CONFIG).read_text())
        return {name: settings[name] for name in (BASE, *SETTINGS)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unusable(place, f"{CONFIG}: {type(error).__name__}: {error}") from error


def _unusable(place: Path, why: str) -> StageError:
    message = f"the adapter cannot be used: {why}."
    fix = "save the model again; or delete this folder, which the merged model beside it does without"
    return refuse("model", place, message, fix, kind="model")
