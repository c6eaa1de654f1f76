"""Answers of an evaluation on MLflow's evaluation pages: a trace for each, with what was judged of it, and a data set
of their prompts.

MLflow's own client takes a trace at a time, through spans that are open and threads that export them. Here its store is
handed all spans in one call, and each trace whole, assessments included, in one more. All ids follow from the run: a
stage that is started again writes the same traces, not new ones.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from schemas.conversation import Message, shown
from schemas.errors import stop_in
from stages.runtime.context import Answered
from stages.tracking.mlflow_client import plain_client, retrying, tracking_uri, value_classes
from stages.tracking.names import shortened
from stages.tracking.problems import first_line

log = logging.getLogger("alignflow")

LINKS_AT_ONCE = 100
"""MLflow's own limit."""
PREVIEW_LENGTH = 1000
"""Characters that lists of traces show of a prompt and of an answer."""


def log_answers(run_id: str, model_id: str | None, label: str, answers: Sequence[Answered], judge: str) -> None:
    """Put the answers of a run on MLflow's evaluation pages; warn where its server or version does not take them.

    model_id: the LoggedModel that has answered. label: the model's name. judge: the kind of judge.
    """
    try:
        _log_answers(run_id, model_id, label, answers, judge)
    except Exception as error:  # of other versions too: no evaluation that is done fails for its pages
        if (stop := stop_in(error)) is not None:
            raise stop from None
        log.warning(
            "the answers of %s are not all on MLflow's evaluation pages: %s. All else of this evaluation is there. "
            "Fix: see that MLflow's server answers, lets you in, and is as new as this one; or set evaluate.traces: 0",
            label,
            first_line(error),
        )


def _log_answers(run_id: str, model_id: str | None, label: str, answers: Sequence[Answered], judge: str) -> None:
    from mlflow.tracing.client import TracingClient  # late: see value_classes

    store, now, entities = TracingClient(tracking_uri()).store, int(time.time() * 1000), value_classes()
    experiment = plain_client().get_run(run_id).info.experiment_id
    retrying(lambda: plain_client().set_tag(run_id, "mlflow.runType", "genai_evaluate"))
    prompts = [{"messages": _chat(row.prompt)} for row in answers]
    retrying(lambda: _link_dataset(store, run_id, experiment, prompts))
    metadata = {"mlflow.sourceRun": run_id} | ({"mlflow.modelId": model_id} if model_id else {})
    spans = []
    for number, row in enumerate(answers):
        trace_id = f"tr-{_id(run_id, number)}"
        answer = {"role": "assistant", "content": _clean(row.answer)}
        spans.append(_span(trace_id, label, prompts[number], {"choices": [{"message": answer}]}, now))
        given = {**row.judged, **row.measured}
        assessments = []
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                continue
            by_model = name in row.judged and judge in ("reward", "endpoint")
            source = entities.AssessmentSource(
                source_type="LLM_JUDGE" if by_model else "CODE",
                source_id=f"judge {judge}" if name in row.judged else "alignflow",
            )
            why = _clean(row.why) if name in row.judged else None
            one = entities.Feedback(name=name, value=value, source=source, rationale=why or None, trace_id=trace_id)
            one.metadata = {"mlflow.assessment.sourceRunId": run_id}
            one.assessment_id = f"a-{_id(run_id, number, name)}"
            assessments.append(one)
        info = entities.TraceInfo(
            trace_id=trace_id,
            trace_location=entities.TraceLocation.from_experiment_id(experiment),
            request_time=now,
            state=entities.TraceState.OK,
            request_preview=shortened(prompts[number]["messages"][-1]["content"], PREVIEW_LENGTH),
            response_preview=shortened(answer["content"], PREVIEW_LENGTH),
            execution_duration=0,
            trace_metadata=metadata,
            tags={"mlflow.traceName": label, "model": label},
            assessments=assessments,
        )
        retrying(partial(store.start_trace, info))
    retrying(lambda: store.log_spans(experiment, spans))
    for start in range(0, len(spans), LINKS_AT_ONCE):
        linked = [span.trace_id for span in spans[start : start + LINKS_AT_ONCE]]
        retrying(partial(store.link_traces_to_run, linked, run_id))


def _link_dataset(store: Any, run_id: str, experiment: str, prompts: Sequence[dict[str, Any]]) -> None:
    """The data set of these prompts as an input of the run: one per experiment, named by what it holds."""
    entities = value_classes()
    name = f"held-out prompts {_id(*(json.dumps(prompt, sort_keys=True) for prompt in prompts))[:8]}"
    dataset = _oldest(store, name, experiment)
    if dataset is None:
        made = store.create_dataset(name, experiment_ids=[experiment])
        dataset = _oldest(store, name, experiment) or made
        if dataset.dataset_id != made.dataset_id:  # another evaluation has made it in between
            store.delete_dataset(made.dataset_id)
    if json.loads(dataset.profile or "{}").get("num_records") != len(prompts):
        store.upsert_dataset_records(dataset.dataset_id, [{"inputs": prompt} for prompt in prompts])
        dataset = store.get_dataset(dataset.dataset_id)
    logged = entities.Dataset(
        name=name,
        digest=dataset.digest,
        source_type="mlflow_evaluation_dataset",
        source=json.dumps({"dataset_id": dataset.dataset_id}),
        schema=dataset.schema,
        profile=dataset.profile,
    )
    context = [entities.InputTag("mlflow.data.context", "evaluation")]
    store.log_inputs(run_id, datasets=[entities.DatasetInput(dataset=logged, tags=context)])


def _oldest(store: Any, name: str, experiment: str) -> Any | None:
    """The first data set of a name, which all take where several have made one at once; None where there is none."""
    known = store.search_datasets(experiment_ids=[experiment], filter_string=f"name = '{name}'")
    return next(iter(sorted(known, key=lambda one: (one.created_time, one.dataset_id))), None)


def _span(trace_id: str, name: str, inputs: Any, outputs: Any, at: int) -> Any:
    """The one span of a trace, at a time in milliseconds: how long a single answer of a batch took is not known."""
    attributes = {
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": "CHAT_MODEL",
        "mlflow.spanInputs": inputs,
        "mlflow.spanOutputs": outputs,
    }
    written = {
        "trace_id": trace_id,
        "span_id": trace_id[-16:],
        "parent_span_id": None,
        "name": name,
        "start_time_unix_nano": at * 1_000_000,
        "end_time_unix_nano": at * 1_000_000,
        "status": {"code": "STATUS_CODE_OK", "message": ""},
        "attributes": {key: json.dumps(value, ensure_ascii=False) for key, value in attributes.items()},
    }
    return value_classes().Span.from_dict(written)


def _chat(prompt: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": _clean(shown(message))} for message in prompt]


def _clean(text: str) -> str:
    """Without what no database takes: lone surrogates and NUL."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


def _id(*parts: object) -> str:
    """32 hexadecimal digits of these."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]
