"""What both sides work on: models on disk, and rows as token ids in the order in which they are trained on."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from schemas.config import BaseParams
from schemas.errors import StageError
from stages import base
from stages.engine.data.codec import Codec
from stages.engine.data.examples import Example, encode, longest
from stages.engine.data.order import step_rows
from tests.support.models import data_folder

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
disable_progress_bars()
WORDS = "the a of to and in is it you that for on with as are at be this have from or one had by word but not what all"


@dataclass(frozen=True)
class Work:
    """One comparison. Both workers read it from `work.json` in its folder."""

    method: str
    """sft, reward, dpo, kto or ppo."""
    folder: str
    model: str
    """Folder of the causal language model."""
    reward: str
    """Folder of the same trunk with a score head."""
    batch_size: int
    steps: int
    """Optimizer steps that there are rows for; with PPO, iterations on the same prompts."""
    learning_rate: float
    precision: str
    max_length: int
    tokens: int
    """Our tokens per micro-batch."""
    answer_length: int
    """PPO: tokens of every sampled answer."""
    ppo_epochs: int
    threads: int
    plain: bool = False
    """Our side without oneDNN's products and without the memory that it keeps."""

    @property
    def rows(self) -> int:
        return self.batch_size * (1 if self.method == "ppo" else self.steps)

    def write(self) -> None:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        (Path(self.folder) / "work.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: str) -> "Work":
        return cls(**json.loads((Path(folder) / "work.json").read_text()))


# --- models -----------------------------------------------------------------------------------------------------------


def base_model(path: str, folder: Path) -> Path:
    """The model to train, as a plain transformers folder inside `folder`, made once per path.

    Raises SystemExit when there is no such model.
    """
    own = folder / re.sub(r"[^\w.-]+", "_", path)
    if not (own / "config.json").is_file():
        try:
            base.build(BaseParams(path=path), 0, own)
        except StageError as error:
            raise SystemExit(f"--model: {error}") from error
    return own


def small_model(like: Path, folder: Path) -> Path:
    """A random Llama of two layers with the same tokenizer: equal losses are soon shown on it."""
    config = AutoConfig.from_pretrained(like)
    for name, value in {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}.items():
        setattr(config, name, value)
    config.num_attention_heads = config.num_key_value_heads = 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Codec.load(like).save(folder)
    return folder


def with_score_head(model: Path, folder: Path) -> Path:
    """The model's trunk with a score head that both sides start from."""
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    codec = Codec.load(model)
    scorer.config.pad_token_id = codec.pad_id
    scorer.config.alignflow_score = {"mean": 0.0, "std": 1.0}
    scorer.save_pretrained(folder)
    codec.save(folder)
    return folder


# --- rows -------------------------------------------------------------------------------------------------------------


def made_up_pairs(path: Path, rows: int = 2000) -> Path:
    """A preference file of random words with lengths like those of chat data: the prompt is three quarters of it."""
    draw, words = random.Random(0), WORDS.split()

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    lines = ({"prompt": text(30, 250), "chosen": text(10, 90), "rejected": text(10, 90)} for _ in range(rows))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def checked(data: Path, folder: Path) -> pl.DataFrame:
    """The pairs of a preference file that `alignflow validate` lets pass."""
    command = [sys.executable, "-m", "flows.cli", "validate", data, "--kind", "preference", "--out", folder]
    if subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"--data: {data} cannot be used; what is wrong with it stands above")
    return pl.concat([pl.read_parquet(f) for f in sorted(folder.glob("*/preference.parquet"))]).sort("row")


def lay_out(work: Work, pairs: Sequence[dict[str, Any]]) -> None:
    """Write the rows of a comparison: `data/` as `validate` does for us, and `rows.json`, token ids, for the peer."""
    codec = Codec.load(work.model)
    examples = encode(pairs, lambda pair: [pair["chosen"], pair["rejected"]], codec)
    room = work.max_length - (work.answer_length if work.method == "ppo" else 0)
    chosen = [e for e in examples if (len(e.tree.prompt) if work.method == "ppo" else longest(e.tree)) <= room]
    if len(chosen) < work.rows:
        raise SystemExit(
            f"--data: {work.method} needs {work.rows} rows of at most {room} tokens, and {len(chosen)} of {len(pairs)} "
            "are. Fix: give more rows, lower --rounds or --batch-size, or raise --max-length"
        )
    chosen = chosen[: work.rows]
    work.write()
    _write_data(Path(work.folder) / "data", [example.row for example in chosen])
    order = [row for s in range(work.rows // work.batch_size) for row in step_rows(work.rows, s, work.batch_size, 0)]
    lines = [_tokens(work, chosen, order, place) for place in range(work.rows)]
    (Path(work.folder) / "rows.json").write_text(json.dumps(lines))


def up(row: int) -> bool:
    """KTO's thumb of a row: every other one is up."""
    return row % 2 == 0


def mismatched(work: Work) -> dict[int, int]:
    """Row -> the row whose answer it is mismatched with, by TRL's rule: the one before it in its batch."""
    partner: dict[int, int] = {}
    for step in range(work.steps):
        rows = step_rows(work.rows, step, work.batch_size, 0)
        partner |= {row: rows[place - 1] for place, row in enumerate(rows)}
    return partner


def _write_data(folder: Path, pairs: Sequence[dict[str, Any]]) -> None:
    common = [{name: pair[name] for name in ("row", "prompt", "prompt_id")} for pair in pairs]
    both = list(zip(common, pairs, strict=True))
    ranked = {"winners": [0], "losers": [1], "margins": None}
    data_folder(
        folder,
        sft=[{**row, "response": pair["chosen"]} for row, pair in both],
        preference=[{**row, **{k: pair[k] for k in ("chosen", "rejected")}, "margin": None} for row, pair in both],
        ranking=[{**row, "responses": [pair["chosen"], pair["rejected"]], **ranked} for row, pair in both],
        feedback=[
            {**row, "completion": pair["chosen" if up(i) else "rejected"], "label": up(i)}
            for i, (row, pair) in enumerate(both)
        ],
        prompt=common,
    )


def _tokens(work: Work, examples: Sequence[Example], order: Sequence[int], place: int) -> dict[str, Any]:
    """One row as the peer's collator takes it."""
    row = order[place]
    prompt, (chosen, rejected) = list(examples[row].tree.prompt), map(list, examples[row].tree.answers)
    if work.method == "sft":
        return {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
    if work.method == "reward":
        return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
    if work.method == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    if work.method == "kto":
        partner = mismatched(work)[row]
        other = examples[partner].tree.answers[0 if up(partner) else 1]
        own = chosen if up(row) else rejected
        kl = list(other[: work.max_length - len(prompt)])
        return {"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": kl, "label": up(row)}
    return {"input_ids": prompt}
