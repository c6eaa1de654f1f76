"""What the numbers of an evaluation mean: pure functions of scores, log-probs, lengths and texts. No torch."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from stages.engine.scoring.intervals import Interval, bootstrap

RIDGE = 1e-6  # keeps the logistic fit finite where wins are separated; elsewhere it moves nothing one can see
LENGTH_PRIOR = 1.0
"""Standard deviation of the length effect's prior, N(0, 1): in logits from equal length to far longer."""
SHIFT_MAX = 1.5
"""Mean length difference, in standard deviations, beyond which length and the model cannot be told apart."""
NEWTON_STEPS = 100


def wins(scores: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """1 where the score is above the baseline's, 1/2 where they are equal, else 0; one per prompt."""
    return [float(s > b) + 0.5 * float(s == b) for s, b in zip(scores, baseline, strict=True)]


def win_rate(won: Sequence[float]) -> float:
    """mean(1[s > s_sft] + 1/2 [s = s_sft]), from the output of `wins`."""
    return float(np.mean(won))


def length_controlled_win_rate(
    won: Sequence[float], length_differences: Sequence[float], clusters: Sequence[str], *, resamples: int, seed: int
) -> tuple[float, Interval] | None:
    """sigmoid(theta) of the logistic fit win ~ theta + gamma tanh(dlen / std dlen), and its bootstrap interval.

    The win rate at equal length, after Dubois et al. 2024 without the terms for the prompt. What identifies gamma there
    (further models of many lengths) is not at hand, so gamma has the prior N(0, LENGTH_PRIOR^2); theta has none. Ties
    enter as the soft target 1/2, so that opposing ties and wins weigh as in the win rate. The standard deviation is the
    population's. The interval is over clusters of prompts, with the design as it is.

    None where the lengths have shifted together, |mean dlen| > SHIFT_MAX std dlen: then the fit would tell from few
    answers, or from none, how all would have fared at equal length. All lengths equal: the plain win rate.
    """
    won_N = np.asarray(won, dtype=np.float64)
    difference_N = np.asarray(length_differences, dtype=np.float64)
    spread = float(difference_N.std())
    if abs(difference_N.mean()) > SHIFT_MAX * spread:
        return None
    scaled_N = np.tanh(difference_N / spread) if spread > 0 else np.zeros_like(difference_N)
    design_N2 = np.stack([np.ones_like(won_N), scaled_N], axis=1)
    precision = np.array([RIDGE, LENGTH_PRIOR**-2])

    def rates(counts_RN: np.ndarray) -> np.ndarray:
        return _sigmoid(fit_logistic(design_N2, won_N, counts_RN, precision)[:, 0])

    interval = bootstrap(rates, clusters, resamples=resamples, seed=seed)
    return float(rates(np.ones((1, len(won_N))))[0]), interval


def fit_logistic(
    design_NK: np.ndarray, target_N: np.ndarray, weights_RN: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """Coefficients (R, K) of R logistic regressions on targets in [0, 1], each with weights of its own.

    Priors are N(0, 1 / precision), K of them. By Newton's method; steps are cut to 2, since a longer one may overshoot.
    """
    coefficients_RK = np.zeros((len(weights_RN), design_NK.shape[1]))
    for _ in range(NEWTON_STEPS):
        chance_RN = _sigmoid(coefficients_RK @ design_NK.T)
        gradient_RK = (weights_RN * (target_N - chance_RN)) @ design_NK - precision * coefficients_RK
        weight_RN = weights_RN * chance_RN * (1 - chance_RN)
        curvature_RKK = np.einsum("rn,nk,nl->rkl", weight_RN, design_NK, design_NK, optimize=True) + np.diag(precision)
        step_RK = np.linalg.solve(curvature_RKK, gradient_RK[..., None])[..., 0].clip(-2, 2)
        coefficients_RK = coefficients_RK + step_RK
        if np.abs(step_RK).max() < 1e-9:
            break
    return coefficients_RK


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


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


def reference_nll(reference_logps: Sequence[float], tokens: Sequence[int]) -> float:
    """sum -log pi_sft / tokens over all answers, in nats per token; the tokens are those that were predicted."""
    return -float(np.sum(reference_logps)) / int(np.sum(tokens))


def preference_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs with log(pi / pi_sft) higher on the chosen answer, ties 1/2."""
    return win_rate(wins(chosen, rejected))


def share(flags: Sequence[bool]) -> float:
    """Share of true ones."""
    return float(np.mean(np.asarray(flags, dtype=np.float64)))
