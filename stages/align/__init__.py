"""Stage `align`: train the SFT model on preferences with one of the methods. A new method is one more entry here."""

import json
from typing import Any

from schemas.methods import CONFIGS, MethodConfig
from schemas.stage import Request
from stages.align.dpo import DPO
from stages.align.kto import KTO
from stages.align.ppo import PPO
from stages.engine.distributed import rank
from stages.engine.training.loop import train
from stages.engine.training.offline import publish_policy
from stages.tracking import StageRun

METHODS: dict[str, type[Any]] = {"dpo": DPO, "kto": KTO, "ppo": PPO}
"""Name -> class, built as `Class(config, run, seed)`: a `Method` with `policy`, `codec`, `total_steps`, `finish()`."""

BUDGET = "budget.json"
"""What stage `budget` writes: {"train_tokens": a number}."""


def run(request: Request, run: StageRun) -> dict[str, float]:
    """Train, measure what the method measures at its end, and publish the model."""
    config = CONFIGS[str(request.params["method"])].model_validate(request.params)
    if run.has("budget"):
        config = within_budget(config, run)
    method = METHODS[config.method](config, run, request.seed)
    metrics = train(method, config, total_steps=method.total_steps, run=run, seed=request.seed)
    if rank() == 0:
        metrics |= method.finish()
        publish_policy(method.policy, method.codec, run)
    return metrics


def within_budget(config: MethodConfig, run: StageRun) -> MethodConfig:
    """The config with the number of training tokens that stage `budget` gives to all methods."""
    tokens = json.loads((run.input("budget") / BUDGET).read_text())["train_tokens"]
    run.params({"train_tokens": tokens})
    return config.model_copy(update={"train_tokens": tokens})
