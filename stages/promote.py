"""Stage `promote`: may the candidate take the champion's place? Decides, with reasons; touches no registry."""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from schemas.errors import refuse
from schemas.promotion import BETTER, Check, Decision, Gate, PromoteParams, exact
from stages.engine.scoring import intervals, metrics
from stages.engine.scoring.evaluation_record import Evaluation, Sample, check_comparable
from stages.engine.scoring.intervals import RESAMPLES, Interval, Statistic, bootstrap, mean_of
from stages.engine.scoring.paired import scores_alone, wins_between
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

Z = 1.959964
"""Half width of a 95 % interval in standard errors."""


def decide(
    candidate: Evaluation, champion: Evaluation | None, sft: Evaluation, gate: Gate, won: Sequence[float]
) -> Decision:
    """Promote if every bound of the gate holds; a missing or non-finite number fails its bound.

    `won`: per answer of the candidate, 1 where it beats the rival's, 1/2 for a tie, else 0. The rival is the champion,
    or the SFT model where there is no champion yet; tolerances are measured against it too. What shows that a policy
    games its reward model is measured against the SFT model and against the champion, each on its own: against the
    champion alone the bounds could be overstepped little by little, against the SFT model alone they move with it.
    """
    rival = sft if champion is None else champion
    against = "sft" if champion is None else "champion"
    clusters = [sample.cluster for sample in candidate.first]
    up, down, tied = won_lost = signs(won, clusters) if won else (0, 0, 0)
    own, alpha = candidate.metrics, gate.alpha
    beaten = f"{up} prompts won, {down} lost, {tied} tied against {against}: "
    beaten += f"the chance of that at a true win rate of {gate.win_rate_min:g}"
    # Of: the candidate is no better than the SFT model at the temperature that makes it as sharp.
    sharp = [sample.matched_win for sample in candidate.first if sample.matched_win is not None]
    matched = bool(sharp) and len(sharp) == len(candidate.first)
    matched_p = exact.sign_test(*signs(sharp, clusters), gate.win_rate_min) if matched else None
    kl, error = own.get("eval/kl_to_reference"), own.get("eval/kl_to_reference_se")
    upper_kl = None if kl is None or error is None else kl + Z * error  # of the 95 % interval
    checks = [
        at_most("win_rate_p", exact.sign_test(*won_lost, gate.win_rate_min), alpha, beaten),
        at_most("matched_win_rate_p", matched_p, alpha, "sft made as sharp as the candidate, beaten"),
        at_most("kl_to_reference", upper_kl, gate.kl_max, "nats per answer from sft, upper end"),
        at_most("empty", own.get("eval/empty"), gate.empty_max, "share of empty answers"),
        at_least("prompts", own.get("eval/prompts"), gate.prompts_min, "prompts answered"),
        *bounds(candidate, sft, gate, "", "sft's"),
        *(bounds(candidate, champion, gate, "_champion", "the champion's") if champion is not None else ()),
        *(worsening(name, candidate, rival, allowed, against) for name, allowed in sorted(gate.tolerances.items())),
    ]
    return Decision(
        promote=all(check.passed for check in checks),
        against=against,
        checks=checks,
        alpha=alpha,
        decided=won_lost[0] + won_lost[1],
        power=gate.power(len(set(clusters))),
    )


# --- better than the rival, by more than chance and sharpness ---


def signs(won: Sequence[float], clusters: Sequence[str]) -> tuple[int, int, int]:
    """How many clusters of prompts are won, lost and tied, by the mean over their answers.

    A sign per cluster: several answers to a prompt, and prompts of one first turn, are not independent of each other.
    So what is tested is whether more prompts are won than lost. With one answer to a prompt, or two and no ties, that
    is whether the win rate over answers is above 1/2, whatever differs between prompts. Else the two may differ: with
    chances p, q, t to win, lose and tie, two answers win a prompt more often than they lose it by (p - q)(1 + t), so
    that prompts with many ties weigh more; of more answers the more frequent winner counts.
    """
    return intervals.signs([win - 0.5 for win in won], clusters)


# --- bounds against a model's answers to the same prompts ---


def bounds(candidate: Evaluation, other: Evaluation, gate: Gate, suffix: str, whose: str) -> Iterator[Check]:
    """The bounds against one model: at the unfavourable ends of paired intervals, but for distinct-2.

    Distinct-2 is no mean over prompts, and a bootstrap, which draws prompts twice, lowers it: there the number counts.
    """

    def ratio(value: Callable[[Sample], float | None], per: Callable[[Sample], float] = lambda sample: 1.0) -> Interval:
        return ratio_interval(
            [[value(s) for s in one.first] for one in (candidate, other)],
            [[per(s) for s in one.first] for one in (candidate, other)],
            clusters,
        )

    clusters = [sample.cluster for sample in candidate.first]
    length = ratio(lambda s: float(s.length))
    yield at_most(f"length_ratio{suffix}", length.high, gate.length_ratio_max, f"length over {whose}, upper end")
    own, theirs = candidate.metrics.get("eval/distinct_2"), other.metrics.get("eval/distinct_2")
    variety = None if own is None or not theirs else own / theirs
    yield at_least(f"distinct_2_ratio{suffix}", variety, gate.distinct_2_min, f"variety over {whose}")
    nll, meaning = ratio(surprise, lambda s: float(s.length + s.ended)), f"oddness to sft over that of {whose} answers"
    yield at_least(f"reference_nll_ratio{suffix}", nll.low, gate.reference_nll_min, f"{meaning}, lower end")
    yield at_most(f"reference_nll_ratio{suffix}", nll.high, gate.reference_nll_max, f"{meaning}, upper end")
    cut = difference_interval(
        [float(not s.ended) for s in candidate.first], [float(not s.ended) for s in other.first], clusters
    )
    yield at_most(f"unended_more{suffix}", cut.high, gate.unended_more_max, f"share cut off above {whose}, upper end")
    if gate.relevance_min > 0:
        tied_to = ratio(lambda s: s.relevance)
        meaning = f"what the answers tell of their prompts, over {whose}, lower end"
        yield at_least(f"relevance_ratio{suffix}", tied_to.low, gate.relevance_min, meaning)


def surprise(sample: Sample) -> float | None:
    """-log pi_sft of the answer."""
    return None if sample.reference_logp is None else -sample.reference_logp


NOWHERE = Interval(math.nan, math.nan)


def ratio_interval(
    values: Sequence[Sequence[float | None]], weights: Sequence[Sequence[float]], clusters: Sequence[str]
) -> Interval:
    """95 % interval of (sum of values / sum of weights) of the first model over the second's, paired over clusters.

    nan where a number is missing, or the second model's is not above 0 or not clearly so: there is no ratio.
    """
    if any(value is None for side in values for value in side) or not clusters:
        return NOWHERE
    means = [
        quotient(value, weight) for value, weight in zip(np.asarray(values, dtype=np.float64), weights, strict=True)
    ]
    ones = np.ones((1, len(clusters)))
    if not all(np.isfinite(mean(ones)).all() for mean in means) or means[1](ones)[0] <= 0:
        return NOWHERE
    if bootstrap(means[1], clusters, resamples=RESAMPLES, seed=0).low <= 0:
        return NOWHERE
    return bootstrap(lambda counts_RN: means[0](counts_RN) / means[1](counts_RN), clusters, resamples=RESAMPLES, seed=0)


def quotient(values: np.ndarray, weights: Sequence[float]) -> Statistic:
    """Sum of values over sum of weights."""
    weight_N = np.asarray(weights, dtype=np.float64)
    return lambda counts_RN: (counts_RN @ values) / np.maximum(counts_RN @ weight_N, 1e-12)


def difference_interval(
    values: Sequence[float | None], others: Sequence[float | None], clusters: Sequence[str]
) -> Interval:
    """95 % interval of the mean of values - others, paired over clusters; nan where one is missing."""
    if not clusters or any(value is None for value in (*values, *others)):
        return NOWHERE
    difference_N = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    if not np.isfinite(difference_N).all():
        return NOWHERE
    return bootstrap(mean_of(difference_N), clusters, resamples=RESAMPLES, seed=0)


# --- tolerances ---

PER_SAMPLE: dict[str, Callable[[Sample], float | None]] = {
    "judge_score": lambda s: s.score,
    "win_rate_vs_sft": lambda s: s.win,
    "reward_score": lambda s: s.reward_score,
    "ended": lambda s: float(s.ended),
}
"""Metrics that are means over answers, so that their difference has a paired interval."""


def worsening(name: str, candidate: Evaluation, rival: Evaluation, allowed: float, against: str) -> Check:
    """A metric may be worse than the rival's by so much, at the upper end of the difference's 95 % interval.

    Metrics that are no means over answers or pairs are compared as they are, which the check says.
    """
    sign, end = (1.0 if BETTER[name] == "lower" else -1.0), ", upper end"
    if name in PER_SAMPLE or name == "reference_nll":
        take = PER_SAMPLE.get(name)
        sides = [[take(s) if take else per_token(s) for s in one.first] for one in (candidate, rival)]
        clusters = [sample.cluster for sample in candidate.first]
    elif name == "preference_accuracy":
        sides = [[right for _, right in one.pairs] for one in (candidate, rival)]
        clusters = [cluster for cluster, _ in candidate.pairs]
    else:
        own, other = candidate.metrics.get(f"eval/{name}"), rival.metrics.get(f"eval/{name}")
        worse = None if own is None or other is None else sign * (own - other)
        return at_most(f"{name}_worse", worse, allowed, f"how much worse than the {against}'s, without an interval")
    if len(sides[0]) != len(sides[1]):
        sides, clusters = [[], []], []
    found = difference_interval(sides[0], sides[1], clusters)
    worse = found.high if sign > 0 else -found.low
    return at_most(f"{name}_worse", worse, allowed, f"how much worse than the {against}'s{end}")


def per_token(sample: Sample) -> float | None:
    """-log pi_sft of the answer, per token."""
    odd = surprise(sample)
    return None if odd is None else odd / max(1, sample.length + sample.ended)


# --- checks ---


def at_most(metric: str, value: float | None, bound: float, meaning: str) -> Check:
    """value <= bound."""
    value = finite(value)
    passed = value is not None and value <= bound
    return Check(metric=metric, value=value, relation="<=", bound=bound, meaning=meaning, passed=passed)


def at_least(metric: str, value: float | None, bound: float, meaning: str) -> Check:
    """value >= bound."""
    value = finite(value)
    passed = value is not None and value >= bound
    return Check(metric=metric, value=value, relation=">=", bound=bound, meaning=meaning, passed=passed)


def finite(value: float | None) -> float | None:
    """None for what is missing, NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def run(context: StageContext) -> dict[str, float]:
    """Decide on the input `candidate` and publish `decision` (decision.json); returns the numbers behind it.

    Inputs: the evaluations candidate and sft, and champion where there is one.
    """
    gate = PromoteParams.model_validate(context.request.params).gate
    candidate, sft = Evaluation.load(context.input("candidate")), Evaluation.load(context.input("sft"))
    champion = Evaluation.load(context.input("champion")) if context.has("champion") else None
    for name, other in (("sft", sft), ("champion", champion)):
        if other is not None:
            check_comparable("the candidate", candidate.settings, candidate.prompts, name, other)
    won = wins(candidate, champion, context)
    decision = decide(candidate, champion, sft, gate, won)
    publish(decision, context)
    measured = {f"gate/{check.metric}": check.value for check in decision.checks if check.value is not None}
    return {**measured, **rate(won, candidate), "gate/promote": float(decision.promote)}


def wins(candidate: Evaluation, champion: Evaluation | None, context: StageContext) -> list[float]:
    """Per answer, 1 where the judge prefers the candidate's answer to the rival's, 1/2 for a tie, else 0."""
    if champion is None:
        return [sample.win for sample in candidate.first]
    judge = candidate.settings["judge"]
    if not scores_alone(judge):  # the request's: an address in a stored evaluation has been checked by nobody
        judge = PromoteParams.model_validate(context.request.params).judge
        if judge is None:
            message = "the judge only compares, and the request does not say where it is."
            raise refuse("judge", None, message, "give evaluate.judge as the parameter `judge`", kind="missing_input")
    return wins_between(
        ("the candidate", "the champion"),
        candidate.first,
        champion.first,
        judge,
        lambda done, total: context.progress(done, total, "answers judged"),
    )


def rate(won: Sequence[float], candidate: Evaluation) -> dict[str, float]:
    """The win rate and its 95 % interval over prompts, for people: the exact test decides. No prompts, no numbers."""
    if not won:
        return {}
    found = bootstrap(won, [sample.cluster for sample in candidate.first], resamples=RESAMPLES, seed=0)
    return {"gate/win_rate": metrics.win_rate(won), "gate/win_rate_low": found.low, "gate/win_rate_high": found.high}


def publish(decision: Decision, context: StageContext) -> None:
    """The folder `decision`, the same file at the run's top, and a line per check in the log."""
    for check in decision.checks:
        log.info("%s %s", "pass: " if check.passed else "FAIL: ", check)
    log.info("%s", decision.power)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "decision.json"
        file.write_text(decision.model_dump_json(indent=2), encoding="utf-8")
        context.file(file)
        context.publish("decision", Path(temporary))
    context.tag("decision", "promote" if decision.promote else "reject")
    context.tag("decision.reasons", "; ".join(map(str, decision.reasons)) or "all bounds hold")
