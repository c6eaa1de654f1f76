"""Files of answers, and people who judge them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.commands import RankForm
from stages.commands.rank import questions
from stages.commands.rank.session import Session
from stages.commands.rank.verdicts import Verdicts

FRUIT = {"prompt": "Name a fruit.", "responses": ["An apple.", "Bread.", "A pear."], "order": [], "source": 7}
TREE = {"prompt": "Name a tree.", "responses": ["Oak.", "I won't."], "order": []}


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as a JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def session(file: Path, annotator: str = "anna", form: RankForm = "ranking", seed: int = 0) -> Session:
    """A person who begins with a file, or goes on."""
    items = questions.read(file, form).items
    return Session(items, Verdicts(file.with_suffix(".verdicts.jsonl")), annotator, form, seed)


def say(person: Session, number: int, verdict: Any) -> None:
    """Judge an item by its answers' own numbers in place of those on the screen."""
    if isinstance(verdict, list):
        shown = person.order(person.items[number])
        verdict = [[shown.index(place) for place in group] for group in verdict]
    person.judge(number, verdict, "", 1.0)


def told(person: Session) -> list[Any]:
    """All verdicts of all people."""
    return person.verdicts.read(person.form)
