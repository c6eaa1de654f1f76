"""One person's walk through the items: what is shown, in which order, and what was said of it."""

import hashlib
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from threading import RLock
from typing import Any

from schemas.commands import RankForm
from schemas.conversation import shown, shown_tools
from schemas.errors import refuse
from schemas.text import visible
from stages.commands.rank.questions import Item
from stages.commands.rank.verdicts import NOTE_CHARACTERS, Groups, Verdict, Verdicts


@dataclass
class Session:
    """The items, and what this person has said of them so far. Answers go by their places on the screen, from 0."""

    items: list[Item]
    verdicts: Verdicts
    annotator: str
    form: RankForm
    seed: int = 0
    mine: dict[str, Verdict] = field(default_factory=dict)
    """Item -> this person's last verdict on it."""
    _lock: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        told = self.verdicts.read(self.form)
        self.mine |= {one.item: one for one in told if one.annotator == self.annotator}

    def order(self, item: Item) -> list[int]:
        """The answers' numbers as they are shown: shuffled by seed, person and item, so that no place gives a hint."""
        source = f"{self.seed}\n{self.annotator}\n{item.id}".encode()
        order = list(item.places)
        random.Random(int.from_bytes(hashlib.sha256(source).digest())).shuffle(order)
        return order

    def next_open(self, after: int = -1) -> int | None:
        """The first item after a number, then from the beginning, of which nothing was said yet; None at the end."""
        numbers = [*range(after + 1, len(self.items)), *range(after + 1)]
        return next((number for number in numbers if self.items[number].id not in self.mine), None)

    def judge(self, number: int, verdict: Groups | str | None, note: str, seconds: float) -> None:
        """Save what was said of an item; None skips it.

        Raises:
            StageError: the verdict is none that this item can have.
            OSError: there is no room to save it.
        """
        item = self.items[number]
        order = self.order(item)
        if self.form == "thumbs":
            fits = verdict in ("up", "down", None)
        else:
            named = sorted(place for group in verdict or () for place in group)
            fits = verdict is None or (named == list(range(len(order))) and all(verdict))
        if not fits:
            fix = "name every answer once" if self.form != "thumbs" else "say up or down"
            raise refuse("verdict", verdict, "this is not a verdict on these answers.", fix)
        told = [[order[place] for place in group] for group in verdict] if isinstance(verdict, list) else verdict
        with self._lock:
            saved = Verdict.model_validate(
                {
                    "item": item.id,
                    "annotator": self.annotator,
                    "form": self.form,
                    "shown": order,
                    "verdict": told,
                    "note": note.strip()[:NOTE_CHARACTERS],
                    "seconds": round(seconds, 1),
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
            self.verdicts.add(saved)
            self.mine[item.id] = saved

    def view(self, number: int | None) -> dict[str, Any]:
        """All that the page, or the terminal, shows of an item (None: of the end), nothing of which names a model."""
        with self._lock:
            judged = [self.mine.get(item.id) for item in self.items]
        states = "".join("." if one is None else "s" if one.verdict is None else "j" for one in judged)
        taken = [one.seconds for one in judged if one is not None]
        common = {
            "number": number,
            "states": states,
            "form": self.form,
            "annotator": visible(self.annotator),
            "median": round(median(taken), 1) if taken else None,
        }
        if number is None:
            return common
        item = self.items[number]
        order, mine = self.order(item), judged[number]
        turns = [{"role": turn["role"], "text": visible(shown(turn))} for turn in item.question.prompt]
        tools = shown_tools(item.question.prompt)
        told = None if mine is None else mine.verdict
        if isinstance(told, list):
            told = [[order.index(place) for place in group] for group in told]
        return {
            **common,
            "item": item.id,
            "prompt": [*([{"role": "tools", "text": visible(tools)}] if tools else []), *turns],
            "answers": [visible(item.question.texts[place]) for place in order],
            "verdict": told,
            "note": "" if mine is None else visible(mine.note),
        }
