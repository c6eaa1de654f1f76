"""Who says which answer is better: a rule, a sentiment lexicon, a reward model, or a model behind an endpoint.

A judge scores answers by themselves (`Scoring`) or compares two (`EndpointJudge`); both kinds have `score` and `wins`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from schemas import config as settings
from schemas.config.training import Half
from schemas.conversation import Message
from schemas.errors import refuse
from stages.engine import demo
from stages.engine.data.codec import Codec
from stages.engine.models.layouts import choose_layout
from stages.engine.models.loading import check_judge, load_judge
from stages.engine.models.policy import Scorer
from stages.engine.scoring import metrics
from stages.engine.scoring.batched import over_trees
from stages.engine.scoring.endpoint import EndpointJudge
from stages.runtime.context import StageContext

TOKENS_PER_BATCH = 8192  # of one forward pass of a reward model

Progress = Callable[[int, int], None]


class Judge(Protocol):
    """What `evaluate` and `generate` ask. `prompts` has one conversation per answer."""

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        """One number per answer, higher is better; comparable between the answers of one call."""
        ...

    def wins(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], others: Sequence[str]) -> list[float]:
        """Per prompt, 1 when the answer is better than the other one, 0 when it is worse, 1/2 for a tie."""
        ...


class Scoring:
    """A judge that scores each answer by itself; it compares by score."""

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        raise NotImplementedError

    def wins(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], others: Sequence[str]) -> list[float]:
        return metrics.wins(self.score(prompts, answers), self.score(prompts, others))


class RuleJudge(Scoring):
    """The demo's ground truth, of the last message's text and the answer."""

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        return [
            float(demo.reward(prompt[-1]["content"], answer)) for prompt, answer in zip(prompts, answers, strict=True)
        ]


class SentimentJudge(Scoring):
    """vaderSentiment's compound score of the answer, in [-1, 1] (Hutto and Gilbert 2014); the prompt plays no part."""

    def __init__(self, field: str = "judge") -> None:
        """Raises StageError when the extra is not installed."""
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # an extra
        except ImportError as error:
            message = "the sentiment judge needs the package vaderSentiment."
            fix = "pip install 'alignflow[sentiment]'"
            raise refuse(field, "sentiment", message, fix, kind="missing_package") from error
        self.analyzer: Any = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        return [float(self.analyzer.polarity_scores(answer)["compound"]) for answer in answers]


class RewardJudge(Scoring):
    """A reward model's score, read from its folder; it tokenizes with the tokenizer and template of its own.

    `field` names the reward model in messages, `frozen` is the type in which it is held. Its weights are loaded when it
    is first asked: until then there may be others.
    """

    def __init__(
        self, folder: Path, progress: Progress | None = None, field: str = "reward", frozen: Half | None = None
    ) -> None:
        self.codec = Codec.load(folder)
        check_judge(folder)
        self.folder = folder
        self.frozen: Half | None = frozen
        self.progress, self.field = progress, field

    @cached_property
    def scorer(self) -> Scorer:
        """The model itself."""
        return load_judge(self.folder, frozen=self.frozen)

    def release(self) -> None:
        """Free the weights, until it is asked again."""
        self.__dict__.pop("scorer", None)

    def check(self, prompts: Sequence[Sequence[Message]], new_tokens: int) -> None:
        """Raise StageError for a prompt that it cannot read, or not with so many more tokens."""
        self.codec.check_prompts(prompts, new_tokens, self.field, "the judging reward model")

    def score(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        """Raises StageError when a score is NaN or infinite: it would make every choice and comparison arbitrary."""
        trees = [
            self.scorer.read(*self.codec.ended(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if not trees:
            return []
        layout = choose_layout(self.scorer, "packed", trees, self.codec.pad_id)
        scores: dict[int, list[float]] = {}
        for batch in over_trees(self.scorer, self.scorer, trees, layout, TOKENS_PER_BATCH, self.codec.pad_id):
            scores |= batch
            if self.progress is not None:
                self.progress(len(scores), len(trees))
        found = [scores[i][0] for i in range(len(trees))]
        bad = [score for score in found if not math.isfinite(score)]
        if bad:
            message = f"the reward model gave {len(bad)} of {len(found)} answers no finite score."
            fix = "look at its training, which may have diverged"
            raise refuse(self.field, bad[0], message, fix, kind="judge")
        return found


def judge_for(config: settings.Judge, context: StageContext, frozen: Half | None = None) -> Judge:
    """The judge that a stage's config names. A reward model is read from the stage's input `judge`, and held in the
    type that `frozen` names.

    Raises StageError when the package, the key or the input that it needs is not there.
    """
    field = f"{context.request.stage}.judge"

    def progress(done: int, total: int) -> None:
        context.progress(done, total, "answers judged")

    if isinstance(config, settings.RuleJudge):
        return RuleJudge()
    if isinstance(config, settings.SentimentJudge):
        return SentimentJudge(field)
    if isinstance(config, settings.EndpointJudge):
        if not context.request.log_text:
            message = "an endpoint is sent prompts and answers, which log_text: false forbids."
            fix = "use a judge that runs here (rule, sentiment, reward), or log_text: true"
            raise refuse(field, "endpoint", message, fix)
        return EndpointJudge(config, field, progress)
    if not context.has("judge"):
        message = "the reward judge needs a reward model as the stage's input `judge`."
        fix = "give the pipeline `gold` rows (data.preference.gold_fraction, gold), or name a reward model's folder"
        raise refuse(f"{field}.model", config.model, message, fix, kind="missing_input")
    return RewardJudge(context.input("judge"), progress, f"{field}.model", frozen)


def agreement(judge: Judge, pairs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Per pair {prompt: messages, chosen, rejected}, 1 where the judge prefers the chosen answer, 1/2 for a tie, or 0.

    Its mean is the judge's accuracy by the labels of whoever chose.
    """
    prompts = [pair["prompt"] for pair in pairs]
    return judge.wins(prompts, [pair["chosen"] for pair in pairs], [pair["rejected"] for pair in pairs])
