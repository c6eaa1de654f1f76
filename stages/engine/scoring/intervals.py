"""Intervals and tests of means over prompts, each of which says what it covers. No torch.

Answers to prompts of one cluster (the same first user turn, draws of one prompt) depend on each other, so clusters are
drawn again and counted, never single answers. Shapes: N values, K rows of them, C clusters, S seeds, R resamples.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from schemas.promotion.exact import upper_tail

Covers = Literal["prompts", "seeds and prompts"]
Statistic = Callable[[np.ndarray], np.ndarray]
"""From counts_RN, how often each value is in each resample, to a number per resample (R)."""

RESAMPLES = 2000
"""Where nobody says how many."""
BLOCK = 2**22  # counts in memory at once: 32 MB
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, unless made with another level. `covers`: what was drawn again, so what another draw of it
    would change; over `prompts` alone it says nothing about another training run."""

    low: float
    high: float
    covers: Covers = "prompts"

    def contains(self, value: float) -> bool:
        """Whether a value is inside or on the edge."""
        return self.low <= value <= self.high


def groups(clusters: Sequence[str]) -> tuple[np.ndarray, int]:
    """Number of each value's cluster (N), in the order of their first appearance, and how many clusters there are."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    return np.array([numbers[name] for name in clusters], dtype=np.int64), len(numbers)


def resampled(clusters: Sequence[str], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks counts_RN of `resamples` draws of as many clusters as there are, with replacement, in all.

    The same clusters and seed give the same draws, so that statistics of one set of prompts stay paired.
    """
    number_N, count = groups(clusters)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // max(len(number_N), count))
    for start in range(0, resamples, block):
        drawn_RC = generator.multinomial(count, np.full(count, 1 / count), size=min(block, resamples - start))
        yield drawn_RC[:, number_N].astype(np.float64)


def bootstraps(
    rows: Sequence[Sequence[float] | np.ndarray],
    clusters: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = LEVEL,
) -> list[Interval]:
    """Percentile interval of the mean of each row (N) over clusters of prompts (Efron and Tibshirani 1993).

    Near its level from about 100 clusters on; with fewer it is too narrow. All rows share their resamples.
    """
    if not rows:
        return []
    value_NK = np.array(rows, dtype=np.float64).T
    blocks = resampled(clusters, resamples, seed)
    mean_RK = np.concatenate([counts_RN @ value_NK / counts_RN.sum(1, keepdims=True) for counts_RN in blocks])
    ends = np.quantile(mean_RK, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(float(low), float(high)) for low, high in ends.T]


def mean_of(values: Sequence[float] | np.ndarray) -> Statistic:
    """The mean of values (N)."""
    value_N = np.asarray(values, dtype=np.float64)
    return lambda counts_RN: counts_RN @ value_N / counts_RN.sum(1)


def bootstrap(
    values: Sequence[float] | np.ndarray | Statistic,
    clusters: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = LEVEL,
) -> Interval:
    """`bootstraps` of a single row, or of another statistic; resamples in which it is not finite are left out."""
    statistic = values if callable(values) else mean_of(values)
    found_R = np.concatenate([statistic(counts_RN) for counts_RN in resampled(clusters, resamples, seed)])
    low, high = np.quantile(found_R[np.isfinite(found_R)], [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def clustered_error(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> float:
    """Standard error of the mean of values in clusters: sqrt(C / (C - 1) sum_c (sum of residuals)^2) / N.

    Liang and Zeger 1986 for a mean; with one value per cluster it is the sample standard deviation / sqrt N. nan for a
    single cluster.
    """
    value_N, (number_N, count) = np.asarray(values, dtype=np.float64), groups(clusters)
    if count < 2:
        return math.nan
    residual_C = np.bincount(number_N, value_N - value_N.mean(), count)
    return float(np.sqrt(count / (count - 1) * np.sum(residual_C**2)) / len(value_N))


def over_seeds(values_SN: Sequence[Sequence[float]], clusters: Sequence[str], *, level: float = LEVEL) -> Interval:
    """Interval of the mean over seeds and prompts, where every seed's model has answered the same prompts.

    Two parts, each with its own t quantile, added in squares: the standard error of the seeds' means with S - 1 degrees
    of freedom, and that of the prompts' means over the seeds with C - 1. A percentile bootstrap over so few seeds would
    be far too narrow: of three it misses a third of their variance, and the t quantile. Needs two seeds.
    """
    from scipy.special import stdtrit  # late: half a second, and most comparisons have one seed

    value_SN = np.asarray(values_SN, dtype=np.float64)
    seeds, (_, count) = len(value_SN), groups(clusters)
    if seeds < 2:
        raise ValueError("one seed says nothing about others")
    parts = [(float(value_SN.mean(1).std(ddof=1)) / math.sqrt(seeds), seeds)]
    if count > 1:
        parts.append((clustered_error(value_SN.mean(0), clusters), count))
    reach = math.hypot(*(float(stdtrit(size - 1, (1 + level) / 2)) * error for error, size in parts))
    mean = float(value_SN.mean())
    return Interval(mean - reach, mean + reach, "seeds and prompts")


def signs(differences: Sequence[float], clusters: Sequence[str]) -> tuple[int, int, int]:
    """In how many clusters the differences sum to more than 0, to less, and to 0."""
    number_N, count = groups(clusters)
    total_C = np.bincount(number_N, np.asarray(differences, dtype=np.float64), count)
    up, down = int(np.sum(total_C > 1e-9)), int(np.sum(total_C < -1e-9))
    return up, down, count - up - down


def sign_test(differences: Sequence[float], clusters: Sequence[str]) -> float:
    """Two-sided p-value of the exact sign test over clusters: that a sum of differences is above 0 as often as below.

    Sums of 0 are left out (Dixon and Mood 1946). It holds for any number of clusters.
    """
    up, down, _ = signs(differences, clusters)
    return two_sided(min(up, down), up + down)


def two_sided(fewer: int, trials: int) -> float:
    """min(1, 2 P(X <= fewer)) for X ~ binomial(trials, 1/2)."""
    return min(1.0, 2 * upper_tail(trials - fewer, trials, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order (Holm 1979): those below alpha are jointly wrong with chance <= alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def apart(difference: float, parts: Sequence[tuple[float, int]], count: int) -> bool:
    """Whether two of `count` means differ at the level of 5 %, also where the two were chosen by their height.

    parts: the error of the difference as independent variances, each with its degrees of freedom. By the studentized
    range with Welch's degrees of freedom (Games and Howell 1976): if all means are equal, any two at all are told apart
    in at most about 5 % of cases, whatever their spreads. Without any error nothing can be said.
    """
    total = sum(variance for variance, _ in parts)
    if not total > 0:
        return False
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    return abs(difference) > _range_quantile(count, math.floor(4 * freedom) / 4) * math.sqrt(total / 2)


@cache
def _range_quantile(count: int, freedom: float) -> float:
    """Of the range of `count` normal means over their estimated standard error, 95 %."""
    from scipy.stats import studentized_range  # late: seconds, and most comparisons have one seed

    return float(studentized_range.ppf(LEVEL, count, freedom))
