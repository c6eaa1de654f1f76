"""Two models' answers to the same prompts side by side: who wins, by the judge of both evaluations. No torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from schemas.config import EndpointJudge
from stages.engine.scoring import metrics
from stages.engine.scoring.evaluation_record import Sample, texts

Progress = Callable[[int, int], None]


def scores_alone(judge: Mapping[str, Any]) -> bool:
    """Whether a judge, by its config, scores answers by themselves, so that all pairs of models are judged already."""
    return judge["judge"] != "endpoint"


def wins_between(
    names: tuple[str, str],
    samples: Sequence[Sample],
    others: Sequence[Sample],
    judge: Mapping[str, Any],
    progress: Progress | None = None,
) -> list[float]:
    """Per answer, 1 where the judge prefers the first model's to the other's, 1/2 for a tie, else 0.

    Both samples are those of one temperature, to the same prompts and draws in the same order. A judge that scores has
    its scores in both; one that only compares, `judge` by its config, is asked with both answers.

    Raises:
        StageError: the judge must be asked, and texts are not kept or it cannot be reached.
    """
    if scores_alone(judge):
        return metrics.wins([s.score for s in samples], [s.score for s in others])
    answers, other_answers = texts(samples, names[0]), texts(others, names[1])
    from stages.engine.scoring import endpoint  # late: it takes transformers along, which no other judge needs here

    asked = endpoint.EndpointJudge(EndpointJudge.model_validate(judge), "evaluate.judge", progress)
    return asked.wins([sample.prompt for sample in samples], answers, other_answers)
