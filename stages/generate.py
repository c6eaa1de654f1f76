"""Stage `generate`: a model writes K answers to each prompt; a judge ranks them, or people do.

stages/commands/generate.py runs it without MLflow.

Writes rows.jsonl, one row per prompt, which stage `validate` reads as kind `ranking`:

- scored by a judge:        {"prompt": [...], "responses": [...], "scores": [...]}
- with label noise:         {"prompt": [...], "responses": [...], "comparisons": [{"a": 0, "b": 1, "winner": 1}, ...]}
- for people to rank:       {"prompt": [...], "responses": [...], "order": []}

Where a prompt has tools, `tools` holds them. All K answers are written, equal ones too: how often a model repeats
itself is worth knowing, and `validate` makes one of them and reports it. For people, a README beside the file explains
how to fill in `order`.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp
from pathlib import Path
from typing import Any

from schemas.config import GenerateConfig
from schemas.conversation import opened
from schemas.errors import refuse
from stages.engine.data.codec import Codec
from stages.engine.data.examples import has, read
from stages.engine.models.loading import load_policy
from stages.engine.models.policy import Policy, context_length
from stages.engine.sampling import sample, seed_of, uniforms
from stages.engine.scoring.judges import Judge, RewardJudge, judge_for
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

Messages = list[dict[str, str]]
Progress = Callable[[int, int], None]

HOW_TO_RANK = """rows.jsonl holds one prompt per line with its answers under `responses`, to be ranked by people.

Fill in `order` on every line: the answers' numbers, counted from 0 in the order in which they stand, best first.

    "order": [2, 0, 3, 1]       the third answer is best, then the first, the fourth, the second
    "order": [2, [0, 3], 1]     the first and the fourth are equally good

It must name each answer once. A line whose `order` stays empty counts as not ranked. Change nothing else.
The ranked file comes back as preference data, in a pipeline's config

    data:
      preference: {path: rows.jsonl, kind: ranking}

or to look at it first: alignflow validate rows.jsonl --kind ranking --out ranked
"""


@dataclass(frozen=True)
class Generated:
    """K answers to one prompt, and the judge's scores."""

    prompt: Messages
    responses: list[str]
    scores: list[float] | None = None


def label(item: Generated, noise: float, seed: int) -> dict[str, Any]:
    """One row of rows.jsonl. With noise, a function of (seed, the prompt) decides every pair of unequal answers."""
    prompt, tools = opened(item.prompt)
    row: dict[str, Any] = {"prompt": prompt, **({"tools": tools} if tools else {}), "responses": item.responses}
    if item.scores is None:
        return {**row, "order": []}
    if noise == 0:
        return {**row, "scores": item.scores}
    pairs = [(i, j) for i, j in combinations(range(len(item.responses)), 2) if item.responses[i] != item.responses[j]]
    drawn = uniforms(seed_of(seed, "label", json.dumps(item.prompt)), len(pairs))
    comparisons = [
        {"a": i, "b": j, "winner": i if number < win_probability(item.scores[i], item.scores[j], noise) else j}
        for (i, j), number in zip(pairs, drawn, strict=True)
    ]
    # All answers equal: no comparison, which as equal scores is a tie.
    return {**row, "comparisons": comparisons} if comparisons else {**row, "scores": [0.0] * len(item.responses)}


def win_probability(score: float, other: float, noise: float) -> float:
    """That an answer beats another one (Bradley and Terry 1952): sigmoid of the scores' difference over `noise`."""
    difference = (score - other) / noise
    return 1 / (1 + exp(-difference)) if difference > -700 else 0.0


def answer(
    policy: Policy,
    codec: Codec,
    prompts: Sequence[Messages],
    config: GenerateConfig,
    seed: int,
    progress: Progress,
    judge: Judge | None = None,
) -> tuple[list[Generated], int]:
    """K answers to each prompt that leaves room for one, and the tokens sampled. `judge` is asked whether it can read
    them, before any is sampled.

    Answer k's randomness is a function of (seed, prompt, k), so neither `limit` nor a larger K changes the others.
    """
    room = (context_length(policy.plain) or sys.maxsize) - config.max_new_tokens
    encoded = list(zip(prompts, codec.check_templates(prompts, "prompts", "the model"), strict=True))
    fitting = [(prompt, ids) for prompt, ids in encoded if len(ids) <= room]
    if len(fitting) < len(prompts):
        log.warning("%d of %d prompts leave no room for an answer: left out", len(prompts) - len(fitting), len(prompts))
    if isinstance(judge, RewardJudge):
        judge.check([prompt for prompt, _ in fitting], config.max_new_tokens)
    if not fitting:
        message = f"there is no prompt to answer: of {len(prompts)} none leaves room for an answer"
        fix = "lower it, or give shorter prompts"
        raise refuse("generate.max_new_tokens", config.max_new_tokens, message, fix, kind="no_prompts")
    every = [(ids, seed_of(seed, "generate", json.dumps(p), k)) for p, ids in fitting for k in range(config.answers)]
    sampled = sample(
        policy,
        [ids for ids, _ in every],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seeds=[own for _, own in every],
        stop_ids=codec.stop_ids,
        pad_id=codec.pad_id,
        progress=progress,
    )
    texts = [codec.text(ids) for ids in sampled]
    k = config.answers
    return [Generated(p, texts[i * k : (i + 1) * k]) for i, (p, _) in enumerate(fitting)], sum(map(len, sampled))


def score(items: Sequence[Generated], judge: Judge | None) -> list[Generated]:
    """The items with the judge's scores; unchanged without a judge."""
    if judge is None:
        return list(items)
    prompts = [item.prompt for item in items for _ in item.responses]
    scores = iter(judge.score(prompts, [text for item in items for text in item.responses]))
    return [Generated(item.prompt, item.responses, [next(scores) for _ in item.responses]) for item in items]


def summary(items: Sequence[Generated], tokens: int, seconds: float) -> dict[str, float]:
    """Counts, the share of answers that repeat another one to the same prompt, and the mean score."""
    total = sum(len(item.responses) for item in items)
    scores = [score for item in items for score in item.scores or ()]
    return {
        "generate/prompts": float(len(items)),
        "generate/answers": float(total),
        "generate/identical": 1 - sum(len(set(item.responses)) for item in items) / total,
        **({"generate/score": sum(scores) / total} if scores else {}),
        "compute/generated_tokens": float(tokens),
        "compute/seconds": seconds,
    }


def write(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """One JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    file.write_text(lines, encoding="utf-8", errors="backslashreplace")  # half an emoji as JSON escapes it


def read_prompts(folder: Path, limit: int | None) -> list[Messages]:
    """The data's prompts, each once: the first `limit` to train on, and all that are held out."""
    rows = read(folder, "train", "prompt")[:limit]
    if has(folder, "eval", "prompt"):
        rows += read(folder, "eval", "prompt")
    return list({row["prompt_id"]: row["prompt"] for row in reversed(rows)}.values())[::-1]


def run(context: StageContext) -> dict[str, float]:
    """Answer the prompts of `data` with `model`, label the answers, publish `rows`. Input `judge` is a reward model."""
    request = context.request
    config = GenerateConfig.model_validate(request.params)
    began = time.monotonic()
    judge = (
        None if config.judge is None else judge_for(config.judge, context, config.frozen)
    )  # first: what is missing costs no sampling
    model = context.input("model")
    prompts = read_prompts(context.input("data"), config.limit)
    policy = load_policy(model, trainable=False, frozen=config.frozen)
    items, tokens = answer(
        policy,
        Codec.load(model),
        prompts,
        config,
        request.seed,
        lambda done, total: context.progress(done, total, "answers"),
        judge,
    )
    del policy  # before the judge's weights are loaded
    items = score(items, judge)
    folder = context.work / "rows"
    shutil.rmtree(folder, ignore_errors=True)
    write([label(item, config.noise, request.seed) for item in items], folder / "rows.jsonl")
    if judge is None:
        (folder / "README.txt").write_text(HOW_TO_RANK)
    if request.log_text:
        context.table(side_by_side(items[:50]), "samples.json")
    context.publish("rows", folder)
    return summary(items, tokens, time.monotonic() - began)


def side_by_side(items: Sequence[Generated]) -> dict[str, list[Any]]:
    """A table of prompts and answers, best first where they are scored."""
    table: dict[str, list[Any]] = {"prompt": [item.prompt[-1]["content"] for item in items]}
    for k in range(len(items[0].responses)):
        table[f"answer {k + 1}"] = []
    for item in items:
        scores = item.scores or [0.0] * len(item.responses)
        best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
        for k, i in enumerate(best_first):
            score = "" if item.scores is None else f"[{scores[i]:.2f}] "
            table[f"answer {k + 1}"].append(score + item.responses[i])
    return table
