"""Three answers on MLflow's evaluation pages, and what is read back of them."""

import math
from typing import Any

from schemas.stage import Request
from stages import tracking
from stages.runtime.context import Answered
from stages.tracking import StageRun

ANSWERS = [
    Answered([{"role": "user", "content": "say one"}], "one", {"judge_score": 2.0, "against_sft": "win"}, why="two"),
    Answered(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say \ud800"}],
        "\0",
        {"judge_score": math.nan, "against_sft": "loss"},
        {"length": 3.0},
    ),
    Answered([{"role": "user", "content": "say three"}], "", {"judge_score": 0.0}),
]


def log(times: int = 1, judge: str = "reward", **params: Any) -> str:
    """A run of stage evaluate that logs ANSWERS so many times, as one that is started again does; its id."""
    asked = Request(stage="evaluate", version=1, params=params, name="dpo", experiment="answers")
    with StageRun(asked) as run:
        for _ in range(times):
            run.answers(ANSWERS, judge)
        run.finish({})
    return run.run_id


def read_back(run_id: str) -> list[tuple[Any, Any, dict[str, Any]]]:
    """(messages, answer, assessment -> (value, source, why)) of the run's traces, in the order of their prompts."""
    client = tracking.plain_client()
    experiment = client.get_run(run_id).info.experiment_id
    traces = client.search_traces(locations=[experiment], run_id=run_id)
    found = []
    for trace in traces:
        (span,) = trace.data.spans
        assert span.inputs is not None and span.outputs is not None
        judged = {
            one.name: (one.value, one.source.source_type, one.rationale)  # type: ignore[union-attr]
            for one in trace.info.assessments
        }
        assert len(judged) == len(trace.info.assessments)
        found.append((span.inputs["messages"], span.outputs["choices"][0]["message"]["content"], judged))
    return sorted(found, key=lambda one: str(one[0][-1]["content"]))


EXPECTED = [
    (
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say ?"}],
        "\ufffd",
        {"against_sft": ("loss", "LLM_JUDGE", None), "length": (3.0, "CODE", None)},
    ),
    (
        [{"role": "user", "content": "say one"}],
        "one",
        {"judge_score": (2.0, "LLM_JUDGE", "two"), "against_sft": ("win", "LLM_JUDGE", "two")},
    ),
    ([{"role": "user", "content": "say three"}], "", {"judge_score": (0.0, "LLM_JUDGE", None)}),
]
"""What no database takes is replaced, and a number that is none is left out."""
