"""Tracking: digests, reuse, what reaches MLflow, and what a killed process leaves behind."""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from schemas.colours import COLOURS
from schemas.errors import StageError
from schemas.stage import Artifact, Request, Result
from stages import tracking
from stages.tracking import StageRun, mlflow_client, store
from stages.tracking.journal import Journal
from stages.tracking.names import PARAM_LENGTH, own_name, shown_name


def request(**params: object) -> Request:
    return Request(stage="sft", version=1, params=dict(params), name="sft", pipeline_run="first", experiment="tests")  # type: ignore[arg-type]


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in tracking.client().get_metric_history(run_id, name)]


def test_digest_is_over_sorted_names_and_contents(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", b="two", a="one")
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert tracking.digest(folder) == hashlib.sha256(f"a\0{one}\nb\0{two}\n".encode()).hexdigest()
    assert tracking.digest(folder / "a") == one
    (folder / "a").rename(folder / "c")
    assert tracking.digest(folder) != hashlib.sha256(f"a\0{one}\nb\0{two}\n".encode()).hexdigest()
    with pytest.raises(StageError, match="does not exist"):
        tracking.digest(tmp_path / "nothing")


def test_charts_begin_with_quality_and_results_keep_the_names_of_stages() -> None:
    """MLflow lists groups of charts by name; a run of an older version has them by that of the stage."""
    for name in ("baselines/T0.3/judge_score", "budget/own_dpo", "compute/train_tokens", "data/eval/prompt"):
        shown = shown_name(name)
        assert shown > "eval/" and shown.partition("/")[2] == name.partition("/")[2]
        assert own_name(shown) == own_name(name) == name
    for name in ("train/loss", "eval/data/rows", "data", "quarantined/empty"):
        assert shown_name(name) == own_name(name) == name


def test_fetch_verifies(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", a="one")
    artifact = Artifact(uri=str(folder), sha256=tracking.digest(folder))
    assert tracking.fetch(artifact) == folder
    assert tracking.fetch(artifact.model_copy(update={"uri": folder.as_uri()})) == folder
    (folder / "a").write_text("two")
    with pytest.raises(StageError, match="altered") as altered:
        tracking.fetch(artifact)
    assert altered.value.problem.value == str(folder)
    with pytest.raises(StageError, match="gone"):
        tracking.fetch(Artifact(uri=str(tmp_path / "nothing"), sha256="0"))


def test_another_stage_reads_what_a_run_has_logged(home: Path, tmp_path: Path) -> None:
    with StageRun(request(beta=0.5)) as made:
        for step, loss in ((2, 0.5), (1, 1.0), (3, math.nan)):
            made.metrics({"train/loss": loss, "train/other": 1.0}, step=step)
        made.dataset("pairs", "pairs.jsonl", "ab" * 32, 17)
        model = made.publish("model", folder_with(tmp_path / "model", weights="w"), model=True)
        made.finish({"compute/train_tokens": 7.0})
    with StageRun(Request(stage="compare", version=1, params={}, experiment="tests")) as reader:
        known = reader.recorded(made.run_id, ["train/loss", "train/none"])
        by_digest = reader.recorded(model.sha256, ["train/loss"])
        assert known is not None and by_digest is not None
        assert (known.run_id, known.curves) == (by_digest.run_id, by_digest.curves)
        assert known.curves == {"train/loss": [(1, 1.0), (2, 0.5)]}  # in the order of the steps, finite
        assert (known.stage, known.params["beta"], list(known.datasets)) == ("sft", "0.5", ["pairs"])
        assert known.metrics["compute/train_tokens"] == 7.0 and known.tags["output.model"] == model.sha256
        assert reader.recorded("0" * 32) is None and reader.recorded("0" * 64) is None
        reader.finish({})


def test_a_run_is_whole_in_mlflow(home: Path, tmp_path: Path) -> None:
    asked = request(a={"b": 1, "c": None}, long="x" * 9000, **{"odd,name": [1, 2]})
    with StageRun(asked) as run:
        for step in range(1500):
            run.metrics({"train/loss": 1.0 / (step + 1)}, step=step)
        run.metrics({"train/bad": math.nan, "train/worse": math.inf}, step=3)
        run.params({"a.b": 2})  # MLflow refuses to change a parameter: the first stays
        run.tag("data.version", "v" * 20_000)
        run.table({"prompt": ["p", "q"], "sft": ["a", "\ud800"]}, "eval/samples.json")
        run.dataset("pairs", "pairs.jsonl", "ab" * 32, 17)
        model = run.publish("model", folder_with(tmp_path / "model", weights="w"), model=True)
        data = run.publish("data", folder_with(tmp_path / "data", rows="r"))
        run.finish({"eval/loss": 0.25})
    kept = tracking.client().get_run(run.run_id)
    assert kept.info.status == "FINISHED" and kept.info.run_name == "sft"
    assert kept.data.tags.items() >= {"stage": "sft", "stage.version": "1", "pipeline.run": "first"}.items()
    assert kept.data.tags["stage.key"] == asked.key()
    assert kept.data.tags["mlflow.note.content"].startswith("Stage `sft`, of the pipeline run `first`. Talk to")
    assert kept.data.tags["mlflow.runColor"] == COLOURS["sft"] and kept.data.tags["mlflow.user"]
    assert kept.data.params["a.b"] == "1" and kept.data.params["a.c"] == "null"
    assert kept.data.params["odd_name"] == "[1, 2]"
    assert len(kept.data.params["long"]) == PARAM_LENGTH
    assert kept.data.metrics["eval/loss"] == 0.25
    assert history(run.run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(1500)]
    assert math.isnan(history(run.run_id, "train/bad")[0][1])
    assert history(run.run_id, "train/worse")[0][1] > 1e308  # SQL has no infinity: MLflow keeps the largest number
    assert kept.inputs is not None and kept.inputs.dataset_inputs[0].dataset.digest == ("ab" * 32)[:36]
    config = tracking.client().download_artifacts(run.run_id, "config.json")
    assert Request.model_validate_json(Path(config).read_text()) == asked
    table = json.loads(Path(tracking.client().download_artifacts(run.run_id, "eval/samples.json")).read_text())
    assert table == {"columns": ["prompt", "sft"], "data": [["p", "a"], ["q", "\ud800"]]}
    logged = tracking.client().get_logged_model(model.uri.removeprefix("models:/"))
    assert logged.status == "READY" and logged.source_run_id == run.run_id
    assert (tracking.fetch(model) / "weights").read_text() == "w"
    assert (tracking.fetch(data) / "rows").read_text() == "r"


def finished(asked: Request, folder: Path) -> Result:
    with StageRun(asked) as run:
        run.publish("data", folder)
        return run.finish({"eval/loss": 0.25})


def test_find_takes_only_what_is_whole(home: Path, tmp_path: Path) -> None:
    asked = request(a=1)
    assert tracking.find(asked.key()) is None
    result = finished(asked, folder_with(tmp_path / "data", rows="r"))
    assert tracking.find(asked.key()) == result.model_copy(update={"reused": True})
    assert tracking.find(request(a=2).key()) is None
    assert tracking.find(request(a=1, log_every=7).key()) is not None  # changes no result
    (tracking.fetch(result.outputs["data"]) / "rows").write_text("s")
    assert tracking.find(asked.key()) is None
    again = finished(asked, folder_with(tmp_path / "data", rows="r"))
    assert again.run_id != result.run_id
    assert tracking.find(asked.key()) == again.model_copy(update={"reused": True})
    shutil.rmtree(tracking.fetch(again.outputs["data"]))
    assert tracking.find(asked.key()) is None


def test_a_source_stands_for_its_path() -> None:
    one, other, changed = (
        request(path=path).model_copy(update={"inputs": {"source": Artifact(uri=path, sha256=sha256)}})
        for path, sha256 in (("/a", "1"), ("/b", "1"), ("/a", "2"))
    )
    assert one.key() == other.key() != changed.key()
    assert request(path="/a").key() != request(path="/b").key()


def test_reuse_is_noted(home: Path, tmp_path: Path) -> None:
    result = finished(request(a=1), folder_with(tmp_path / "data", rows="r"))
    for pipeline_run in ("first", "second", "second", "third"):
        tracking.note_reuse(result, pipeline_run)
    experiment = tracking.experiment("tests")
    runs = tracking.client().search_runs([experiment], "tags.`pipeline.reused_by` LIKE '%third%'")
    assert [run.data.tags["pipeline.reused_by"] for run in runs] == ["second third"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StageError("stop", status="preempted"), "KILLED"),
        (StageError("bad rows"), "FAILED"),
        (RuntimeError("bug"), "FAILED"),
    ],
)
def test_an_ended_run_is_continued(home: Path, error: Exception, status: str) -> None:
    asked = request(a=1)
    first = StageRun(asked)
    with pytest.raises(type(error)), first:
        first.metrics({"train/loss": 1.0}, step=0)
        first.metrics({"train/loss": 0.5}, step=1)
        raise error
    assert tracking.client().get_run(first.run_id).info.status == status
    with StageRun(asked) as second:
        assert tracking.client().get_run(first.run_id).info.status == "RUNNING"
        second.metrics({"train/loss": 0.5}, step=1)  # from the checkpoint on, once more
        second.metrics({"train/loss": 0.25}, step=2)
    assert second.run_id == first.run_id
    assert history(first.run_id, "train/loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_another_host_continues_a_run_without_a_second_point(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())  # all that the two hosts share
    with pytest.raises(KeyboardInterrupt), StageRun(request()) as first:
        first.metrics({"train/loss": 1.0}, step=1)
        raise KeyboardInterrupt
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "other"))
    with StageRun(request()) as second:
        second.metrics({"train/loss": 1.0}, step=1)
        second.metrics({"train/loss": 0.5}, step=2)
    assert second.run_id == first.run_id and second.work != first.work
    assert history(first.run_id, "train/loss") == [(1, 1.0), (2, 0.5)]


def test_a_journal_that_death_cut_short(home: Path, tmp_path: Path) -> None:
    run_id = tracking.client().create_run(tracking.experiment("tests")).info.run_id
    path = tmp_path / "journal.jsonl"
    path.write_text('["train/loss", "1.0", 0, 5]\n["train/loss", "nan", 1, 6]\n["train/lo')
    journal = Journal(path, run_id)
    journal.add({"train/loss": 0.25}, 2)
    journal.close()
    Journal(path, run_id).close()  # shipping all of it again leaves no duplicate
    points = history(run_id, "train/loss")
    assert [step for step, _ in points] == [0, 1, 2]
    assert [points[0][1], points[2][1]] == [1.0, 0.25] and math.isnan(points[1][1])


BROKEN_LINES = [
    b"\0" * 40,
    b'["train/loss", "0.5", 1, 6',
    b'["train/loss", "\xff", 1, 6]',
    b'["train/loss", "half", 1, 6]',
    b'["train/loss", 0.5, 1.5, 6]',
    b'{"train/loss": 0.5}',
    b'["train/loss", "0.5"]',
    b'["train/loss", "0.5", 99999999999999999999, 6]',
    b'["train,loss", "0.5", 1, 6]',
    b"[" * 100_000,
    b"",
]


def test_lines_that_are_none_of_a_journal_are_kept_aside(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = tracking.client().create_run(tracking.experiment("tests")).info.run_id
    path = tmp_path / "journal.jsonl"
    good = [b'["train/loss", "1.0", 0, 5]', b'["train/loss", "0.25", 2, 7]']
    content = b"\n".join([good[0], *BROKEN_LINES, good[1]]) + b"\n"
    path.write_bytes(content)
    Journal(path, run_id).close()
    assert history(run_id, "train/loss") == [(0, 1.0), (2, 0.25)]
    assert (tmp_path / "journal.jsonl.bad").read_bytes() == content
    assert f"{len(BROKEN_LINES)} of {len(BROKEN_LINES) + 2} lines" in caplog.text
    assert path.read_bytes() == b"\n".join(good) + b"\n"


def test_a_folder_in_a_journals_place_is_moved(home: Path, tmp_path: Path) -> None:
    run_id = tracking.client().create_run(tracking.experiment("tests")).info.run_id
    (tmp_path / "journal.jsonl").mkdir()
    journal = Journal(tmp_path / "journal.jsonl", run_id)
    journal.add({"train/loss": 0.25}, 2)
    journal.close()
    assert history(run_id, "train/loss") == [(2, 0.25)] and (tmp_path / "journal.jsonl.bad").is_dir()


def test_metrics_wait_while_mlflow_is_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.tracking.journal.SHIP_SECONDS", 0.02)
    with StageRun(request(a=1)) as run:
        client = tracking.plain_client()
        with monkeypatch.context() as away:
            away.setattr("stages.tracking.journal.plain_client", lambda: (_ for _ in ()).throw(ConnectionError("away")))
            for step in range(50):
                run.metrics({"train/loss": float(step)}, step=step)
            end = time.monotonic() + 30
            while run._journal._error is None:
                assert time.monotonic() < end, "nothing was tried"
                time.sleep(0.01)
        assert client is tracking.plain_client()
    assert history(run.run_id, "train/loss") == [(step, float(step)) for step in range(50)]


def test_a_client_that_cannot_be_made_yet_is_made_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database may be locked, or its server restarting, when the first call of a process comes."""
    make, failures = mlflow_client._client_for, iter([RuntimeError("database is locked"), ConnectionError()])

    def at_the_third_try(uri: str) -> Any:
        for failure in failures:
            raise failure
        return make(uri)

    monkeypatch.setattr(mlflow_client, "_client_for", at_the_third_try)
    assert [e.name for e in tracking.client().search_experiments()] == ["Default"]


def test_a_listing_of_remote_files_is_tried_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ConnectionError("refused"), ["entry"]])

    def list_artifacts(**named: Any) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("mlflow.artifacts.list_artifacts", list_artifacts)
    assert store.entries("mlflow-artifacts:/folder") == ["entry"]


def test_a_locked_database_is_tried_again() -> None:
    answers = iter([RuntimeError("(sqlite3.OperationalError) database is locked"), ConnectionError(), "done"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert tracking.retrying(call) == "done"
    with pytest.raises(ValueError, match="other"):
        tracking.retrying(lambda: (_ for _ in ()).throw(ValueError("other")))


def test_other_ranks_write_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    folder = folder_with(tmp_path / "data", rows="r")
    asked = request(a=1).model_copy(
        update={"inputs": {"data": Artifact(uri=str(folder), sha256=tracking.digest(folder))}}
    )
    with StageRun(asked) as run:
        assert run.input("data") == folder and run.has("data") and not run.has("reward")
        run.metrics({"train/loss": 1.0}, step=0)
        run.params({"a": 2})
        run.tag("a", 1)
        run.table({"a": [1]}, "a.json")
        run.publish("data", folder)
        run.progress(1, 2, "steps")
        with pytest.raises(StageError, match=r"inputs\.reward = missing"):
            run.input("reward")
    assert not (home / "mlflow.db").exists()


def test_progress_says_how_far(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("stages.tracking.run.time.monotonic", lambda: now[0])
    run = StageRun(request(a=1))
    for done in range(1, 11):
        now[0] += 2.0
        run.progress(done, 10, "steps  loss 1.23")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [  # at 2, 8, 14 and 20 seconds
        "sft  1/10 steps  loss 1.23",
        "sft  4/10 steps  loss 1.23  0:12 left",
        "sft  7/10 steps  loss 1.23  0:06 left",
        "sft  10/10 steps  loss 1.23",
    ]
    run.progress(1, 3, "answers")  # another piece of work, with a pace of its own
    now[0] += 60.0
    run.progress(2, 3, "answers")
    assert capsys.readouterr().err.splitlines() == ["sft  1/3 answers", "sft  2/3 answers  1:00 left"]


def test_progress_is_lively_for_a_terminal_and_at_first_only(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("stages.tracking.run.time.monotonic", lambda: now[0])
    monkeypatch.setenv("ALIGNFLOW_LIVE", "1")
    run = StageRun(request(a=1))
    for done in range(1, 201):
        now[0] += 0.5
        run.progress(done, 1000, "steps")
    # Each of the first minute, 120, at steps of 0.5 s; then one every 5 s, ten steps, until 100 s.
    assert len(capsys.readouterr().err.splitlines()) == 120 + (200 - 120) // 10


def test_names_that_mlflow_takes() -> None:
    assert tracking.acceptable_name("eval/win rate:a.b-c_d") == "eval/win rate:a.b-c_d"
    assert tracking.acceptable_name("a,b(c)") == "a_b_c_"
    assert len(tracking.acceptable_name("x" * 400)) == 250
    assert tracking.acceptable_name("x" * 400) != tracking.acceptable_name("x" * 401)
    assert tracking.flatten({"a": {"b": {"c": 1}, "d": []}, "e": "f"}) == {"a.b.c": "1", "a.d": "[]", "e": "f"}


def test_a_source_that_changes_is_not_published(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("one\n")
    given = {"source": Artifact(uri=str(source), sha256=tracking.digest(source))}
    asked = request(a=1).model_copy(update={"inputs": given})
    with pytest.raises(StageError, match="changed while it was read") as stopped, StageRun(asked) as run:
        assert run.input("source") == source
        source.write_text("one\ntwo\n")
        run.publish("data", folder_with(tmp_path / "data", rows="r"))
    assert stopped.value.status == "refused" and stopped.value.problem.value == str(source)
    assert not run.outputs
    assert not [file for file in tracking.client().list_artifacts(run.run_id) if file.path == "data"]


def test_a_step_done_again_replaces_only_what_was_not_finite(home: Path, tmp_path: Path) -> None:
    run_id = tracking.client().create_run(tracking.experiment("tests")).info.run_id
    for values in ((1.0, math.nan), (2.0, 0.5), (3.0, math.nan)):
        journal = Journal(tmp_path / "journal.jsonl", run_id)
        for step, value in enumerate(values):
            journal.add({"train/loss": value}, step)
        journal.close()
    points = sorted(history(run_id, "train/loss"), key=lambda point: (point[0], not math.isnan(point[1])))
    assert [step for step, _ in points] == [0, 1, 1]
    assert points[0][1] == 1.0 and math.isnan(points[1][1]) and points[2][1] == 0.5
