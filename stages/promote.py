"""Stage `promote`: may the candidate take the champion's place? Decides, with reasons; touches no registry."""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from schemas.promotion import BETTER, Check, Decision, Gate, PromoteParams
from stages.engine.scoring import metrics
from stages.engine.scoring.evaluation_record import Evaluation, check_comparable
from stages.engine.scoring.paired import wins_between
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

Metrics = Mapping[str, float]
"""An evaluation's `eval/` metrics; the candidate's with `gate/win_rate_low`, its paired win rate's lower bound."""


def decide(candidate: Metrics, champion: Metrics | None, sft: Metrics, gate: Gate) -> Decision:
    """Promote if every bound of the gate holds; a missing or non-finite number fails its bound.

    The win rate and the tolerances are measured against the champion, or the SFT model where there is no champion yet;
    what shows that a policy games its reward model is always measured against the SFT model.
    """
    rival = sft if champion is None else champion
    against = "sft" if champion is None else "champion"
    checks = [
        above("win_rate_low", candidate.get("gate/win_rate_low"), gate.win_rate_min, f"win rate against {against}"),
        at_most("kl_to_reference", candidate.get("eval/kl_to_reference"), gate.kl_max, "nats per answer from sft"),
        at_most("length_ratio", ratio("length", candidate, sft), gate.length_ratio_max, "length over sft's"),
        at_least("distinct_2_ratio", ratio("distinct_2", candidate, sft), gate.distinct_2_min, "variety over sft's"),
        *nll_checks(ratio("reference_nll", candidate, sft), gate),
        at_most("empty", candidate.get("eval/empty"), gate.empty_max, "share of empty answers"),
        at_least("prompts", candidate.get("eval/prompts"), gate.prompts_min, "prompts answered"),
        *(worsening(name, candidate, rival, allowed, against) for name, allowed in sorted(gate.tolerances.items())),
    ]
    return Decision(promote=all(check.passed for check in checks), against=against, checks=checks)


def nll_checks(value: float | None, gate: Gate) -> Iterator[Check]:
    """The two bounds on how odd the answers look to the SFT model."""
    yield at_least("reference_nll_ratio", value, gate.reference_nll_min, "oddness to sft over that of its own answers")
    yield at_most("reference_nll_ratio", value, gate.reference_nll_max, "oddness to sft over that of its own answers")


def worsening(name: str, candidate: Metrics, rival: Metrics, allowed: float, against: str) -> Check:
    """A metric may be worse than the rival's by so much."""
    own, other = candidate.get(f"eval/{name}"), rival.get(f"eval/{name}")
    sign = 1 if BETTER[name] == "lower" else -1
    worse = None if own is None or other is None else sign * (own - other)
    return at_most(f"{name}_worse", worse, allowed, f"how much worse than the {against}'s")


def ratio(name: str, candidate: Metrics, sft: Metrics) -> float | None:
    """The candidate's metric over the SFT model's; None where one is missing, or the latter 0."""
    own, other = candidate.get(f"eval/{name}"), sft.get(f"eval/{name}")
    return None if own is None or not other else own / other


def above(metric: str, value: float | None, bound: float, meaning: str) -> Check:
    """value > bound."""
    value = finite(value)
    passed = value is not None and value > bound
    return Check(metric=metric, value=value, relation=">", bound=bound, meaning=meaning, passed=passed)


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
    request = context.request
    gate = PromoteParams.model_validate(request.params).gate
    candidate, sft = Evaluation.load(context.input("candidate")), Evaluation.load(context.input("sft"))
    champion = Evaluation.load(context.input("champion")) if context.has("champion") else None
    for name, other in (("sft", sft), ("champion", champion)):
        if other is not None:
            check_comparable("the candidate", candidate.settings, candidate.prompts, name, other)
    won = wins_over_sft(candidate) if champion is None else wins_over_champion(candidate, champion, context)
    win_rate = rate(won, resamples=candidate.settings["bootstrap"], seed=request.seed)
    decision = decide({**candidate.metrics, **win_rate}, champion.metrics if champion else None, sft.metrics, gate)
    publish(decision, context)
    measured = {f"gate/{check.metric}": check.value for check in decision.checks if check.value is not None}
    return {**measured, **win_rate, "gate/promote": float(decision.promote)}


def rate(won: list[float], *, resamples: int, seed: int) -> dict[str, float]:
    """The win rate and its 95 % interval by bootstrap over prompts. No prompts, no numbers."""
    if not won:
        return {}
    low, high = metrics.bootstrap_interval(won, resamples=resamples, seed=seed)
    return {"gate/win_rate": metrics.win_rate(won), "gate/win_rate_low": low, "gate/win_rate_high": high}


def wins_over_sft(candidate: Evaluation) -> list[float]:
    """Per prompt, what the evaluation has found against the SFT model: 1 won, 1/2 tied, 0 lost."""
    return [sample.win for sample in candidate.first]


def wins_over_champion(candidate: Evaluation, champion: Evaluation, context: StageContext) -> list[float]:
    """Per answer, 1 where the judge prefers the candidate's to the champion's, 1/2 for a tie, else 0."""
    names, judge = ("the candidate", "the champion"), candidate.settings["judge"]
    return wins_between(
        names,
        candidate.first,
        champion.first,
        judge,
        lambda done, total: context.progress(done, total, "answers judged"),
    )


def publish(decision: Decision, context: StageContext) -> None:
    """The folder `decision`, the same file at the run's top, and a line per check in the log."""
    for check in decision.checks:
        log.info("%s %s", "pass: " if check.passed else "FAIL: ", check)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "decision.json"
        file.write_text(decision.model_dump_json(indent=2), encoding="utf-8")
        context.file(file)
        context.publish("decision", Path(temporary))
    context.tag("decision", "promote" if decision.promote else "reject")
    context.tag("decision.reasons", "; ".join(map(str, decision.reasons)) or "all bounds hold")
