"""`alignflow sweep`: methods x beta x learning rates x seeds as one plain config, whose `align` holds all variants.

All start from the same SFT model, data and reward model, are evaluated alike, and train on the same number of tokens.
Stages are reused by their keys, so a longer list of betas or seeds runs only what is new.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from statistics import fmean
from typing import Any, TypeVar

from pydantic import ValidationError

from flows.planning import config_file, explain
from flows.planning.plan import Plan
from schemas.config import PipelineConfig, seeded_name
from schemas.config.methods import CONFIGS, PPO, MethodConfig
from schemas.errors import refuse
from schemas.stage import Result
from stages import tracking

T = TypeVar("T", int, float)


def load(
    source: str,
    overrides: Sequence[str],
    methods: str,
    betas: str,
    seeds: str,
    tokens: int | None = None,
    name: str | None = None,
    learning_rates: str | None = None,
) -> Plan:
    """The plan of a sweep over a preset or file. The lists have commas; without `learning_rates` each has its own.

    Raises:
        StageError: a list holds what it cannot, or the config is wrong.
    """
    base = explain.validate(config_file.raw_of(source, overrides))
    names = method_names(methods)
    rates: list[float] | list[None] = [None]
    if learning_rates is not None:
        fields = dict.fromkeys(names, "learning_rate")
        rates = settings("--learning-rate", learning_rates, fields, "rate", "give numbers such as 1e-6,3e-6")
    fields = {method: CONFIGS[method].strength for method in names}
    strengths = settings("--beta", betas, fields, "beta", "give numbers such as 0.05,0.1,0.3")
    runs = numbers("--seeds", seeds, int)
    for seed in runs:
        if why := refusal(names[0], "seed", seed):
            raise refuse("--seeds", seed, f"it {why}.", "give whole numbers such as 0,1,2")
    align = {}
    for method, beta, rate, seed in itertools.product(names, strengths, rates, runs):
        group = f"{method}-{shown(beta)}{'' if rate is None else f'-lr{shown(rate)}'}"  # dpo-0.1, dpo-0.1-lr1e-06
        align[seeded_name(group, seed)] = variant(base, method, beta, rate, seed, tokens)
    raw = base.model_dump(mode="json") | {"align": align, "sweep": name or base.name, "equal_tokens": tokens is None}
    raw["seeds"] = None  # each variant has its own
    raw["promote"] = None  # a sweep makes no champion, and its candidate would be none of the variants
    return config_file.planned(raw)


def method_names(text: str) -> list[str]:
    """Methods of a list with commas. Raises StageError for an unknown one, one without a beta, or one given twice."""
    names = words("--methods", text)
    for name in names:
        if name not in CONFIGS:
            near = get_close_matches(name, CONFIGS, 1) or list(CONFIGS)
            raise refuse("--methods", name, "there is no such method.", f"use {', '.join(near)}")
        config = CONFIGS[name]
        if config.strength not in config.model_fields:
            raise refuse("--methods", name, "the method has no beta.", "leave it out; `alignflow run` trains it")
    return names


def settings(option: str, text: str, fields: Mapping[str, str], what: str, fix: str) -> list[float]:
    """The list's numbers, each of which goes into a field of every method and into a variant's name. `fields`: method
    -> field. Raises StageError for one that cannot.
    """
    values = numbers(option, text, float)
    for value, (name, field) in itertools.product(values, fields.items()):
        if why := refusal(name, field, value):
            raise refuse(option, f"{value:g}", f"{name} takes no such {what}: it {why}.", fix)
        if "+" in shown(value):
            raise refuse(option, f"{value:g}", "it must be less than 1e15.", fix)
    if len(set(map(shown, values))) < len(values):
        raise refuse(option, text, "two numbers differ beyond 15 digits only.", fix)
    return values


def shown(number: float) -> str:
    """A beta or learning rate as a variant's name has it, which takes no `+`."""
    return f"{number:.15g}"


def refusal(method: str, field: str, value: float) -> str | None:
    """Why a method cannot have this value in a field, `must be greater than 0`; None where it can."""
    try:
        CONFIGS[method].model_validate({field: value})
    except ValidationError as error:
        return explain.wording(error.errors()[0])
    return None


def numbers(option: str, text: str, kind: type[T]) -> list[T]:
    """Numbers of a list with commas, ascending. Raises StageError for what is none, or stands twice."""
    values = []
    for word in words(option, text):
        try:
            values.append(kind(word))
        except ValueError:
            what = "not a whole number" if kind is int else "not a number"
            raise refuse(option, word, f"this is {what}.", "give numbers with commas, such as 1,2,3") from None
    if len(set(values)) < len(values):
        raise refuse(option, text, "a number stands twice.", "give each once")
    return sorted(values)


def words(option: str, text: str) -> list[str]:
    """The parts between commas. Raises StageError when there is none, or one stands twice."""
    parts = [word.strip() for word in text.split(",") if word.strip()]
    if not parts or len(set(parts)) < len(parts):
        raise refuse(option, text, "the list is empty or names something twice.", "give each once, with commas")
    return parts


def variant(
    base: PipelineConfig, method: str, beta: float, rate: float | None, seed: int, tokens: int | None
) -> dict[str, Any]:
    """One variant: the config's own settings of the method with another beta, learning rate, seed, number of tokens."""
    # What the config says of the method: under its name, else under another, else nothing but the defaults.
    named = [base.align[method]] if method in base.align else []
    known = [config for config in [*named, *base.align.values()] if config.method == method]
    own: MethodConfig = known[0] if known else CONFIGS[method](method=method)
    if isinstance(own, PPO) and own.kl_target is not None:
        fix = "set it to null: with it the coefficient moves away from beta"
        raise refuse("align.ppo.kl_target", own.kl_target, "a sweep needs a fixed KL coefficient.", fix)
    changed = {own.strength: beta, "learning_rate": rate, "seed": seed, "train_tokens": tokens}
    return own.model_dump(mode="json") | {name: value for name, value in changed.items() if value is not None}


def winner(results: Mapping[str, Result]) -> list[str]:
    """The models of the point with the highest mean judge score, one per seed."""
    frontier = tracking.fetch(results["compare"].outputs["comparison"]) / "frontier.json"
    points: list[dict[str, Any]] = json.loads(frontier.read_text(encoding="utf-8"))
    return max(points, key=lambda point: point["judge_score"])["models"]


def test_text(results: Mapping[str, Result]) -> str:
    """What the test part says of a sweep's winner; empty where nothing was evaluated there."""
    measured = {name.removeprefix("test "): one.metrics for name, one in results.items() if name.startswith("test ")}
    sft = measured.pop("sft", {})
    if not measured:
        return ""
    names = ("judge_score", "win_rate_vs_sft", "win_rate_vs_sft_low", "win_rate_vs_sft_high")
    rows = {model: [metrics[f"eval/{name}"] for name in names] for model, metrics in measured.items()}
    score, rate = (fmean(row[i] for row in rows.values()) for i in (0, 1))
    each = [
        f"  {name}: score {s:.2f}, {100 * w:.0f} % [{100 * a:.0f}, {100 * b:.0f}]"
        for name, (s, w, a, b) in rows.items()
    ]
    seeds = "one seed" if len(rows) == 1 else f"mean of {len(rows)} seeds"
    return "\n".join(
        [
            f"The winner on the test part, {sft['eval/prompts']:.0f} prompts that chose nothing ({seeds}): "
            f"judge score {score:.2f}, of the SFT model {sft['eval/judge_score']:.2f}; win rate {100 * rate:.0f} %.",
            "Each seed, with its 95 % interval over prompts:",
            *each,
        ]
    )


def tokens_line(config: PipelineConfig, results: Mapping[str, Result]) -> str:
    """How many tokens the variants have really trained on."""
    counts = [results[name].metrics["compute/train_tokens"] for name in config.trained if name in results]
    return f"training tokens of the {len(counts)} variants: {min(counts):,.0f} to {max(counts):,.0f}"
