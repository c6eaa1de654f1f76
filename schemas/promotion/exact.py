"""The exact one-sided sign test of a win rate, and what it can detect.

A prompt is won, lost or tied; ties say nothing of the direction. Probabilities are sums of binomial terms, exact up to
float rounding.
"""

import functools
import math


def upper_tail(successes: int, trials: int, chance: float) -> float:
    """P(X >= successes) for X ~ binomial(trials, chance)."""
    if successes <= 0:
        return 1.0
    if successes > trials or chance <= 0:
        return 0.0
    if chance >= 1:
        return 1.0
    low, high, whole = math.log(chance), math.log1p(-chance), math.lgamma(trials + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * low + (trials - k) * high)
            for k in range(successes, trials + 1)
        ),
    )


def sign_test(won: int, lost: int, tied: int, minimum: float) -> float:
    """p-value of H0: "the candidate's win rate over all prompts is at most `minimum`", ties counting half.

    minimum = 1/2: H0 says that a prompt is won no more often than lost, whatever the share of ties. Given the prompts
    that are decided, wins are binomial with chance at most 1/2, so that ties are left out (Dixon and Mood 1946; Putter
    1955 shows that no way of counting them does better). Any other minimum: P(won) <= win rate <= minimum under H0,
    so that ties count as not won, which can only make the test stricter.

    It needs prompts that are independent of each other and of the choice of the candidate; their chances may differ
    (Hoeffding 1956, theorem 5: the tail of such a sum is at most the binomial's, above its mean plus 1). No prompt: 1.
    """
    return upper_tail(won, won + lost + (0 if minimum == 0.5 else tied), minimum)


@functools.lru_cache(maxsize=4096)
def wins_needed(trials: int, alpha: float, minimum: float) -> int:
    """The least number of wins whose p-value is at most alpha; trials + 1 where not even all of them are enough."""
    low, high = 0, trials + 1
    while low < high:
        middle = (low + high) // 2
        if upper_tail(middle, trials, minimum) <= alpha:
            high = middle
        else:
            low = middle + 1
    return low


def power(trials: int, truth: float, alpha: float, minimum: float) -> float:
    """Chance to pass for a candidate that wins each of `trials` prompts with chance `truth`, none tied.

    At the same win rate, ties, and several answers to a prompt that differ, make it larger.
    """
    return upper_tail(wins_needed(trials, alpha, minimum), trials, truth)


def detectable(trials: int, alpha: float, minimum: float, chance: float = 0.8) -> float | None:
    """The least true win rate that passes with `chance`, rounded up to 0.001; None where no win rate does."""
    if power(trials, 1.0, alpha, minimum) < chance:
        return None
    low, high = 0, 1000
    while low < high:
        middle = (low + high) // 2
        if power(trials, middle / 1000, alpha, minimum) >= chance:
            high = middle
        else:
            low = middle + 1
    return low / 1000
