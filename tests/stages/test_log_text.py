"""`log_text: false`: prompts and answers stand in the rows that training reads, and nowhere else.

Whole runs are searched in tests/system/test_secrets.py.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flows.planning.plan import plan
from schemas.config import EndpointJudge, PipelineConfig
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from schemas.stage import STAGES, Request
from stages import __main__ as entry
from stages.compare import compare
from stages.compare.page import render_html
from stages.engine.scoring.evaluation_record import Evaluation, Sample, check_comparable, digest_of, texts, without_text
from stages.validate import check
from stages.validate.context import Context
from tests.support.leak_pipeline import WORD


def config(**more: Any) -> PipelineConfig:
    data = {"preference": {"path": "pairs.jsonl", "kind": "preference"}}
    raw = {"name": "t", "model": {"scratch": {}}, "data": data, "align": {"dpo": {}}, "log_text": False, **more}
    return PipelineConfig.model_validate(raw)


ENDPOINT = {"judge": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "m"}


def test_an_endpoint_is_refused_before_anything_runs() -> None:
    generated = {"generate": {"judge": ENDPOINT}, "data": {"sft": {"path": "demo:sft", "kind": "sft"}}}
    for more, field in (({"evaluate": {"judge": ENDPOINT}}, "evaluate.judge"), (generated, "generate.judge")):
        with pytest.raises(StageError, match="log_text: false forbids") as refused:
            plan(config(**more))
        assert refused.value.problem.field == field
        plan(config(**more, log_text=True))


def request(stage: str, log_text: bool, **params: Any) -> Request:
    return Request(stage=stage, version=STAGES[stage].version, params=params, log_text=log_text)


def test_only_what_a_stage_publishes_is_part_of_its_key() -> None:
    differ = {stage for stage in STAGES if request(stage, True).key() != request(stage, False).key()}
    assert differ == {"validate", "generate", "evaluate", "baselines", "compare"}


def test_what_a_library_says_is_left_out(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its message may quote a row: neither log nor result has it, and the places in the code are still there."""
    for status, error in (("failed", ValueError(WORD)), ("failed", OSError(28, "No space left on device", WORD))):
        result = entry.stopped(error, "key", None, log_text=False)
        assert result.status == status and result.error is not None and WORD not in result.model_dump_json()
        assert result.error.kind == ("disk" if isinstance(error, OSError) else "ValueError")
    try:
        int(WORD)
    except ValueError as error:
        entry.stopped(error, "key", None, log_text=False)
        assert "test_log_text.py" in caplog.text and WORD not in caplog.text
        assert WORD in str(entry.stopped(error, "key", None).error)


def test_quarantine_and_report_hold_no_values(tmp_path: Path) -> None:
    """Not the bad values, and not the first row of a CSV that has no header."""
    file = tmp_path / "rows.csv"
    file.write_text(f"prompt,response,{WORD}\n{WORD},,x\np,r,x\nsay {WORD},r\n")
    for log_text in (True, False):
        out = tmp_path / str(log_text)
        check(Context(ValidateParams(path=str(file), kind="sft", max_bad=1), log_text=log_text), out)
        shown = "".join((out / name).read_text() for name in ("quarantine.jsonl", "report.json"))
        assert (WORD in shown) == log_text
        rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert [(row["row"], row["reason"]) for row in rows] == [(2, "wrong_number_of_cells"), (0, "empty")]
    file.write_text(f"{WORD} is what I asked,and this the answer\np,r\n")
    with pytest.raises(StageError) as refused:
        check(Context(ValidateParams(path=str(file), kind="sft"), log_text=False), tmp_path / "out")
    assert WORD not in str(refused.value) and "column 1, column 2" in str(refused.value)


def sample(prompt: str, score: float) -> Sample:
    return Sample([{"role": "user", "content": prompt}], f"{WORD} {prompt}", score, "sft", 0.0, 1.0, 3, 2, True, 0.5)


SETTINGS: dict[str, Any] = {
    "judge": {"judge": "sentiment"},
    "judge_model": None,
    "temperatures": [1.0],
    "samples_per_prompt": 1,
    "max_new_tokens": 8,
    "seed": 0,
}


def evaluation(*scores: float) -> Evaluation:
    rates = {"win_rate_vs_sft": 1.0, "win_rate_vs_sft_low": 0.9, "win_rate_vs_sft_high": 1.0, "judge_score": scores[0]}
    metrics = {
        f"eval/{name}": value for name, value in {**rates, "kl_to_reference": 1, "kl_to_reference_se": 0}.items()
    }
    return Evaluation(metrics, [sample(f"{WORD} {i}", score) for i, score in enumerate(scores)], SETTINGS)


def test_samples_without_text_can_still_be_compared(tmp_path: Path) -> None:
    whole = evaluation(1.0, 2.0)
    bare = Evaluation(whole.metrics, list(map(without_text, whole.samples)), whole.settings)
    bare.save(tmp_path)
    assert WORD not in (tmp_path / "samples.jsonl").read_text()
    read = Evaluation.load(tmp_path)
    assert read.samples == bare.samples
    for one, kept in zip(whole.samples, read.samples, strict=True):
        assert digest_of(one.prompt) == digest_of(kept.prompt)
        assert (kept.score, kept.win, kept.length, kept.kl) == (one.score, one.win, one.length, one.kl)
    prompts = [one.prompt for one in whole.samples]
    check_comparable("a", SETTINGS, prompts, "b", read)
    check_comparable("a", SETTINGS, [one.prompt for one in read.samples], "b", whole)
    with pytest.raises(StageError, match="not the same"):
        check_comparable("a", SETTINGS, prompts[::-1], "b", read)
    with pytest.raises(StageError, match="holds no answers"):
        texts(read.samples, "the champion")


def test_the_report_shows_no_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    models = {"sft": evaluation(0.0, 0.0), "dpo": evaluation(1.0, 2.0)}
    assert WORD in render_html(compare(models))
    page = render_html(compare(models, log_text=False))
    assert WORD not in page and "same 2 prompts" in page and "log_text is false" in page
    bare = {k: Evaluation(e.metrics, list(map(without_text, e.samples)), e.settings) for k, e in models.items()}
    assert WORD not in render_html(compare(bare))  # evaluations of an earlier run


def test_the_endpoint_is_refused_in_a_stage_too(tmp_path: Path) -> None:
    from stages.engine.scoring.judges import judge_for
    from tests.support.context import MemoryContext

    context = MemoryContext(tmp_path, {}, {}, stage="evaluate", log_text=False)
    with pytest.raises(StageError, match="log_text: false forbids"):
        judge_for(EndpointJudge.model_validate(ENDPOINT), context)
