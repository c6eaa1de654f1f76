"""Parts of a config that exclude each other or lack one another: told from the config alone, before it is planned."""

import re

from schemas.config import EndpointJudge, PipelineConfig, RewardJudge, seeded_name
from schemas.errors import refuse
from schemas.promotion import PromoteConfig

RESERVED = {"base", "sft", "generate", "reward", "gold", "judge", "budget", "baselines", "people", "compare", "promote"}
RESERVED |= {"champion"}
"""Names of other nodes than aligned models."""


def check(config: PipelineConfig) -> None:
    """Raise StageError for a name that is taken, a judge that cannot judge, or a gate that can never open."""
    _check_seeds(config)
    ranks = config.nodes * config.devices
    if ranks % config.replicas:
        fix = f"set it to a divisor of nodes x devices ({ranks}), or devices to a multiple of it"
        raise refuse("replicas", config.replicas, "the devices cannot be shared out over so many copies.", fix)
    for name in [*config.align, *config.trained]:
        if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,62}", name, re.ASCII):
            fix = f"letters, digits, dots, dashes and underscores, and none of {', '.join(sorted(RESERVED))}"
            raise refuse("align", name, "this name cannot be used.", fix)
    _check_generate(config)
    judge = config.evaluate.judge
    if isinstance(judge, RewardJudge) and judge.model == "gold":
        _check_gold(config)
    if not config.log_text:
        # Without texts in evaluations there is nothing to compare, and what a server keeps or quotes is its own.
        for name, part in {"evaluate": config.evaluate, "generate": config.generate}.items():
            if part is not None and isinstance(part.judge, EndpointJudge):
                fix = "use a judge that runs here (rule, sentiment, reward), or log_text: true"
                message = "an endpoint is sent prompts and answers, which log_text: false forbids."
                raise refuse(f"{name}.judge", "endpoint", message, fix)
    # A plain run promotes nothing: who the candidate is must be clear to a retraining alone, which asks by itself.
    if config.promote is not None and (config.promote.candidate is not None or len(config.align) == 1):
        check_gate(config)


def _check_seeds(config: PipelineConfig) -> None:
    """Every seed stands once, and no method has one of its own besides."""
    if config.seeds is None:
        return
    if len(set(config.seeds)) < len(config.seeds):
        raise refuse("seeds", config.seeds, "a seed stands twice.", "give each once")
    for name, method in config.align.items():
        if method.seed is not None:
            fix = f"leave out align.{name}.seed, or seeds"
            raise refuse(f"align.{name}.seed", method.seed, "`seeds` sets the seed of every method.", fix)


def _check_generate(config: PipelineConfig) -> None:
    """Generated preferences exclude given ones, and their judge must exist before them."""
    if config.generate is None:
        return
    judge = config.generate.judge
    if config.data.preference is not None:
        fix = "leave out one of them; generated answers want data.prompt or data.sft"
        raise refuse("generate", "set", "preferences are both given and generated.", fix)
    if judge is None:
        fix = "set generate.judge, or export with `alignflow generate` and give the ranked file as data.preference"
        raise refuse("generate.judge", None, "answers that people rank end a pipeline run.", fix)
    if isinstance(judge, RewardJudge) and judge.model == "gold":
        fix = "set it to the folder of a reward model"
        raise refuse("generate.judge.model", "gold", "the gold model is trained after `generate`.", fix)


def _check_gold(config: PipelineConfig) -> None:
    """The gold judge is trained, on rows of its own."""
    if config.gold is None:
        raise refuse("gold", None, "no gold reward model is trained.", "set gold: {}, or another evaluate.judge")
    if config.data.preference is None:
        fix = "set data.preference, or another evaluate.judge"
        raise refuse("data.preference", None, "the gold reward model needs preferences.", fix)
    if config.data.preference.gold_fraction == 0:
        fix = "set it, for example to 0.4: the gold model learns from these rows, the policies from the others"
        raise refuse("data.preference.gold_fraction", 0, "the gold reward model has no rows.", fix)


def check_gate(config: PipelineConfig) -> None:
    """Raise StageError unless it is clear who the candidate is, and the gate gets as many prompts as it asks for."""
    candidate(config)
    gate, limit = (config.promote or PromoteConfig()).gate, config.evaluate.limit
    if limit is not None and limit < gate.prompts_min:
        fix = "raise evaluate.limit, or lower promote.gate.prompts_min"
        message = f"evaluate.limit is {limit}, which is too few for the gate."
        raise refuse("promote.gate.prompts_min", gate.prompts_min, message, fix)


def candidate(config: PipelineConfig) -> str:
    """The name of the model that may become champion; of a method with several seeds it is the first seed's.

    The best of the seeds would be chosen on the prompts that the gate judges by. Raises StageError when it is not clear
    which method is meant.
    """
    named, known = (config.promote or PromoteConfig()).candidate, list(config.align)
    if named in config.trained:
        return str(named)
    if named is None and len(known) == 1:
        named = known[0]
    if named in known and config.seeds is not None:
        return seeded_name(str(named), config.seeds[0])
    if named not in known:
        message = "there is no such method." if named else f"align has {', '.join(known) or 'no method'}."
        fix = f"set it to one of {', '.join(known)}" if known else "set align to one method, dpo: {} for example"
        raise refuse("promote.candidate", named, message, fix)
    return str(named)
