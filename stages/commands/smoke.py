"""Let a model answer a few held-out prompts as those who serve it load it: by MLflow, in plain transformers.

Prints what came of it as JSON, and no text of an answer: `answers`, `empty`, `ended`.
"""

import json
import os
from typing import Any

from schemas import environment
from schemas.commands import SmokeCommand
from schemas.errors import EXIT_CODES, StageError, refuse
from schemas.text import show
from stages import tracking
from stages.commands.entry import begin, refused
from stages.engine.data.examples import read
from stages.runtime.process import die_with_parent


def answer(command: SmokeCommand) -> dict[str, int]:
    """How many prompts were answered, how many answers are empty, and how many came to an end by themselves.

    Raises:
        StageError: MLflow cannot load the model.
    """
    prompts = [row["prompt"] for row in read(command.data, "eval", "prompt")]
    asked = prompts[:: max(1, len(prompts) // command.prompts)][: command.prompts]
    try:
        pipeline = tracking.load_pipeline(command.model)
    except Exception as error:  # whatever MLflow and transformers raise over a folder that they cannot use
        message = f"MLflow cannot load the model: {error}."
        fix = "publish it anew: `alignflow retrain --force` after a change of its config"
        raise refuse("promote.smoke", command.model, message, fix, kind="smoke") from error
    ends = pipeline.model.generation_config.eos_token_id
    tokenizer, stops = pipeline.tokenizer, set(ends if isinstance(ends, list) else [ends])
    given: dict[str, Any] = {"max_new_tokens": command.max_new_tokens, "do_sample": False}
    counts = {"answers": len(asked), "empty": 0, "ended": 0}
    for prompt in asked:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
        (made,) = pipeline(messages, return_tensors=True, **given)
        ids = made["generated_token_ids"]
        before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        own = list(ids)[len(before) :]
        counts["empty"] += not tokenizer.decode(own, skip_special_tokens=True).strip()
        counts["ended"] += bool(own) and int(own[-1]) in stops
    return counts


def main(command: SmokeCommand) -> int:
    """Prints the counts; returns the exit code. It ends with the retraining that asks."""
    die_with_parent()
    if environment.parent() not in (None, os.getppid()):  # it has died already
        return EXIT_CODES["preempted"]
    try:
        show(json.dumps(answer(command)))
    except StageError as error:
        return refused("error", error)
    return 0


if __name__ == "__main__":
    begin(SmokeCommand.model_validate, main)
