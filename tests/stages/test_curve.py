"""The curve of the baselines and what is above it, against corners and shares worked by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stages import compare
from stages.compare import curve
from stages.compare.curve import Point, at, hull
from stages.compare.findings import findings
from stages.compare.plots import draw
from stages.compare.table import render_text
from stages.engine.scoring.evaluation_record import Evaluation
from tests.support.evaluations import ENDPOINT, SFT, N, made, settings


def point(name: str, kl: float, height: float) -> Point:
    return Point(name, kl, np.array([height - 1, height + 1]))


SHARP = [point("sft", 0, 1), point("a", 1, 2), point("b", 2, 2.2), point("c", 4, 3), point("d", 5, 2)]


def test_the_curve_is_the_least_concave_one_above_all_that_never_falls() -> None:
    # From a (1, 2) to c (4, 3) it is 2.33 at KL 2, above b; d is below c.
    assert [corner.name for corner in hull(SHARP)] == ["sft", "a", "c"]
    assert [corner.name for corner in hull([point("sft", 0, 1), point("low", 1, 0.5)])] == ["sft"]
    assert [corner.name for corner in hull([point("sft", 0, 1), point("x", 0, 2), point("y", 1, 3)])][-1] == "y"


@pytest.mark.parametrize(
    ("kl", "shares"),
    [
        (0.0, [(1.0, "sft")]),
        (0.25, [(0.75, "sft"), (0.25, "a")]),
        (1.0, [(1.0, "a")]),
        (2.0, [(2 / 3, "a"), (1 / 3, "c")]),
        (4.0, [(1.0, "c")]),
        (50.0, [(1.0, "c")]),
        (-1e-9, [(1.0, "sft")]),
    ],
)
def test_between_two_corners_it_is_their_mixture_and_beyond_the_last_as_high_as_there(
    kl: float, shares: list[tuple[float, str]]
) -> None:
    found = at(hull(SHARP), kl)
    assert [corner.name for _, corner in found] == [name for _, name in shares]
    assert [share for share, _ in found] == pytest.approx([share for share, _ in shares])


def baseline(scores: Any, kl: float) -> Evaluation:
    return made(list(scores), kl_to_reference=kl)


def test_a_gain_is_the_paired_difference_to_the_mixture_at_the_models_own_distance() -> None:
    wave = np.tile([0.0, 1.0], N // 2)
    aligned = made(list(2 + wave), kl_to_reference=3.0)
    baselines = {"T=0.5": baseline(1 + wave, 2.0), "T=0.3": baseline(1.5 + wave, 4.0)}
    comparison = compare.compare({"sft": SFT, "dpo": aligned}, baselines=baselines)
    gain = comparison.gains["dpo"]
    assert gain.against == ("T=0.5", "T=0.3") and gain.kl == 3.0
    # Halfway between both the curve is 1.25 + wave: .75 above it on every prompt, so the interval has no width.
    assert (gain.gain, gain.interval.low, gain.interval.high) == pytest.approx((0.75, 0.75, 0.75))
    assert gain.clear and "Every aligned model is clearly above" in " ".join(findings(comparison))
    row = next(row for row in comparison.table if row["model"] == "dpo")
    assert row["gain"] == pytest.approx(0.75) and "+0.75 [0.75, 0.75]" in render_text([row])


def test_a_model_on_the_curve_has_gained_nothing_and_is_marked() -> None:
    """Far above SFT, and no more than chance better than the SFT model sharpened to less than its distance."""
    noise = np.random.default_rng(0).normal(0, 1, N)
    noise -= noise.mean() + 0.01  # a gain of .01, with a standard error of 1 / sqrt(120) = .09
    comparison = compare.compare(
        {"sft": SFT, "dpo": made([2.0] * N, kl_to_reference=5.0)}, baselines={"T=0.3": baseline(2 + noise, 3.0)}
    )
    assert comparison.gains["dpo"].gain == pytest.approx(0.01)
    assert comparison.gains["dpo"].against == ("T=0.3",) and not comparison.gains["dpo"].clear
    said = " ".join(compare.text(comparison).split())
    assert "Nothing gained beyond sharpening SFT or selecting among its answers: dpo." in said
    assert "]! " in said and "T=0.3 1.99" in said
    page = compare.render_html(comparison)
    assert "Nothing gained beyond sharpening" in page and "The dashed line" in page
    assert draw(comparison.table, baselines=comparison.baselines) != draw(comparison.table)
    assert compare.as_json(comparison)["gains"][0]["clear"] is False


def test_a_nearer_model_is_held_against_what_is_as_near() -> None:
    """The same score at KL 1 is above the curve, whose height 2 is at KL 3."""
    near = made([1.5] * N, kl_to_reference=1.0)
    comparison = compare.compare({"sft": SFT, "dpo": near}, baselines={"T=0.3": baseline([2.0] * N, 3.0)})
    assert comparison.gains["dpo"].gain == pytest.approx(1.5 - 2 / 3)


def test_of_a_judge_that_compares_the_wins_over_sft_are_the_heights() -> None:
    sft = made([0.0] * N, ENDPOINT)
    always, mostly = made([1.0] * N, ENDPOINT), made([1.0] * 90 + [-1.0] * 30, ENDPOINT, kl_to_reference=0.5)
    comparison = compare.compare({"sft": sft, "dpo": always}, baselines={"best of 2": mostly})
    assert [(p.name, p.height) for p in comparison.baselines] == [("sft", 0.5), ("best of 2", 0.75)]
    assert comparison.gains["dpo"].gain == 0.25


def test_several_draws_count_as_their_mean() -> None:
    one = made([1.0, 3.0] * (N // 2))
    doubled = [
        type(s)(**{**vars(s), "draw": i % 2, "prompt": one.samples[i - i % 2].prompt})
        for i, s in enumerate(one.samples)
    ]
    assert curve.heights(doubled, {"judge": "rule"}).tolist() == [2.0] * (N // 2)


def test_where_nobody_answers_at_temperature_1_no_gain_is_claimed_and_it_says_so() -> None:
    cold = settings(temperatures=(0.7,))
    given = {
        name: Evaluation(one.metrics, [replace(s, temperature=0.7) for s in one.samples], cold)
        for name, one in {"sft": SFT, "dpo": made([2.0] * N, kl_to_reference=5.0)}.items()
    }
    comparison = compare.compare(given, baselines={"T=0.3": baseline([1.0] * N, 3.0)})
    assert not comparison.gains and not comparison.baselines
    assert "cannot be said: baselines are measured at temperature 1" in " ".join(compare.text(comparison).split())
