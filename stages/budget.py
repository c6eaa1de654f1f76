"""Stage `budget`: the number of tokens on which every method of a run can train, and none beyond its own setting.

It is the least of what the methods would see by themselves. For those that learn from rows it is counted exactly. PPO's
own answers are not known yet: they are taken to be as long as the SFT model's in its evaluation.
"""

import json
import logging
import tempfile
from pathlib import Path
from statistics import fmean

from transformers import AutoConfig

from schemas.config.methods import CONFIGS, PPO, MethodConfig
from schemas.config.training import NO_END, steps_for
from stages.align import BUDGET, METHODS
from stages.engine.data.codec import Codec
from stages.engine.data.examples import encode, fitting, read
from stages.engine.data.trees import tree_tokens
from stages.engine.scoring.evaluation_record import Evaluation
from stages.engine.training.offline import PolicyMethod
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")


def run(context: StageContext) -> dict[str, float]:
    """Count every method's tokens and publish the least as `budget`.

    Params: `methods`, a list of settings. Inputs: model, rows by their kind, and with PPO the SFT model's `evaluation`.
    """
    settings = context.request.params["methods"]
    assert isinstance(settings, list)
    own: list[tuple[str, int]] = []
    for one in settings:
        assert isinstance(one, dict)
        method = CONFIGS[str(one["method"])].model_validate(one)
        own.append((method.method, own_tokens(method, context)))
    least = min(tokens for _, tokens in own)
    log.info("training tokens by themselves: %s", ", ".join(f"{name} {tokens:,}" for name, tokens in own))
    log.info("every method trains on %s", f"{least:,}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / BUDGET).write_text(json.dumps({"train_tokens": least}))
        context.publish("budget", Path(folder))
    return {"budget/train_tokens": float(least)} | {f"budget/own_{name}": float(tokens) for name, tokens in own}


def own_tokens(config: MethodConfig, context: StageContext) -> int:
    """Training tokens (schemas/config/training.py) that a method sees in its own setting, order left aside."""
    if config.train_tokens is not None:
        return config.train_tokens
    codec = Codec.load(context.input("model"))
    positions = getattr(AutoConfig.from_pretrained(context.input("model")), "max_position_embeddings", None)
    limit = min(config.max_length, positions or config.max_length)
    if isinstance(config, PPO):
        return rollout_tokens(config, context, codec, limit)
    method = METHODS[config.method]
    assert issubclass(method, PolicyMethod)
    examples = fitting(encode(read(context.input(method.kind), "train", method.kind), method.answers, codec), limit)
    mean = fmean(tree_tokens(example.tree, "shared") for example in examples)
    return round(mean * config.batch_size * steps_for(len(examples), config))


def rollout_tokens(config: PPO, context: StageContext, codec: Codec, limit: int) -> int:
    """Prompts and sampled answers of all iterations, once per epoch."""
    prompts = [len(codec.prompt(row["prompt"])) for row in read(context.input("prompt"), "train", "prompt")]
    room = limit - config.max_new_tokens - 1
    fit = [length for length in prompts if length <= room] or [room]  # PPO itself refuses when none fits
    evaluation = Evaluation.load(context.input("evaluation"))
    samples = evaluation.at(1.0) if 1.0 in evaluation.temperatures else evaluation.first
    answer = fmean(min(sample.length + sample.ended, config.max_new_tokens) for sample in samples)
    answers = config.iterations * config.rollout_size * config.ppo_epochs
    return round(min(answers, (config.max_steps or NO_END) * config.batch_size) * (fmean(fit) + answer))
