"""Stage `align`: train the SFT model on preferences with one of the methods. A new method is one more entry here."""

import json
from typing import Any

from schemas.config.methods import CONFIGS, MethodConfig
from stages.align.dpo import DPO
from stages.align.kto import KTO
from stages.align.ppo import PPO
from stages.engine.training.loop import train_and_publish
from stages.engine.training.method import PublishedMethod
from stages.runtime.context import StageContext

METHODS: dict[str, type[PublishedMethod[Any]]] = {"dpo": DPO, "kto": KTO, "ppo": PPO}
"""Name -> class, built as `Class(config, context)`; each is a `PublishedMethod` (engine/training/method.py)."""

BUDGET = "budget.json"
"""What stage `budget` writes: {"train_tokens": a number}."""


def run(context: StageContext) -> dict[str, float]:
    """Train, measure what the method measures at its end, and publish the model."""
    params = context.request.params
    config = CONFIGS[str(params["method"])].model_validate(params)
    if context.has("budget"):
        config = within_budget(config, context)
    return train_and_publish(METHODS[config.method](config, context), context)


def within_budget(config: MethodConfig, context: StageContext) -> MethodConfig:
    """The config with the number of training tokens that stage `budget` gives to all methods."""
    tokens = json.loads((context.input("budget") / BUDGET).read_text())["train_tokens"]
    context.params({"train_tokens": tokens})
    return config.model_copy(update={"train_tokens": tokens})
