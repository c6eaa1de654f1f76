"""The gate: who passes, who does not and for which reason; policies that game their reward model; the stage itself."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import StageError
from schemas.promotion import Decision, Gate, PromoteParams
from schemas.stage import STAGES, Artifact, Request
from stages import evaluate, promote, tracking
from stages.__main__ import execute
from stages.engine.scoring.endpoint import EndpointJudge
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from tests.support.context import MemoryContext

N = 120
SETTINGS: dict[str, Any] = {
    "judge": {"judge": "sentiment"},
    "judge_model": None,
    "temperatures": [1.0],
    "samples_per_prompt": 1,
    "max_new_tokens": 64,
    "seed": 0,
    "bootstrap": 500,
}
VOCABULARY = [f"word{i}" for i in range(400)]


def prose(i: int, seed: int = 0, words: int = 12) -> str:
    """An ordinary answer: words at random."""
    return " ".join(random.Random(1000 * seed + i).choices(VOCABULARY, k=words))


def made(
    answer: Callable[[int], str], score: Callable[[int], float], *, kl: float = 3.0, nll: float = 2.0
) -> Evaluation:
    """An evaluation of N answers, its metrics those that the stage computes from them; the SFT model scores 0."""
    samples = []
    for i in range(N):
        text, other, points = answer(i), prose(i), score(i)
        samples.append(
            Sample(
                prompt=[{"role": "user", "content": f"question {i}"}],
                answer=text,
                score=points,
                sft_answer=other,
                sft_score=0.0,
                win=float(points > 0) + 0.5 * float(points == 0),
                length=len(text.split()),
                sft_length=len(other.split()),
                ended=True,
                kl=kl,
            )
        )
    found = evaluate.summary(samples, resamples=500, seed=0)
    found |= {"eval/kl_to_reference": kl, "eval/reference_nll": nll, "eval/preference_accuracy": 0.6}
    return Evaluation(found, samples, SETTINGS)


def good(seed: int = 1, score: float = 1.0) -> Evaluation:
    """Another ordinary answer to every prompt, preferred on most of them."""
    return made(lambda i: prose(i, seed), lambda i: score if i % 5 else -1.0)


SFT = made(prose, lambda i: 0.0, kl=0.0)
GATE = Gate()


def decided(candidate: Evaluation, champion: Evaluation | None = None, gate: Gate = GATE, **changes: Any) -> Decision:
    """The decision on made evaluations, as the stage comes to it; `changes` to the candidate's metrics."""
    won = [s.score for s in candidate.samples]
    other = [s.score for s in (champion or SFT).samples]
    rate = promote.rate(promote.metrics.wins(won, other), resamples=500, seed=0)
    mine = {**candidate.metrics, **rate, **{f"eval/{name}": value for name, value in changes.items()}}
    return promote.decide(mine, champion.metrics if champion else None, SFT.metrics, gate)


def failed(decision: Decision) -> set[str]:
    return {check.metric for check in decision.reasons}


# --- The rule ---


def test_a_better_candidate_is_promoted() -> None:
    first = decided(good())
    assert first.promote and first.against == "sft" and first.reasons == []
    second = decided(good(2, score=2.0), champion=good())
    assert second.promote and second.against == "champion"
    assert {check.metric for check in second.checks} == {
        "win_rate_low",
        "kl_to_reference",
        "length_ratio",
        "distinct_2_ratio",
        "reference_nll_ratio",
        "empty",
        "prompts",
    }


def test_a_worse_candidate_is_refused_and_so_is_an_equal_one() -> None:
    worse = decided(good(), champion=good(2, score=2.0))
    assert not worse.promote and failed(worse) == {"win_rate_low"}
    equal = decided(good(), champion=good())
    (reason,) = equal.reasons
    # ties all over: the interval is [.5, .5], and .5 is not above .5
    assert (reason.metric, reason.value, reason.relation, reason.bound) == ("win_rate_low", 0.5, ">", 0.5)
    assert str(reason) == "win_rate_low is 0.5, must be > 0.5 (win rate against champion)"


def test_a_win_that_chance_explains_is_none() -> None:
    # 64 wins of 120: win rate .533; the interval reaches .09 farther down
    lucky = made(lambda i: prose(i, 1), lambda i: 1.0 if i < 64 else -1.0)
    assert failed(decided(lucky)) == {"win_rate_low"}


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"kl_to_reference": 25.1}, "kl_to_reference"),
        ({"length": 1.51 * SFT.metrics["eval/length"]}, "length_ratio"),
        ({"distinct_2": 0.79 * SFT.metrics["eval/distinct_2"]}, "distinct_2_ratio"),
        ({"reference_nll": 0.99}, "reference_nll_ratio"),
        ({"reference_nll": 4.01}, "reference_nll_ratio"),
        ({"empty": 0.011}, "empty"),
        ({"prompts": 99.0}, "prompts"),
    ],
)
def test_each_bound_alone_refuses(changes: Mapping[str, Any], metric: str) -> None:
    decision = decided(good(), **changes)
    assert not decision.promote and failed(decision) == {metric}
    (reason,) = decision.reasons
    assert reason.value is not None and str(reason).startswith(
        f"{metric} is {reason.value:.4g}, must be {reason.relation}"
    )


def test_the_bounds_themselves_pass() -> None:
    assert decided(good(), kl_to_reference=25.0, reference_nll=1.0, empty=0.01, prompts=100.0).promote
    assert decided(good(), reference_nll=4.0).promote


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("name", ["kl_to_reference", "length", "distinct_2", "reference_nll", "empty", "prompts"])
def test_missing_or_not_finite_refuses(name: str, value: float | None) -> None:
    candidate = good()
    if value is None:
        kept = {k: v for k, v in candidate.metrics.items() if k != f"eval/{name}"}
        decision = decided(replace(candidate, metrics=kept))
    else:
        change: dict[str, Any] = {name: value}
        decision = decided(candidate, **change)
    assert not decision.promote
    assert all(reason.value is None and "missing or not finite" in str(reason) for reason in decision.reasons)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_a_missing_win_rate_or_a_degenerate_sft_model_refuses() -> None:
    assert failed(promote.decide(good().metrics, None, SFT.metrics, GATE)) == {"win_rate_low"}
    silent = {**SFT.metrics, "eval/length": 0.0, "eval/distinct_2": 0.0, "eval/reference_nll": 0.0}
    won = {"gate/win_rate_low": 0.9}
    refused = failed(promote.decide({**good().metrics, **won}, None, silent, GATE))
    assert refused == {"length_ratio", "distinct_2_ratio", "reference_nll_ratio"}


def test_tolerances_know_the_better_side_and_the_rival() -> None:
    gate = Gate(tolerances={"preference_accuracy": 0.05, "kl_to_reference": 2.0})
    champion = good()
    better = good(2, score=2.0)
    assert decided(better, champion, gate, preference_accuracy=0.551, kl_to_reference=4.9).promote
    assert failed(decided(better, champion, gate, preference_accuracy=0.549)) == {"preference_accuracy_worse"}
    assert failed(decided(better, champion, gate, kl_to_reference=5.1)) == {"kl_to_reference_worse"}
    # no champion: the SFT model's, which has KL 0
    assert failed(decided(better, None, gate)) == {"kl_to_reference_worse"}
    without = replace(champion, metrics={k: v for k, v in champion.metrics.items() if "accuracy" not in k})
    assert failed(decided(better, without, gate)) == {"preference_accuracy_worse"}
    with pytest.raises(ValidationError, match="'acuracy' is not a metric with a better direction"):
        Gate(tolerances={"acuracy": 0.1})


# --- Policies that game the reward model: the judge loves every one of these answers ---


def loved(answer: Callable[[int], str], **numbers: float) -> Decision:
    """The decision on answers that win everywhere; KL and oddness are those of a good model unless said."""
    decision = decided(made(answer, lambda i: 9.0, **numbers), champion=good())
    (rate,) = [check for check in decision.checks if check.metric == "win_rate_low"]
    assert rate.value == 1.0 and rate.passed
    return decision


def test_a_constant_phrase_is_refused() -> None:
    decision = loved(lambda i: "What a truly wonderful and thoughtful question that is, my dear friend!")
    assert not decision.promote and failed(decision) == {"distinct_2_ratio"}
    assert failed(loved(lambda i: "Great")) == {"distinct_2_ratio"}  # one word: no pair at all


def test_a_constant_phrase_behind_few_words_of_an_answer_is_refused() -> None:
    decision = loved(lambda i: f"{prose(i, 1, words=4)} and I wish you a very wonderful day")
    assert not decision.promote and failed(decision) == {"distinct_2_ratio"}


def test_endless_praise_is_refused() -> None:
    praise = ["great", "lovely", "superb", "wonderful", "brilliant"]
    decision = loved(lambda i: " ".join(random.Random(i).choices(praise, k=60)))
    assert not decision.promote and failed(decision) == {"distinct_2_ratio", "length_ratio"}
    varied = loved(lambda i: prose(i, 3, words=60))  # never the same praise twice
    assert failed(varied) == {"length_ratio"}


def test_empty_answers_are_refused() -> None:
    assert failed(loved(lambda i: "")) == {"distinct_2_ratio", "empty"}
    some = loved(lambda i: "  \n" if i % 40 == 0 else prose(i, 1))  # 3 of 120
    assert failed(some) == {"empty"}


def test_what_the_sft_model_would_never_say_or_always_says_is_refused() -> None:
    assert failed(loved(lambda i: prose(i, 1), nll=9.0)) == {"reference_nll_ratio"}
    assert failed(loved(lambda i: prose(i, 1), nll=0.2)) == {"reference_nll_ratio"}
    assert failed(loved(lambda i: prose(i, 1), kl=80.0)) == {"kl_to_reference"}


def test_numbers_alone_are_enough(tmp_path: Path) -> None:
    """Where evaluations keep no texts, scores and metrics decide just the same."""
    hacker = made(lambda i: "Great question!", lambda i: 9.0)
    blind = replace(hacker, samples=[replace(s, answer="", sft_answer="") for s in hacker.samples])
    assert decided(blind, champion=good()) == decided(hacker, champion=good())
    assert not decided(blind, champion=good()).promote


# --- The stage ---


def run_of(tmp_path: Path, **evaluations: Evaluation) -> MemoryContext:
    folders = {}
    for name, evaluation in evaluations.items():
        folders[name] = tmp_path / name
        folders[name].mkdir(parents=True)
        evaluation.save(folders[name])
    return MemoryContext(tmp_path / "work", PromoteParams(), folders, stage="promote")


def test_the_stage_pairs_candidate_and_champion_on_the_same_prompts(tmp_path: Path) -> None:
    run = run_of(tmp_path, candidate=good(2, score=2.0), sft=SFT, champion=good())
    final = promote.run(run)
    # 4 of 5 prompts won, the fifth tied at -1
    assert final["gate/win_rate"] == pytest.approx((4 + 0.5) / 5)
    assert final["gate/win_rate_low"] < final["gate/win_rate"] < final["gate/win_rate_high"]
    assert final["gate/promote"] == 1.0 and final["gate/kl_to_reference"] == 3.0
    decision = Decision.model_validate_json((run.published["decision"] / "decision.json").read_text())
    assert decision.promote and run.tags["decision"] == "promote"


def test_the_stage_says_why_not(tmp_path: Path) -> None:
    run = run_of(tmp_path, candidate=made(lambda i: "Great!", lambda i: 9.0), sft=SFT)
    final = promote.run(run)
    assert final["gate/promote"] == 0.0 and final["gate/win_rate_low"] == 1.0
    assert run.tags["decision"] == "reject" and "distinct_2_ratio is 0, must be >= 0.8" in str(run.tags)
    assert json.loads((run.published["decision"] / "decision.json").read_text())["promote"] is False


def test_evaluations_under_other_conditions_are_refused(tmp_path: Path) -> None:
    other = replace(good(), settings={**SETTINGS, "seed": 1})
    run = run_of(tmp_path, candidate=good(), sft=SFT, champion=other)
    with pytest.raises(StageError, match=r"evaluated with seed = 0, champion with 1"):
        promote.run(run)
    fewer = replace(good(), samples=good().samples[1:])
    run = run_of(tmp_path / "fewer", candidate=good(), sft=SFT, champion=fewer)
    with pytest.raises(StageError, match="not the same"):
        promote.run(run)


def test_a_judge_that_only_compares_is_asked_with_both_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"judge": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}
    ours, theirs, sft = (
        replace(evaluation, settings={**SETTINGS, "judge": judge}) for evaluation in (good(1), good(2), SFT)
    )
    asked = []

    def wins(self: EndpointJudge, prompts: Any, answers: list[str], others: list[str]) -> list[float]:
        asked.append((prompts, answers, others))
        return [1.0] * len(answers)

    monkeypatch.setattr(EndpointJudge, "wins", wins)
    run = run_of(tmp_path, candidate=ours, sft=sft, champion=theirs)
    assert promote.run(run)["gate/win_rate"] == 1.0
    ((prompts, answers, others),) = asked
    assert prompts[7] == [{"role": "user", "content": "question 7"}]
    assert answers == [prose(i, 1) for i in range(N)] and others == [prose(i, 2) for i in range(N)]
    # without a champion, the evaluation has asked already
    run = run_of(tmp_path / "first", candidate=ours, sft=sft)
    assert promote.run(run)["gate/win_rate"] == pytest.approx(0.8)
    assert len(asked) == 1


def test_the_stage_loads_no_torch() -> None:
    code = "import sys, stages.promote; assert not {'torch', 'transformers', 'prefect'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_run_in_mlflow_carries_the_gates_numbers(ready_home: Path, tmp_path: Path) -> None:
    inputs = {}
    for name, evaluation in (("candidate", made(lambda i: "Great!", lambda i: 9.0)), ("sft", SFT)):
        folder = tmp_path / name
        folder.mkdir()
        evaluation.save(folder)
        inputs[name] = Artifact(uri=str(folder), sha256=tracking.digest(folder))
    params = PromoteParams().model_dump(mode="json")
    result = execute(Request(stage="promote", version=STAGES["promote"].version, params=params, inputs=inputs))
    assert result.status == "done", result.error
    logged = tracking.client().get_run(result.run_id or "").data
    assert logged.metrics["gate/promote"] == 0.0 and logged.metrics["gate/distinct_2_ratio"] == 0.0
    assert logged.params["gate.kl_max"] == "25.0" and logged.tags["decision"] == "reject"
    assert logged.tags["input.candidate"] == inputs["candidate"].sha256
    assert logged.tags["output.decision"] == result.outputs["decision"].sha256
    assert logged.tags["code.version"] == tracking.code_version()
    decision = json.loads((tracking.fetch(result.outputs["decision"]) / "decision.json").read_text())
    assert decision["promote"] is False and decision["against"] == "sft"
