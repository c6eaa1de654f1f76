"""What `alignflow runs` lists, and what becomes of two runs that are compared."""

import os
from pathlib import Path

import pytest

from flows.results import across, history, lookup
from flows.results.history import Record
from schemas.errors import Problem, StageError
from schemas.stage import Artifact, Request, Result
from stages.runtime import workspace

DAY = 86400.0
ID = "8634f932-aaa5-4444-8c65-94d054d2f74b"


def write(home: Path, **values: object) -> None:
    record = Record.model_validate({"run": ID, "name": "demo", "began": DAY, "place": workspace.place()} | values)
    (home / "runs").mkdir(exist_ok=True)
    (home / "runs" / f"{record.run}.json").write_text(record.model_dump_json())


def test_a_run_is_recorded_with_what_was_changed_and_how_it_ended(home: Path) -> None:
    results = {"sft": Result(status="done", key="a"), "dpo": Result(status="done", key="b", reused=True)}
    with history.recorded(ID, "demo", ["align.dpo.beta=0.3", "evil=\n\x1b[2J"]) as entry:
        (during,) = history.records()
        assert during.state == "running" and during.ended is None
        entry.count(results, {"sft": 1.24})
    (after,) = history.records()
    assert (after.state, after.stages, after.reused, after.seconds) == ("done", 2, 1, {"sft": 1.2})
    assert after.changed == ["align.dpo.beta=0.3", "evil= �[2J"] and (after.ended or 0) >= after.began


@pytest.mark.parametrize(("status", "state"), [("preempted", "stopped"), ("refused", "refused")])
def test_a_problem_is_the_state(home: Path, status: str, state: str) -> None:
    with history.recorded(ID, "demo", []) as entry:
        entry.fail(StageError("bad rows", status=status))  # type: ignore[arg-type]
    (one,) = history.records()
    assert (one.state, one.problem) == (state, "bad rows")


def test_ctrl_c_is_a_stop(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt), history.recorded(ID, "demo", []):
        raise KeyboardInterrupt
    assert [one.state for one in history.records()] == ["stopped"]


def test_a_run_whose_process_is_gone_was_killed_and_one_elsewhere_is_believed(home: Path) -> None:
    other = ID.replace("8634", "9999")
    write(home, process=os.getpid(), process_began=1.0)  # our pid, in another life
    write(home, run=other, process=os.getpid(), process_began=1.0, place={"host": "elsewhere", "home": "/h"})
    assert {one.run: one.state for one in history.records()} == {ID: "killed", other: "running"}


def test_runs_are_listed_newest_first_and_found_by_what_a_line_shows(home: Path) -> None:
    for number in range(3):
        run = f"{number}" * 8 + ID[8:]
        write(
            home, run=run, began=DAY * number, state="done", stages=16, reused=15, best=["kto", "dpo"], changed=["a=1"]
        )
    (home / "runs" / "broken.json").write_text("{")
    text = history.as_text(history.records(), 200)
    head, *lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["22222222", "11111111", "00000000"]
    assert head.split() == ["run", "name", "when", "state", "stages", "best", "changed"]
    assert lines[0].endswith("done   16 (15 reused)  kto, dpo  a=1")
    assert all(len(line) <= 40 for line in history.as_text(history.records(), 40).splitlines())
    assert history.as_text([], 80).startswith("No run yet.")


@pytest.mark.parametrize(
    ("which", "found"), [(ID, True), (ID[:8], True), (ID[:10], True), (ID[:4], False), ("", False)]
)
def test_an_id_may_be_cut_to_what_is_shown_and_no_shorter(which: str, found: bool) -> None:
    assert history.is_id(which, ID) == found


def test_models_of_two_runs_stand_together_and_equal_ones_once() -> None:
    def made(**digests: str) -> dict[str, Artifact]:
        return {name: Artifact(uri=f"/{digest}", sha256=digest) for name, digest in digests.items()}

    inputs = across.together(
        {"A": made(sft="s", dpo="1", ppo="p", baselines="b"), "B": made(sft="s", dpo="2", kto="k", baselines="b")}
    )
    digests = {name: artifact.sha256 for name, artifact in inputs.items()}
    assert digests == {"sft": "s", "dpo-A": "1", "dpo-B": "2", "ppo": "p", "baselines": "b", "kto": "k"}
    apart = across.together({"A": made(sft="s", baselines="b"), "B": made(sft="t", baselines="c")})
    assert sorted(apart) == ["sft-A", "sft-B"]  # there is no one SFT model that the baselines could be of


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Request]:
    """The requests for comparisons across runs: `a...` and `b...` exist, and their stage refuses."""
    requests: list[Request] = []

    def refuse(request: Request) -> Result:
        requests.append(request)
        problem = Problem(kind="config", message="not the same prompts.")
        return Result(status="refused", key=request.key(), error=problem)

    def request_of(run_id: str) -> Request:
        inputs = {"dpo": Artifact(uri="/d", sha256=run_id), "sft": Artifact(uri="/s", sha256="s")}
        return Request(
            stage="compare", version=1, params={"judge": {"judge": "endpoint"}}, inputs=inputs, log_text=False
        )

    found = {which: lookup.Comparison(which * 9, tmp_path, f"mlflow-{which}") for which in "ab"}
    monkeypatch.setattr(across.lookup, "comparison", found.__getitem__)
    monkeypatch.setattr(across.lookup, "request_of", request_of)
    monkeypatch.setattr(across.process, "run_stage", refuse)
    return requests


def test_two_runs_are_compared_by_the_stage_without_asking_a_judge(asked: list[Request]) -> None:
    with pytest.raises(StageError, match="not the same prompts"):
        across.compare("a", "b")
    (request,) = asked
    assert set(request.inputs) == {"sft", "dpo-aaaaaaaa", "dpo-bbbbbbbb"} and request.params == {}
    assert request.tags == {lookup.ACROSS: "aaaaaaaaa bbbbbbbbb"} and not request.log_text


def test_a_run_is_not_compared_with_itself(asked: list[Request]) -> None:
    with pytest.raises(StageError, match="RUN = a: this is the same run"):
        across.compare("a", "a")
    assert asked == []


def test_what_stages_usually_take_is_what_they_took_last(home: Path) -> None:
    """Of runs of the same name; a stage that the newest lacks is believed of the one before."""
    runs = [("demo", {"sft": 1.0, "dpo": 2.0}), ("other", {"sft": 9.0}), ("demo", {"sft": 3.0})]
    for number, (name, seconds) in enumerate(runs):
        with history.recorded(f"{number}" * 32, name, []) as entry:
            entry.count({"base": Result(status="done", key="k")}, seconds)
    assert history.usual_seconds("demo") == {"sft": 3.0, "dpo": 2.0}
    assert history.usual_seconds("none") == {}
