"""What people said in another tool: the same for all tools, and how it is read from their JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.commands import RankForm
from schemas.errors import refuse
from stages.commands.rank.questions import Item, Question
from stages.commands.rank.verdicts import NOTE_CHARACTERS, Groups, Verdict

NAME_CHARACTERS = 60


@dataclass(frozen=True)
class Told:
    """One person's verdict on some answers to a prompt."""

    question: Question
    places: tuple[int, ...]
    """The answers that were judged, by their numbers in the question."""
    annotator: str
    verdict: Groups | str | None
    """Numbers in the question, best first; `up` or `down`; None where it was skipped."""
    seconds: float = 0.0
    at: str = ""
    note: str = ""


class Unreadable(Exception):
    """A record is not what its tool writes: what is wrong with it."""


def load(file: Path) -> list[Any]:
    """The records of a JSON list, or of JSON lines.

    Raises:
        StageError: the file cannot be read, is not JSON, or holds no records.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("FILE", file, f"the file cannot be read: {error}.", "name an export", kind="file") from error
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        try:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            fix = "export as JSON"
            raise refuse("FILE", file, f"this is not JSON: {error}.", fix, kind="bad_data") from error
    if isinstance(records, dict):
        records = next((records[name] for name in ("traces", "records", "tasks") if name in records), [records])
    if not isinstance(records, list) or not records:
        raise refuse("FILE", file, "the file holds no records.", "export what people have judged", kind="empty_file")
    return records


def form_of(told: Sequence[Told]) -> RankForm:
    """What they were asked. Raises StageError where it was not one thing."""
    forms: set[RankForm] = set()
    for one in told:
        thumb = isinstance(one.verdict, str) or len(one.places) == 1
        forms.add("thumbs" if thumb else "pairs" if len(one.places) < len(one.question.texts) else "ranking")
    if len(forms) > 1 and "thumbs" in forms:
        raise refuse("FILE", None, "it mixes thumbs with rankings.", "export each project by itself", kind="bad_data")
    return "thumbs" if "thumbs" in forms else "pairs" if "pairs" in forms else "ranking"


def as_verdicts(told: Sequence[Told]) -> tuple[list[Item], list[Verdict]]:
    """The items, each once, and the last verdict of each person on each, by their times where these are known.

    Raises:
        Unreadable: a name is none.
    """
    form = form_of(told)
    items: dict[str, Item] = {}
    verdicts: dict[tuple[str, str], Verdict] = {}
    for one in told:
        item = Item(one.question, one.places)
        items.setdefault(item.id, item)
        values = {"item": item.id, "annotator": one.annotator[:NAME_CHARACTERS].strip(), "form": form}
        values |= {"shown": list(one.places), "verdict": one.verdict, "note": one.note[:NOTE_CHARACTERS]}
        try:
            verdict = Verdict.model_validate(values | {"seconds": max(0.0, one.seconds), "at": one.at})
        except ValidationError as error:
            raise Unreadable(str(error.errors()[0]["msg"])) from error
        before = verdicts.get((one.annotator, item.id))
        if before is None or before.at <= verdict.at or not verdict.at:
            verdicts[one.annotator, item.id] = verdict
    return list(items.values()), list(verdicts.values())


def groups_of(places: Sequence[Sequence[int]], judged: Sequence[int]) -> Groups:
    """A ranking that names each judged answer once. Raises Unreadable for another one."""
    named = [place for group in places for place in group]
    if sorted(named) != sorted(judged):
        raise Unreadable(f"the ranking names {len(named)} answers once or twice, of {len(judged)}")
    return [list(group) for group in places if group]


def text_of(value: Any, what: str) -> str:
    """A text. Raises Unreadable for anything else, and where nothing is in it."""
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"{what} is not a text")
    return value


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object. Raises Unreadable for anything else."""
    if not isinstance(value, dict):
        raise Unreadable(f"{what} is not an object")
    return value


def messages_of(value: Any) -> list[dict[str, str]]:
    """A prompt as messages: a text is one of the user. Raises Unreadable for anything else."""
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(value, "the prompt")}]
    if not isinstance(value, list) or not value:
        raise Unreadable("the prompt is neither a text nor messages")
    turns = [mapping(turn, "a message") for turn in value]
    return [{name: text_of(turn.get(name), f"a message's {name}") for name in ("role", "content")} for turn in turns]
