"""The gate's error budget: every look at a candidate spends a share of the year's error, and is written down before it.

The looks of a registered model are tags of the registered model in MLflow, `look.NUMBER.CANDIDATE`, so that neither a
rejected candidate's removal nor a crash forgets one.

The rule is alpha spending by the union bound (Bonferroni; Lan and DeMets 1983 for spending over calendar time): the
chance that any look of a year is wrong is at most the sum of what they spend, whatever depends on what: the same
prompts, a champion that an earlier look made, candidates trained on each other's answers. E-values would let a test go
on for longer on one candidate; here each candidate is another hypothesis with fresh answers, where they gain nothing
and a look of their size needs more prompts.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from flows.results import registry
from flows.results.lookup import quoted
from schemas.errors import refuse
from schemas.promotion import Decision, Gate
from stages import tracking

log = logging.getLogger("alignflow")

YEAR = timedelta(days=365)
KEPT = 2 * YEAR
"""Older looks are removed from the registry: they count no more."""
PREFIX = "look."
OPEN = "open"
"""Decision of a look that is taken and not decided, or whose process died."""


@dataclass(frozen=True)
class Look:
    """One decision on a candidate."""

    number: int
    at: str
    """When it was taken, ISO 8601."""
    alpha: float
    """What it spends."""
    key: str
    """Digest of what was looked at and how: candidate, champion, SFT model, data, judge and gate. An equal look is not
    another chance: it takes the same answers and comes to the same decision."""
    candidate: str
    """sha256 of the candidate."""
    decision: str = OPEN
    p: float | None = None
    n: int | None = None
    """Clusters of prompts that were won or lost."""

    @property
    def time(self) -> datetime:
        """When it was taken."""
        return datetime.fromisoformat(self.at)

    @property
    def tag(self) -> str:
        """Its tag's name. With the candidate in it: two hosts that know nothing of each other overwrite nothing."""
        return f"{PREFIX}{self.number:05d}.{self.candidate[:12]}"


# --- the rule: pure ---


def opens(looks: Iterable[Look], gate: Gate, now: datetime) -> datetime | None:
    """When another look may be taken; None: now.

    So that within any 365 days no more than `gate.error` is spent: the chance to promote, in them, at least one
    candidate that is no better than its champion.
    """
    recent = sorted((look for look in looks if look.time > now - YEAR), key=lambda look: look.time)
    spent = sum(look.alpha for look in recent) + gate.alpha
    opening = None
    for look in recent:
        if spent <= gate.error * (1 + 1e-9):
            break
        spent, opening = spent - look.alpha, look.time + YEAR
    return opening


def seed(model: str, look: Look) -> int:
    """Of all answers of a look: each look draws new ones, and one that is resumed the same again."""
    parts = f"{model}/{look.number}/{look.candidate}/{look.key}"
    return int.from_bytes(hashlib.sha256(parts.encode()).digest()[:8], "big") >> 1


# --- the registry ---


def looks(model: str) -> list[Look]:
    """All looks of a registered model that are kept, oldest first."""
    registered = _model(model)
    found = []
    for name, value in ({} if registered is None else registered.tags).items():
        if name.startswith(PREFIX):
            try:
                found.append(Look(**json.loads(value)))
            except (ValueError, TypeError) as error:
                message = f"the record of a look at a candidate is not readable: {error}."
                fix = f"restore the tag {name} of the registered model in MLflow, or delete it to forget what it spent"
                raise refuse(f"{model}: {name}", value, message, fix, kind="registry") from error
    return sorted(found, key=lambda one: one.number)


def take(model: str, key: str, candidate: str, gate: Gate) -> Look:
    """The look of this key: the one that was taken before, else a new one, which is written down before it returns.

    Others are kept out meanwhile (`registry.held`), so that two retrainings at once see what the other has spent.

    Raises:
        StageError: kind `budget`: the year's error is spent.
    """
    with registry.held(model):
        known, now = looks(model), datetime.now(UTC)
        # Looks of the last year that looked at the same in the same way.
        before = [one for one in known if one.key == key and one.time > now - YEAR]
        if before:
            return max(before, key=lambda one: one.number)
        check_budget(model, known, gate, now)
        number = 1 + max((look.number for look in known), default=0)
        look = Look(number, now.isoformat(timespec="seconds"), gate.alpha, key, candidate)
        if _model(model) is None:
            tracking.client().create_registered_model(model)
        write(model, look)
        for old in known:
            if old.time < now - KEPT:
                tracking.client().delete_registered_model_tag(model, old.tag)
        return look


def check_budget(model: str, known: Sequence[Look], gate: Gate, now: datetime | None = None) -> None:
    """Raises StageError of kind `budget` where no look may be taken now, with the day when one may."""
    opening = opens(known, gate, now or datetime.now(UTC))
    if opening is None:
        return
    message = (
        f"{model} has spent its error budget of {gate.error:g} in 365 days; the gate opens again on {opening:%Y-%m-%d}."
    )
    fix = (
        "wait until then; or raise promote.gate.looks_per_year, which makes each look stricter, or promote.gate.error, "
        "the chance of a wrong promotion in a year"
    )
    raise refuse("promote.gate.error", gate.error, message, fix, kind="budget")


def note(model: str, look: Look, decision: Decision) -> Look:
    """Write down what a look came to."""
    p = next((check.value for check in decision.checks if check.metric == "win_rate_p"), None)
    decided = "promote" if decision.promote else "reject"
    look = replace(look, decision=decided, p=p, n=decision.decided)
    write(model, look)
    log.info("look %d at %s: p = %s, it spent %.2g", look.number, model, p, look.alpha)
    return look


def write(model: str, look: Look) -> None:
    """As a tag of the registered model."""
    tracking.client().set_registered_model_tag(model, look.tag, json.dumps(asdict(look)))


def _model(model: str) -> Any:
    found = tracking.client().search_registered_models(f"name = {quoted(model)}")
    return tracking.client().get_registered_model(model) if found else None
