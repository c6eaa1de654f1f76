"""Stage `evaluate`: one model answers the held-out prompts, a judge scores the answers, and the numbers are published.

All models get the same prompts and the same seeds, so differences come from the models, at each of the config's
temperatures. What each number means stands
in stages/engine/scoring/metrics.py.
"""

import logging
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.config import EvaluateParams
from schemas.errors import refuse
from schemas.stage import Request
from stages.engine.data.codec import Codec
from stages.engine.data.examples import encode, fitting, has, read, read_if_there
from stages.engine.data.trees import Batch, Tree
from stages.engine.models.layouts import choose_layout
from stages.engine.models.loading import load_policy
from stages.engine.models.logprobs import exact_kl
from stages.engine.models.policy import Policy, context_length, sums
from stages.engine.sampling import sample, seed_of
from stages.engine.scoring import gate_evidence, metrics
from stages.engine.scoring.batched import over_trees, undisturbed
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
from stages.engine.scoring.reference_cache import ReferenceCache
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

TOKENS_PER_BATCH = 8192  # of one forward pass that computes log-probs
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answers:
    """Sampled answers: token ids with the stop token where one was reached, and their text."""

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]

    @property
    def lengths(self) -> list[int]:
        """Tokens without the end token."""
        return [len(ids) - ended for ids, ended in zip(self.ids, self.ended, strict=True)]


class Evaluator:
    """The model under evaluation beside the reference, with what both need to be asked."""

    def __init__(self, context: StageContext, config: EvaluateParams) -> None:
        self.context, self.config = context, config
        self.codec = Codec.load(context.input("model"))
        self.policy = load_policy(context.input("model"), trainable=False)
        self.itself = context.request.inputs["model"].sha256 == context.request.inputs["reference"].sha256
        self.reference = self.policy if self.itself else load_policy(context.input("reference"), trainable=False)
        self.generated_tokens = 0

    def prompts(self) -> list[Messages]:
        """The held-out prompts, each once, that leave room for an answer. Raises StageError when they are too few."""
        rows = read(self.context.input("data"), self.config.part, "prompt")
        first: dict[str, Messages] = {}
        for row in rows:
            first.setdefault(row["prompt_id"], row["prompt"])
        distinct = list(first.values())
        room = (context_length(self.policy.hf) or math.inf) - self.config.max_new_tokens
        kept = [prompt for prompt in distinct if len(self.codec.prompt(prompt)) <= room]
        if len(kept) < len(distinct):
            log.warning(
                "%d of %d prompts leave no room for an answer: left out", len(distinct) - len(kept), len(distinct)
            )
        kept = kept[: self.config.limit]
        if len(kept) < self.config.min_prompts:
            message = f"only {len(kept)} held-out prompts to evaluate on."
            share = f"data.*.{self.config.part}_fraction"
            fix = f"hold out more ({share}, data.evaluation), raise evaluate.limit, or ask for fewer"
            raise refuse("evaluate.min_prompts", self.config.min_prompts, message, fix, kind="too_few_prompts")
        return kept

    def answer(
        self, prompts: Sequence[Messages], temperature: float, draws: int | None = None, policy: Policy | None = None
    ) -> Answers:
        """`draws` answers to each prompt (default: `samples_per_prompt`), one after the other; of the model, or of
        another `policy`.

        A seed is a function of the request's seed, the prompt's place and the draw, the same at each temperature.
        """
        draws = draws or self.config.samples_per_prompt
        ids = sample(
            policy or self.policy,
            [self.codec.prompt(prompt) for prompt in prompts for _ in range(draws)],
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            seeds=[
                seed_of("evaluate", self.context.request.seed, i, k) for i in range(len(prompts)) for k in range(draws)
            ],
            stop_ids=self.codec.stop_ids,
            pad_id=self.codec.pad_id,
            progress=lambda done, total: self.context.progress(done, total, "answers"),
        )
        self.generated_tokens += sum(map(len, ids))
        return Answers(ids, [self.codec.text(i) for i in ids], [i[-1] in self.codec.stop_ids for i in ids])

    def logps(self, trees: Sequence[Tree]) -> tuple[list[list[float]], list[list[float]]]:
        """log pi and log pi_sft of every answer, at temperature 1: a list per tree, a number per answer.

        Both come from the same cache, keyed by the weights: equal weights give equal numbers, to the last bit.
        """
        return self._logps(self.policy, "model", trees), self._logps(self.reference, "reference", trees)

    def _logps(self, policy: Policy, name: str, trees: Sequence[Tree]) -> list[list[float]]:
        cache = ReferenceCache(self.context.request.inputs[name].sha256, "fp32")
        layout = choose_layout(policy, "shared", trees, self.codec.pad_id)
        return cache.logps(policy, trees, layout, TOKENS_PER_BATCH, self.codec.pad_id)

    def distances(
        self, prompts: Sequence[Messages], answers: Answers, temperature: float = 1.0
    ) -> tuple[list[float], list[float]]:
        """KL along each answer, and its log pi_sft: one answer to each of `prompts`, in nats.

        The KL is the sum over the answer's tokens of KL(pi_T(. | prefix) || pi_sft(. | prefix)), exact over the
        vocabulary, with pi at `temperature` and pi_sft at 1. Over answers drawn from pi_T its mean is the KL of whole
        answers (chain rule), with a fraction of the noise of sampled log-ratios. Both models read a batch together, so
        it costs no forward pass beyond those of the log-probs.
        """
        trees = self.trees(prompts, answers)

        def values(batch: Batch) -> Tensor:
            own = self.policy(batch, temperature=temperature, log_probs=True)
            same = self.itself and temperature == 1
            other = own if same else self.reference(batch, log_probs=True)
            kl_N = exact_kl(own.log_probs, other.log_probs, len(own.logps_N))
            return torch.stack([sums(of, batch.answer_N, batch.answers) for of in (kl_N, other.logps_N)], 1)

        layout = choose_layout(self.policy, "shared", trees, self.codec.pad_id)
        pairs: dict[int, list[float]] = {}
        with undisturbed(self.reference):
            for batch in over_trees(self.policy, values, trees, layout, TOKENS_PER_BATCH, self.codec.pad_id):
                pairs |= {i: pair for i, (pair,) in batch.items()}
        return [pairs[i][0] for i in range(len(trees))], [pairs[i][1] for i in range(len(trees))]

    def trees(self, prompts: Sequence[Messages], answers: Answers) -> list[Tree]:
        """One answer behind each of `prompts`."""
        pairs = zip(prompts, answers.ids, strict=True)
        return [Tree(tuple(self.codec.prompt(prompt)), (tuple(ids),)) for prompt, ids in pairs]

    def relevance(self, prompts: Sequence[Messages], answers: Answers) -> list[float]:
        """How much likelier the SFT model finds each answer behind its own prompt than behind others, in nats."""
        return gate_evidence.relevance(
            lambda trees: self._logps(self.reference, "reference", trees),
            [self.codec.prompt(prompt) for prompt in prompts],
            answers.ids,
            [cluster_of(prompt) for prompt in prompts],
        )

    def matched(self, prompts: Sequence[Messages], answers: Answers, temperature: float) -> float:
        """The temperature at which the SFT model is as sharp as this one at `temperature`."""
        trees = self.trees(prompts, answers)
        return gate_evidence.matched_temperature(
            self.policy, self.reference, trees, temperature, TOKENS_PER_BATCH, self.codec.pad_id
        )

    def pairs_right(self, folder: Path) -> list[tuple[str, float]]:
        """Of each held-out pair of a data folder: its prompt's cluster, and 1 where the chosen answer has gained more
        probability over the SFT model than the other one, 1/2 for a tie, else 0.
        """
        if not has(folder, "eval", "preference"):
            log.warning("no pairs are held out (eval_fraction), so there is no eval/preference_accuracy")
            return []
        examples = encode(read(folder, "eval", "preference"), lambda row: [row["chosen"], row["rejected"]], self.codec)
        limit = context_length(self.policy.hf)
        examples = examples if limit is None else fitting(examples, limit)
        policy, reference = self.logps([example.tree for example in examples])
        ratios = [[p - r for p, r in zip(*pair, strict=True)] for pair in zip(policy, reference, strict=True)]
        right = metrics.wins([chosen for chosen, _ in ratios], [rejected for _, rejected in ratios])
        return list(zip([cluster_of(example.row["prompt"]) for example in examples], right, strict=True))


def run(context: StageContext) -> dict[str, float]:
    """Evaluate the input `model` and publish `evaluation`; returns the final metrics.

    Inputs: model, reference, data, and where there: judge, reward, pairs, baseline (the SFT model's evaluation).
    """
    request = context.request
    config = EvaluateParams.model_validate(request.params)
    started = time.monotonic()
    check_judge(request)
    judge = judge_for(config.judge, context)  # first, so that a missing key or package costs no sampling
    evaluator = Evaluator(context, config)
    prompts = evaluator.prompts()
    settings = settings_of(request, config)
    baseline = read_baseline(context, settings, prompts, evaluator.itself)

    draws = config.samples_per_prompt
    asked = [prompt for prompt in prompts for _ in range(draws)]
    reward = RewardJudge(context.input("reward")) if context.has("reward") else None
    samples: list[Sample] = []
    final: dict[str, float] = {}
    distances: dict[float, list[float]] = {}
    for temperature in config.temperatures:
        answers = evaluator.answer(prompts, temperature, draws)
        distances[temperature], reference_logps = evaluator.distances(asked, answers)
        others = None if baseline is None else baseline.at(temperature)
        verdicts = judge_answers(judge, asked, answers.texts, others)
        rewards = None if reward is None else reward.score(asked, answers.texts)
        some = put_together(asked, answers, others, verdicts, distances[temperature], rewards)
        some = [
            replace(row, temperature=temperature, draw=i % draws, reference_logp=reference_logps[i])
            for i, row in enumerate(some)
        ]
        if config.gate:
            some, values = for_the_gate(evaluator, judge, asked, answers, some)
            final |= {metric_at(name, temperature, config.temperatures): value for name, value in values.items()}
        samples += some
        values = summary(some, resamples=config.bootstrap, seed=request.seed)
        values["eval/reference_nll"] = metrics.reference_nll(reference_logps, [len(ids) for ids in answers.ids])
        final |= {metric_at(name, temperature, config.temperatures): value for name, value in values.items()}

    if 1.0 not in distances:  # the KL is that of the model itself, so it takes answers of its own
        distances[1.0], _ = evaluator.distances(asked, evaluator.answer(prompts, 1.0, draws))
    clusters = [row.cluster for row in samples[: len(asked)]]
    final["eval/kl_to_reference"] = metrics.mean_and_error(distances[1.0])[0]
    final["eval/kl_to_reference_se"] = clustered_error(distances[1.0], clusters)
    pairs = evaluator.pairs_right(context.input("pairs")) if context.has("pairs") else []
    if pairs:
        final["eval/preference_accuracy"] = metrics.win_rate([right for _, right in pairs])
    if context.has("pairs") and evaluator.itself and isinstance(judge, Scoring):  # once a comparison, not once a model
        final |= judge_accuracy(judge, context.input("pairs"), resamples=config.bootstrap, seed=request.seed)
    if isinstance(judge, EndpointJudge):
        final["judge/inconsistent"] = judge.inconsistent / len(samples)
        final["judge/unreadable"] = judge.unreadable / (2 * len(samples))
    final["compute/generated_tokens"] = float(evaluator.generated_tokens)
    final["compute/seconds"] = time.monotonic() - started
    publish(context, Evaluation(final, samples, settings, pairs))
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


def for_the_gate(
    evaluator: Evaluator, judge: Judge, prompts: Sequence[Messages], answers: Answers, samples: list[Sample]
) -> tuple[list[Sample], dict[str, float]]:
    """The samples of one temperature with each answer's relevance, and its win over the SFT model's made as sharp.

    For that the SFT model answers with the same seeds, at the temperature that gives it this model's entropy: a model
    that is only the SFT model sharpened then ties with it.
    """
    found, temperature = evaluator.relevance(prompts, answers), samples[0].temperature
    samples = [replace(row, relevance=value) for row, value in zip(samples, found, strict=True)]
    values = {"eval/prompt_relevance": metrics.mean_and_error(found)[0]}
    if evaluator.itself:
        return samples, values
    matched = evaluator.matched(prompts, answers, temperature)
    distinct = prompts[:: evaluator.config.samples_per_prompt]
    sharp = evaluator.answer(distinct, matched, policy=evaluator.reference)
    won = judge.wins(prompts, answers.texts, sharp.texts)
    samples = [replace(row, matched_win=win) for row, win in zip(samples, won, strict=True)]
    values |= {"eval/matched_temperature": matched, "eval/win_rate_vs_matched_sft": metrics.win_rate(won)}
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
        **config.model_dump(mode="json", exclude={"gate"}),
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
    """(score, the baseline's score, win) per answer. Raises StageError when a score is not a number.

    A judge that only compares gives the win as score, and its complement to the baseline. Without a baseline the model
    is its own: every answer is a tie, of which such a judge is not asked.
    """
    if baseline is None and isinstance(judge, EndpointJudge):
        return [(0.5, 0.5, 0.5)] * len(answers)
    if baseline is None:
        scores = _finite(judge.score(prompts, answers))
        return list(zip(scores, scores, metrics.wins(scores, scores), strict=True))
    if isinstance(judge, EndpointJudge):
        won = judge.wins(prompts, answers, texts(baseline, "the SFT model"))
        return [(win, 1 - win, win) for win in won]
    scores, others = _finite(judge.score(prompts, answers)), [row.score for row in baseline]
    return list(zip(scores, others, metrics.wins(scores, others), strict=True))


def _finite(scores: list[float]) -> list[float]:
    bad = sum(not math.isfinite(score) for score in scores)
    if bad:
        message = f"the judge gave {bad} of {len(scores)} answers no finite score."
        fix = "look at the training of the judging reward model: it may have diverged"
        raise refuse(
            "evaluate.judge", next(score for score in scores if not math.isfinite(score)), message, fix, kind="judge"
        )
    return scores


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
    interval = bootstrap(won, clusters, **drawn)
    longer = [row.length - row.sft_length for row in samples]
    controlled = metrics.length_controlled_win_rate(won, longer, clusters, **drawn)
    values = {
        "judge_score": metrics.mean_and_error([row.score for row in samples])[0],
        "win_rate_vs_sft": metrics.win_rate(won),
        "win_rate_vs_sft_low": interval.low,
        "win_rate_vs_sft_high": interval.high,
        "length": metrics.mean_and_error([row.length for row in samples])[0],
        "distinct_2": metrics.distinct_2(answers),
        "empty": metrics.share([not answer.strip() for answer in answers]),
        "ended": metrics.share([row.ended for row in samples]),
        "prompts": float(sum(row.draw == 0 for row in samples)),
    }
    if controlled is not None:  # else it is not logged: a table shows "-"
        rate, reach = controlled
        values |= {"length_controlled_win_rate": rate, "length_controlled_win_rate_low": reach.low}
        values["length_controlled_win_rate_high"] = reach.high
    rewards = [row.reward_score for row in samples if row.reward_score is not None]
    if rewards:
        values["reward_score"] = metrics.mean_and_error(rewards)[0]
    return {f"eval/{name}": value for name, value in values.items()}


def publish(context: StageContext, evaluation: Evaluation) -> None:
    """The folder `evaluation`, and answers beside the SFT model's as a table for MLflow's UI: of the first temperature
    and the first draw, since that UI lays runs side by side by their prompts.

    Without `log_text` there is no table, and the samples are digests and numbers.
    """
    if context.request.log_text:
        columns = ("answer", "sft_answer", "score", "sft_score", "win", "length", "kl", "reward_score")
        shown = [row for row in evaluation.first if row.draw == 0]
        table: dict[str, list[Any]] = {"prompt": [text_of(row.prompt) for row in shown]}
        table |= {name: [getattr(row, name) for row in shown] for name in columns}
        context.table(table, "eval/samples.json")
    else:
        evaluation = replace(evaluation, samples=list(map(without_text, evaluation.samples)))
    with tempfile.TemporaryDirectory() as folder:
        evaluation.save(Path(folder))
        context.publish("evaluation", Path(folder))
