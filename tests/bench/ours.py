"""Our side: the engine's own loop and methods, one optimizer step (PPO: one iteration) a turn.

    python -m tests.bench.ours FOLDER            FOLDER holds work.json and data/ (see work.py)
    python -m tests.bench.ours FOLDER --first    PPO: gradient of the first update on given answers

PPO samples a fixed number of tokens here and scores them as they stand, as TRL does.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from schemas.config import RewardConfig, SFTConfig, methods
from schemas.config.training import Training
from stages.align import ppo
from stages.align.dpo import DPO
from stages.align.kto import KTO
from stages.engine.data.trees import Tree
from stages.engine.models import cpu
from stages.engine.training.loop import train
from stages.engine.training.offline import OfflineAlignment
from stages.reward import Reward
from stages.sft import SFT
from tests.bench.sections import watch
from tests.bench.turns import Turns
from tests.bench.work import Work, mismatched
from tests.support.context import MemoryContext
from tests.support.models import one_step


class CycledKTO(KTO):
    """KTO with the mismatched answers that TRL would take."""

    partner: Mapping[int, int]

    def mismatch(self, seed: int) -> list[Tree]:
        found = []
        for row, tree in enumerate(self.trees):
            answer = self.trees[self.partner[row]].answers[0]
            found.append(Tree(tree.prompt, (answer[: self.limit - len(tree.prompt)],)))
        return found


class FixedLengthPPO(ppo.PPO):
    """PPO whose answers all have the same length, and are scored without an end token put behind them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.codec.stop_ids = frozenset()
        self.reward_model.tree = lambda row, prompt, answer: Tree(tuple(prompt), (tuple(answer),))  # type: ignore[method-assign]


class InTurns(MemoryContext):
    """A run in memory that answers with every finished turn's loss."""

    def start(self, turns: Turns, steps_per_turn: int) -> None:
        self.turns, self.steps_per_turn, self.sections = turns, steps_per_turn, watch()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        super().metrics(values, step)
        if step is not None and step % self.steps_per_turn == 0:
            self.turns.done(loss=values["train/loss"], sections=self.sections.taken())

    def turn_by_turn(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; before every turn's first one, wait."""
        for step in range(sys.maxsize):
            if step % self.steps_per_turn == 0:
                self.turns.wait()
            yield next(batches)


def config_for(work: Work) -> Training:
    """The settings that TRL has by default, or that are set on both sides."""
    same: dict[str, Any] = {
        "learning_rate": work.learning_rate,
        "batch_size": work.batch_size,
        "max_length": work.max_length,
        "tokens_per_micro_batch": work.tokens,
        "precision": work.precision,
        "schedule": "constant",
        "warmup": 0.0,
        "adam_eps": 1e-8,
        "checkpoint_minutes": 1e6,
    }
    if work.method == "sft":
        return SFTConfig(**same)
    if work.method == "reward":
        return RewardConfig(**same)
    if work.method == "dpo":
        return methods.DPO(**same)
    if work.method == "kto":
        return methods.KTO(**same, desirable_weight=1.0, undesirable_weight=1.0)
    own = {"rollout_size": work.batch_size, "ppo_epochs": work.ppo_epochs, "max_new_tokens": work.answer_length}
    like_trl = {"max_grad_norm": 1e9, "missing_end_penalty": 0.0, "iterations": work.steps, "lam": 0.95}
    trunk = "shared" if os.environ.get("BENCH_SHARED_TRUNK") else "separate"
    return methods.PPO(**same, **own, **like_trl, value_trunk=trunk)


def method_for(work: Work, run: MemoryContext, config: Any) -> Any:
    if work.method == "kto":
        CycledKTO.partner = mismatched(work)
    classes = {"sft": SFT, "reward": Reward, "dpo": DPO, "kto": CycledKTO, "ppo": FixedLengthPPO}
    return classes[work.method](config, run)


def time_reading() -> list[float]:
    """Seconds that the reference's log-probs take, filled in as they are read."""
    seconds: list[float] = []
    inner = OfflineAlignment.reference_logps

    def reference_logps(*args: Any) -> Any:
        began = time.perf_counter()
        found = inner(*args)
        seconds.append(time.perf_counter() - began)
        return found

    OfflineAlignment.reference_logps = reference_logps  # type: ignore[method-assign]
    return seconds


def first_update(work: Work, run: MemoryContext, config: Any) -> None:
    """Gradient of PPO's first update on the answers in `answers.safetensors`, and its losses."""
    answers = load_file(Path(work.folder) / "answers.safetensors")["answers_BT"].tolist()
    rows = json.loads((Path(work.folder) / "rows.json").read_text())
    given = {tuple(row["input_ids"]): answer for row, answer in zip(rows, answers, strict=True)}
    ppo.sample = lambda policy, prompts, **kwargs: [given[tuple(p)] for p in prompts]  # type: ignore[assignment]
    method = method_for(work, run, config)
    _, metrics = one_step(method)
    found = {n: p.grad for n, p in method.model.named_parameters() if p.grad is not None}
    stats = {n: torch.tensor(float(metrics[n])) for n in ("train/policy_loss", "train/value_loss")}
    stats |= {n: torch.tensor(v) for n, v in method.rollout.stats.items()}
    save_file({**found, **stats}, Path(work.folder) / "gradient-ours.safetensors")


def main(arguments: Sequence[str]) -> None:
    work = Work.read(arguments[0])
    torch.set_num_threads(work.threads)
    if work.plain:
        cpu._ONEDNN, cpu.keep_freed_memory = False, lambda: None
    turns, config, folder = Turns(), config_for(work), Path(work.folder)
    inputs = {
        "data": folder / "data",
        "model": Path(work.reward if work.method == "reward" else work.model),
        "reward": Path(work.reward),
    }
    run = InTurns(folder / "ours", config, inputs)
    if "--first" in arguments:
        first_update(work, run, config)
        return
    turns.wait()  # the first turn is the set-up: loading, and the reference's log-probs
    reading = time_reading()
    method = method_for(work, run, config)
    steps_per_turn = method.steps_per_iteration if work.method == "ppo" else 1
    turns.done(reference=sum(reading))
    run.start(turns, steps_per_turn)
    inner = method.batches
    method.batches = lambda start: run.turn_by_turn(inner(start))
    train(method, run)


if __name__ == "__main__":
    main(sys.argv[1:])
