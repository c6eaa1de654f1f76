"""A person's word between the gate's decision and the move of the alias.

The registered version's tags hold what was asked and what was answered, so that it outlasts the flow that waits, its
process and its server. Whoever answers moves the alias too, under the registry's lock: the form on Prefect's page, by
the flow that it resumes; `alignflow approve`, at once; or time, which rejects.
"""

import contextlib
import getpass
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import Pause, PrefectException
from prefect.input import RunInput, keyset_from_paused_state, read_flow_run_input
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Paused, Running, State, Suspended
from pydantic import Field, model_validator

from flows.results import announce, history, registry
from flows.results.registry import Version
from flows.servers.automations import WAITS
from schemas.errors import StageError, refuse
from schemas.stage import Artifact
from stages import tracking

log = logging.getLogger("alignflow")

APPROVAL = "approval"
"""Tag of a version that a person is asked about; the others begin with it: `approval.by`, `.at`, `.until`, `.note`."""
WAITING, APPROVED, REJECTED, EXPIRED = "waiting", "approved", "rejected", "timed out"

ASKED_BY, RUNS = "approval.runs", 50
"""Tag with the flow runs that wait for the answer, and how many of them are kept."""
LOOK_SECONDS = 3.0
"""Between two looks of a waiting flow at what was answered."""


class Answer(RunInput):
    """The form on Prefect's page of a run that waits."""

    answer: Literal["approve", "reject"] = Field(title="Your answer")  # no switch: one that nobody touched is off
    by: str = Field(title="Your name", description="Kept with the version.", min_length=1, max_length=100)
    note: str = Field(default="", title="Why", description="Kept with the version.", max_length=1000)

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, given: Any) -> Any:
        """Forms that were open before `answer` was in them had a switch `approve`."""
        if isinstance(given, dict) and isinstance(given.get("approve"), bool) and "answer" not in given:
            given = {**given, "answer": "approve" if given["approve"] else "reject"}
            del given["approve"]
        return given


def ask(
    model: str,
    candidate: Artifact,
    run_id: str | None,
    tags: Mapping[str, str],
    expected: str | None,
    hours: float,
    description: str = "",
) -> Version:
    """Register the candidate as a version that waits for a person, who has so many hours. `description`: Markdown for
    its page.

    The same decision (the same look, before the same champion) is asked once: its answer and its deadline stay.
    """
    mine = {"approval.look": tags["decision.look"], "approval.before": expected or "none"}
    with registry.held(model):
        known = registry.of_digest(model, candidate.sha256)
        if known is not None and APPROVAL in known.tags and mine.items() <= known.tags.items():
            kept = {name: known.tags[name] for name in ("decision", "decision.reasons", "decided.at")}
            runs = [*runs_of(known), tags["pipeline.run"]][-RUNS:]
            one = registry.register(model, candidate, run_id, {**tags, **kept, ASKED_BY: " ".join(dict.fromkeys(runs))})
            return registry.version(model, one.number)
        if known is not None:  # an answer to another decision must never pass for one to this
            close(known)
        until = datetime.now(UTC) + timedelta(hours=hours)
        asked = {**mine, "approval.until": iso(until), "decision": WAITING, ASKED_BY: tags["pipeline.run"]}
        one = registry.register(model, candidate, run_id, {**tags, **asked, registry.STATUS: "waiting for approval"})
        if description:
            tracking.client().update_model_version(model, one.number, description)
        registry.tag(one, {APPROVAL: WAITING})  # last: a process may die in between
        return registry.version(model, one.number)


def close(one: Version) -> None:
    """Take a question and its answer off a version."""
    for name in (APPROVAL, "approval.by", "approval.at", "approval.note", ASKED_BY):
        registry.untag(one, name)


def runs_of(one: Version) -> list[str]:
    """Ids of the flow runs that have asked about a version."""
    return one.tags.get(ASKED_BY, one.tags.get("pipeline.run", "")).split()


def iso(moment: datetime) -> str:
    """As tags have it, in UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def settle(one: Version, approve: bool | None, by: str = "", note: str = "", *, late: bool = False) -> Version:
    """Write an answer down and do what it says; the version as it is then. The first answer counts, but one that comes
    after the time is up overrules time. `late`: it is time that answers. None: do what the answer of before says.

    Raises:
        StageError: it may not become champion (kinds `conflict`, `rolled_back`): no alias has moved.
    """
    with registry.held(one.model):
        one = registry.version(one.model, one.number)
        asked = one.tags.get(APPROVAL)  # none: another decision has closed the question
        if approve is not None and asked in ((WAITING,) if late else (WAITING, EXPIRED)):
            answer = APPROVED if approve else EXPIRED if late else REJECTED
            why = f"nobody approved it until {one.tags['approval.until']}" if late else f"{by} rejected it"
            why = f"{why}: {note}" if note else why
            rejected = {} if approve else {"decision": "rejected", "decision.reasons": why, registry.STATUS: "rejected"}
            # The answer itself last: whoever sees it finds the rest.
            given = {"approval.by": by, "approval.at": registry.now(), "approval.note": note, **rejected}
            registry.tag(one, {**given, APPROVAL: answer})
            one = registry.version(one.model, one.number)
        if one.tags.get(APPROVAL) == APPROVED and one.tags["decision"] != "promoted":
            before = one.tags["approval.before"]
            if registry.aliases(one.model).get(registry.CHAMPION) != one.number:  # else it was moved, and died then
                registry.make_champion(one, None if before == "none" else before)
            registry.tag(one, {"decision": "promoted", registry.STATUS: "champion"})
        return registry.version(one.model, one.number)


def asked_by(model: str, run: str) -> Version | None:
    """The version that a flow run has asked about before it was stopped or suspended."""
    mine = (one for one in registry.versions(model) if run in runs_of(one))
    return next((one for one in mine if APPROVAL in one.tags), None)


def pending(model: str) -> bool:
    """Whether a version waits for a person, and has the time."""
    now = iso(datetime.now(UTC))
    waiting = (one for one in registry.versions(model) if one.tags.get(APPROVAL) == WAITING)
    return any(now < one.tags["approval.until"] for one in waiting)


# --- the flow that waits ---


def answered(one: Version) -> Version:
    """Wait until a version is settled; to be called in a flow.

    A run of a deployment is suspended instead: it leaves its worker, and comes back here when it is resumed.

    Raises:
        Pause: it is suspended.
        StageError: the answer was yes, and it may not become champion; or the run was cancelled (status `preempted`).
    """
    run, until = UUID(str(flow_run.id)), datetime.fromisoformat(one.tags["approval.until"])
    if one.tags.get(APPROVAL) != WAITING:
        return settle(one, None)
    with get_client(sync_client=True) as client:
        if (given := from_page(client, run, one)) is not None:
            return settle(one, given.answer == "approve", given.by, given.note)
        if datetime.now(UTC) >= until:
            return settle(one, False, "time", late=True)
        how = f"alignflow approve {str(run)[: history.SHORT]} (or --reject)"
        get_run_logger().warning("%s has passed the gate and %s%s: %s", one, WAITS, iso(until), how)
        if len(runs_of(one)) == 1:  # else a person was told when it was asked first
            finding = f"{one} has passed the gate and {WAITS}{iso(until)}."
            announce.emit("approval-needed", one.model, finding, one.number)
        state = pause(client, run, one, iso(until))
        if deployment.id:
            raise Pause(state=state)
        try:
            return watched(client, run, one, until)
        finally:  # as the server sees it: an answer from elsewhere has not resumed it
            with contextlib.suppress(httpx.HTTPError):
                if (state := client.read_flow_run(run).state) is not None and state.is_paused():
                    client.set_flow_run_state(run, Running(), force=True)


def from_page(client: SyncPrefectClient, run: UUID, one: Version) -> Answer | None:
    """What a person has put into the form of this flow run about this version; None where nobody has."""
    for state in client.read_flow_run_states(run):
        keys = state.state_details.run_input_keyset
        if keys and str(state.state_details.pause_key).startswith(key_of(one)):
            given: Any = read_flow_run_input(keys["response"], flow_run_id=run)
            if given is not None:
                return Answer(**given)
    return None


def key_of(one: Version) -> str:
    """What a pause that asks about a version's decision is called."""
    return f"{one.model}-{one.number}-{one.tags['approval.look']}-"


def pause(client: SyncPrefectClient, run: UUID, one: Version, until: str) -> State[Any]:
    """Pause the flow run on the server, with a form; suspend it where it is one of a deployment."""
    name = key_of(one) + uuid4().hex[:8]  # another one each time: Prefect lets none happen twice
    state: State[Any] = (Suspended if deployment.id else Paused)(pause_key=name, message=f"{one} {WAITS}{until}")
    keys = keyset_from_paused_state(state)
    state.state_details.run_input_keyset = {**keys}
    Answer.with_initial_data(description=question(one, until)).save(keys, flow_run_id=run)
    answer = client.set_flow_run_state(run, state)
    if answer.state is None or not answer.state.is_paused():
        message = f"the Prefect server does not pause the run: {answer.details}."
        raise StageError(message, status="preempted", kind="preempted", fix="run it again: it asks again")
    return answer.state


def question(one: Version, until: str) -> str:
    """What the form says above its fields, Markdown: what is asked, what each answer does, what the gate has seen."""
    before, asked = one.tags["approval.before"], one.tags.get("candidate", "the candidate")
    first = before == "none"
    place = "the first champion" if first else f"the champion in place of version {before}"
    stays = "there is none" if first else f"version {before} stays the champion"
    lines = [
        f"**{one}** ({asked}) has passed the gate. Is it to become the champion?\n",
        f"- Approve, and it is {place} at once.",
        f"- Reject, and {stays}.",
        f"- Without an answer until {datetime.fromisoformat(until):%Y-%m-%d %H:%M} UTC it is rejected.",
        "- *Close* answers nothing.",
    ]
    if page := announce.version_page(one.model, one.number):  # above the checks, which the page scrolls
        lines.append(f"\n[The report, the data and all checks in MLflow]({page})")
    lines += ["\nWhat the gate has seen:\n"]
    return "\n".join([*lines, *(f"- {check}" for check in one.tags["decision.reasons"].split("; "))])


def watched(client: SyncPrefectClient, run: UUID, one: Version, until: datetime) -> Version:
    """Look for an answer in the registry and on the server, until there is one or time is up."""
    look = one.tags["approval.look"]
    while True:
        time.sleep(LOOK_SECONDS)
        try:
            one = registry.version(one.model, one.number)
        except StageError as error:
            if error.problem.kind != "server" or datetime.now(UTC) >= until:
                raise
            log.warning("%s still waits for approval: %s", one, error)  # MLflow is away, and has been for long
            continue
        if one.tags.get("approval.look") != look:
            message = f"{one} was asked about anew, after another look."
            raise StageError(message, status="preempted", kind="preempted", fix="answer that question")
        if one.tags.get(APPROVAL) != WAITING:
            return settle(one, None)
        try:
            state = client.read_flow_run(run).state
            given = None if state is None or state.is_paused() else from_page(client, run, one)
        except httpx.HTTPError:  # away for a moment; the registry is what counts
            continue
        if given is not None:
            return settle(one, given.answer == "approve", given.by, given.note)
        if state is not None and (state.is_cancelling() or state.is_final()):
            raise StageError("the run was cancelled while it waited.", status="preempted", kind="preempted")
        if datetime.now(UTC) >= until:
            return settle(one, False, "time", late=True)


# --- `alignflow approve` ---


def decide(which: str | None, approve: bool, by: str | None = None, note: str = "") -> Version:
    """Answer for the version that a run waits with: by the run's id or the beginning of it, or by the registered
    model's name; None: the only one that waits. Resumes the run where a Prefect server is set.

    Raises:
        StageError: none waits, or several do; it was answered before; or it may not become champion.
    """
    asked = [one for one in registry.versions() if APPROVAL in one.tags]
    if which is None:
        found = [one for one in asked if one.tags[APPROVAL] == WAITING]
    else:
        found = [one for one in asked if which == one.model or any(history.is_id(which, run) for run in runs_of(one))]
        waiting = [one for one in found if one.tags[APPROVAL] == WAITING]
        expired = [one for one in found if one.tags[APPROVAL] == EXPIRED]
        found = waiting or expired[:1] or found[:1]  # the newest
    if len(found) != 1:
        waiting = [one for one in asked if one.tags[APPROVAL] == WAITING]
        known = ", ".join(f"{runs_of(one)[-1][: history.SHORT]} ({one})" for one in waiting)
        message = f"{len(found) or 'nothing'} of that waits for approval." if which else f"{len(found)} versions wait."
        fix = f"name one of {known}" if known else "`alignflow retrain` asks where promote.approval is true"
        raise refuse("RUN", which or "none given", message, fix, kind="registry")
    (one,) = found
    if one.tags[APPROVAL] not in (WAITING, EXPIRED):
        message = f"{one} was {one.tags[APPROVAL]} by {one.tags['approval.by']} at {one.tags['approval.at']}."
        raise refuse("RUN", which or one, message, "retrain, or roll back", kind="registry")
    by = by or f"{getpass.getuser()}@{socket.gethostname()}"
    answer = {"answer": "approve" if approve else "reject", "by": by, "note": note}
    try:
        settled = settle(one, approve, by, note)
    except StageError as error:
        if error.problem.kind in ("conflict", registry.ROLLED_BACK):  # an answer too: the run ends as that
            resume(runs_of(one), answer)
        raise
    resume(runs_of(one), answer)
    return settled


def resume(runs: Sequence[str], answer: Mapping[str, object]) -> None:
    """Resume the flow runs, if a server is set that knows them; they look at the registry too, and need not be told."""
    if not PREFECT_API_URL.value():
        return
    for run in runs:
        try:
            with get_client(sync_client=True) as client:
                told = client.resume_flow_run(UUID(run), run_input=dict(answer))
            if told.status.value != "ACCEPT":
                log.info("run %s was not resumed: %s", run[: history.SHORT], told.details)
        except (httpx.HTTPError, PrefectException, ValueError) as error:
            log.info("run %s was not resumed: %s", run[: history.SHORT], tracking.without_passwords(str(error)))
