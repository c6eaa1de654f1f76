"""A person's word before the alias moves: what the registry keeps of it, and a flow that waits for it."""

import contextvars
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.runtime import flow_run
from pydantic import ValidationError

from flows.gate import approval
from flows.results import registry
from schemas.errors import StageError, refuse
from schemas.stage import Artifact
from stages import tracking
from tests.flows.results.test_registry import model_of
from tests.support.commands import alignflow
from tests.support.processes import wait_for

Made = tuple[Artifact, str]
TAGS = {"decision": "promoted", "decision.reasons": "all hold", "decided.at": "then", "decision.look": "1"}


@pytest.fixture
def models(ready_home: Path, tmp_path: Path) -> list[Made]:
    """The champion, which is registered, and two candidates."""
    made = [model_of(tmp_path / name, name) for name in ("one", "two", "three")]
    registry.register_and_promote("assistant", *made[0], {}, promote=True, expected=None)
    return made


def ask(made: Made, run: str = "run-of-two", hours: float = 1.0, look: str = "1") -> registry.Version:
    tags = {**TAGS, "decision.look": look, "pipeline.run": run}
    return approval.ask("assistant", *made, tags, "1", hours)


def champion() -> str | None:
    return registry.aliases("assistant").get("champion")


def test_the_alias_moves_with_the_answer_and_the_version_says_whose_it_was(models: list[Made]) -> None:
    asked = ask(models[1])
    assert asked.tags["approval"] == "waiting" == asked.tags["decision"] and champion() == "1"
    assert approval.pending("assistant")
    until = datetime.fromisoformat(asked.tags["approval.until"])
    assert timedelta(minutes=59) < until - datetime.now(UTC) <= timedelta(hours=1)
    settled = approval.settle(asked, True, "ada", "looks well")
    assert champion() == "2" and registry.aliases("assistant")["previous"] == "1"
    told = {name: settled.tags[name] for name in ("approval", "approval.by", "approval.note", "decision")}
    assert told == {
        "approval": "approved",
        "approval.by": "ada",
        "approval.note": "looks well",
        "decision": "promoted",
    }
    assert abs(datetime.fromisoformat(settled.tags["approval.at"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert not approval.pending("assistant")


def test_the_first_answer_counts_and_only_time_is_overruled(models: list[Made]) -> None:
    rejected = approval.settle(ask(models[1]), False, "ada", "too long")
    assert rejected.tags["decision.reasons"] == "ada rejected it: too long"
    assert approval.settle(rejected, True, "bob").tags["approval"] == "rejected" and champion() == "1"

    late = approval.settle(ask(models[2]), False, "time", late=True)
    assert late.tags["approval"] == "timed out" and late.tags["decision"] == "rejected"
    assert late.tags["decision.reasons"] == f"nobody approved it until {late.tags['approval.until']}"
    assert approval.settle(late, True, "bob").tags["approval.by"] == "bob" and champion() == "3"
    assert approval.settle(late, False, "time", late=True).tags["approval"] == "approved"


def test_an_answer_whose_process_died_before_the_move_is_acted_on(models: list[Made]) -> None:
    asked = ask(models[1])
    registry.tag(asked, {"approval.by": "ada", "approval": "approved"})
    assert approval.settle(asked, None).tags["decision"] == "promoted" and champion() == "2"


def test_a_champion_of_the_meantime_is_not_replaced(models: list[Made]) -> None:
    asked = ask(models[1])
    registry.register_and_promote("assistant", *models[2], {}, promote=True, expected="1")
    with pytest.raises(StageError, match="version 1 was champion when the candidate was judged, now it is version 3"):
        approval.settle(asked, True, "ada")
    assert champion() == "3" and registry.version("assistant", "2").tags["decision"] == "conflict"


def test_the_form_says_what_each_answer_does(models: list[Made]) -> None:
    asked = ask(models[1])
    given = {"candidate": "dpo", "decision.reasons": "win_rate_p is 0, must be <= 0.1; empty is 0"}
    text = approval.question(replace(asked, tags={**asked.tags, **given}), "2026-12-01T15:35:43Z")
    assert text.startswith("**assistant version 2** (dpo) has passed the gate. Is it to become the champion?\n")
    for line in (
        "Approve, and it is the champion in place of version 1 at once.",
        "Reject, and version 1 stays the champion.",
        "Without an answer until 2026-12-01 15:35 UTC it is rejected.",
        "win_rate_p is 0, must be <= 0.1",
        "empty is 0",
    ):
        assert f"\n- {line}\n" in f"{text}\n"
    first = approval.question(replace(asked, tags={**asked.tags, "approval.before": "none"}), "2026-12-01T15:35:43Z")
    assert "it is the first champion at once" in first and "Reject, and there is none." in first


def test_the_same_decision_is_asked_once(models: list[Made]) -> None:
    asked = ask(models[1])
    again = ask(models[1], "another-run", hours=50)
    assert again.number == "2" and again.tags["approval.until"] == asked.tags["approval.until"]
    assert again.tags["pipeline.run"] == "another-run" and again.tags["decision"] == "waiting"
    approval.settle(again, False, "ada", "no")
    stands = ask(models[1], "a-third-run")
    assert stands.tags["approval"] == "rejected" == stands.tags["decision"]
    assert stands.tags["decision.reasons"] == "ada rejected it: no"
    assert approval.runs_of(stands) == ["run-of-two", "another-run", "a-third-run"]
    assert approval.asked_by("assistant", "another-run") == stands
    other = ask(models[1], "a-fourth-run", look="2")  # another decision: nobody has said anything of it
    assert other.tags["approval"] == "waiting" == other.tags["decision"]
    assert not {"approval.by", "approval.at", "approval.note"} & other.tags.keys()


def test_an_answer_to_an_earlier_decision_is_none_to_a_later_one(
    models: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the process dies that asks anew."""
    approval.settle(ask(models[1]), True, "ada")
    registry.register_and_promote("assistant", *models[2], {}, promote=True, expected="2")
    tag, asked = registry.tag, {**TAGS, "decision.look": "9", "pipeline.run": "r"}

    def dies_after(number: int, one: registry.Version, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            if len(written) == number:
                raise KeyboardInterrupt
            written.append(name)
            tag(one, {name: value})

    for number in range(7, 11):  # of 11 tags; the last of them says that it waits
        written: list[str] = []
        with monkeypatch.context() as patched:
            patched.setattr(registry, "tag", partial(dies_after, number))
            with pytest.raises(KeyboardInterrupt):
                approval.ask("assistant", *models[1], asked, "3", 1.0)
        again = approval.ask("assistant", *models[1], asked, "3", 1.0)
        assert approval.settle(again, None).tags["approval"] == "waiting" and champion() == "3"
        approval.settle(again, True, "ada")  # for the next round
        registry.move(registry.version("assistant", "3"), "2")
        registry.tag(again, {"approval.look": f"of round {number}"})


def test_a_later_verdict_closes_the_question(models: list[Made]) -> None:
    asked = ask(models[1])
    rejected = {**TAGS, "decision": "rejected", "decision.reasons": "smoke"}
    registry.register_and_promote("assistant", *models[1], rejected, promote=False, expected="1")
    with pytest.raises(StageError, match="waits for approval"):
        approval.decide("assistant", approve=True)
    assert approval.settle(asked, True, "ada").tags["decision"] == "rejected" and champion() == "1"


def test_a_champion_whose_promotion_died_behind_the_move_stays_one(
    models: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, move = ask(models[1]), registry.move

    def moves_and_dies(*given: Any) -> None:
        move(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(registry, "move", moves_and_dies)
        with pytest.raises(KeyboardInterrupt):
            approval.settle(asked, True, "ada")
    settled = approval.settle(asked, None)
    assert (settled.tags["decision"], settled.tags["status"], champion()) == ("promoted", "champion", "2")


def test_a_command_that_is_stopped_answers_nothing(models: list[Made], monkeypatch: pytest.MonkeyPatch) -> None:
    ask(models[1])
    told: list[object] = []
    monkeypatch.setattr(approval, "resume", lambda *given: told.append(given))

    def stopped(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(approval, "settle", stopped)
    with pytest.raises(KeyboardInterrupt):
        approval.decide(None, approve=True)
    assert told == []


def test_who_waits_counts_before_whose_time_was_up(models: list[Made]) -> None:
    approval.settle(ask(models[1]), False, "time", late=True)
    waits = ask(models[2], "run-of-three")
    assert approval.decide("assistant", approve=False, by="ada").number == waits.number
    assert approval.decide("assistant", approve=False, by="ada").number == "2"


# --- a flow that waits ---


class Waiting(threading.Thread):
    """A flow, in a thread of its own, that waits with a version; as one of a run from a terminal."""

    def __init__(self, one: registry.Version) -> None:
        super().__init__(daemon=True)
        self.one, self.run_id = one, ""
        self.context = contextvars.copy_context()  # the address of the server
        self.outcome: registry.Version | BaseException | None = None

    def run(self) -> None:
        @flow(name="retrain", persist_result=False)
        def waits() -> None:
            self.run_id = str(flow_run.id)
            registry.tag(self.one, {"pipeline.run": self.run_id, approval.ASKED_BY: self.run_id})
            self.outcome = approval.answered(registry.version("assistant", self.one.number))

        try:
            self.context.run(waits)
        except BaseException as error:
            self.outcome = error


@pytest.fixture
def server(prefect: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setattr(approval, "LOOK_SECONDS", 0.1)
    yield prefect


def waiting(server: SyncPrefectClient, one: registry.Version) -> tuple[Waiting, FlowRun]:
    """The flow, and its run once it is paused."""
    flow = Waiting(one)
    flow.start()

    def state() -> State[Any] | None:
        return server.read_flow_run(flow.run_id).state if flow.run_id else None  # type: ignore[arg-type]

    wait_for(lambda: (now := state()) is not None and now.is_paused(), 60, lambda: (flow.outcome, state()))
    return flow, server.read_flow_run(flow.run_id)  # type: ignore[arg-type]


def ended(flow: Waiting) -> registry.Version:
    flow.join(30)
    assert isinstance(flow.outcome, registry.Version), flow.outcome
    return flow.outcome


def test_it_is_resumed_by_the_form_on_prefects_page(
    server: SyncPrefectClient, models: list[Made], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flow, run = waiting(server, ask(models[1]))
    there, away = registry.version, iter([True, True])

    def version(*given: str) -> registry.Version:
        if threading.current_thread() is flow and next(away, False):
            raise refuse("MLFLOW_TRACKING_URI", "u", "MLflow does not answer", "start it", kind="server")
        return there(*given)

    monkeypatch.setattr(registry, "version", version)
    assert run.state is not None and run.state.name == "Paused"
    assert (run.state.message or "").startswith("assistant version 2 waits for approval until 20")
    for given in (None, {"by": "ada"}):  # the form is not filled in, or only half
        nothing = server.resume_flow_run(run.id, run_input=given)
        assert nothing.status.value == "REJECT" and flow.outcome is None
    server.resume_flow_run(run.id, run_input={"answer": "approve", "by": "ada"})
    assert ended(flow).tags["approval.by"] == "ada" and champion() == "2"
    assert "still waits for approval: MLFLOW_TRACKING_URI = u: MLflow does not answer" in caplog.text
    emitted = EventFilter(event=EventNameFilter(name=["alignflow.approval-needed"]))
    told: list[Any] = []
    wait_for(lambda: told.extend(server.read_events(filter=emitted, limit=10).events) or told, 30)
    assert told[0].resource.id == "alignflow.model.assistant" and told[0].payload["version"] == "2"
    assert told[0].payload["run"] == str(run.id)
    assert told[0].payload["finding"].startswith("assistant version 2 has passed the gate and waits")


def test_a_form_that_was_open_before_an_update_is_read() -> None:
    given = {"by": "ada", "note": ""}
    for switch, answer in ((True, "approve"), (False, "reject")):
        assert approval.Answer(**{**given, "approve": switch}).answer == answer  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="approve"):
        approval.Answer(**{**given, "approve": True, "answer": "reject"})  # type: ignore[arg-type]


def test_it_is_rejected_by_the_form(server: SyncPrefectClient, models: list[Made]) -> None:
    flow, run = waiting(server, ask(models[1]))
    server.resume_flow_run(run.id, run_input={"answer": "reject", "by": "ada", "note": "no"})
    assert ended(flow).tags["decision.reasons"] == "ada rejected it: no" and champion() == "1"


def test_it_sees_the_answer_of_the_command_line(server: SyncPrefectClient, models: list[Made]) -> None:
    """Also where the command knows nothing of the server of the run, as here."""
    flow, run = waiting(server, ask(models[1]))
    answer = alignflow("approve", str(run.id)[:8], "--by", "ada", "--json")
    assert answer.returncode == 0, answer.stderr
    assert '"approval": "approved"' in answer.stdout and '"version": "2"' in answer.stdout
    assert ended(flow).tags["decision"] == "promoted" and champion() == "2"
    wait_for(lambda: (state := server.read_flow_run(run.id).state) is not None and state.is_completed(), 30)


def test_nobody_answers(server: SyncPrefectClient, models: list[Made]) -> None:
    flow, _ = waiting(server, ask(models[1], hours=3 / 3600))
    assert ended(flow).tags["approval"] == "timed out" and champion() == "1"


def test_one_that_was_killed_waits_again_with_the_same_decision_until_the_same_time(
    server: SyncPrefectClient, models: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """The process dies here."""

    def dies(*given: object) -> None:
        raise Killed

    asked = ask(models[1])
    with monkeypatch.context() as killed:
        killed.setattr(approval, "watched", dies)
        first = Waiting(asked)
        first.start()
        first.join(30)
    assert isinstance(first.outcome, Killed)
    flow, run = waiting(server, ask(models[1]))
    assert flow.one.tags["approval.until"] == asked.tags["approval.until"] and str(run.id) != first.run_id
    approval.decide(str(run.id), approve=True, by="ada")
    assert ended(flow).tags["decision"] == "promoted"


# --- the command ---


def test_what_cannot_be_answered_is_named(models: list[Made]) -> None:
    with pytest.raises(StageError, match=r"0 versions wait\. Fix: `alignflow retrain` asks"):
        approval.decide(None, approve=True)
    ask(models[1], "11111111-aaaa")
    ask(models[2], "22222222-bbbb")
    with pytest.raises(
        StageError, match=r"RUN = none given: 2 versions wait\. Fix: name one of .*11111111 \(assistant v"
    ):
        approval.decide(None, approve=True)
    with pytest.raises(StageError, match="RUN = 3333: nothing of that waits for approval"):
        approval.decide("3333", approve=True)
    assert approval.decide("11111111", approve=False, by="ada").number == "2"
    with pytest.raises(StageError, match="assistant version 2 was rejected by ada at 20"):
        approval.decide("11111111", approve=True)
    assert approval.decide("assistant", approve=True, by="ada").number == "3" and champion() == "3"
    assert tracking.client().get_model_version("assistant", "3").tags["approval"] == "approved"
