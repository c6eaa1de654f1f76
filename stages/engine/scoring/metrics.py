"""What the numbers of an evaluation mean: pure functions of scores, log-probs, lengths and texts. No torch."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

RIDGE = 1e-6  # keeps the logistic fit finite where wins are separated; elsewhere it moves nothing one can see
NEWTON_STEPS = 100


def wins(scores: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """1 where the score is above the baseline's, 1/2 where they are equal, else 0; one per prompt."""
    return [float(s > b) + 0.5 * float(s == b) for s, b in zip(scores, baseline, strict=True)]


def win_rate(won: Sequence[float]) -> float:
    """mean(1[s > s_sft] + 1/2 [s = s_sft]), from the output of `wins`."""
    return float(np.mean(won))


def bootstrap_interval(
    values: Sequence[float], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean by the percentile bootstrap: prompts are drawn with replacement `resamples` times."""
    value = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [value[generator.integers(0, len(value), len(value))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def length_controlled_win_rate(won: Sequence[float], length_differences: Sequence[float]) -> float:
    """sigmoid(theta) of the logistic fit win ~ theta + gamma tanh(dlen / std dlen): the win rate at equal length.

    After Dubois et al. 2024, without the terms for the prompt. Ties enter as the soft target 1/2, so that
    opposing ties and wins weigh as in the win rate. The standard deviation is the population's.
    All differences equal: length cannot explain anything, and the result is the plain win rate.
    Separated wins (all won, or won exactly where longer): the ridge picks the fit, near 1, or near 1/2.
    """
    won_N = np.asarray(won, dtype=np.float64)
    difference_N = np.asarray(length_differences, dtype=np.float64)
    spread = float(difference_N.std())
    if spread == 0.0:
        return win_rate(won)
    design_N2 = np.stack([np.ones_like(won_N), np.tanh(difference_N / spread)], axis=1)
    theta, _ = fit_logistic(design_N2, won_N)
    return float(_sigmoid(theta))


def fit_logistic(design_NK: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """Coefficients (K) of logistic regression on targets in [0, 1], by Newton's method with step halving."""
    coefficients = np.zeros(design_NK.shape[1])
    for _ in range(NEWTON_STEPS):
        chance_N = _sigmoid(design_NK @ coefficients)
        gradient = design_NK.T @ (target_N - chance_N) - RIDGE * coefficients
        weight_N = chance_N * (1 - chance_N)
        curvature = (design_NK * weight_N[:, None]).T @ design_NK + RIDGE * np.eye(len(coefficients))
        step = np.linalg.solve(curvature, gradient)
        now = _log_likelihood(design_NK, target_N, coefficients)
        while _log_likelihood(design_NK, target_N, coefficients + step) < now and np.abs(step).max() > 1e-12:
            step = step / 2
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


def _log_likelihood(design_NK: np.ndarray, target_N: np.ndarray, coefficients: np.ndarray) -> float:
    logit_N = design_NK @ coefficients
    fit = np.sum(target_N * logit_N - np.logaddexp(0, logit_N))
    return float(fit - RIDGE / 2 * coefficients @ coefficients)


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.asarray(x, dtype=np.float64)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt n); a single value has the error nan."""
    value = np.asarray(values, dtype=np.float64)
    error = value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else np.nan
    return float(value.mean()), float(error)


def distinct_2(answers: Sequence[str]) -> float:
    """Unique / all word bigrams, pooled over the answers; compare only between equal numbers of answers.

    Words are runs of letters and digits, case folded; no bigram spans two answers. No bigram at all: 0.
    """
    texts = [re.findall(r"\w+", answer.casefold()) for answer in answers]
    bigrams = [pair for words in texts for pair in itertools.pairwise(words)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def kl_to_reference(logps: Sequence[float], reference_logps: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over answers of sum_t (log pi - log pi_sft), in nats; answers are drawn from pi."""
    return mean_and_error([policy - ref for policy, ref in zip(logps, reference_logps, strict=True)])


def reference_nll(reference_logps: Sequence[float], tokens: Sequence[int]) -> float:
    """sum -log pi_sft / tokens over all answers, in nats per token; the tokens are those that were predicted."""
    return -float(np.sum(reference_logps)) / int(np.sum(tokens))


def preference_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs with log(pi / pi_sft) higher on the chosen answer, ties 1/2."""
    return win_rate(wins(chosen, rejected))


def share(flags: Sequence[bool]) -> float:
    """Share of true ones."""
    return float(np.mean(np.asarray(flags, dtype=np.float64)))
