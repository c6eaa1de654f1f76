"""Who beats whom: pairs on the same prompts, ranks and words, against counts and enumerations worked here."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import StageError
from stages import compare
from stages.compare.findings import COVERS, findings
from stages.compare.head_to_head import cell, logged, matrix, overoptimised, ranked, sentence
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.scoring.intervals import bootstrap, two_sided
from tests.support.context import MemoryContext
from tests.support.evaluations import ENDPOINT, SFT, N, made, settings

BELOW, ABOVE = made([1.0] * N), made([2.0] * 80 + [0.5] * 40)  # both beat SFT on every prompt


def test_both_win_always_against_sft_and_one_beats_the_other() -> None:
    """What a win rate against SFT cannot tell apart: 100 % against 100 %, and head to head 80 of 120."""
    duels = matrix({"below": BELOW, "above": ABOVE, "sft": SFT}, 1.0)
    duel = duels["above", "below"]
    assert duel.win_rate == pytest.approx(80 / 120) and duel.clear and duel.beats
    won = [1.0] * 80 + [0.0] * 40
    expected = bootstrap(won, [s.cluster for s in SFT.samples], resamples=500, seed=0)
    assert duel.rate and (duel.rate.low, duel.rate.high) == pytest.approx((expected.low, expected.high))
    assert duel.difference == pytest.approx((80 * 1.0 - 40 * 0.5) / 120)
    # Three pairs: two with 120 of 120 come first, so this one's p is not multiplied.
    assert duel.p == pytest.approx(sum(math.comb(120, k) for k in range(41)) * 2 / 2**120)
    assert duel.adjusted_p == pytest.approx(duel.p)
    assert duels["above", "sft"].adjusted_p == pytest.approx(3 * 2 / 2**120)
    assert ranked(duels, ["below", "above"], {"below": 9.0, "above": 0.0}) == ["above", "below"]
    assert sentence(duels["below", "above"]) == sentence(duel) and sentence(duel).startswith(
        "above beats below 67 % [5"
    )
    assert cell(duel).endswith("*") and cell(duels["below", "above"]).startswith("33 %")
    said = findings(compare.compare({"sft": SFT, "below": BELOW, "above": ABOVE}))
    assert said[0].startswith("Head to head: above beats below 67 %") and said[-1] == COVERS
    assert said[1] == "Clearly better than SFT: all aligned models."
    assert "above is clearly better than SFT." in findings(compare.compare({"sft": SFT, "above": ABOVE}))


def test_the_draws_of_a_prompt_count_once_and_resamples_have_the_evaluations_seed() -> None:
    """Two draws to each of 60 prompts: 40 prompts won and 20 lost, not 80 and 40."""

    def twice(evaluation: Evaluation) -> Evaluation:
        first = [evaluation.samples[i - i % 2] for i in range(N)]
        samples = [
            replace(sample, prompt=one.prompt, cluster=one.cluster, draw=i % 2)
            for i, (sample, one) in enumerate(zip(evaluation.samples, first, strict=True))
        ]
        return replace(evaluation, samples=samples, settings=settings() | {"samples_per_prompt": 2, "seed": 5})

    duel = matrix({"above": twice(ABOVE), "below": twice(BELOW)}, 1.0)["above", "below"]
    assert duel.p == pytest.approx(2 * sum(math.comb(60, k) for k in range(21)) / 2**60)
    won, clusters = [1.0] * 80 + [0.0] * 40, [str(i // 2) for i in range(N)]
    seeded, other = (bootstrap(won, clusters, resamples=500, seed=seed) for seed in (5, 0))
    assert duel.rate == seeded != other


def test_who_loses_to_the_first_and_to_whom_the_first_loses_is_told_apart() -> None:
    """c is above a and b on 76 of 120 prompts and below both on 44; a is above b on all: by mean rates a is first.

    a: (44/120 + 1) / 2 = .68, c: 76/120 = .63; p of 44 of 120 is below .05 / 6.
    """
    a, b, c = made([2.0] * N), made([1.0] * N), made([3.0] * 76 + [0.5] * 44)
    assert 6 * two_sided(44, N) < 0.05
    said = findings(compare.compare({"sft": SFT, "a": a, "b": b, "c": c}))[0]
    assert said.startswith("Head to head: a beats b 100 % [100, 100]; a loses against c 37 % [")


def test_only_models_that_are_clearly_better_than_sft_are_counted_as_such_at_each_temperature() -> None:
    def both(first: list[float], second: list[float]) -> Evaluation:
        one = made(first)
        colder = [replace(sample, temperature=0.3) for sample in made(second).samples]
        return replace(one, samples=[*one.samples, *colder], settings=settings(temperatures=(1.0, 0.3)))

    up, down, level = [1.0] * N, [-1.0] * N, [1.0, -1.0] * (N // 2)
    given = {"sft": both([0.0] * N, [0.0] * N), "dpo": both(up, down), "kto": both(down, up), "ppo": both(level, level)}
    assert "Clearly better than SFT: dpo, of 3 aligned models; at temperature 0.3: kto." in findings(
        compare.compare(given)
    )


def test_seen_from_the_other_side_all_is_turned() -> None:
    duels = matrix({"below": BELOW, "above": ABOVE}, 1.0)
    one, other = duels["above", "below"], duels["below", "above"]
    assert one.rate and other.rate and one.gap and other.gap
    assert (other.win_rate, other.difference) == pytest.approx((1 - (one.win_rate or 0), -(one.difference or 0)))
    assert (other.rate.low, other.rate.high) == pytest.approx((1 - one.rate.high, 1 - one.rate.low))
    assert (other.gap.low, other.gap.high) == (-one.gap.high, -one.gap.low)
    assert other.clear and not other.beats and other.turned().beats


def test_many_pairs_make_a_difference_less_clear() -> None:
    """71 of 120 has p = .055 ... 73 .022: clear as the only pair, not as one of six."""
    close = {"a": made([1.0] * N), "b": made([1.5] * 73 + [0.5] * 47)}
    assert two_sided(47, 120) < 0.05 < 6 * two_sided(47, 120)
    assert matrix(close, 1.0)["b", "a"].clear
    level = {f"c{i}": made([1.0 + 0.1 * (-1) ** (j + i) for j in range(N)]) for i in range(2)}
    crowd = matrix({**close, **level}, 1.0)
    duel = crowd["b", "a"]
    assert not duel.clear and duel.rate is not None and duel.rate.low > 0.5, "the interval is of this pair alone"
    p = 6 * two_sided(47, 120)
    assert sentence(duel).startswith("cannot tell b from a apart: 61 % [")
    assert sentence(duel).endswith(f"], p {p:.2f} after Holm's correction")
    assert "Holm" not in sentence(matrix(close, 1.0)["b", "a"])


def test_equal_models_cannot_be_told_apart() -> None:
    said = findings(compare.compare({"sft": SFT, "dpo": BELOW, "kto": BELOW}))
    assert said[0] == "Head to head: cannot tell dpo from kto 50 % [50, 50] apart."


def test_the_highest_reward_with_a_clearly_lower_score_is_pointed_at() -> None:
    gamed = made([1.0] * N, reward_score=5.0)
    better = made([1.5] * 90 + [0.8] * 30, reward_score=2.0)
    comparison = compare.compare({"sft": SFT, "ppo": gamed, "dpo": better})
    (line,) = [line for line in findings(comparison) if "over-optimised" in line]
    assert line.startswith("ppo has the highest reward score, but dpo is judged higher by 0.3")
    assert line in " ".join(compare.text(comparison).split())
    level = compare.compare({"sft": SFT, "ppo": gamed, "dpo": made([1.5] * 60 + [0.5] * 60, reward_score=2.0)})
    assert overoptimised(level.first_duels, level.table) == ""
    best = compare.compare({"sft": SFT, "ppo": made([1.0] * N, reward_score=1.0), "dpo": better})
    assert overoptimised(best.first_duels, best.table) == ""


def test_at_each_temperature_equal_meets_equal() -> None:
    def both(first: float, second: float) -> Evaluation:
        one, other = made([first] * N), made([second] * N)
        colder = [Sample(**{**vars(sample), "temperature": 0.3}) for sample in other.samples]
        return Evaluation(one.metrics, [*one.samples, *colder], settings(temperatures=(1.0, 0.3)))

    comparison = compare.compare({"sft": both(0, 0), "dpo": both(2, 1), "ppo": both(1, 2)})
    assert list(comparison.duels) == [1.0, 0.3]
    assert comparison.duels[1.0]["dpo", "ppo"].win_rate == 1.0 and comparison.duels[0.3]["dpo", "ppo"].win_rate == 0.0
    values = logged(comparison.duels[1.0], first=True) | logged(comparison.duels[0.3], first=False)
    assert values["eval/dpo/vs_ppo/win_rate"] == 1.0 == values["eval/dpo/vs_ppo/win_rate_low"]
    assert values["eval/dpo/vs_ppo/t0.3/win_rate"] == 0.0 and values["eval/ppo/vs_dpo/win_rate_high"] == 0.0
    assert values["eval/dpo/vs_ppo/score_difference"] == 1.0


def test_a_judge_that_compares_is_asked_about_aligned_pairs_alone() -> None:
    given = {name: made([1.0] * N, ENDPOINT) for name in ("base", "sft", "dpo", "kto")}
    asked = []

    def ask(names: tuple[str, str], samples: Sequence[Sample], others: Sequence[Sample]) -> list[float]:
        asked.append(names)
        return [1.0] * len(samples)

    duels = matrix(given, 1.0, ask)
    assert asked == [("dpo", "kto")] and duels["kto", "dpo"].win_rate == 0.0 and duels["dpo", "kto"].gap is None
    assert duels["dpo", "sft"].win_rate == 1.0 == 1 - (duels["sft", "dpo"].win_rate or 0)  # asked by the evaluation
    assert duels["base", "dpo"].win_rate is None and "not asked" in duels["base", "dpo"].reason
    asked.clear()
    matrix({f"m{i}": made([1.0] * N, ENDPOINT) for i in range(6)}, 1.0, ask)
    assert len(asked) == 15  # of six, every pair
    crowd = {f"m{i}": made([1.0] * N, ENDPOINT) for i in range(7)} | {"best": made([1.0] * N, ENDPOINT)}
    crowd |= {name: made([1.0] * 60 + [-1.0] * 60, ENDPOINT) for name in crowd if name != "best"}
    asked.clear()
    matrix(crowd, 1.0, ask)
    assert len(asked) == 7 and all("best" in pair for pair in asked)  # of 28 pairs


def test_without_texts_the_reason_stands_where_the_number_would() -> None:
    def ask(*given: Any) -> list[float]:
        raise StageError("dpo's evaluation holds no answers.")

    given = {name: made([1.0] * N, ENDPOINT) for name in ("sft", "dpo", "kto")}
    comparison = compare.compare(given, ask=ask)
    duel = comparison.first_duels["dpo", "kto"]
    assert duel.win_rate is None and cell(duel) == "-" and "holds no answers" in sentence(duel)
    assert findings(comparison)[0] == "Which aligned model is best cannot be said: dpo's evaluation holds no answers."
    assert "eval/dpo/vs_kto/win_rate" not in logged(comparison.first_duels, first=True)

    def once(names: tuple[str, str], samples: Sequence[Sample], others: Sequence[Sample]) -> list[float]:
        return [1.0] * N if "ppo" in names else ask()

    some = compare.compare({**given, "ppo": made([1.0] * N, ENDPOINT)}, ask=once)
    known = [other for (one, other), duel in some.first_duels.items() if one == "dpo" and duel.win_rate is not None]
    assert sorted(known) == ["ppo", "sft"]
    assert findings(some)[0].startswith("Which aligned model is best cannot be said")


def test_where_most_prompts_and_the_win_rate_disagree_nobody_is_ahead() -> None:
    """One of two answers won and one tied on 75 prompts, both lost on 45: more prompts won, more answers lost."""
    own = [2.0, 1.0] * 75 + [0.0, 0.0] * 45
    two = [Sample(**vars(s) | {"draw": i % 2, "cluster": str(i // 2)}) for i, s in enumerate([*SFT.samples] * 2)]
    ahead = [replace(s, score=score) for s, score in zip(two, own, strict=True)]
    level = [replace(s, score=1.0) for s in two]
    given = {"a": Evaluation({}, ahead, settings()), "b": Evaluation({}, level, settings())}
    duel = matrix(given, 1.0)["a", "b"]
    assert two_sided(45, 120) < 0.01  # what the signs alone would say
    assert duel.win_rate == pytest.approx(75 * 0.75 / 120)  # below one half
    assert duel.p == 1.0 and not duel.clear


def test_the_stage_publishes_every_pair_and_logs_it(tmp_path: Path) -> None:
    folders = {}
    for name, evaluation in {"sft": SFT, "dpo": ABOVE, "kto": BELOW}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        evaluation.save(folders[name])
    run = MemoryContext(tmp_path, {}, folders, stage="compare")
    final = compare.run(run)
    written = json.loads((run.published["comparison"] / "comparison.json").read_text())
    pairs = {(pair["model"], pair["other"]): pair for pair in written["pairs"]}
    assert set(pairs) == set(itertools.combinations(("dpo", "kto", "sft"), 2))
    assert pairs["dpo", "kto"]["win_rate"] == final["eval/dpo/vs_kto/win_rate"] == pytest.approx(80 / 120)
    assert pairs["dpo", "kto"]["rate"]["covers"] == "prompts" and pairs["dpo", "kto"]["clear"]
    assert [row["model"] for row in json.loads((run.published["comparison"] / "table.json").read_text())] == [
        "sft",
        "dpo",
        "kto",
    ]
    assert written["covers"] == COVERS and written["best"] == ["dpo"]  # which beats kto
