"""The gate: who passes, who does not and for which reason; policies that game their reward model; the stage itself."""

import itertools
import json
import math
import random
import re
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
from tests.conftest import ROOT
from tests.support.context import MemoryContext

N = 400
SETTINGS: dict[str, Any] = {
    "judge": {"judge": "sentiment"},
    "judge_model": None,
    "temperatures": [0.3],
    "samples_per_prompt": 1,
    "max_new_tokens": 64,
    "seed": 0,
    "bootstrap": 100,
}
PAPER = ROOT / "deploy" / "README.md"
VOCABULARY = [f"word{i}" for i in range(1000)]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made numbers differ little between prompts, so that few resamples tell the same."""
    monkeypatch.setattr(promote, "RESAMPLES", 100)


def prose(i: int, seed: int = 0, words: int = 12) -> str:
    """An ordinary answer: words at random."""
    return " ".join(random.Random(1000 * seed + i).choices(VOCABULARY, k=words))


def made(
    answer: Callable[[int], str],
    score: Callable[[int], float],
    *,
    kl: float = 3.0,
    nll: float = 2.0,
    relevance: float = 5.0,
    ended: Callable[[int], bool] = lambda i: True,
    matched: Callable[[int], float] | None = None,
) -> Evaluation:
    """An evaluation of N answers, its metrics those that the stage computes from them; the SFT model scores 0.

    `nll`: of each token under the SFT model; `matched`: score of the SFT model made as sharp, else 0.
    """
    samples = []
    for i in range(N):
        text, other, points = answer(i), prose(i), score(i)
        sharp = 0.0 if matched is None else matched(i)
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
                ended=ended(i),
                kl=kl,
                temperature=0.3,
                reference_logp=-nll * (len(text.split()) + ended(i)),
                relevance=relevance,
                matched_win=float(points > sharp) + 0.5 * float(points == sharp),
            )
        )
    found = evaluate.summary(samples, resamples=100, seed=0)
    found |= {"eval/kl_to_reference": kl, "eval/kl_to_reference_se": 0.0, "eval/reference_nll": nll}
    right = [float(i % 5 < 3) for i in range(N)]
    pairs = [(f"pair {i}", value) for i, value in enumerate(right)]
    return Evaluation(found | {"eval/preference_accuracy": 0.6}, samples, SETTINGS, pairs)


def good(seed: int = 1, score: float = 1.0, **more: Any) -> Evaluation:
    """Another ordinary answer to every prompt, preferred on most of them."""
    return made(lambda i: prose(i, seed), lambda i: score if i % 5 else -1.0, **more)


SFT = made(prose, lambda i: 0.0, kl=0.0)
GATE = Gate()


def decided(
    candidate: Evaluation, champion: Evaluation | None = None, gate: Gate = GATE, sft: Evaluation = SFT, **changes: Any
) -> Decision:
    """The decision on made evaluations, as the stage comes to it; `changes` to the candidate's metrics."""
    won = promote.metrics.wins([s.score for s in candidate.first], [s.score for s in (champion or sft).first])
    changed = {**candidate.metrics, **{f"eval/{name}": value for name, value in changes.items()}}
    return promote.decide(replace(candidate, metrics=changed), champion, sft, gate, won)


def with_samples(evaluation: Evaluation, **changes: Any) -> Evaluation:
    """The evaluation with equal changes to all samples; a callable is called with the sample."""
    return replace(
        evaluation,
        samples=[
            replace(s, **{name: value(s) if callable(value) else value for name, value in changes.items()})
            for s in evaluation.samples
        ],
    )


def value_of(decision: Decision, metric: str) -> float:
    """What a check has found."""
    value = next(check.value for check in decision.checks if check.metric == metric)
    assert value is not None
    return value


def failed(decision: Decision) -> set[str]:
    return {check.metric for check in decision.reasons}


def hacked(decision: Decision) -> set[str]:
    """What has failed, each of which must have failed against the SFT model and the champion alike."""
    failures = failed(decision)
    assert {name for name in failures if name.endswith("_champion")} <= {f"{name}_champion" for name in failures}
    return {name for name in failures if not name.endswith("_champion")}


# --- The rule ---


def test_a_better_candidate_is_promoted() -> None:
    first = decided(good())
    assert first.promote and first.against == "sft" and first.reasons == []
    second = decided(good(2, score=2.0), champion=good())
    assert second.promote and second.against == "champion"
    against_one = {"length_ratio", "distinct_2_ratio", "reference_nll_ratio", "unended_more", "relevance_ratio"}
    both = against_one | {f"{name}_champion" for name in against_one}
    alone = {"win_rate_p", "matched_win_rate_p", "kl_to_reference", "empty", "prompts"}
    assert {check.metric for check in second.checks} == both | alone
    assert {check.metric for check in first.checks} == against_one | alone


def test_a_worse_candidate_is_refused_and_so_is_an_equal_one() -> None:
    worse = decided(good(), champion=good(2, score=2.0))
    assert not worse.promote and failed(worse) == {"win_rate_p"}
    equal = decided(good(), champion=good())  # ties all over
    (reason,) = equal.reasons
    assert (reason.metric, reason.value, reason.relation, reason.bound) == ("win_rate_p", 1.0, "<=", 0.05 / 53)
    assert "0 prompts won, 0 lost, 400 tied against champion" in str(reason) and equal.decided == 0


def test_the_p_value_is_the_binomial_tail_of_the_prompts_that_are_decided() -> None:
    # 400 prompts, 100 of them tied; of 300, 178 won: P(X >= 178), X ~ binomial(300, 1/2)
    def score(i: int) -> float:
        return 0.0 if i < 100 else 1.0 if i < 278 else -1.0

    tail = sum(math.comb(300, k) for k in range(178, 301)) / 2**300
    decision = decided(made(lambda i: prose(i, 1), score))
    assert value_of(decision, "win_rate_p") == pytest.approx(tail, rel=1e-9)
    assert decision.decided == 300 and decision.promote == (tail <= 0.05 / 53)
    one_less = decided(made(lambda i: prose(i, 1), lambda i: -1.0 if i < 278 and i >= 276 else score(i)))
    assert decision.promote and not one_less.promote


def test_answers_to_one_first_turn_count_once() -> None:
    """Twice the answers say no more: a sign per cluster, by the mean over its answers."""
    candidate = made(lambda i: prose(i, 1), lambda i: 1.0 if i < 230 else -1.0)
    alone = promote.signs([s.win for s in candidate.first], [s.cluster for s in candidate.first])
    assert alone == (230, 170, 0)
    halved = promote.signs([s.win for s in candidate.first], [str(i // 2) for i in range(N)])
    assert halved == (115, 85, 0)
    assert promote.signs([1.0, 0.0, 1.0, 0.5, 0.5, 0.5], ["a", "a", "b", "b", "c", "c"]) == (1, 0, 2)


def test_more_than_sharpness_must_be_gained() -> None:
    """It beats the SFT model at the same temperature, and is no better than it at the same sharpness."""
    won = lambda i: 1.0 if i % 5 else -1.0  # noqa: E731
    sharper = made(lambda i: prose(i, 1), won, matched=won)
    assert failed(decided(sharper)) == {"matched_win_rate_p"}
    unmeasured = with_samples(good(), matched_win=None)
    assert failed(decided(unmeasured)) == {"matched_win_rate_p"}
    partly = with_samples(good(), matched_win=lambda s: None if place(s) == 7 else s.matched_win)
    assert failed(decided(partly)) == {"matched_win_rate_p"}


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"kl_to_reference": 25.1}, "kl_to_reference"),
        ({"kl_to_reference": 24.9, "kl_to_reference_se": 0.1}, "kl_to_reference"),
        ({"distinct_2": 0.79 * SFT.metrics["eval/distinct_2"]}, "distinct_2_ratio"),
        ({"empty": 0.011}, "empty"),
        ({"prompts": 399.0}, "prompts"),
    ],
)
def test_each_bound_on_a_metric_alone_refuses(changes: Mapping[str, Any], metric: str) -> None:
    decision = decided(good(), **changes)
    assert not decision.promote and failed(decision) == {metric}
    (reason,) = decision.reasons
    assert reason.value is not None and str(reason).startswith(f"{metric} is")


TOO_FAR: list[tuple[dict[str, Any], str]] = [
    ({"length": lambda s: 19}, "length_ratio"),  # 19/12 > 1.5
    ({"reference_logp": lambda s: -0.9 * (s.length + 1)}, "reference_nll_ratio"),  # of 2: .45 < .5
    ({"reference_logp": lambda s: -4.1 * (s.length + 1)}, "reference_nll_ratio"),  # 2.05 > 2
    ({"ended": lambda s: int(s.prompt[0]["content"].split()[1]) % 5 > 0}, "unended_more"),  # .2 > .1
    ({"relevance": 2.4}, "relevance_ratio"),  # of 5: .48 < .5
]


@pytest.mark.parametrize(("changes", "metric"), TOO_FAR)
def test_each_bound_holds_against_the_sft_model_and_against_the_champion(changes: dict[str, Any], metric: str) -> None:
    """Each side's own numbers count: a champion like the candidate does not excuse it, nor does such an SFT model."""
    candidate = with_samples(good(2, score=2.0), **changes)
    if "length" in changes:
        candidate = with_samples(candidate, reference_logp=lambda s: -2.0 * (s.length + s.ended))
    alike = with_samples(candidate, score=lambda s: 1.0 if s.score > 0 else -1.0)
    assert failed(decided(candidate, champion=alike)) == {metric}
    sft_alike = replace(with_samples(candidate, score=0.0), metrics=SFT.metrics)
    assert failed(decided(candidate, champion=good(), sft=sft_alike)) == {f"{metric}_champion"}
    assert failed(decided(candidate, champion=alike, sft=sft_alike)) == set()


def test_variety_is_held_against_both() -> None:
    champion = good()
    richer = replace(champion, metrics={**champion.metrics, "eval/distinct_2": 1.3})
    assert failed(decided(good(2, score=2.0), champion=richer)) == {"distinct_2_ratio_champion"}
    poorer = replace(SFT, metrics={**SFT.metrics, "eval/distinct_2": 1.3})
    assert failed(decided(good(2, score=2.0), champion=champion, sft=poorer)) == {"distinct_2_ratio"}


def test_the_unfavourable_end_of_the_interval_counts() -> None:
    """A mean inside of the bound is not enough where chance may have put it there."""
    # lengths 0 or 35: ratio 17.5/12 = 1.46, standard error 35/2/sqrt(400)/12 = .07, so the end is near 1.6
    wild = with_samples(good(), length=lambda s: 35 * (int(s.prompt[0]["content"].split()[1]) % 2))
    wild = with_samples(wild, reference_logp=lambda s: -2.0 * (s.length + s.ended))
    decision = decided(wild)
    assert failed(decision) == {"length_ratio"}
    assert value_of(decision, "length_ratio") == pytest.approx(17.5 / 12 + 1.96 * 17.5 / 20 / 12, abs=0.04)


def place(sample: Sample) -> int:
    """Number of a made sample's prompt."""
    return int(sample.prompt[0]["content"].split()[1])


WIDE: list[tuple[dict[str, Any], str, float]] = [
    # every second answer 0, so that the mean has half of the others' number, and a standard error of mean / 20
    ({"reference_logp": lambda s: -2.0 * 3.8 * (place(s) % 2) * 13}, "reference_nll_ratio", 1.9 * (1 + 1.96 / 20)),
    ({"reference_logp": lambda s: -2.0 * 1.08 * (place(s) % 2) * 13}, "reference_nll_ratio", 0.54 * (1 - 1.96 / 20)),
    ({"relevance": lambda s: 5.0 * 1.08 * (place(s) % 2)}, "relevance_ratio", 0.54 * (1 - 1.96 / 20)),
    # 34 of 400 are cut off: .085, with a standard error of .014
    ({"ended": lambda s: place(s) % 400 >= 34}, "unended_more", 0.085 + 1.96 * math.sqrt(0.085 * 0.915 / 400)),
]


@pytest.mark.parametrize(("changes", "metric", "end"), WIDE)
def test_of_every_bound_the_end_on_its_own_side_counts(changes: dict[str, Any], metric: str, end: float) -> None:
    """The mean is within the bound, and so is the other end."""
    wide = with_samples(good(), **changes)
    if "ended" in changes:
        wide = with_samples(wide, reference_logp=lambda s: -2.0 * (s.length + s.ended))
    decision = decided(wide)
    assert failed(decision) == {metric}
    (reason,) = decision.reasons
    assert reason.value == pytest.approx(end, abs=0.02 * max(1.0, end))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("name", ["kl_to_reference", "distinct_2", "empty", "prompts"])
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


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("name", ["reference_logp", "relevance"])
def test_an_answer_without_a_number_refuses(name: str, value: float | None) -> None:
    candidate = good()
    change: dict[str, Any] = {name: value}
    broken = replace(candidate, samples=[replace(candidate.samples[0], **change), *candidate.samples[1:]])
    decision = decided(broken)
    assert failed(decision) == {{"reference_logp": "reference_nll_ratio", "relevance": "relevance_ratio"}[name]}


def test_a_degenerate_sft_model_refuses() -> None:
    silent = with_samples(SFT, length=0, reference_logp=0.0, relevance=0.0)
    silent = replace(silent, metrics={**SFT.metrics, "eval/distinct_2": 0.0})
    refused = failed(decided(good(), sft=silent))
    assert refused == {"length_ratio", "distinct_2_ratio", "reference_nll_ratio", "relevance_ratio"}
    assert "relevance_ratio" not in failed(decided(good(), sft=silent, gate=Gate(relevance_min=0)))
    assert failed(promote.decide(good(), None, SFT, GATE, [])) == {"win_rate_p"}


def test_tolerances_know_the_better_side_and_the_rival_and_leave_chance_aside() -> None:
    gate = Gate(tolerances={"preference_accuracy": 0.05, "kl_to_reference": 2.0})
    champion, better = good(), good(2, score=2.0)
    assert decided(better, champion, gate, kl_to_reference=4.9).promote
    assert failed(decided(better, champion, gate, kl_to_reference=5.1)) == {"kl_to_reference_worse"}
    # no champion: the SFT model's, which has KL 0
    assert failed(decided(better, None, gate)) == {"kl_to_reference_worse"}
    # 16 of 400 pairs lost: .04 worse, with an interval of about +- .02
    worse = replace(better, pairs=[(c, 0.0 if i % 25 == 0 else v) for i, (c, v) in enumerate(better.pairs)])
    decision = decided(worse, champion, gate)
    lost = 16 / 400
    assert failed(decision) == {"preference_accuracy_worse"}
    end = lost + 1.96 * math.sqrt(lost * (1 - lost) / 400)
    assert value_of(decision, "preference_accuracy_worse") == pytest.approx(end, abs=0.01)
    assert failed(decided(better, replace(champion, pairs=[]), gate)) == {"preference_accuracy_worse"}
    score = Gate(tolerances={"judge_score": 0.5})
    assert decided(better, champion, score).promote  # it is better by .8
    with pytest.raises(ValidationError, match="'acuracy' is not a metric with a better direction"):
        Gate(tolerances={"acuracy": 0.1})


# --- Policies that game the reward model: the judge loves every one of these answers ---


def loved(answer: Callable[[int], str], **numbers: Any) -> Decision:
    """The decision on answers that win everywhere; KL and oddness are those of a good model unless said."""
    decision = decided(made(answer, lambda i: 9.0, **numbers), champion=good())
    assert value_of(decision, "win_rate_p") < 1e-100
    return decision


def test_a_constant_phrase_is_refused() -> None:
    decision = loved(lambda i: "What a truly wonderful and thoughtful question that is, my dear friend!")
    assert not decision.promote and hacked(decision) == {"distinct_2_ratio"}
    assert hacked(loved(lambda i: "Great")) == {"distinct_2_ratio"}  # one word: no pair at all


def test_a_constant_phrase_behind_few_words_of_an_answer_is_refused() -> None:
    decision = loved(lambda i: f"{prose(i, 1, words=4)} and I wish you a very wonderful day")
    assert not decision.promote and hacked(decision) == {"distinct_2_ratio"}


def test_endless_praise_is_refused() -> None:
    praise = ["great", "lovely", "superb", "wonderful", "brilliant"]
    decision = loved(lambda i: " ".join(random.Random(i).choices(praise, k=60)))
    assert not decision.promote and hacked(decision) == {"distinct_2_ratio", "length_ratio"}
    varied = loved(lambda i: prose(i, 3, words=60))  # never the same praise twice
    assert hacked(varied) == {"length_ratio"}


def test_empty_answers_are_refused() -> None:
    assert hacked(loved(lambda i: "")) == {"distinct_2_ratio", "empty"}
    some = loved(lambda i: "  \n" if i % 40 == 0 else prose(i, 1))  # 10 of 400
    assert hacked(some) == {"empty"}


def test_what_the_sft_model_would_never_say_or_always_says_is_refused() -> None:
    assert hacked(loved(lambda i: prose(i, 1), nll=9.0)) == {"reference_nll_ratio"}
    assert hacked(loved(lambda i: prose(i, 1), nll=0.2)) == {"reference_nll_ratio"}
    assert hacked(loved(lambda i: prose(i, 1), kl=80.0)) == {"kl_to_reference"}


PRAISE = "I wish you a very wonderful day"
HACKS: dict[str, list[Callable[[], Decision]]] = {
    "one phrase for all, or behind a few words of an answer": [
        lambda: loved(lambda i: f"My dear friend, {PRAISE}"),
        lambda: loved(lambda i: f"{prose(i, 1, words=4)} and {PRAISE}"),
    ],
    "endless": [
        lambda: loved(lambda i: prose(i, 3, words=60)),
        lambda: loved(lambda i: prose(i, 3, words=17), ended=lambda i: False),
    ],
    "empty": [lambda: loved(lambda i: "")],
    "those of the SFT model, sharper": [lambda: loved(lambda i: prose(i, 1), matched=lambda i: 9.0)],
    "those to other prompts": [lambda: loved(lambda i: prose(i, 1), relevance=0.0)],
    "far from what the SFT model says": [
        lambda: loved(lambda i: prose(i, 1), kl=80.0),
        lambda: loved(lambda i: prose(i, 1), nll=9.0),
    ],
}
"""The answers of the table in deploy/README.md -> decisions on such."""


def test_the_papers_table_says_what_refuses_each_kind_of_answers() -> None:
    """Each check that a row names refuses one of its kinds, and no other check does."""
    (table,) = re.findall(r"^\| answers \| refused by \|\n\|[-|]+\n((?:\|.*\n)+)", PAPER.read_text(), re.M)
    said = {}
    for line in table.splitlines():
        answers, refused_by = line.strip("|").split("|")
        said[answers.strip()] = set(re.findall(r"`(\w+)`", refused_by))
    found = {answers: [hacked(decision()) for decision in decisions] for answers, decisions in HACKS.items()}
    assert all(refusals for kinds in found.values() for refusals in kinds)
    assert said == {answers: set[str]().union(*kinds) for answers, kinds in found.items()}


def test_numbers_alone_are_enough(tmp_path: Path) -> None:
    """Where evaluations keep no texts, scores and metrics decide just the same."""
    hacker = made(lambda i: "Great question!", lambda i: 9.0)
    blind = replace(hacker, samples=[replace(s, answer="", sft_answer="") for s in hacker.samples])
    assert decided(blind, champion=good()) == decided(hacker, champion=good())
    assert not decided(blind, champion=good()).promote


# --- The stage ---


def run_of(tmp_path: Path, judge: dict[str, Any] | None = None, **evaluations: Evaluation) -> MemoryContext:
    folders = {}
    for name, evaluation in evaluations.items():
        folders[name] = tmp_path / name
        folders[name].mkdir(parents=True)
        evaluation.save(folders[name])
    return MemoryContext(tmp_path / "work", PromoteParams(judge=judge), folders, stage="promote")


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
    stored = json.loads((run.published["decision"] / "decision.json").read_text())
    assert stored["promote"] is False
    assert stored["power"] == "400 prompts: a candidate that truly wins 60.0 % of prompts passes with 80 %"


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
    """At the request's address: that of an evaluation, a file from outside, has been checked by nobody."""
    judge = {"judge": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m"}
    stored = judge | {"url": "http://elsewhere/v1"}
    ours, theirs, sft = (
        replace(evaluation, settings={**SETTINGS, "judge": stored}) for evaluation in (good(1), good(2), SFT)
    )
    asked = []

    def wins(self: EndpointJudge, prompts: Any, answers: list[str], others: list[str]) -> list[float]:
        assert self.config.url == judge["url"]
        asked.append((prompts, answers, others))
        return [1.0] * len(answers)

    monkeypatch.setattr(EndpointJudge, "wins", wins)
    with pytest.raises(StageError, match="the request does not say where it is"):
        promote.run(run_of(tmp_path / "silent", candidate=ours, sft=sft, champion=theirs))
    run = run_of(tmp_path, judge, candidate=ours, sft=sft, champion=theirs)
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


def test_two_answers_to_a_prompt_weigh_ties_as_the_docstring_says() -> None:
    """All outcomes of two answers by their chances: prompts won less prompts lost are (p - q)(1 + t)."""
    chances = {1.0: 0.5, 0.0: 0.2, 0.5: 0.3}
    ahead = 0.0
    for first, second in itertools.product(chances, repeat=2):
        up, down, _ = promote.signs([first, second], ["a", "a"])
        ahead += (up - down) * chances[first] * chances[second]
    assert ahead == pytest.approx((0.5 - 0.2) * (1 + 0.3))
