"""Models saved as plain transformers folders."""

import json
import math
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from stages.engine.distributed import rank
from stages.engine.models import lora, pieces
from stages.engine.models.loading import quiet
from stages.engine.models.policy import Policy, Scorer
from stages.engine.models.sharding import is_sharded, to_first_rank, whole

LARGEST_FILE: int | str = "50GB"
"""Of a model's weights."""
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SavesTokenizer(Protocol):
    """A tokenizer with its template, as far as saving a model needs it."""

    @property
    def end(self) -> str: ...
    @property
    def lead(self) -> str: ...
    def pad_apart(self) -> int | None: ...
    def save(self, folder: Path) -> None: ...


def save_policy(policy: Policy, codec: SavesTokenizer, folder: Path | str, base: str | None = None) -> None:
    """Write a plain transformers folder of the policy, adapters merged, value head left out. Changes nothing here.

    On sharded weights all ranks have to call it; the first one writes the folder that one process would have written.
    `base`: the digest of the artifact that it was trained from; an adapter is then written apart too (`lora.save`).
    """
    _save(policy, codec, Path(folder), base)


def save_scorer(
    scorer: Scorer,
    codec: SavesTokenizer,
    folder: Path | str,
    mean: float = 0.0,
    std: float = 1.0,
    base: str | None = None,
) -> None:
    """Write a plain transformers folder of the reward model: raw scores, and in its config `alignflow_score`,
    and what stands before and after an answer.

    transformers reads a score at the last token that is not the padding, so the padding is a token other than the end.
    Where the tokenizer has no other there is none: transformers then reads the last token, of one text at a time.

    mean, std: of the raw scores on samples of the reference policy. A loaded scorer gives (raw - mean) / std.
    `base` as in `save_policy`.
    """
    if not (std > 0 and math.isfinite(std) and math.isfinite(mean)):
        raise ValueError(f"scores cannot be normalised by mean {mean} and std {std}")
    config = (scorer.empty[0] if is_sharded(scorer) else scorer).plain.config
    config.get_text_config().pad_token_id = codec.pad_apart()
    config.alignflow_score = {"mean": mean, "std": std}
    config.alignflow_answer = {"lead": codec.lead, "end": codec.end}
    _save(scorer, codec, Path(folder), base)


def _save(model: Policy | Scorer, codec: SavesTokenizer, folder: Path, base: str | None) -> None:
    if not is_sharded(model):
        _write(model, codec, folder, base, _merged(model) if isinstance(model.hf, PeftModel) else None)
        return
    in_pieces = _goes_in_pieces(model.empty[0].plain)
    # Adapters are small; of the other weights the first rank holds one at a time.
    with whole(model, first_rank_only=True, of=lora.PART if in_pieces else "") as one:
        if rank() == 0:
            merged = _merged(one) if isinstance(one.hf, PeftModel) and not in_pieces else None
            _write(one, codec, folder, base, {} if in_pieces else merged)
        if in_pieces:
            _write_weights(model, one, folder)


def _merged(model: Policy | Scorer) -> dict[str, Tensor]:
    return lora.merged(model.plain, _TYPES[model.publish])


def _write(
    model: Policy | Scorer, codec: SavesTokenizer, folder: Path, base: str | None, state: dict[str, Tensor] | None
) -> None:
    plain, dtype = model.plain, _TYPES[model.publish]
    for name, value in model.dropouts.items():
        setattr(plain.config, name, value)
    state = _published(plain.state_dict() if state is None else state, dtype)
    try:
        with quiet():
            plain.save_pretrained(folder, state_dict=state, max_shard_size=LARGEST_FILE)
            if plain.config.dtype != str(dtype).removeprefix("torch."):  # the type that it has here
                plain.config.dtype = dtype
                plain.config.save_pretrained(folder)
    finally:
        for name in model.dropouts:
            setattr(plain.config, name, 0.0)
    if base is not None and isinstance(model.hf, PeftModel):
        lora.save(model.hf, folder, lora.label(base, model.held, model.rounded))
    _let_others_read(folder)
    codec.save(folder)


def _let_others_read(folder: Path) -> None:
    """safetensors makes its files readable by their owner only."""
    for file in folder.rglob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode & 0o777)


def _goes_in_pieces(plain: PreTrainedModel) -> bool:
    """Whether files have the very tensors of the model, so that they can be written one by one."""
    return not pieces.converts(plain) and all(v.is_floating_point() for v in plain.state_dict().values())


def _published(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in the type of what is published, on the CPU where that is another; tied tensors stay one."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for value in state.values():
        alters = value.is_floating_point() and value.dtype != dtype
        cast.setdefault((value.data_ptr(), value.shape), value.to("cpu", dtype) if alters else value)
    return {name: cast[value.data_ptr(), value.shape] for name, value in state.items()}


def _write_weights(model: Policy | Scorer, one: Policy | Scorer, folder: Path) -> None:
    """The files and the index that `save_pretrained` would have written, each weight gathered when its turn comes.

    model: the sharded one; one: the same without shards, with its adapters alone. Called on all ranks.
    """
    plain = one.plain
    ours = {id(p): theirs for p, theirs in zip(one.parameters(), model.parameters(), strict=True)}
    state = {name: value for name, value in plain.state_dict(keep_vars=True).items() if lora.PART not in name}
    tied = {}
    for name, value in state.items():
        tied.setdefault(id(value), []).append(name)
    dropped = {
        name for names in tied.values() for name in names if len(names) > 1 and name in plain.all_tied_weights_keys
    }
    ignored = plain._keys_to_ignore_on_save or ()
    state = {lora.unwrapped(name): v for name, v in state.items() if name not in dropped and name not in ignored}
    state = {name: state[name] for name in sorted(state, key=dot_natural_key)}
    adapted = {f"{name}.weight": module for name, module in plain.named_modules() if isinstance(module, LoraLayer)}

    def value(name: str) -> Tensor:
        tensor = state[name]
        if id(tensor) in ours:
            tensor = to_first_rank(ours[id(tensor)], tensor)
        tensor = tensor + lora.product(adapted[name]) if name in adapted and rank() == 0 else tensor
        return tensor.to(_TYPES[model.publish])

    pattern = SAFE_WEIGHTS_NAME.replace(".", "{suffix}.")
    sized = {name: torch.empty_like(value, dtype=_TYPES[model.publish], device="meta") for name, value in state.items()}
    split = split_torch_state_dict_into_shards(sized, filename_pattern=pattern, max_shard_size=LARGEST_FILE)
    for file, names in split.filename_to_tensors.items():
        shapes = {name: state[name].shape for name in names}
        pieces.write(folder / file if rank() == 0 else None, shapes, value, _TYPES[model.publish])
    if rank() > 0:
        return
    if split.is_sharded:
        (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # of an earlier, smaller model
        metadata = {"total_parameters": plain.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    _let_others_read(folder)
