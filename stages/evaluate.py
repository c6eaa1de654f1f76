"""Stage `evaluate`: one model answers the held-out prompts, a judge scores the answers, and the numbers are published.

All models get the same prompts and the same seeds, so differences come from the models, at each of the config's
temperatures. What each number means stands in stages/engine/scoring/metrics.py.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schemas.config import EvaluateParams
from schemas.errors import refuse
from schemas.stage import Request
from stages.engine.data.examples import Row, read_if_there
from stages.engine.evaluator import Answers, Evaluator, Messages
from stages.engine.scoring import metrics
from stages.engine.scoring.by_source import by_source
from stages.engine.scoring.endpoint import EndpointJudge
from stages.engine.scoring.evaluation_record import (
    Evaluation,
    Sample,
    check_comparable,
    cluster_of,
    text_of,
    texts,
    without_text,
)
from stages.engine.scoring.intervals import bootstrap, clustered_error
from stages.engine.scoring.judges import Judge, RewardJudge, Scoring, agreement, judge_for
from stages.runtime.context import Answered, StageContext

log = logging.getLogger("alignflow")


def run(context: StageContext) -> dict[str, float]:
    """Evaluate the input `model` and publish `evaluation`; returns the final metrics.

    Inputs: model, reference, data, and where there: judge, reward, pairs, baseline (the SFT model's evaluation).
    """
    request = context.request
    config = EvaluateParams.model_validate(request.params)
    started = time.monotonic()
    check_judge(request)
    judge = judge_for(config.judge, context, config.frozen)  # first, so that a missing key or package costs no sampling
    evaluator = Evaluator(context, config)
    prompts = evaluator.prompts()
    data = request.inputs["data"]
    context.dataset("held-out prompts", data.uri, data.sha256, len(prompts))
    settings = settings_of(request, config)
    baseline = read_baseline(context, settings, prompts, evaluator.itself)

    draws = config.samples_per_prompt
    asked = [prompt for prompt in prompts for _ in range(draws)]
    reward = RewardJudge(context.input("reward"), frozen=config.frozen) if context.has("reward") else None
    for reader in (judge, reward):
        if isinstance(reader, RewardJudge):
            reader.check(prompts, config.max_new_tokens)
    # Those who judge are loaded when the models have said all they have to, one after the other.
    read = {temperature: read_at(evaluator, prompts, asked, temperature) for temperature in config.temperatures}
    if 1.0 in read:
        distances = read[1.0].distances
    else:  # the KL is that of the model itself, so it takes answers of its own
        distances, _ = evaluator.distances(asked, evaluator.answer(prompts, 1.0, draws))
    pairs = evaluator.pairs_right(context.input("pairs")) if context.has("pairs") else []
    evaluator.release()
    rewards: dict[float, list[float]] = {}
    if reward is not None:
        rewards = {temperature: reward.score(asked, one.answers.texts) for temperature, one in read.items()}
        reward.release()

    samples: list[Sample] = []
    final: dict[str, float] = {}
    for temperature, one in read.items():
        others = None if baseline is None else baseline.at(temperature)
        verdicts = judge_answers(judge, asked, one.answers.texts, others)
        some = put_together(asked, one.answers, others, verdicts, one.distances, rewards.get(temperature))
        some = [
            replace(row, temperature=temperature, draw=i % draws, reference_logp=one.reference_logps[i])
            for i, row in enumerate(some)
        ]
        if one.gate is not None:
            some, values = for_the_gate(one.gate, judge, asked, one.answers, some)
            final |= {metric_at(name, temperature, config.temperatures): value for name, value in values.items()}
        samples += some
        values = summary(some, resamples=config.bootstrap, seed=request.seed)
        values["eval/reference_nll"] = metrics.reference_nll(one.reference_logps, [len(ids) for ids in one.answers.ids])
        values |= summaries_by_source(evaluator.asked, some, resamples=config.bootstrap, seed=request.seed)
        final |= {metric_at(name, temperature, config.temperatures): value for name, value in values.items()}

    clusters = [row.cluster for row in samples[: len(asked)]]
    final["eval/kl_to_reference"] = metrics.mean_and_error(distances)[0]
    final["eval/kl_to_reference_se"] = clustered_error(distances, clusters)
    answered = [row for row in evaluator.asked for _ in range(draws)]
    for source, own in by_source(answered, distances).items():
        final[f"eval/{source}/kl_to_reference"] = metrics.mean_and_error(own)[0]
    if pairs:
        rights = [right for _, right in pairs]
        final["eval/preference_accuracy"] = metrics.win_rate(rights)
        for source, own in by_source([row for row, _ in pairs], rights).items():
            final[f"eval/{source}/preference_accuracy"] = metrics.win_rate(own)
    if context.has("pairs") and evaluator.itself and isinstance(judge, Scoring):  # once a comparison, not once a model
        final |= judge_accuracy(judge, context.input("pairs"), resamples=config.bootstrap, seed=request.seed)
    if isinstance(judge, EndpointJudge):
        final["judge/inconsistent"] = judge.inconsistent / len(samples)
        final["judge/unreadable"] = judge.unreadable / (2 * len(samples))
    final["compute/generated_tokens"] = float(evaluator.generated_tokens)
    final["compute/seconds"] = time.monotonic() - started
    if counted := by_source(evaluator.asked, prompts):
        settings["sources"] = {source: len(some) for source, some in counted.items()}
    clustered = [(cluster_of(row["prompt"]), right) for row, right in pairs]
    publish(context, Evaluation(final, samples, settings, clustered), traces=config.traces, itself=evaluator.itself)
    return final


def judge_accuracy(judge: Judge, folder: Path, *, resamples: int, seed: int) -> dict[str, float]:
    """`judge/accuracy` on the held-out pairs of a data folder, with its interval over prompts; nothing without any."""
    pairs = read_if_there(folder, "eval", "preference")
    if not pairs:
        return {}
    agreed = agreement(judge, pairs)
    interval = bootstrap(agreed, [cluster_of(pair["prompt"]) for pair in pairs], resamples=resamples, seed=seed)
    return {
        "judge/accuracy": metrics.win_rate(agreed),
        "judge/accuracy_low": interval.low,
        "judge/accuracy_high": interval.high,
    }


@dataclass(frozen=True)
class ForTheGate:
    """What only the gate asks the models for."""

    relevance: list[float]
    """Of each answer to its prompt."""
    matched: float | None = None
    """The temperature at which the SFT model is as sharp as the model; None for the SFT model itself."""
    sharp: Answers | None = None
    """The SFT model's answers at it."""


@dataclass(frozen=True)
class Read:
    """A model's answers at one temperature, and what it and the SFT model tell of them."""

    answers: Answers
    distances: list[float]
    reference_logps: list[float]
    gate: ForTheGate | None


def read_at(evaluator: Evaluator, prompts: Sequence[Messages], asked: Sequence[Messages], temperature: float) -> Read:
    """All that is asked of the models at one temperature. `asked`: a prompt for each answer."""
    answers = evaluator.answer(prompts, temperature)
    distances, logps = evaluator.distances(asked, answers)
    gate = read_for_the_gate(evaluator, asked, answers, temperature) if evaluator.config.gate else None
    return Read(answers, distances, logps, gate)


def read_for_the_gate(
    evaluator: Evaluator, prompts: Sequence[Messages], answers: Answers, temperature: float
) -> ForTheGate:
    """Each answer's relevance, and the SFT model's answers made as sharp.

    It answers with the same seeds, at the temperature that gives it this model's entropy: a model that is only the SFT
    model sharpened then ties with it.
    """
    relevance = evaluator.relevance(prompts, answers)
    if evaluator.itself:
        return ForTheGate(relevance)
    matched = evaluator.matched(prompts, answers, temperature)
    distinct = prompts[:: evaluator.config.samples_per_prompt]
    return ForTheGate(relevance, matched, evaluator.answer(distinct, matched, policy=evaluator.reference))


def for_the_gate(
    read: ForTheGate, judge: Judge, prompts: Sequence[Messages], answers: Answers, samples: list[Sample]
) -> tuple[list[Sample], dict[str, float]]:
    """The samples of one temperature with each answer's relevance, and its win over the SFT model's made as sharp."""
    samples = [replace(row, relevance=value) for row, value in zip(samples, read.relevance, strict=True)]
    values = {"eval/prompt_relevance": metrics.mean_and_error(read.relevance)[0]}
    if read.matched is None or read.sharp is None:
        return samples, values
    won = judge.wins(prompts, answers.texts, read.sharp.texts)
    samples = [replace(row, matched_win=win) for row, win in zip(samples, won, strict=True)]
    values |= {"eval/matched_temperature": read.matched, "eval/win_rate_vs_matched_sft": metrics.win_rate(won)}
    return samples, values


def metric_at(name: str, temperature: float, temperatures: Sequence[float]) -> str:
    """The name under which a metric is logged: `eval/x` of the first temperature, `eval/t0.3/x` of another one."""
    if temperature == temperatures[0]:
        return name
    return f"eval/t{temperature:.15g}/{name.removeprefix('eval/')}"


def check_judge(request: Request) -> None:
    """The reward model that a policy was trained on must not be the one that judges it."""
    judge, reward = request.inputs.get("judge"), request.inputs.get("reward")
    if judge is not None and reward is not None and judge.sha256 == reward.sha256:
        message = "the judge is the reward model that the policy was trained on, so it cannot judge it."
        fix = "train a gold reward model on other rows (data.preference.gold_fraction, gold), or use another judge"
        raise refuse("evaluate.judge", "reward", message, fix)


def settings_of(request: Request, config: EvaluateParams) -> dict[str, Any]:
    """The conditions of this evaluation; only what decides its result, and no model's name."""
    judge = request.inputs.get("judge")
    return {
        **config.model_dump(mode="json", exclude={"gate", "traces"}),
        "seed": request.seed,
        "judge_model": judge.sha256 if judge is not None else None,
    }


def read_baseline(
    context: StageContext, settings: dict[str, Any], prompts: Sequence[Messages], itself: bool
) -> Evaluation | None:
    """The SFT model's evaluation; None when the model is the SFT model itself, which is then its own baseline."""
    if itself:
        return None
    if not context.has("baseline"):
        message = "the model differs from the reference, so its answers must be compared with the SFT model's."
        fix = "evaluate the SFT model first, and give its output `evaluation` as the input `baseline`"
        raise refuse("inputs.baseline", "missing", message, fix, kind="missing_input")
    baseline = Evaluation.load(context.input("baseline"))
    check_comparable("this model", settings, prompts, "the baseline", baseline)
    return baseline


def judge_answers(
    judge: Judge, prompts: Sequence[Messages], answers: Sequence[str], baseline: Sequence[Sample] | None
) -> list[tuple[float, float, float]]:
    """(score, the baseline's score, win) per answer.

    A judge that only compares gives the win as score, and its complement to the baseline. Without a baseline the model
    is its own: every answer is a tie, of which such a judge is not asked.
    """
    if baseline is None and isinstance(judge, EndpointJudge):
        return [(0.5, 0.5, 0.5)] * len(answers)
    if baseline is None:
        scores = judge.score(prompts, answers)
        return list(zip(scores, scores, metrics.wins(scores, scores), strict=True))
    if isinstance(judge, EndpointJudge):
        won = judge.wins(prompts, answers, texts(baseline, "the SFT model"))
        return [(win, 1 - win, win) for win in won]
    scores, others = judge.score(prompts, answers), [row.score for row in baseline]
    return list(zip(scores, others, metrics.wins(scores, others), strict=True))


def put_together(
    prompts: Sequence[Messages],
    answers: Answers,
    baseline: Sequence[Sample] | None,
    verdicts: Sequence[tuple[float, float, float]],
    distances: Sequence[float],
    rewards: Sequence[float] | None,
) -> list[Sample]:
    """One record per answer; `prompts` has one for each."""
    samples = []
    for i, prompt in enumerate(prompts):
        score, sft_score, win = verdicts[i]
        samples.append(
            Sample(
                prompt=prompt,
                answer=answers.texts[i],
                score=score,
                sft_answer=answers.texts[i] if baseline is None else baseline[i].answer,
                sft_score=sft_score,
                win=win,
                length=answers.lengths[i],
                sft_length=answers.lengths[i] if baseline is None else baseline[i].length,
                ended=answers.ended[i],
                kl=distances[i],
                reward_score=None if rewards is None else rewards[i],
            )
        )
    return samples


def summary(samples: Sequence[Sample], *, resamples: int, seed: int) -> dict[str, float]:
    """The metrics that follow from the records of one temperature alone; intervals are over prompts."""
    won, answers = [row.win for row in samples], texts(samples, "the model")
    clusters, drawn = [row.cluster for row in samples], {"resamples": resamples, "seed": seed}
    longer = [row.length - row.sft_length for row in samples]
    controlled = metrics.length_controlled_win_rate(won, longer, clusters, **drawn)
    values = main_metrics(samples, **drawn) | {
        "distinct_2": metrics.distinct_2(answers),
        "empty": metrics.share([not answer.strip() for answer in answers]),
        "ended": metrics.share([row.ended for row in samples]),
    }
    if controlled is not None:  # else it is not logged: a table shows "-"
        rate, reach = controlled
        values |= {"length_controlled_win_rate": rate, "length_controlled_win_rate_low": reach.low}
        values["length_controlled_win_rate_high"] = reach.high
    return {f"eval/{name}": value for name, value in values.items()}


def main_metrics(samples: Sequence[Sample], *, resamples: int, seed: int) -> dict[str, float]:
    """What is said of all prompts, and of each source's: scores, win rate against SFT with its interval, lengths."""
    won = [row.win for row in samples]
    interval = bootstrap(won, [row.cluster for row in samples], resamples=resamples, seed=seed)
    values = {
        "judge_score": metrics.mean_and_error([row.score for row in samples])[0],
        "win_rate_vs_sft": metrics.win_rate(won),
        "win_rate_vs_sft_low": interval.low,
        "win_rate_vs_sft_high": interval.high,
        "length": metrics.mean_and_error([row.length for row in samples])[0],
        "prompts": float(sum(row.draw == 0 for row in samples)),
    }
    rewards = [row.reward_score for row in samples if row.reward_score is not None]
    if rewards:
        values["reward_score"] = metrics.mean_and_error(rewards)[0]
    return values


def summaries_by_source(
    asked: Sequence[Row], samples: Sequence[Sample], *, resamples: int, seed: int
) -> dict[str, float]:
    """For each source of a mixture the main metrics of `summary`, on the answers to its prompts: `eval/chat/length`.

    asked: the rows of the prompts; of each prompt as many samples follow each other as there are draws.
    """
    draws = len(samples) // max(1, len(asked))
    values: dict[str, float] = {}
    for source, own in by_source([row for row in asked for _ in range(draws)], samples).items():
        some = main_metrics(own, resamples=resamples, seed=seed)
        values |= {f"eval/{source}/{name}": value for name, value in some.items()}
    return values


def publish(context: StageContext, evaluation: Evaluation, *, traces: int, itself: bool) -> None:
    """The folder `evaluation`, and answers beside the SFT model's as a table for MLflow's UI: of the first temperature
    and the first draw, since that UI lays runs side by side by their prompts. The first `traces` are traces too.

    Without `log_text` there is neither, and the samples are digests and numbers.
    """
    if context.request.log_text:
        columns = ("answer", "sft_answer", "score", "sft_score", "win", "length", "kl", "reward_score")
        shown = [row for row in evaluation.first if row.draw == 0]
        table: dict[str, list[Any]] = {"prompt": [text_of(row.prompt) for row in shown]}
        table |= {name: [getattr(row, name) for row in shown] for name in columns}
        context.table(table, "eval/samples.json")
        context.answers([answered(row, itself) for row in shown[:traces]], evaluation.settings["judge"]["judge"])
    else:
        evaluation = replace(evaluation, samples=list(map(without_text, evaluation.samples)))
    with tempfile.TemporaryDirectory() as folder:
        evaluation.save(Path(folder))
        context.publish("evaluation", Path(folder))


def answered(sample: Sample, itself: bool) -> Answered:
    """A sample for MLflow's evaluation pages; of the SFT model itself nothing is won or lost."""
    against = {} if itself else {"against_sft": {1.0: "win", 0.0: "loss"}.get(sample.win, "tie")}
    measured = {"length": float(sample.length)}
    if sample.reward_score is not None:
        measured["reward_score"] = sample.reward_score
    why = "" if itself else f"The SFT model's answer, of score {sample.sft_score:g}: {sample.sft_answer}"
    return Answered(sample.prompt, sample.answer or "", {"judge_score": sample.score, **against}, measured, why)
