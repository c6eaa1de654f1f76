"""Intervals and tests over clusters of prompts, against formulas worked here and simulated coverage."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from stages.engine.scoring.evaluation_record import cluster_of
from stages.engine.scoring.intervals import (
    BLOCK,
    Interval,
    bootstrap,
    clustered_error,
    holm,
    over_seeds,
    resampled,
    sign_test,
)


def alone(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def test_of_two_prompts_it_is_the_enumerated_one() -> None:
    # Resamples of {0, 1}: mean 0 and 1 with chance 1/4 each, 1/2 with chance 1/2.
    assert bootstrap([0.0, 1.0], alone(2), resamples=2000, seed=0) == Interval(0.0, 1.0, "prompts")
    assert bootstrap([0.0, 1.0], alone(2), resamples=2000, seed=0, level=0.4) == Interval(0.5, 0.5)
    # As one cluster there is nothing to draw anew.
    assert bootstrap([0.0, 1.0], ["a", "a"], resamples=100, seed=0) == Interval(0.5, 0.5)


def test_it_is_seeded_and_near_the_normal_one() -> None:
    won = [1.0] * 120 + [0.0] * 80
    once, again, other = (bootstrap(won, alone(200), resamples=4000, seed=seed) for seed in (1, 1, 2))
    assert once == again != other
    error = math.sqrt(0.6 * 0.4 / 200)
    assert (once.low, once.high) == pytest.approx((0.6 - 1.96 * error, 0.6 + 1.96 * error), abs=0.006)
    assert once.contains(0.6) and not once.contains(0.5)


def test_what_goes_together_is_drawn_together() -> None:
    """Each value three times in a cluster says what it says once."""
    values = np.random.default_rng(0).normal(size=150)
    clusters = [f"c{i}" for i in range(150) for _ in range(3)]
    single = bootstrap(values.tolist(), alone(150), resamples=500, seed=3)
    thrice = bootstrap(np.repeat(values, 3).tolist(), clusters, resamples=500, seed=3)
    assert (thrice.low, thrice.high) == pytest.approx((single.low, single.high), abs=1e-12)
    expected = values.std(ddof=1) / math.sqrt(150)
    assert clustered_error(values, alone(150)) == pytest.approx(expected)
    assert clustered_error(np.repeat(values, 3), clusters) == pytest.approx(expected)
    # Unequal sizes, by the formula: residuals of [0, 1, 5] with mean 2 sum to -3 and 3 in their clusters.
    assert clustered_error([0.0, 1.0, 5.0], ["a", "a", "b"]) == pytest.approx(math.sqrt(2 / 1 * (9 + 9)) / 3)
    assert math.isnan(clustered_error([1.0, 2.0], ["a", "a"]))


def test_resamples_come_in_blocks_of_as_many_clusters_as_there_are() -> None:
    clusters = ["a", "b", "b", "c"] * 1000
    blocks = list(resampled(clusters, 1200, seed=0))
    assert sum(map(len, blocks)) == 1200 and len(blocks) > 1 and max(block.size for block in blocks) <= BLOCK
    first = blocks[0]
    assert (first[:, 1] == first[:, 2]).all()  # one cluster, one count
    assert (first[:, :4] @ np.array([1, 0.5, 0.5, 1]) == 3).all()


def test_one_prompts_turns_and_system_message_make_its_cluster() -> None:
    system, first = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
    answer, more = {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}
    assert cluster_of([first]) == cluster_of([first, answer, more])
    assert cluster_of([first]) != cluster_of([system, first]) == cluster_of([system, first, answer, more])
    assert cluster_of([first]) != cluster_of([more])
    assert cluster_of([{"role": "sha256", "content": "abc"}]) == "abc"


def test_over_seeds_it_covers_what_it_says() -> None:
    """Three seeds, 60 prompts, an effect of each and of both, drawn 1000 times: the truth, 0, is inside 95 %."""
    draw = np.random.default_rng(0)
    inside = narrow = 0
    for _ in range(1000):
        values = draw.normal(0, 1, (3, 1)) + draw.normal(0, 1, (1, 60)) + draw.normal(0, 1, (3, 60))
        interval = over_seeds(values.tolist(), alone(60))
        assert interval.covers == "seeds and prompts"
        inside += interval.contains(0.0)
        narrow += abs(values.mean()) <= 1.96 * clustered_error(values.mean(0), alone(60))
    assert 0.93 <= inside / 1000 <= 0.97
    assert narrow / 1000 < 0.6  # over the prompts alone it is far from that
    with pytest.raises(ValueError, match="one seed"):
        over_seeds([[1.0, 2.0]], alone(2))
    assert over_seeds([[1.0, 1.0], [1.0, 1.0]], alone(2)) == Interval(1.0, 1.0, "seeds and prompts")


def enumerated(differences: Sequence[float]) -> float:
    """P(|W - L| at least as large) over all signs of the differences that are not 0."""
    signs = [d for d in differences if d]
    seen = abs(sum(np.sign(signs)))
    every = [abs(sum(flips)) >= seen for flips in itertools.product((-1, 1), repeat=len(signs))]
    return sum(every) / len(every)


@pytest.mark.parametrize("differences", [[1, 1, 1, 1, -1, 0], [0.5, -0.5], [1] * 9, [0, 0], [1, 1, 1, -1, -1, -1, -1]])
def test_the_sign_test_is_the_enumerated_one(differences: list[float]) -> None:
    assert sign_test(differences, alone(len(differences))) == pytest.approx(enumerated(differences))


def test_the_sign_test_counts_clusters() -> None:
    assert sign_test([1.0, 1.0, -0.5, -1.0], ["a", "a", "a", "b"]) == 1.0  # one won, one lost
    assert sign_test([1.0] * 20, ["a"] * 20) == 1.0


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .6: times 4, 3, 2, 1, never below the one before.
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    # .024 x 1 is below .02 x 2 before it: a larger p is never adjusted to a smaller one.
    assert holm([0.024, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
