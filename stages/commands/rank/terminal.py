"""Ranking in the terminal: one line per item."""

import re
import textwrap
import time
from shutil import get_terminal_size
from typing import Literal, TextIO

from schemas.commands import RankForm
from schemas.text import show
from stages.commands.rank.session import Session
from stages.commands.rank.verdicts import Groups

_HOW: dict[RankForm, str] = {
    "ranking": "Type the answers' numbers, best first: 2 1=3 means 2 is best, then 1 and 3 as equals.",
    "pairs": "Type the better answer's number, 1 or 2; = where they are equally good.",
    "thumbs": "Type + for a good answer, - for a bad one.",
}
_OTHERS = "s skips, u goes back, n TEXT adds a note, q ends. All is saved line by line."
Read = tuple[Literal["verdict"], Groups | str] | tuple[Literal["wrong"], str]


def understand(line: str, form: RankForm, answers: int) -> Read:
    """A line as a verdict on this many answers, by their places from 0; or what is wrong with it.

    With fewer than ten answers digits need no space between them. The only answer that is not named is the last.
    """
    if form == "thumbs":
        thumb = {"+": "up", "-": "down"}.get(line)
        return ("verdict", thumb) if thumb else ("wrong", _HOW[form])
    if form == "pairs":
        groups = {"1": [[0], [1]], "2": [[1], [0]], "=": [[0, 1]]}.get(line)
        return ("verdict", groups) if groups else ("wrong", _HOW[form])
    if not re.fullmatch(r"[\d\s>,=]+", line):
        return "wrong", _HOW[form]
    digits = r"\d" if answers < 10 else r"\d+"
    order: Groups = []
    tie = False
    for word in re.findall(f"{digits}|=", line):
        if word == "=":
            tie = True
        elif tie and order:
            order[-1].append(int(word) - 1)
            tie = False
        else:
            order.append([int(word) - 1])
    named = [place for group in order for place in group]
    missing = sorted(set(range(answers)) - set(named))
    if len(missing) == 1 and not tie:
        order, named, missing = [*order, missing], [*named, *missing], []
    if tie or not order:
        return "wrong", _HOW[form]
    unknown = sorted({place + 1 for place in named if not 0 <= place < answers})
    twice = sorted({place + 1 for place in named if named.count(place) > 1})
    for numbers, problem in ((unknown, "there is no answer"), (twice, "twice:")):
        if numbers:
            return "wrong", f"{problem} {', '.join(map(str, numbers))}. Answers have the numbers 1 to {answers}."
    if missing:
        return "wrong", f"not named: {', '.join(str(place + 1) for place in missing)}. {_HOW[form]}"
    return "verdict", order


def rank(session: Session, lines: TextIO, out: TextIO) -> None:
    """Ask for a verdict on one item after the other, until all are judged, `q`, or the end of input."""
    show(f"{_HOW[session.form]}\n{_OTHERS}", out)
    number, passed, note = session.next_open(), list[int](), ""
    began = time.monotonic()
    shows = True
    while number is not None:
        view = session.view(number)
        if shows:
            _show(view, out)
            began, note, shows = time.monotonic(), view["note"], False
        print("> ", end="", flush=True, file=out)
        read = lines.readline()
        line = read.strip()
        if not read or line == "q":
            show("", out)
            return
        if line == "u":
            earlier = passed.pop() if passed else None
            shows = earlier is not None
            number = number if earlier is None else earlier
            if earlier is None:
                show("This is the first item of this call.", out)
        elif line == "n" or line.startswith("n "):
            note = line[2:].strip()
            show(f"Noted: {note}" if note else "No note.", out)
        else:
            skips = line == "s"
            what, verdict = ("verdict", None) if skips else understand(line, session.form, len(view["answers"]))
            if what == "wrong":
                show(verdict, out)
                continue
            session.judge(number, verdict, note, time.monotonic() - began)
            passed.append(number)
            number, shows = session.next_open(number), True
    show("All items are judged.", out)


def _show(view: dict, out: TextIO) -> None:
    """An item: the prompt, and the answers under their numbers."""
    width = min(get_terminal_size().columns, 100)
    done = sum(state != "." for state in view["states"])
    title = f" {view['number'] + 1} of {len(view['states'])}, {done} judged "
    show(f"\n{title:-^{width}}", out)
    single = len(view["prompt"]) == 1
    parts = [("" if single else f"{turn['role']}: ", turn["text"]) for turn in view["prompt"]]
    parts += [(f"{place}  ", text) for place, text in enumerate(view["answers"], 1)]
    for place, (mark, text) in enumerate(parts):
        if place == len(view["prompt"]):
            show("", out)
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width - 4) or [""]]
        written = [f"{mark if number == 0 else ' ' * len(mark)}{line}".rstrip() for number, line in enumerate(lines)]
        show("\n".join(written), out)
    if view["verdict"] is not None:
        told = view["verdict"]
        before = told if isinstance(told, str) else " ".join("=".join(str(p + 1) for p in group) for group in told)
        show(f"(before: {before})", out)
