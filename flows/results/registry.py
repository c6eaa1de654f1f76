"""MLflow's model registry: versions with what is known of them, and the alias `champion`, moved by compare-and-swap.

MLflow has no such swap. Whoever moves the alias holds a lock, looks again where it points, and leaves it alone when
that is not where it pointed when the decision was taken.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flows.execution.lease import lease
from flows.results.lookup import quoted
from flows.servers.local_prefect import has_shared_server
from schemas.errors import StageError, refuse
from schemas.stage import Artifact
from stages import tracking
from stages.runtime import workspace

log = logging.getLogger("alignflow")

CHAMPION, PREVIOUS = "champion", "previous"
FORMER = "champion.former"
"""Tag on a version that has become champion: the version that was it before, or `none`."""
ROLLED_BACK = "rolled_back"
STATUS = "status"
"""Tag that tells people what became of a version: `candidate`, `waiting for approval`, `champion`, `former champion`,
`rejected`, `conflict`, `rolled back`."""
LAST = "z."
"""Before the names of tags that only programs read, so that a page lists them last."""
FOR_PROGRAMS = {
    "config.digest",
    "data.digest",
    "eval.run_id",
    "pipeline.run",
    "promote.run_id",
    "stage.key",
    "train.run_id",
}
"""These. Versions of before there was such a prefix have them without."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    model: str
    number: str
    artifact: Artifact
    run_id: str | None
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.model} version {self.number}"


def champion(model: str) -> Version | None:
    """The version that is champion; None where there is no such model, or it has none."""
    number = aliases(model).get(CHAMPION)
    return None if number is None else version(model, number)


def aliases(model: str) -> dict[str, str]:
    """Alias -> version of a registered model; empty where there is no such model."""
    client = tracking.client()
    models = client.search_registered_models(f"name = {quoted(model)}")
    if not models:
        return {}
    # Read by itself: what a search finds may come without its aliases. Over a database the versions are numbers.
    whole = client.get_registered_model(model)
    return {alias: str(number) for alias, number in whole.aliases.items()}


def version(model: str, number: str) -> Version:
    """A version by its number."""
    return _version(tracking.client().get_model_version(model, number))


def versions(model: str | None = None) -> list[Version]:
    """All versions of a model, or of all models; newest first."""
    query = f"name = {quoted(model)}" if model is not None else None
    client, token, listed = tracking.client(), None, list[Any]()
    while True:
        page = client.search_model_versions(query, page_token=token)
        listed += page
        token = page.token
        if not token:
            break
    return sorted(map(_version, listed), key=lambda one: (one.model, -int(one.number)))


def names() -> list[str]:
    """The registered models that have a champion."""
    return sorted({one.model for one in versions() if CHAMPION in aliases(one.model)})


def of_digest(model: str, sha256: str) -> Version | None:
    """The model's version with this content."""
    return next((one for one in versions(model) if one.artifact.sha256 == sha256), None)


def _version(raw: Any) -> Version:
    tags = dict(raw.tags)
    tags |= {name.removeprefix(LAST): value for name, value in raw.tags.items() if name.startswith(LAST)}
    source, sha256 = str(raw.source), tags.get("sha256")
    if sha256 is None and source.startswith("models:/m-"):  # not registered here: its LoggedModel has it, or nothing
        sha256 = tracking.client().get_logged_model(source.removeprefix("models:/")).tags.get("sha256")
    return Version(raw.name, str(raw.version), Artifact(uri=source, sha256=sha256 or ""), raw.run_id, tags)


@contextlib.contextmanager
def held(model: str) -> Iterator[None]:
    """Keep all others from changing the model: on this host by a file's lock, elsewhere by a lease on the Prefect
    server. Where that server is this process's own, or none is set, other hosts are not kept out.
    """
    shared = has_shared_server()
    if not shared and not tracking.tracking_uri().startswith("sqlite:"):
        log.warning("no shared Prefect server (PREFECT_API_URL): promotions from other hosts are not kept out")
    waiting = f"another process changes the registered model {model}: waiting for it"
    elsewhere = lease(f"alignflow-registry-{model}") if shared else contextlib.nullcontext()
    with workspace.lock(workspace.home() / "registry" / f"{model}.lock", waiting), elsewhere:
        if lags(model):
            catch_up(model)
        yield


def former_of(one: Version | None) -> str | None:
    """The version that was champion before this one; None where there was none."""
    number = "none" if one is None else one.tags.get(FORMER, "none")
    return None if number == "none" else number


def lags(model: str) -> bool:
    """Whether `previous` is not the champion's predecessor, or the champion's status is another one: a process died
    between the moves of a promotion or a rollback. Where people have moved an alias by hand, to a version that never
    was champion, nothing is known.
    """
    current, previous = champion(model), aliases(model).get(PREVIOUS)
    if current is None or FORMER not in current.tags:
        return False
    if current.tags.get(STATUS, "champion") not in ("champion", "rolled back"):
        return True
    former = former_of(current)
    if former is None:
        return previous == current.number
    return previous != former and any(one.number == former for one in versions(model))


def catch_up(model: str) -> None:
    """Do what a promotion or rollback that died on its way has left undone. To be called while the model is held."""
    current = champion(model)
    former = former_of(current)
    if former is None or any(one.number == former for one in versions(model)):
        point_previous(model, former)
    if current is not None and current.tags.get(STATUS) not in ("champion", "rolled back"):
        if former is not None and aliases(model).get(PREVIOUS) == former:
            before = version(model, former)
            if before.tags.get(STATUS) == "champion":
                tag(before, {"champion.until": now(), STATUS: "former champion"})
        tag(current, {"champion.since": current.tags.get("champion.since", now()), STATUS: "champion"})


def settled_champion(model: str) -> Version | None:
    """The version that is champion, and what a promotion that died on its way has left undone is done."""
    if lags(model):
        with held(model):
            log.info("%s: a promotion or rollback had died on its way; it is complete now", model)
    return champion(model)


def register_and_promote(
    model: str,
    candidate: Artifact,
    run_id: str | None,
    tags: Mapping[str, str],
    *,
    promote: bool,
    expected: str | None,
    description: str = "",
) -> Version:
    """Register the candidate with its tags; to promote it, make it the champion replaces version `expected`.

    A content that is registered already keeps its version, with the new tags. description: Markdown for its page.

    Raises:
        StageError: kind `conflict`: another version is champion by now; kind `rolled_back`: this content was champion
            once and was rolled back. Then no alias has moved, and the version is tagged.
    """
    with held(model):
        candidate_version = register(model, candidate, run_id, tags)
        for name in [one for one in candidate_version.tags if one == "approval" or one.startswith("approval.")]:
            untag(candidate_version, name)  # of a question about it that this decision closes
        if description:
            tracking.client().update_model_version(model, candidate_version.number, description)
        if not promote and aliases(model).get(CHAMPION) != candidate_version.number:
            tag(candidate_version, {STATUS: "rejected"})
        if promote:
            make_champion(candidate_version, expected)
        return version(model, candidate_version.number)


def make_champion(one: Version, expected: str | None) -> None:
    """Make a version the champion in the place of version `expected`. To be called while the model is held.

    Raises:
        StageError: as `register_and_promote`.
    """
    try:
        check_not_rolled_back(one)
        check_still_champion(one.model, expected)
    except StageError as error:
        kind = error.problem.kind
        tag(one, {"decision": kind, "decision.reasons": str(error), STATUS: kind.replace("_", " ")})
        raise
    move(one, expected)


def register(model: str, candidate: Artifact, run_id: str | None, tags: Mapping[str, str]) -> Version:
    """The candidate's version: the one with the same content, else a new one."""
    registered = of_digest(model, candidate.sha256)
    if registered is None:
        client = tracking.client()
        if not client.search_registered_models(f"name = {quoted(model)}"):
            client.create_registered_model(model)
        # The status first, since lists show tags as they were set.
        at_once = {
            STATUS: "candidate",
            "sha256": candidate.sha256,
        }  # by which it is found again, should this process die here
        logged = candidate.uri.removeprefix("models:/")  # a server wants to hear it twice
        with tracking.as_default():
            made = client.create_model_version(model, candidate.uri, run_id, at_once, model_id=logged)
        registered = version(model, str(made.version))
    tag(registered, tags)
    return registered


def tag(one: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a version; a long value is shortened."""
    places = {LAST + name if name in FOR_PROGRAMS else name: value for name, value in tags.items()}
    for place in sorted(places, key=lambda place: place.startswith(LAST)):  # a list shows them as they were set
        short = tracking.shortened(places[place], tracking.TAG_LENGTH)
        tracking.client().set_model_version_tag(one.model, one.number, place, short)


def untag(one: Version, name: str) -> None:
    """Remove a tag of a version, if it has it."""
    if name in one.tags:
        tracking.client().delete_model_version_tag(one.model, one.number, name)


def check_still_champion(model: str, expected: str | None) -> None:
    """Raises StageError of kind `conflict` unless version `expected` (None: no version) is champion."""
    now = aliases(model).get(CHAMPION)
    if now != expected:
        was = "there was no champion" if expected is None else f"version {expected} was champion"
        message = (
            f"{was} when the candidate was judged, now it is {'none' if now is None else f'version {now}'}; "
            "nothing was moved."
        )
        fix = "retrain again: what is trained is reused, and the candidate is compared with the new champion"
        raise refuse("champion", f"{model}@{CHAMPION}", message, fix, kind="conflict")


def check_not_rolled_back(one: Version) -> None:
    """Raises StageError of kind `rolled_back` when this content was taken back as champion."""
    if ROLLED_BACK in one.tags:
        message = f"the candidate is {one}, which was rolled back at {one.tags[ROLLED_BACK]}."
        fix = f"change data or config; or, if it was right after all, delete the version's tag {ROLLED_BACK}"
        raise refuse("candidate", one.artifact.sha256[:16], message, fix, kind=ROLLED_BACK)


def move(one: Version, former: str | None) -> None:
    """Make a version the champion. The former one is noted first, so that a crash on the way loses nothing."""
    client = tracking.client()
    tag(one, {FORMER: former or "none"})
    client.set_registered_model_alias(one.model, CHAMPION, one.number)
    point_previous(one.model, former)
    if former is not None:
        tag(version(one.model, former), {"champion.until": now(), STATUS: "former champion"})
    tag(one, {"champion.since": now(), STATUS: "champion"})


def point_previous(model: str, number: str | None) -> None:
    """Point the alias `previous` to a version, or remove it."""
    client = tracking.client()
    if number is not None:
        client.set_registered_model_alias(model, PREVIOUS, number)
    elif PREVIOUS in aliases(model):
        client.delete_registered_model_alias(model, PREVIOUS)


def now() -> str:
    """The time, for tags."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def rollback(model: str | None = None) -> tuple[Version, Version]:
    """Make the former champion champion again; returns the version that was rolled back, and the restored one.

    Without a name: of the only registered model that has a champion.

    Raises:
        StageError: there is no champion, no former one, or the former one was rolled back itself.
    """
    if not model:
        known = names()
        if len(known) != 1:
            have = f"there are {len(known)} registered models with a champion."
            fix = f"name one of {', '.join(known)}" if known else "run `alignflow retrain` first"
            raise refuse("MODEL", "none given", have, fix, kind="registry")
        model = known[0]
    with held(model):
        bad = champion(model)
        if bad is None:
            fix = f"name one of {', '.join(names()) or 'the registered models, after a retraining has promoted one'}"
            raise refuse("MODEL", model, "has no champion.", fix, kind="registry")
        former = former_of(bad)
        if former is None:
            fix = "point the alias at another version in MLflow, or take it away there"
            raise refuse("MODEL", bad, "there was no champion before it.", fix, kind="registry")
        restored = version(model, former)
        if ROLLED_BACK in restored.tags:
            fix = "point the alias at a version that you trust in MLflow"
            message = f"the champion before it, version {former}, was rolled back itself."
            raise refuse("MODEL", bad, message, fix, kind="registry")
        tag(bad, {ROLLED_BACK: now(), STATUS: "rolled back"})  # first: from here on no schedule promotes it again
        tracking.client().set_registered_model_alias(model, CHAMPION, former)
        point_previous(model, former_of(restored))
        tag(restored, {STATUS: "champion"})
        return bad, restored
