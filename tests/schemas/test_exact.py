"""The exact sign test against sums of binomial coefficients, and the gate's power at its defaults."""

import math

import pytest

from schemas.promotion import Gate, exact


def test_the_tail_is_the_sum_of_binomial_terms() -> None:
    for trials, successes in ((10, 7), (31, 16), (400, 232)):
        tail = sum(math.comb(trials, k) for k in range(successes, trials + 1)) / 2**trials
        assert exact.upper_tail(successes, trials, 0.5) == pytest.approx(tail, rel=1e-9)
    assert exact.upper_tail(2, 3, 0.6) == pytest.approx(3 * 0.6**2 * 0.4 + 0.6**3)
    assert (exact.upper_tail(0, 5, 0.5), exact.upper_tail(6, 5, 0.5), exact.upper_tail(1, 5, 0.0)) == (1, 0, 0)


def test_ties_are_left_out_at_one_half_and_count_as_not_won_elsewhere() -> None:
    assert exact.sign_test(8, 2, 90, 0.5) == exact.upper_tail(8, 10, 0.5)
    assert exact.sign_test(8, 2, 5, 0.6) == exact.upper_tail(8, 15, 0.6)
    assert exact.sign_test(0, 0, 400, 0.5) == 1.0


def test_a_true_six_tenths_passes_one_look_at_the_default_size() -> None:
    gate = Gate()
    chance = exact.power(gate.prompts_min, 0.6, gate.alpha, gate.win_rate_min)
    assert gate.alpha == pytest.approx(0.05 / 53) and chance >= 0.8
    needed = exact.wins_needed(400, gate.alpha, 0.5)
    assert exact.upper_tail(needed, 400, 0.5) <= gate.alpha < exact.upper_tail(needed - 1, 400, 0.5)
    # against another minimum the tail is that minimum's
    needed = exact.wins_needed(100, 0.05, 0.6)
    assert exact.upper_tail(needed, 100, 0.6) <= 0.05 < exact.upper_tail(needed - 1, 100, 0.6)
    assert exact.detectable(400, gate.alpha, 0.5) == 0.6 and exact.detectable(5, gate.alpha, 0.5) is None
    assert gate.power(400) == "400 prompts: a candidate that truly wins 60.0 % of prompts passes with 80 %"
