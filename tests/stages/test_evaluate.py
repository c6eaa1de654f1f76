"""The evaluation's metrics against numbers worked here, and the stage on tiny models.

Shapes: T tokens, V vocabulary.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from schemas.config import EndpointJudge as EndpointConfig
from schemas.config import EvaluateConfig, EvaluateParams, RuleJudge, SentimentJudge
from schemas.errors import StageError
from schemas.stage import STAGES, Artifact, Request
from stages import compare, evaluate, tracking
from stages.__main__ import execute
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_judge, load_policy, load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.sampling import sample, seed_of
from stages.engine.scoring import gate_evidence, metrics
from stages.engine.scoring.endpoint import EndpointJudge
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.scoring.intervals import bootstrap
from stages.engine.scoring.judges import RewardJudge, agreement
from stages.engine.scoring.judges import SentimentJudge as SentimentJudgeOfAnswers
from tests.support.context import MemoryContext
from tests.support.models import PAIRS, data_folder, model_folder, rows

N = 12
MAX_NEW_TOKENS = 6


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# --- pure functions ---


def test_win_rate_counts_ties_half() -> None:
    won = metrics.wins([2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 3.0])
    assert won == [1.0, 0.5, 0.5, 0.0]
    assert metrics.win_rate(won) == 2 / 4


def controlled(won: Sequence[float], differences: Sequence[float], resamples: int = 100) -> Any:
    clusters = [str(i) for i in range(len(won))]
    return metrics.length_controlled_win_rate(won, differences, clusters, resamples=resamples, seed=0)


def test_length_controlled_win_rate_solves_the_posteriors_equations() -> None:
    draw = np.random.default_rng(0)
    difference_N = draw.normal(4, 10, 300).round()
    won_N = draw.choice([0.0, 0.5, 1.0], 300, p=[0.3, 0.1, 0.6])
    rate, interval = controlled(won_N.tolist(), difference_N.tolist())
    # theta has no prior and gamma N(0, 1): residuals sum to 0, and along the lengths to gamma.
    theta = logit(rate)
    tanh_N = np.tanh(difference_N / difference_N.std())
    gammas = np.linspace(-3, 3, 60001)
    along = [float(tanh_N @ (won_N - 1 / (1 + np.exp(-theta - g * tanh_N)))) - g for g in gammas[::100]]
    gamma = float(np.interp(0.0, along[::-1], gammas[::100][::-1]))
    chance_N = 1 / (1 + np.exp(-(theta + gamma * tanh_N)))
    assert float((won_N - chance_N).sum()) == pytest.approx(0, abs=0.01)
    assert interval.low < rate < interval.high and interval.covers == "prompts"


def test_length_controlled_win_rate_of_opposite_lengths_takes_out_the_longer_ones_wins() -> None:
    # 80 % won where longer, 30 % where shorter, in equal numbers: equal length is between, by the logits' mean but for
    # the prior, which pulls the effect towards 0 and the result towards the plain 55 %.
    p, q = 0.8, 0.3
    won = [1.0] * 80 + [0.0] * 20 + [1.0] * 30 + [0.0] * 70
    rate, _ = controlled(won, [5] * 100 + [-5] * 100)
    unpulled = 1 / (1 + math.exp(-(logit(p) + logit(q)) / 2))
    assert min(unpulled, 0.55) < rate < max(unpulled, 0.55)
    tied = [1.0] * 70 + [0.5] * 20 + [0.0] * 10 + [1.0] * 30 + [0.0] * 70  # 1/2 twice weighs as a win and a loss
    assert controlled(tied, [5] * 100 + [-5] * 100)[0] == pytest.approx(rate, abs=1e-9)
    more = controlled([1.0] * 90 + [0.0] * 10, [5] * 80 + [-5] * 10 + [0] * 10)
    assert more[0] < 0.9  # most are longer, so some of the 90 % is the length's


def test_a_summary_controls_for_how_much_longer_an_answer_is_than_the_sft_models() -> None:
    """Lengths of 20 to 32 of both, 5 apart: neither's own length says who wins, the difference does."""
    won = [1.0] * 80 + [0.0] * 20 + [1.0] * 30 + [0.0] * 70
    longer = [5] * 100 + [-5] * 100
    samples = [
        Sample([{"role": "user", "content": str(i)}], "a", w, "b", 0.5, w, 20 + i % 13, 20 + i % 13 - d, True, 0.0)
        for i, (w, d) in enumerate(zip(won, longer, strict=True))
    ]
    found = evaluate.summary(samples, resamples=50, seed=0)
    assert found["eval/length_controlled_win_rate"] == pytest.approx(controlled(won, longer)[0]) != 0.55
    assert found["eval/win_rate_vs_sft"] == 0.55


def test_where_lengths_have_shifted_together_nothing_is_said() -> None:
    won = [1.0] * 80 + [0.0] * 20
    assert controlled(won, [20] * 99 + [21]) is None  # a single other length would decide
    assert controlled(won, [20] * 100) is None
    assert controlled(won, [0] * 100)[0] == pytest.approx(0.8)
    half = [1] * 50 + [-1] * 50  # sd 1: the edge is a mean of 1.5
    assert controlled(won, [d + 1.49 for d in half]) is not None and controlled(won, [d + 1.51 for d in half]) is None


@pytest.mark.parametrize(("shift", "most"), [(0.0, 0.03), (1.0, 0.045), (1.3, 0.06)])
def test_wins_without_a_length_effect_keep_their_rate_where_lengths_have_shifted(shift: float, most: float) -> None:
    """231 prompts, 80 % won whatever the length: the estimate scatters little more than the plain rate (.026)."""
    draw = np.random.default_rng(0)
    found, inside = [], 0
    for _ in range(60):
        result = controlled((draw.random(231) < 0.8).astype(float).tolist(), draw.normal(shift, 1, 231).tolist(), 200)
        if result is not None:
            found.append(result[0])
            inside += result[1].contains(0.8)
    assert abs(np.mean(found) - 0.8) < 0.02 and np.std(found) < most
    assert inside / len(found) > 0.8


def test_length_controlled_win_rate_where_all_are_won() -> None:
    rate, interval = controlled([1.0] * 50, [d - 25 for d in range(50)])
    assert rate == pytest.approx(1, abs=1e-4) == interval.low
    assert controlled([0.0] * 50, [d - 25 for d in range(50)])[0] == pytest.approx(0, abs=1e-4)


def test_distinct_2_pools_the_bigrams_of_all_answers() -> None:
    # "a b", "b a", "a b" and "a b", "b c": 5 bigrams, of which "a b", "b a", "b c" differ; case and marks don't count.
    assert metrics.distinct_2(["A b, a b!", "a b c"]) == 3 / 5
    assert metrics.distinct_2(["one", "two", ""]) == 0.0  # no bigram spans two answers


def test_reference_nll_and_preference_accuracy() -> None:
    assert metrics.reference_nll([-6.0, -1.0], [3, 2]) == 7 / 5  # pooled over tokens, not over answers
    assert metrics.preference_accuracy([1.0, 0.0, 2.0], [0.5, 0.0, 3.0]) == (1 + 0.5 + 0) / 3
    assert metrics.share([True, False, False, True]) == 0.5


# --- the stage ---


class World:
    """An SFT model, an aligned one, and data, with evaluations made on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sft, self.aligned = model_folder(folder / "sft", seed=0), model_folder(folder / "aligned", seed=1)
        self.codec = Codec.load(self.sft)
        self.rows = rows(N, {})
        self.data = data_folder(folder / "data", eval_prompt=self.rows, eval_preference=rows(9, *PAIRS))
        self.count = 0

    def evaluate(
        self, model: Path, config: EvaluateConfig | None = None, seed: int = 0, **folders: Path
    ) -> tuple[dict[str, float], Evaluation, MemoryContext]:
        self.count += 1
        inputs = {"model": model, "reference": self.sft, "data": self.data, **folders}
        run = MemoryContext(self.folder / f"work{self.count}", config or settings(), inputs, "evaluate", seed)
        final = evaluate.run(run)
        return final, Evaluation.load(run.published["evaluation"]), run

    def baseline(self, config: EvaluateConfig | None = None) -> Path:
        return self.evaluate(self.sft, config)[2].published["evaluation"]


def settings(**changes: Any) -> EvaluateConfig:
    defaults: dict[str, Any] = {"judge": SentimentJudge(), "min_prompts": 2, "max_new_tokens": MAX_NEW_TOKENS}
    return EvaluateConfig(**(defaults | {"bootstrap": 200, "temperatures": [1.0]} | changes))


@pytest.fixture
def world(tmp_path: Path, home: Path) -> World:
    return World(tmp_path)


@torch.no_grad()
def exact_kls(
    folder: Path,
    reference: Path,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> np.ndarray:
    """Along each answer the sum over its tokens of sum_v pi log(pi / pi_ref), in float64, by plain transformers."""
    own, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (folder, reference))
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, at = torch.tensor([[*prompt, *answer]]), slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        own_TV = (own(ids).logits[0, at] / temperature).log_softmax(-1)
        found.append(float((own_TV.exp() * (own_TV - other(ids).logits[0, at].log_softmax(-1))).sum()))
    return np.array(found)


@torch.no_grad()
def exact_logps(folder: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """Sum of log-probs of each answer, in float64, one sequence at a time, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logps_TV = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        found.append(sum(float(logps_TV[len(prompt) - 1 + t, token]) for t, token in enumerate(answer)))
    return found


def sampled(
    world: World, folder: Path, seed: int = 0, temperature: float = 1.0, draw: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the answers that the stage must come to, as token ids."""
    prompts = [world.codec.prompt(row["prompt"]) for row in world.rows]
    answers = sample(
        load_policy(folder, trainable=False),
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=temperature,
        seeds=[seed_of("evaluate", seed, i, draw) for i in range(N)],
        stop_ids=world.codec.stop_ids,
        pad_id=world.codec.pad_id,
    )
    return prompts, answers


def test_the_sft_model_scores_half_nothing_and_half_by_construction(world: World) -> None:
    final, evaluation, _ = world.evaluate(world.sft, pairs=world.data)
    for name in ("win_rate_vs_sft", "win_rate_vs_sft_low", "win_rate_vs_sft_high", "length_controlled_win_rate"):
        assert final[f"eval/{name}"] == 0.5
    assert final["eval/kl_to_reference"] == 0.0 == final["eval/kl_to_reference_se"]
    assert final["eval/preference_accuracy"] == 0.5
    assert all(row.kl == 0.0 and row.answer == row.sft_answer for row in evaluation.samples)


def test_a_copy_of_the_sft_model_given_a_baseline_scores_the_same(world: World) -> None:
    again, _, _ = world.evaluate(world.sft, pairs=world.data, baseline=world.baseline())
    assert again["eval/win_rate_vs_sft"] == 0.5 and again["eval/kl_to_reference"] == 0.0


def test_the_numbers_of_another_model_follow_from_the_definitions(world: World) -> None:
    final, evaluation, run = world.evaluate(world.aligned, pairs=world.data, baseline=world.baseline())
    prompts, answers = sampled(world, world.aligned)
    texts = [world.codec.text(ids) for ids in answers]
    assert [row.answer for row in evaluation.samples] == texts
    kls = exact_kls(world.aligned, world.sft, prompts, answers)
    assert [row.kl for row in evaluation.samples] == pytest.approx(kls.tolist(), abs=1e-4)
    assert final["eval/kl_to_reference"] == pytest.approx(kls.mean(), abs=1e-4)
    assert final["eval/kl_to_reference_se"] == pytest.approx(kls.std(ddof=1) / math.sqrt(N), abs=1e-4)
    tokens = sum(map(len, answers))
    nll = -sum(exact_logps(world.sft, prompts, answers)) / tokens
    assert final["eval/reference_nll"] == pytest.approx(nll, abs=1e-4)

    ended = [ids[-1] in world.codec.stop_ids for ids in answers]
    assert 0 < sum(ended) < N  # both kinds occur, so that the next two lines say something
    assert final["eval/ended"] == sum(ended) / N
    assert final["eval/length"] == (tokens - sum(ended)) / N
    assert final["eval/empty"] == sum(not text.strip() for text in texts) / N
    assert final["compute/generated_tokens"] == tokens
    assert final["eval/distinct_2"] == metrics.distinct_2(texts)
    _, sft_answers = sampled(world, world.sft)
    assert [row.sft_answer for row in evaluation.samples] == [world.codec.text(ids) for ids in sft_answers]
    wins = [(row.score > row.sft_score) + 0.5 * (row.score == row.sft_score) for row in evaluation.samples]
    assert final["eval/win_rate_vs_sft"] == sum(wins) / N
    assert final["eval/judge_score"] == pytest.approx(sum(row.score for row in evaluation.samples) / N)
    assert evaluation.metrics == final
    table = run.tables["eval/samples.json"]
    assert table["prompt"][0] == world.rows[0]["prompt"][0]["content"] and table["answer"] == texts


def test_preference_accuracy_is_that_of_the_implicit_reward(world: World) -> None:
    final, _, _ = world.evaluate(world.aligned, pairs=world.data, baseline=world.baseline())
    pairs = rows(9, *PAIRS)
    prompts = [world.codec.prompt(row["prompt"]) for row in pairs]
    ratios = {}
    for side in ("chosen", "rejected"):
        answers = [world.codec.answer(row[side]) for row in pairs]
        own, sft = (exact_logps(folder, prompts, answers) for folder in (world.aligned, world.sft))
        ratios[side] = np.subtract(own, sft)
    assert final["eval/preference_accuracy"] == float((ratios["chosen"] > ratios["rejected"]).mean())


def test_the_judges_accuracy_is_on_the_sft_models_evaluation_alone(world: World) -> None:
    world.data = data_folder(world.folder / "nice", eval_prompt=world.rows, eval_preference=rows(9, *PAIRS))
    final, evaluation, _ = world.evaluate(world.sft, pairs=world.data)
    agreed = agreement(SentimentJudgeOfAnswers(), rows(9, *PAIRS))
    assert final["judge/accuracy"] == pytest.approx(sum(agreed) / 9)
    assert final["judge/accuracy_low"] <= final["judge/accuracy"] <= final["judge/accuracy_high"]
    assert "judge/accuracy" not in world.evaluate(world.aligned, pairs=world.data, baseline=world.baseline())[0]
    line = compare.agreement_of(evaluation)
    assert line.startswith(f"On held-out pairs the judge prefers the chosen answer in {100 * sum(agreed) / 9:.0f} %")
    gold = replace(evaluation, settings={**evaluation.settings, "judge": {"judge": "reward"}})
    assert compare.agreement_of(gold).endswith(compare.INDEPENDENT) and compare.agreement_of(None) == ""


def test_at_another_temperature_the_kl_is_still_that_of_the_model(world: World) -> None:
    config = settings(temperatures=[0.5])
    final, evaluation, _ = world.evaluate(world.aligned, config, baseline=world.baseline(config))
    prompts, shown = sampled(world, world.aligned, temperature=0.5)
    assert [row.answer for row in evaluation.samples] == [world.codec.text(ids) for ids in shown]
    _, drawn = sampled(world, world.aligned, temperature=1.0)
    kls = exact_kls(world.aligned, world.sft, prompts, drawn)
    assert final["eval/kl_to_reference"] == pytest.approx(kls.mean(), abs=1e-4)


def test_the_kl_has_the_mean_of_the_log_ratios_and_less_noise(world: World) -> None:
    config = settings(samples_per_prompt=30)
    final, _, _ = world.evaluate(world.aligned, config, baseline=world.baseline(config))
    ratios = []
    for draw in range(30):
        prompts, answers = sampled(world, world.aligned, draw=draw)
        ratios.append(
            np.subtract(exact_logps(world.aligned, prompts, answers), exact_logps(world.sft, prompts, answers))
        )
    by_prompt = np.array(ratios).mean(0)
    error = by_prompt.std(ddof=1) / math.sqrt(N)
    within = np.array(ratios).std(0, ddof=1).mean() / math.sqrt(30 * N)  # of the mean, by the answers' draws alone
    assert final["eval/kl_to_reference"] == pytest.approx(by_prompt.mean(), abs=4 * within)
    assert final["eval/kl_to_reference_se"] < error


def test_seeds_follow_the_request_and_the_place_of_the_prompt(world: World) -> None:
    whole = world.evaluate(world.sft)[1].samples
    assert world.evaluate(world.sft, settings(limit=5))[1].samples == whole[:5]
    other = world.evaluate(world.sft, seed=1)[1].samples
    assert [row.answer for row in other] != [row.answer for row in whole]


def test_reward_score_is_the_policys_own_reward_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = tmp_path / "reward"
    save_scorer(load_scorer(world.sft, seed=5), world.codec, reward)
    evaluators: list[evaluate.Evaluator] = []

    def loaded(*given: Any, **named: Any) -> Any:
        assert not hasattr(evaluators[0], "policy"), "the models are freed before those who judge are loaded"
        return load_judge(*given, **named)

    class Noted(evaluate.Evaluator):
        def prompts(self) -> Any:
            evaluators.append(self)
            return super().prompts()

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Evaluator", Noted)
        patch.setattr("stages.engine.scoring.judges.load_judge", loaded)
        final, evaluation, _ = world.evaluate(world.sft, reward=reward)
    scores = RewardJudge(reward).score(
        [row.prompt for row in evaluation.samples], [str(row.answer) for row in evaluation.samples]
    )
    assert [row.reward_score for row in evaluation.samples] == pytest.approx(scores)
    assert final["eval/reward_score"] == pytest.approx(sum(scores) / N)
    with pytest.raises(StageError, match="cannot judge it") as error:
        world.evaluate(world.sft, settings(judge="reward"), reward=reward, judge=reward)
    assert error.value.problem.field == "evaluate.judge"


def test_the_first_answers_are_for_the_evaluation_pages_with_what_is_said_of_them(world: World) -> None:
    baseline = world.baseline()
    asked = settings(traces=4, samples_per_prompt=2, temperatures=[1.0, 0.3])
    _, evaluation, run = world.evaluate(world.aligned, asked, baseline=world.baseline(asked))
    first = [row for row in evaluation.samples if row.draw == 0 and row.temperature == 1.0][:4]
    verdict = {0.0: "loss", 0.5: "tie", 1.0: "win"}
    assert [(row.prompt, row.answer, row.judged, row.measured) for row in run.answered] == [
        (s.prompt, s.answer, {"judge_score": s.score, "against_sft": verdict[s.win]}, {"length": s.length})
        for s in first
    ]
    assert all(str(s.sft_answer) in row.why for s, row in zip(first, run.answered, strict=True))
    _, same, none = world.evaluate(world.aligned, settings(traces=0), baseline=baseline)
    assert none.answered == [] and "traces" not in same.settings
    _, _, itself = world.evaluate(world.sft, settings())
    assert len(itself.answered) == N and {*itself.answered[0].judged} == {"judge_score"}
    private = MemoryContext(world.folder / "private", {}, {}, "evaluate", log_text=False)
    evaluate.publish(private, evaluation, traces=4, itself=False)
    assert private.answered == []
    asked_for = [Request(stage="evaluate", version=1, params={"traces": n, "seed": 1}) for n in (0, 50)]
    assert asked_for[0].key() == asked_for[1].key()


def test_too_few_prompts_are_refused_with_their_count(world: World) -> None:
    with pytest.raises(StageError, match=f"only {N} held-out") as error:
        world.evaluate(world.sft, settings(min_prompts=N + 1, few_prompts="refuse"))
    assert error.value.problem.field == "evaluate.min_prompts"
    assert error.value.problem.value == str(N + 1)
    with pytest.raises(StageError, match="only 3 held-out"):
        world.evaluate(world.sft, settings(min_prompts=4, limit=3, few_prompts="refuse"))


def test_too_few_prompts_are_said_and_evaluated_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    final, _, _ = world.evaluate(world.sft, settings(min_prompts=N + 1))
    assert final["eval/prompts"] == N and "hard to tell" not in caplog.text  # `validate` has said it
    final, _, _ = world.evaluate(world.sft, settings(min_prompts=4, limit=3))
    assert final["eval/prompts"] == 3
    said = "only 3 held-out prompts to evaluate on. Differences will be hard to tell. Fix: raise evaluate.limit, which"
    assert said in caplog.text
    long = {**world.rows[0], "prompt": [{"role": "user", "content": "a " * 60}]}
    world.data = data_folder(world.folder / "none", eval_prompt=[long])
    with pytest.raises(StageError, match="only 0 held-out"):
        world.evaluate(world.sft, settings())


def test_each_prompt_counts_once_and_one_without_room_for_an_answer_not_at_all(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**world.rows[0], "prompt": [{"role": "user", "content": "a " * 60}], "prompt_id": "long"}
    world.data = data_folder(world.folder / "more", eval_prompt=[long, *world.rows, *world.rows])
    final, evaluation, _ = world.evaluate(world.sft)
    assert final["eval/prompts"] == N
    assert [row.prompt for row in evaluation.samples] == [row["prompt"] for row in world.rows]
    assert "1 of 13 prompts leave no room" in caplog.text


def test_the_test_part_is_answered_where_it_is_asked_for(world: World) -> None:
    world.data = data_folder(world.folder / "parts", eval_prompt=world.rows[5:], test_prompt=world.rows[:5])
    asked = EvaluateParams(**settings(min_prompts=5).model_dump(), part="test")
    _, evaluation, _ = world.evaluate(world.sft, asked)
    assert evaluation.prompts == [row["prompt"] for row in world.rows[:5]]
    with pytest.raises(StageError, match="test_fraction"):
        world.evaluate(world.sft, asked.model_copy(update={"min_prompts": 6, "few_prompts": "refuse"}))


def test_a_model_needs_the_sft_models_answers_to_the_same_prompts_under_the_same_settings(world: World) -> None:
    with pytest.raises(StageError) as error:
        world.evaluate(world.aligned)
    assert error.value.problem.field == "inputs.baseline"
    with pytest.raises(StageError, match="not the same"):
        world.evaluate(world.aligned, baseline=world.baseline(settings(limit=5)))
    with pytest.raises(StageError, match="judge"):
        world.evaluate(world.aligned, baseline=world.baseline(settings(judge=RuleJudge())))


def test_without_held_out_pairs_there_is_no_preference_accuracy(world: World, caplog: pytest.LogCaptureFixture) -> None:
    nothing = data_folder(world.folder / "no_pairs", eval_prompt=world.rows)
    assert "eval/preference_accuracy" not in world.evaluate(world.sft, pairs=nothing)[0]
    assert "no pairs are held out" in caplog.text


class LongerEndpoint(EndpointJudge):
    """An endpoint judge without the network: the longer answer wins."""

    def wins(self, prompts: Any, answers: Sequence[str], others: Sequence[str]) -> list[float]:
        return metrics.wins([len(a) for a in answers], [len(o) for o in others])


def test_a_judge_that_compares_scores_by_the_win_over_the_baseline(world: World) -> None:
    judge = LongerEndpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model="m"), "evaluate.judge")
    baseline = world.evaluate(world.sft)[1].samples
    answers = ["", *("x" * 99 for _ in range(N - 2)), baseline[-1].answer]
    baseline[0] = replace(baseline[0], answer="longer")
    prompts = [row.prompt for row in baseline]
    verdicts = evaluate.judge_answers(judge, prompts, answers, baseline)
    assert verdicts == [(0.0, 1.0, 0.0), *[(1.0, 0.0, 1.0)] * (N - 2), (0.5, 0.5, 0.5)]
    judge.wins = judge.score = None  # pyright: ignore[reportAttributeAccessIssue] - beside itself it is not asked
    assert evaluate.judge_answers(judge, prompts, answers, None) == [(0.5, 0.5, 0.5)] * N


def test_several_temperatures_and_draws_stand_apart_and_are_paired_with_the_baselines(world: World) -> None:
    config = settings(temperatures=[1.0, 0.5], samples_per_prompt=2)
    final, evaluation, run = world.evaluate(world.aligned, config, baseline=world.baseline(config))
    assert evaluation.temperatures == [1.0, 0.5] and len(evaluation.samples) == 2 * N * 2
    for temperature, start in ((1.0, ""), (0.5, "t0.5/")):
        samples = evaluation.at(temperature)
        assert [(row.prompt, row.draw) for row in samples] == [(r["prompt"], k) for r in world.rows for k in (0, 1)]
        for draw in (0, 1):
            for folder, field in ((world.aligned, "answer"), (world.sft, "sft_answer")):
                _, answers = sampled(world, folder, temperature=temperature, draw=draw)
                found = [getattr(row, field) for row in samples if row.draw == draw]
                assert found == [world.codec.text(ids) for ids in answers]
        wins = [(row.score > row.sft_score) + 0.5 * (row.score == row.sft_score) for row in samples]
        assert final[f"eval/{start}win_rate_vs_sft"] == sum(wins) / (2 * N)
        assert final[f"eval/{start}prompts"] == N and f"eval/{start}reference_nll" in final
        # An interval over prompts: the two draws of one go together.
        interval = bootstrap(wins, [row.cluster for row in samples], resamples=200, seed=0)
        assert final[f"eval/{start}win_rate_vs_sft_high"] == interval.high
    # The KL is that of the answers at temperature 1, its error that of the prompts' means.
    kl = np.array([row.kl for row in evaluation.at(1.0)]).reshape(N, 2)
    assert final["eval/kl_to_reference"] == pytest.approx(kl.mean())
    assert final["eval/kl_to_reference_se"] == pytest.approx(kl.mean(1).std(ddof=1) / math.sqrt(N))
    assert run.tables["eval/samples.json"]["answer"] == [row.answer for row in evaluation.at(1.0) if row.draw == 0]
    with pytest.raises(StageError, match=r"only at 1, 0\.5") as error:
        evaluation.at(0.3)
    assert error.value.problem.field == "evaluate.temperatures"


class Same(LongerEndpoint):
    """A tie where both answers are the same, else a win; it keeps what it was asked."""

    def wins(self, prompts: Any, answers: Sequence[str], others: Sequence[str]) -> list[float]:
        self.others = list(others)
        return [0.5 if a == b else 1.0 for a, b in zip(answers, others, strict=True)]


def test_for_the_gate_a_model_meets_the_sft_model_made_as_sharp(world: World) -> None:
    """The SFT model with its logits doubled: at half the temperature the SFT model gives the same answers."""
    sharper = world.folder / "sharper"
    shutil.copytree(world.sft, sharper)
    model = AutoModelForCausalLM.from_pretrained(world.sft)
    with torch.no_grad():
        model.lm_head.weight *= 2
    model.save_pretrained(sharper)
    config = EvaluateParams(**settings(temperatures=[0.8], samples_per_prompt=2).model_dump(), gate=True)
    inputs = {"model": sharper, "reference": world.sft, "data": world.data}
    evaluator = evaluate.Evaluator(MemoryContext(world.folder / "gate", config, inputs, "evaluate"), config)
    prompts = evaluator.prompts()
    asked = [prompt for prompt in prompts for _ in range(2)]
    answers = evaluator.answer(prompts, 0.8)
    samples = evaluate.put_together(asked, answers, None, [(0.0, 0.0, 0.5)] * 2 * N, [0.0] * 2 * N, None)
    samples = [replace(row, temperature=0.8) for row in samples]
    judge = Same(EndpointConfig(url="http://127.0.0.1:9/v1", model="m"), "evaluate.judge")
    read = evaluate.read_for_the_gate(evaluator, asked, answers, 0.8)
    found, values = evaluate.for_the_gate(read, judge, asked, answers, samples)
    matched = values["eval/matched_temperature"]
    assert matched == pytest.approx(0.4, rel=0.01)
    draws = [sampled(world, world.sft, temperature=matched, draw=draw)[1] for draw in (0, 1)]
    assert judge.others == [world.codec.text(draws[k][i]) for i in range(N) for k in (0, 1)]
    tied = sum(row.matched_win == 0.5 for row in found)
    assert tied >= 0.9 * 2 * N  # the temperature is found to .6 %
    assert values["eval/win_rate_vs_matched_sft"] == 1 - 0.5 * tied / (2 * N)
    # What an answer tells of its prompt: log pi_sft behind it, less the mean behind four others.
    ids = [world.codec.prompt(prompt) for prompt in asked]
    own = exact_logps(world.sft, ids, answers.ids)
    others = gate_evidence.other_prompts([row.cluster for row in samples])
    behind = [exact_logps(world.sft, [ids[k] for k in places], [answers.ids[3]] * 4) for places in others[3:4]]
    assert found[3].relevance == pytest.approx(own[3] - sum(behind[0]) / 4, abs=1e-4)


def test_an_evaluation_of_a_single_temperature_of_old_is_read(world: World, tmp_path: Path) -> None:
    evaluation = world.evaluate(world.sft, settings(temperatures=[0.7]))[1]
    evaluation.save(tmp_path)
    now = {name: value for name, value in evaluation.settings.items() if name != "samples_per_prompt"}
    settings_of_old = {name: value for name, value in now.items() if name != "temperatures"} | {"temperature": 0.7}
    (tmp_path / "settings.json").write_text(json.dumps(settings_of_old))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    new = {"temperature", "draw", "cluster"}
    old = [{name: value for name, value in line.items() if name not in new} for line in lines]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert Evaluation.load(tmp_path) == evaluation


@pytest.mark.parametrize(
    ("given", "temperatures"),
    [({}, [1.0, 0.3]), ({"temperature": 0.7}, [0.7]), ({"temperatures": [0.3, 1]}, [0.3, 1.0])],
)
def test_one_temperature_is_a_list_of_one(given: dict[str, Any], temperatures: list[float]) -> None:
    assert EvaluateConfig.model_validate(given).temperatures == temperatures


@pytest.mark.parametrize("temperatures", [[], [1.0, 1], [0.0], [True], ["hot"]])
def test_temperatures_that_are_none_are_refused(temperatures: list[Any]) -> None:
    with pytest.raises(ValidationError, match="temperatures"):
        EvaluateConfig.model_validate({"temperatures": temperatures})
    with pytest.raises(ValidationError, match="both set"):
        EvaluateConfig.model_validate({"temperatures": temperatures, "temperature": 1.0})


def test_a_folder_reads_back_as_it_was_written(world: World, tmp_path: Path) -> None:
    evaluation = world.evaluate(world.sft)[1]
    odd = replace(evaluation.samples[0], answer="a\u2028b\n\r\x85c \u85cf")
    folder = tmp_path / "odd"
    folder.mkdir()
    written = Evaluation(evaluation.metrics, [odd], evaluation.settings)
    written.save(folder)
    assert Evaluation.load(folder) == written
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().split(b"\n") if line]
    assert {"prompt", "answer", "score", "reward_score", "kl", "length"} <= set(lines[0])


@pytest.mark.slow
def test_the_run_in_mlflow_carries_metrics_without_steps_table_and_the_trainings_parameters(world: World) -> None:
    inputs = {
        name: Artifact(uri=str(folder), sha256=tracking.digest(folder))
        for name, folder in {"model": world.sft, "reference": world.sft, "data": world.data}.items()
    }
    request = Request(
        stage="evaluate",
        version=STAGES["evaluate"].version,
        params=settings().model_dump(mode="json"),
        inputs=inputs,
        name="sft",
        about={"learning_rate": "0.001"},
        tags={"data.version": "abc"},
    )
    result = execute(request)
    assert result.status == "done", result.error
    logged = tracking.client().get_run(result.run_id or "")
    times = {"usage/stage_seconds", "usage/tracking_seconds"}
    final = {name: value for name, value in logged.data.metrics.items() if name not in times}
    shown = {name.replace("compute/", "usage/"): value for name, value in result.metrics.items()}
    assert final == pytest.approx(shown) and times <= logged.data.metrics.keys()
    assert logged.data.metrics["eval/win_rate_vs_sft"] == 0.5
    assert {
        metric.step for name in shown for metric in tracking.client().get_metric_history(logged.info.run_id, name)
    } == {0}
    assert logged.inputs is not None
    assert [one.dataset.name for one in logged.inputs.dataset_inputs][:1] == ["held-out prompts"]
    assert logged.data.tags["model"] == "sft" and logged.data.tags["data.version"] == "abc"
    assert logged.data.params["learning_rate"] == "0.001"
    assert "eval/samples.json" in logged.data.tags["mlflow.loggedArtifacts"]
    assert len(Evaluation.load(tracking.fetch(result.outputs["evaluation"])).samples) == N


def test_a_model_of_another_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    other = shutil.copytree(world.aligned, tmp_path / "other")
    wider = AutoModelForCausalLM.from_pretrained(other)
    wider.resize_token_embeddings(wider.config.vocab_size + 3)
    wider.save_pretrained(other)
    with pytest.raises(StageError, match="it was trained from another base model") as refused:
        world.evaluate(other, baseline=world.baseline())
    assert refused.value.problem.kind == "not_comparable"
