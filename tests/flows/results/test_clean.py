"""What `alignflow clean` removes and what it never does, over runs whose lineage is known."""

import os
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Completed, Running

from flows.planning import requests
from flows.results import clean, lineage
from schemas.errors import StageError
from schemas.stage import PEOPLE, Artifact
from stages import tracking
from stages.runtime import workspace
from tests.support.finished import finish
from tests.support.lineage_world import World


@pytest.fixture
def no_flow_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's part left out, which starts a server each time; test_files_of_this_disk has it."""
    monkeypatch.setattr(clean, "flow_runs", lambda before, dry_run: [])


@pytest.fixture
def world(ready_home: Path, no_flow_runs: None) -> World:
    return World(ready_home)


def removed(days: float, dry_run: bool = False) -> set[tuple[str, str]]:
    """Kind and the first words of what is removed."""
    items = clean.clean(days, dry_run)
    assert all(item.size > 0 for item in items)
    return {(item.kind, item.where.partition(" (")[0].removeprefix(f"{workspace.home()}/")) for item in items}


def test_what_a_registered_version_was_made_from_stays_and_the_rest_goes(world: World) -> None:
    """dpo is champion, kto its predecessor; lone and its data are neither's, and too young to be removed at 1 day."""
    assert removed(1) == set()
    gone = {("model or data", "lone"), ("model or data", "data other")}
    assert removed(0, dry_run=True) == gone
    tracking.fetch(world.lone)
    assert removed(0) == gone
    assert removed(0) == set()
    with pytest.raises(StageError, match="gone"):
        tracking.fetch(world.lone)
    for kept in (world.dpo, world.kto, world.sft, world.data, world.questions, world.evaluation):
        assert tracking.fetch(kept).exists()
    assert "pairs.jsonl" in lineage.as_text(lineage.lineage("models:/assistant@champion"))
    (run,) = [one for one in tracking.runs("tags.model = 'lone'")]
    assert tracking.find(run.data.tags["stage.key"]) is None  # asked for again, it is made again
    assert run.info.status == "FINISHED"  # its numbers stay


def test_what_runs_of_the_last_days_were_made_from_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything looks 40 days old, but lone, which a pipeline has just taken again."""
    now = time.time()
    monkeypatch.setattr(clean.time, "time", lambda: now + 40 * clean.DAY)
    (run,) = [one for one in tracking.runs("tags.model = 'lone'")]
    tracking.client().set_tag(run.info.run_id, "pipeline.reused_at", str(int((now + 39 * clean.DAY) * 1000)))
    assert removed(30) == set()
    tracking.client().set_tag(run.info.run_id, "pipeline.reused_at", str(int(now * 1000)))
    assert removed(30) == {("model or data", "lone"), ("model or data", "data other")}


def test_what_others_have_on_a_server_stays(world: World) -> None:
    """Runs with a tag `stage` that no stage of ours has made, and a finished one whose output nobody can tell."""
    client, number = tracking.client(), tracking.experiment("others")
    ours_but_unreadable = {"stage": "sft", "stage.key": "f" * 64}
    every = [
        {"stage": "validate"},
        {"stage": "source"},
        {"stage": "sft", "code.version": "theirs"},
        ours_but_unreadable,
    ]
    for tags in every:
        run = client.create_run(number, tags=tags)
        client.log_text(run.info.run_id, "theirs", "data/rows.txt")
        client.set_terminated(run.info.run_id)
    assert removed(0) == {("model or data", "lone"), ("model or data", "data other")}


def test_a_version_that_a_person_has_registered_keeps_what_it_was_made_from(world: World) -> None:
    (run,) = [one for one in tracking.runs("tags.model = 'lone'")]
    tracking.client().create_registered_model("by-hand")
    tracking.client().create_model_version("by-hand", str(tracking.locate(world.lone.uri)), run.info.run_id)
    assert removed(0) == set()


def test_finished_stages_of_a_pipeline_at_work_stay(world: World) -> None:
    """However long its last stage takes; one that nobody works on any more holds nothing back."""
    tags = {"stage": "align", "stage.key": "e" * 64, "pipeline.run": "p1", **workspace.place()}
    tracking.client().create_run(tracking.experiment("tests"), tags=tags)
    with workspace.lock(workspace.work_folder("e" * 64) / "lock"):
        assert removed(0) == set()
    assert removed(0) == {("model or data", "lone"), ("model or data", "data other")}


def test_what_only_a_server_can_remove_waits_for_one(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """`alignflow up` kept it, and does not run now."""
    number = tracking.client().create_experiment("kept by a server", artifact_location="mlflow-artifacts:/9")
    tracking.client().create_run(number, tags={"stage": "sft", "stage.key": "d" * 64, "code.version": "1"})
    run = tracking.client().create_run(number, tags={"stage": "source", "sha256": "0" * 64, "artifact": "source/x"})
    tracking.client().set_terminated(run.info.run_id)
    assert removed(0) == {("model or data", "lone"), ("model or data", "data other")}
    assert "1 run" in caplog.text and "alignflow up" in caplog.text


def test_files_of_this_disk(ready_home: Path) -> None:
    """Removed: an abandoned checkpoint, a copy, what was moved aside. Kept: what a process holds, and what is new."""
    for name in ("abandoned", "busy", "new"):
        (ready_home / "work" / name / "checkpoint").mkdir(parents=True)
        (ready_home / "work" / name / "checkpoint" / "weights").write_bytes(b"x" * 1000)
    copy = ready_home / "cache" / "artifacts" / ("0" * 64)
    copy.mkdir(parents=True)
    (copy / "weights").write_bytes(b"x" * 500)
    (ready_home / "cache" / "reference.sqlite.bad").write_bytes(b"x" * 100)
    (ready_home / "notes.bad.txt").write_text("of its owner, whose home may hold more")
    long_ago = time.time() - 31 * clean.DAY
    for path in [*ready_home.rglob("*")]:
        if "new" not in path.parts:
            os.utime(path, (long_ago, long_ago))
    with workspace.lock(ready_home / "work" / "busy" / "lock"):
        os.utime(ready_home / "work" / "busy", (long_ago, long_ago))
        os.utime(ready_home / "work" / "busy" / "lock", (long_ago, long_ago))
        items = clean.clean(30, dry_run=False)
    assert [(item.size, item.where) for item in items] == [
        (1000, str(ready_home / "work" / "abandoned")),
        (500, str(copy)),
        (100, str(ready_home / "cache" / "reference.sqlite.bad")),
    ]
    assert not copy.exists() and not (ready_home / "work" / "abandoned" / "checkpoint").exists()
    assert (ready_home / "work" / "busy" / "checkpoint" / "weights").exists()
    assert (ready_home / "work" / "new" / "checkpoint" / "weights").exists()
    text = clean.as_text(items, dry_run=True).splitlines()
    assert text[0].startswith("      1 kB  checkpoints") and text[-1] == "      2 kB  would be removed in all"


def test_copies_of_verdicts_go_where_no_comparison_needs_them(
    ready_home: Path, no_flow_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept: the copies of a listed run's comparison, of one since the time, and of today; and the verdicts."""
    now, results = time.time(), requests.people_folder({}) / "results"
    results.mkdir(parents=True)
    copies: dict[str, Artifact] = {}
    for name in ("listed", "used lately", "of old", "of today"):
        (results / "dpo-sft.json").write_text(name)
        copies |= {name: requests.people_said({}, {})[PEOPLE]}
        assert requests.people_said({}, {})[PEOPLE] == copies[name]  # as where two processes have made it
        if name != "of today":
            finish({}, stage="compare", name=name, params={}, inputs={PEOPLE: copies[name]}, pipeline_run=name)
    os.utime(copies["of today"].uri, (1, 1))
    assert requests.people_said({}, {})[PEOPLE] == copies["of today"]
    assert os.stat(copies["of today"].uri).st_mtime > 1, "it is used again"
    (results.parent / requests.COPIES / "tmp1" / "results").mkdir(parents=True)  # its process was killed
    (results.parent / requests.COPIES / "tmp1" / "results" / "dpo-sft.json").write_text("half")
    clean.history.Entry(clean.history.Record(run="listed", name="t", began=now)).note(state="done")
    later = now + 40 * clean.DAY
    monkeypatch.setattr(clean.time, "time", lambda: later)
    os.utime(copies["of today"].uri, (later - 3600, later - 3600))
    (run,) = [one for one in tracking.runs("tags.stage = 'compare'") if one.info.run_name == "used lately"]
    tracking.client().set_tag(run.info.run_id, "pipeline.reused_at", str(int((now + 39 * clean.DAY) * 1000)))
    gone = [Path(copies["of old"].uri), results.parent / requests.COPIES / "tmp1"]
    sooner = {item.where for item in clean.clean(0.01, dry_run=True)}  # after a quarter of an hour, but a day at least
    assert sooner == {*map(str, gone), copies["used lately"].uri}
    assert {item.where for item in clean.clean(30, dry_run=False)} == {str(path) for path in gone}
    left = {path.name for path in (results.parent / requests.COPIES).iterdir()}
    assert left == {copies[name].sha256 for name in ("listed", "used lately", "of today")} and results.is_dir()


def test_old_lines_of_the_list_of_runs_go_once_newer_ones_fill_it(home: Path) -> None:
    """A run that waits for a person, and one that is young, stay whatever their place."""
    now = time.time()
    for number in range(clean.LISTED + 4):
        state = "waiting" if number == 1 else "done"
        entry = clean.history.Entry(clean.history.Record(run=f"r{number}", name="t", began=now - 1e7 + number))
        entry.note(state=state, place=workspace.place())
        if number != 2:
            os.utime(home / "runs" / f"r{number}.json", (now - 31 * clean.DAY, now - 31 * clean.DAY))
    items = list(clean.old_records(now - 30 * clean.DAY))
    assert {Path(item.where).stem for item in items} == {"r0", "r3"}  # the newest 20 are r4 to r23
    for item in items:
        item.remove()
    assert len(clean.history.records()) == clean.LISTED + 2


def test_of_a_server_that_others_use_too_only_runs_of_our_deployments_go(prefect: SyncPrefectClient) -> None:
    @flow
    def anything() -> None: ...

    theirs, ours = (prefect.create_flow_run(anything, state=Completed(), tags=tags) for tags in ([], ["alignflow"]))
    clean.flow_runs(time.time() + 60, dry_run=False)
    left = {run.id for run in prefect.read_flow_runs()}
    assert theirs.id in left and ours.id not in left


def test_flow_runs_that_ended_are_old_some_day_and_those_that_run_never(prefect: SyncPrefectClient) -> None:
    @flow
    def nothing() -> None: ...

    ended, at_work = (prefect.create_flow_run(nothing, state=state()) for state in (Completed, Running))
    assert ended.id in clean.old_flow_runs(prefect, time.time() + 60)
    assert at_work.id not in clean.old_flow_runs(prefect, time.time() + 60)
    assert ended.id not in clean.old_flow_runs(prefect, time.time() - 60)
