"""Models saved as plain transformers folders."""

import math
from pathlib import Path
from typing import Protocol

from peft import PeftModel

from stages.engine.distributed import rank
from stages.engine.models import lora
from stages.engine.models.loading import quiet
from stages.engine.models.policy import Policy, Scorer
from stages.engine.models.sharding import is_sharded, whole


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
    if is_sharded(model):
        with whole(model, first_rank_only=True) as one:
            if rank() == 0:
                _save(one, codec, folder, base)
        return
    plain = model.plain
    for name, value in model.dropouts.items():
        setattr(plain.config, name, value)
    try:
        with quiet():
            plain.save_pretrained(folder, state_dict=lora.merged(plain) if isinstance(model.hf, PeftModel) else None)
    finally:
        for name in model.dropouts:
            setattr(plain.config, name, 0.0)
    if base is not None and isinstance(model.hf, PeftModel):
        lora.save(model.hf, folder, base)
    for file in folder.rglob("*.safetensors"):  # safetensors makes its files readable by their owner only
        file.chmod((folder / "config.json").stat().st_mode & 0o777)
    codec.save(folder)
