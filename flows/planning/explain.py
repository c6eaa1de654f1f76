"""A config's mistakes, one line each: field, value, what is wrong, fix."""

import json
import re
import types
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from schemas.config import PipelineConfig
from schemas.config.data import DataConfig
from schemas.errors import StageError
from schemas.text import one_line, short

_MOST = 50
"""Mistakes that are listed."""

_ALL_DEVICES = "the rows of one optimizer step, over all devices and micro-batches"
_OTHER_NAMES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("lr", "lrate"), ("learning_rate", "")),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), ("epochs", "")),
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size", "global_batch_size"), ("batch_size", _ALL_DEVICES)
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "micro_batch_size", "mini_batch_size"),
        ("tokens_per_micro_batch", "the tokens of one forward pass; how many passes make a step follows"),
    ),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), ("lora.rank", "")),
    "lora_alpha": ("lora.alpha", ""),
    "lora_dropout": ("lora.dropout", ""),
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), ("lora.target", "")),
    **dict.fromkeys(("use_peft", "use_lora", "peft", "finetuning_type"), ("lora", "`{}` for its defaults")),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), ("warmup", "a share of the steps")),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("schedule", "")),
    **dict.fromkeys(("gradient_clip_val", "grad_clip", "max_norm", "clip_grad"), ("max_grad_norm", "")),
    "adam_epsilon": ("adam_eps", ""),
    **dict.fromkeys(("optim", "optimizer_name"), ("optimizer", "adamw or adamw8bit")),
    **dict.fromkeys(("load_in_4bit", "quantization_bit"), ("lora.base", "nf4")),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "dtype", "mixed_precision"), ("precision", "fp32 or bf16")),
    "logging_steps": ("log_every", "in optimizer steps"),
    **dict.fromkeys(("eval_steps", "eval_strategy", "val_check_interval"), ("measure_every", "in optimizer steps")),
    "save_steps": ("checkpoint_steps", "in optimizer steps"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "max_prompt_length", "cutoff_len", "model_max_length"),
        ("max_length", "tokens of a prompt with its answer"),
    ),
    **dict.fromkeys(("max_completion_length", "response_length", "max_response_length"), ("max_new_tokens", "")),
    **dict.fromkeys(("cliprange", "clip_range", "cliprange_policy", "epsilon"), ("clip", "")),
    **dict.fromkeys(("cliprange_value", "clip_range_vf"), ("value_clip", "")),
    "vf_coef": ("value_coef", ""),
    **dict.fromkeys(("init_kl_coef", "kl_coefficient", "kl_penalty"), ("kl_coef", "")),
    "num_ppo_epochs": ("ppo_epochs", ""),
    **dict.fromkeys(("gae_lambda", "lambda"), ("lam", "")),
    "loss_type": ("loss", ""),
    "pref_beta": ("beta", ""),
    **dict.fromkeys(("model_name_or_path", "model_name"), ("model.path", "")),
    "model_revision": ("model.revision", ""),
    **dict.fromkeys(("dataset", "dataset_name"), ("data.preference.path", "or data.sft.path and their like")),
    **dict.fromkeys(("test_size", "val_size", "eval_ratio"), ("eval_fraction", "a share of the prompts")),
    **dict.fromkeys(("num_processes", "num_gpus", "n_gpus", "nproc_per_node"), ("devices", "")),
    **dict.fromkeys(("num_nodes", "nnodes", "num_machines"), ("nodes", "")),
    **dict.fromkeys(("fsdp", "deepspeed", "zero_stage"), ("sharding", "none or full")),
}
"""What TRL, transformers, peft and LLaMA-Factory call it -> our key, and what it counts where that may differ."""


def validate(raw: dict[str, Any]) -> PipelineConfig:
    """The config; StageError with one line per mistake."""
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(details, raw) for details in error.errors()[:_MOST]]
        if error.error_count() > _MOST:
            lines.append(f"and {error.error_count() - _MOST} more mistakes")
        raise StageError("\n".join(lines), kind="config") from None


def wording(details: Any) -> str:
    """What is wrong, in our words: `must be greater than 0`."""
    if details["type"] == "finite_number" and details["input"] != details["input"]:
        return "must be a number, which NaN is not"
    return details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def explain(details: Any, raw: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: field, value, what is wrong, fix."""
    loc = details["loc"]
    path = ".".join(one_line(part, 200) for part in loc)
    message = one_line(wording(details), 2000)
    if details["type"] == "extra_forbidden":
        known = known_keys(loc, raw)
        if answer := _here_called(loc, raw):
            return f"{path}: {answer}"
        return (
            f"{path}: unknown key. {closest_match(one_line(loc[-1], 200), known) or 'Known here: ' + ', '.join(known)}"
        )
    if details["type"] == "missing":
        return f"{path}: missing. Fix: add it{_description(loc, raw)}"
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be keys with values, `{key: value}`"
    if details["type"] == "string_pattern_mismatch":
        message = "must be up to 63 letters, digits, dots, dashes and underscores, a letter or digit first"
    if details["type"] == "literal_error":
        hint = closest_match(short(details["input"]).strip("'\""), re.findall(r"'([^']*)'", details["ctx"]["expected"]))
        message += f". {hint}" if hint else ""
    if details["type"] == "value_error":
        return f"{path}: {message}"
    value = details["input"]
    written = json.dumps(value) if value is None or isinstance(value, bool) else short(value)
    return f"{path} = {written}: {message[0].lower()}{message[1:]}"


def _here_called(loc: tuple[str | int, ...], raw: Any) -> str:
    """Our key for one that other trainers have, and where it stands; empty where it is none of theirs."""
    name, counts = _OTHER_NAMES.get(str(loc[-1]), ("", ""))
    inner = name.rpartition(".")[2]
    align = raw.get("align") if isinstance(raw, dict) else None
    methods = [("align", method) for method in align] if isinstance(align, dict) else []
    tops = [("model",), ("sft",), ("reward",), *methods, ()]
    places = [loc[:-1], *((place for place in tops if place != loc[:-1]) if len(loc) < 3 else ())]
    found = [place for place in places if name.partition(".")[0] in known_keys((*place, name), raw)]
    own = [loc[:-1]] if "lora" in loc[:-1] and inner in known_keys(loc, raw) else []
    keys = [
        ".".join(map(str, (*place, inner if own else name))) for place in own or found[: 1 if loc[:-1] in found else 6]
    ]
    if not name or not keys:
        return ""
    return f"unknown key. Fix: write {', '.join(keys)}{f' ({counts})' if counts else ''}"


def closest_match(word: str, known: Iterable[str]) -> str:
    """A question that names the closest known word; empty when none is close."""
    near = get_close_matches(word, list(known), 1)
    return f"Did you mean '{near[0]}'?" if near else ""


def known_keys(loc: tuple[str | int, ...], raw: Any) -> list[str]:
    """The keys that are valid in place of the last one of `loc` in `raw`."""
    return sorted({name for model in _models(loc, raw) for name in model.model_fields})


def _description(loc: tuple[str | int, ...], raw: Any) -> str:
    fields = [model.model_fields.get(str(loc[-1])) for model in _models(loc, raw)]
    texts = [" ".join(field.description.split()) for field in fields if field and field.description]
    return f": {texts[0]}" if texts else ""


def _models(loc: tuple[str | int, ...], raw: Any) -> list[type[BaseModel]]:
    """The models that may hold the last key of `loc`: of a union, the one that `method` or `judge` names."""
    models: list[Any] = [PipelineConfig]
    for key in loc[:-1]:
        raw = raw.get(key) if isinstance(raw, dict) else None
        models = [inner for outer in models for inner in _inside(outer, key)]
        models = [inner for inner in models if _named(inner, key, raw)]
    return [model for model in models if isinstance(model, type) and issubclass(model, BaseModel)]


def _inside(outer: Any, key: str | int) -> Iterator[Any]:
    if get_origin(outer) is dict:
        yield from _members(get_args(outer)[1])
    elif get_origin(outer) is list:
        yield from _members(get_args(outer)[0])
    elif isinstance(outer, type) and issubclass(outer, BaseModel) and key in outer.model_fields:
        yield from _members(outer.model_fields[str(key)].annotation)


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _named(member: Any, key: str | int, raw: Any) -> bool:
    """False for a union's member that another `method` or `judge` was asked for, a method's name being its default; and
    for a single source of data where several are given."""
    if not (isinstance(member, type) and issubclass(member, BaseModel) and isinstance(raw, dict)):
        return True
    if member is DataConfig and "sources" in raw:
        return False
    tags = {"method": raw.get("method", key), "judge": raw.get("judge")}
    annotations = {name: member.model_fields[name].annotation for name in tags if name in member.model_fields}
    return all(tags[name] in get_args(kind) for name, kind in annotations.items() if get_origin(kind) is Literal)
