"""A champion that answers as it will be served, and others that our own sampler would have let pass."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.gate import smoke
from schemas.commands import SmokeCommand
from schemas.errors import StageError
from schemas.promotion import Decision, PromoteConfig
from schemas.stage import Artifact
from stages import tracking
from stages.commands.smoke import answer
from tests.support import models
from tests.support.finished import finish
from tests.support.forks import PYTHON
from tests.support.processes import left_after, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


PROMPTS = ["red", "blue", "green"]


@pytest.fixture
def data(ready_home: Path, tmp_path: Path) -> Path:
    rows = [models.row(number, text) for number, text in enumerate(PROMPTS)]
    return models.data_folder(tmp_path / "data", eval_prompt=rows)


def published(folder: Path) -> Artifact:
    return finish({"model": folder}, stage="align", name="dpo", params={"at": folder.name}).outputs["model"]


PASSED = Decision(promote=True, against="sft", checks=[])


def test_a_model_that_answers_and_ends_passes_and_the_run_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = published(models.taught(tmp_path / "model", PROMPTS, "yes"))
    held_out = Artifact(uri=str(data), sha256=tracking.digest(data))
    run_id = finish({}, stage="promote", params={}).run_id
    config = PromoteConfig(smoke=True)
    decision = smoke.checked(PASSED, config, model, held_out, 6, run_id)
    assert decision.promote and [check.metric for check in decision.checks] == ["smoke"]
    told = tracking.client().get_run(run_id or "").data.tags["smoke"]
    assert "smoke is 1, must be >= 1 (as MLflow serves it: 3 answers, 0 empty, 3 ended by themselves)" in told
    monkeypatch.setattr(smoke, "COMMAND", [*PYTHON, *smoke.COMMAND[1:]])
    late = smoke.checked(PASSED, config.model_copy(update={"smoke_minutes": 1e-4}), model, held_out, 6, run_id)
    assert not late.promote and "no answers within 0.0001 minutes" in str(late.reasons[0])
    unread = smoke.checked(PASSED, config, model.model_copy(update={"uri": "models:/m-none"}), held_out, 6, run_id)
    assert not unread.promote and "MLflow cannot load the model" in str(unread.reasons[0])


def test_what_is_rejected_or_not_asked_for_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "COMMAND", ["false"])
    rejected = Decision(promote=False, against="sft", checks=[])
    nothing = Artifact(uri="", sha256="")
    assert smoke.checked(rejected, PromoteConfig(smoke=True), nothing, nothing, 6, None) is rejected
    assert smoke.checked(PASSED, PromoteConfig(), nothing, nothing, 6, None) is PASSED


@pytest.mark.parametrize(("text", "end", "empty", "ended"), [("yes", None, 0, 3), ("", None, 3, 3), ("yes", 5, 0, 0)])
def test_empty_answers_and_those_without_an_end_are_counted(
    data: Path, tmp_path: Path, text: str, end: int | None, empty: int, ended: int
) -> None:
    folder = models.taught(tmp_path / "model", PROMPTS, text)
    if end is not None:  # a generation_config.json of another tokenizer
        for name in ("generation_config.json", "config.json"):
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(config | {"eos_token_id": end}))
    command = SmokeCommand(model=published(folder).uri, data=data, max_new_tokens=6)
    assert answer(command) == {"answers": 3, "empty": empty, "ended": ended}


def test_answers_that_never_end_and_empty_ones_reject(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = Artifact(uri=str(data), sha256=tracking.digest(data))
    for empty, ended, passes in ((0, 3, True), (0, 1, True), (0, 0, False), (1, 3, False)):
        counts = json.dumps({"answers": 3, "empty": empty, "ended": ended})
        monkeypatch.setattr(smoke, "COMMAND", [sys.executable, "-c", f"print({counts!r})"])
        model = Artifact(uri="models:/m-1", sha256="")
        assert smoke.checked(PASSED, PromoteConfig(smoke=True), model, held_out, 6, None).promote == passes


def test_it_dies_with_the_retraining_that_asks(data: Path, tmp_path: Path) -> None:
    """A parent whose own process is killed leaves none behind, however long the model would answer."""
    held_out, pid = Artifact(uri=str(data), sha256=tracking.digest(data)), tmp_path / "pid"
    waits = f"""if True:
        import os, pathlib, sys, time
        from stages.commands import entry, smoke
        smoke.answer = lambda _: pathlib.Path({str(pid)!r}).write_text(str(os.getpid())) and time.sleep(600)
        entry.begin(smoke.SmokeCommand.model_validate, smoke.main)"""
    asks = f"""if True:
        import sys
        from flows.gate import smoke
        from schemas.promotion import PromoteConfig
        from schemas.stage import Artifact
        smoke.COMMAND = [sys.executable, "-c", {waits!r}]
        data = Artifact.model_validate_json({held_out.model_dump_json()!r})
        smoke._answered(PromoteConfig(smoke=True), Artifact(uri="models:/m-1", sha256=""), data, 6)"""
    with subprocess.Popen([sys.executable, "-c", asks]) as parent:
        wait_for(lambda: pid.exists() and pid.read_text(), 120)
        parent.kill()
    assert left_after([int(pid.read_text())], 10) == []


def test_a_model_of_before_there_was_a_flavour_says_so(data: Path, tmp_path: Path) -> None:
    model = published(models.model_folder(tmp_path / "model"))
    (tracking.fetch(model) / "MLmodel").unlink()
    with pytest.raises(StageError, match=r"promote\.smoke = .*: MLflow cannot load the model"):
        answer(SmokeCommand(model=model.uri, data=data))
