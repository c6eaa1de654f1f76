# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""The peer's side: TRL's trainers on the same token ids, one optimizer step (PPO: one iteration) a turn.

    python -m tests.bench.peer FOLDER            in an environment of its own (see __main__.py)
    python -m tests.bench.peer FOLDER --first    PPO: gradient of the first update on given answers

Rows come tokenized and in order, so nothing is shuffled, cut or left out here. TRL 1.16's best settings for the same
work: SFT without padding, no gradient checkpointing, fused AdamW; its classes for all but PPO, 1.12's for that.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if os.environ.get("BENCH_TRL_PPO"):
    sys.path.insert(0, os.environ["BENCH_TRL_PPO"])

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from tests.bench.turns import Turns


def causal(work: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32, attn_implementation="sdpa")


def scorer(work: dict[str, Any]) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        work["reward"], num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
    )


class InTurns(TrainerCallback):
    """Waits before every step and answers after it. The clock starts when the batch has been collated already."""

    def __init__(self, turns: Turns, losses: list[float]) -> None:
        self.turns, self.losses = turns, losses

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns.done(loss=self.losses[-1])


class IterationsInTurns(InTurns):
    """PPO's trainer tells of the beginning of training and of every iteration's end."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns.done(loss=None)
        self.turns.wait()


def keep_losses(trainer: Any) -> list[float]:
    """Every step's loss, at full precision."""
    losses: list[float] = []
    inner = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found

    trainer.compute_loss = compute_loss
    return losses


def common(work: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": f"{work['folder']}/peer",
        "per_device_train_batch_size": work["batch_size"],
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": work["precision"] == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def offline_trainer(work: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO"}[work["method"]]
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    trainer_class._prepare_dataset = lambda self, dataset, *args, **kwargs: dataset  # it is tokenized
    best = {"padding_free": True, "max_length": None} if name == "SFT" else {"max_length": work["max_length"]}
    config = config_class(**common(work), **best, max_steps=work["steps"], train_sampling_strategy="sequential")
    model = scorer(work) if name == "Reward" else causal(work)
    models = [model, causal(work)] if name in ("DPO", "KTO") else [model]
    return trainer_class(*models, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def ppo_trainer(work: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        **common(work),
        total_episodes=work["steps"] * work["batch_size"],
        num_ppo_epochs=work["ppo_epochs"],
        response_length=work["answer_length"],
        local_rollout_forward_batch_size=work["batch_size"],
        temperature=1.0,
        num_sample_generations=0,
    )
    tokenizer.padding_side = "left"
    data = Dataset.from_list(rows)
    policy = causal(work)
    policy.generation_config.eos_token_id = None  # all answers get the same length
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=causal(work),
        reward_model=scorer(work),
        value_model=scorer(work),
        train_dataset=data,
        eval_dataset=data,
    )


def take_given_answers(work: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put the answers of `answers.safetensors` in the place of sampled ones, with the logits that they have."""
    from safetensors.torch import load_file
    from trl.experimental.ppo import ppo_trainer as module

    answers = load_file(f"{work['folder']}/answers.safetensors")["answers_BT"]
    by_prompt = {tuple(row["input_ids"]): answer for row, answer in zip(rows, answers, strict=True)}

    def given(model: Any, queries: Any, local_batch: int, pad_id: int, config: Any) -> Any:
        own = torch.stack([by_prompt[tuple(t for t in query.tolist() if t != pad_id)] for query in queries])
        both = torch.cat([queries, own], 1)
        logits = module.forward(model, both, pad_id).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / config.temperature

    module.batch_generation = given


def save_first_gradient(work: dict[str, Any], trainer: Any) -> None:
    """At the first update, write its gradient; after the iteration, what it logs."""
    from safetensors.torch import save_file

    found: dict[str, Any] = {}
    inner_step, inner_log = trainer.optimizer.step, trainer.log

    def step(*args: Any, **kwargs: Any) -> Any:
        if not found:
            named = trainer.model.named_parameters()
            found.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        return inner_step(*args, **kwargs)

    def log(metrics: dict[str, float], *args: Any) -> None:
        inner_log(metrics, *args)
        stats = {n: torch.tensor(float(v)) for n, v in metrics.items()}
        save_file({**found, **stats}, f"{work['folder']}/gradient-peer.safetensors")
        os._exit(0)

    trainer.optimizer.step, trainer.log = step, log


def main(folder: str, first: bool) -> None:
    work, rows = (json.loads(Path(folder, name).read_text()) for name in ("work.json", "rows.json"))
    torch.set_num_threads(work["threads"])
    transformers.set_seed(0)
    turns = Turns()
    if not first:
        turns.wait()
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token  # PPO's trainer knows padding by its id
    if work["method"] == "ppo":
        if first:
            take_given_answers(work, rows)
        trainer = ppo_trainer(work, rows, tokenizer)
        if first:
            save_first_gradient(work, trainer)
        else:
            trainer.add_callback(IterationsInTurns(turns, []))
    else:
        trainer = offline_trainer(work, rows, tokenizer)
        trainer.add_callback(InTurns(turns, keep_losses(trainer)))
    if not first:
        turns.done()
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], "--first" in sys.argv)
