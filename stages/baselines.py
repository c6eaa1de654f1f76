"""Stage `baselines`: what the SFT model gives without any alignment, judged on the same prompts as every model.

- Sharpened: sampled at lower temperatures. Its KL to the SFT model is that of pi_T to pi_1 on its own answers.
- The best of n: of n answers at temperature 1, the one that the reward model scores highest. The best of 2 is taken
  from the first two of the same answers as the best of 16. Its KL is at most log n - (n - 1) / n (Beirami et al. 2024,
  https://arxiv.org/abs/2401.01879, theorem 1; as a formula in Stiennon et al. 2020).
"""

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas.config import BaselinesConfig, BaselinesParams, EvaluateParams
from stages.engine.evaluator import Answers, Evaluator, Messages
from stages.engine.scoring import metrics
from stages.engine.scoring.evaluation_record import Evaluation, Sample, save_all, without_text
from stages.engine.scoring.judges import Judge, RewardJudge, judge_for
from stages.evaluate import check_judge, judge_answers, put_together, settings_of
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n nats: what the KL of the best of n to the distribution that it picks from cannot exceed."""
    return math.log(n) - (n - 1) / n


def best_of(rewards: Sequence[float], drawn: int, n: int) -> list[int]:
    """Per prompt, the place of the best rewarded among the first n of its `drawn` answers; the first of equals."""
    return [max(range(start, start + n), key=rewards.__getitem__) for start in range(0, len(rewards), drawn)]


def taken(answers: Answers, places: Sequence[int]) -> Answers:
    """Some of the answers."""
    ids, texts, ended = answers.ids, answers.texts, answers.ended
    return Answers([ids[i] for i in places], [texts[i] for i in places], [ended[i] for i in places])


def run(context: StageContext) -> dict[str, float]:
    """Judge the baselines and publish them as `baselines`; returns their heights and distances.

    Inputs: model and reference, both the SFT model, data, and where there: judge, reward.
    """
    request = context.request
    params = BaselinesParams.model_validate(request.params)
    started = time.monotonic()
    check_judge(request)
    judge = judge_for(params.judge, context, params.frozen)  # first, so that a missing key or package costs no sampling
    conditions = params.model_dump(exclude=set(BaselinesConfig.model_fields))
    config = EvaluateParams(**conditions, baselines=None)
    evaluator = Evaluator(context, config)
    prompts = evaluator.prompts()
    if isinstance(judge, RewardJudge):
        judge.check(prompts, params.max_new_tokens)
    picks = params.best_of if context.has("reward") else []
    if params.best_of and not picks:
        log.warning("there is no reward model to pick by: the best of n answers is left out of the baselines")

    draws = config.samples_per_prompt
    drawn = max([draws, *picks])
    every = evaluator.answer(prompts, 1.0, drawn)
    sharpened: dict[float, tuple[Answers, list[float]]] = {}
    for temperature in params.temperatures:
        answers = evaluator.answer(prompts, temperature, draws)
        asked = [prompt for prompt in prompts for _ in range(draws)]
        sharpened[temperature] = answers, evaluator.distances(asked, answers, temperature)[0]
    evaluator.release()  # before those are loaded that judge
    rewards: list[float] = []
    if picks:
        asked = [prompt for prompt in prompts for _ in range(drawn)]
        rewards = RewardJudge(context.input("reward"), frozen=params.frozen).score(asked, every.texts)
    start = Start(judge, prompts, every, drawn)
    settings = settings_of(request, config)
    baselines = {
        f"T={temperature:g}": start.judged(*sharp, temperature, settings) for temperature, sharp in sharpened.items()
    }
    for n in picks:
        answers = taken(every, best_of(rewards, drawn, n))
        baselines[f"best of {n}"] = start.judged(answers, [best_of_kl(n)] * len(prompts), 1.0, settings)
    publish(context, baselines)
    final = {
        f"baselines/{name.replace(' ', '_').replace('=', '')}/{metric}": evaluation.metrics[f"eval/{metric}"]
        for name, evaluation in baselines.items()
        for metric in ("judge_score", "win_rate_vs_sft", "kl_to_reference")
    }
    final["compute/generated_tokens"] = float(evaluator.generated_tokens)
    final["compute/seconds"] = time.monotonic() - started
    return final


class Start:
    """The SFT model's own answers at temperature 1, `drawn` to each prompt, and the judge that baselines meet there."""

    def __init__(self, judge: Judge, prompts: Sequence[Messages], every: Answers, drawn: int) -> None:
        self.judge, self.prompts, self.every, self.drawn = judge, prompts, every, drawn
        self.own: dict[int, list[Sample]] = {}

    def samples(self, draws: int) -> list[Sample]:
        """The SFT model's first answers to each prompt, judged once."""
        if draws not in self.own:
            places = [i * self.drawn + k for i in range(len(self.prompts)) for k in range(draws)]
            answers, asked = taken(self.every, places), [self.prompts[i // self.drawn] for i in places]
            verdicts = judge_answers(self.judge, asked, answers.texts, None)
            self.own[draws] = put_together(asked, answers, None, verdicts, [0.0] * len(places), None)
        return self.own[draws]

    def judged(
        self, answers: Answers, distances: Sequence[float], temperature: float, settings: dict[str, Any]
    ) -> Evaluation:
        """A baseline's evaluation, against the SFT model's answer of the same draw. distances: nats, one per answer."""
        draws = len(answers.ids) // len(self.prompts)
        own = self.samples(draws)
        asked = [sample.prompt for sample in own]
        verdicts = judge_answers(self.judge, asked, answers.texts, own)
        samples = put_together(asked, answers, own, verdicts, distances, None)
        samples = [replace(one, temperature=temperature, draw=i % draws) for i, one in enumerate(samples)]
        values = {
            "judge_score": metrics.mean_and_error([one.score for one in samples])[0],
            "win_rate_vs_sft": metrics.win_rate([one.win for one in samples]),
            "kl_to_reference": metrics.mean_and_error(distances)[0],
        }
        return Evaluation({f"eval/{name}": value for name, value in values.items()}, samples, settings)


def publish(context: StageContext, baselines: Mapping[str, Evaluation]) -> None:
    """The folder `baselines`; without `log_text` its samples are digests and numbers."""
    if not context.request.log_text:
        bare = {name: [without_text(one) for one in own.samples] for name, own in baselines.items()}
        baselines = {name: replace(own, samples=bare[name]) for name, own in baselines.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_all(baselines, Path(folder))
        context.publish("baselines", Path(folder))
