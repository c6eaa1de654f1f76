"""The forms in which users bring rows, each turned into the one form of its kind (schemas/rows.py).

A row that has no such form raises `Bad` with the column and the reason. Types are judged here, on Python values, since
a frame would have to guess them; what can be said about whole columns is left to the pandera models.

1. Prompts: text, a list of messages, or a transcript that begins with "\\n\\nHuman:".
2. sft: prompt + response, or `messages` whose last one is the answer.
3. preference: prompt + chosen + rejected; chosen + rejected as conversations or transcripts that share all but their
   last turn; or answers `a` and `b` with a `label` that names the better one.
4. ranking: prompt + responses (texts, or objects with `text` and `model`), with one of
   `scores` (higher is better), `order` (indices or models, best first; a list within is a tie), `ranks` (1 is best) or
   `comparisons` ({a, b, winner}: indices or models; winner null, 0 or "tie" is a tie).
   Where they stand empty, nobody has ranked the answers yet: such a row is noted, and gives its prompt only.
   Identical answers become one. Answers that contradict each other on one pair are outvoted or tie. Longer cycles stay:
   independent noisy judgements make them, and a Bradley-Terry loss over single comparisons is fit for them.
5. feedback: prompt + completion (or response) + label: a boolean, 0 or 1, or a word for thumbs up or down.
6. prompt: prompt, or the first of `turns`, or `messages` up to the last of the user's.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import polars as pl

from schemas.config import Kind
from schemas.rows import Indices, Messages, Numbers, Strings, with_prompt_ids

Row = Mapping[str, Any]
Turn = tuple[str, str]
"""Role and content of a message."""
Turns = tuple[Turn, ...]
Parsed = dict[str, Any]
"""A row in its kind's form, the prompt as Turns; key `notes` names what is worth reporting about it."""


class Bad(Exception):
    """A row that cannot be used: which column, why, and the value found there."""

    def __init__(self, column: str, reason: str, value: object = None) -> None:
        super().__init__(f"{column}: {reason}")
        self.column, self.reason, self.value = column, reason, value


# What a file must have to be read as a kind. The first form is the one that errors speak of.
COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "ranking": (
        ("prompt", "responses", "comparisons"),
        ("prompt", "responses", "scores"),
        ("prompt", "responses", "order"),
        ("prompt", "responses", "ranks"),
    ),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "a", "b", "label")),
    "feedback": (("prompt", "completion", "label"), ("prompt", "response", "label")),
    "sft": (("prompt", "response"), ("messages",)),
    "prompt": (("prompt",), ("turns",), ("messages",)),
}
KNOWN: dict[Kind, frozenset[str]] = {kind: frozenset(sum(forms, ())) for kind, forms in COLUMNS.items()}
KNOWN["preference"] |= {"margin"}

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_UP = {"true", "1", "yes", "up", "thumbs_up", "good", "positive", "desirable", "like", "\U0001f44d"}
_DOWN = {"false", "0", "no", "down", "thumbs_down", "bad", "negative", "undesirable", "dislike", "\U0001f44e"}
_TIES = (None, 0, "tie", "both", "")


def parse(kind: Kind, row: Row) -> Parsed:
    """The row in its kind's form. Raises Bad."""
    return _PARSERS[kind](row)


def fitting_kinds(columns: Iterable[str]) -> list[Kind]:
    """The kinds as which a file with these columns can be read; the most telling first."""
    found = set(columns)
    fits: list[Kind] = [kind for kind, forms in COLUMNS.items() if any(found.issuperset(form) for form in forms)]
    return fits[:-1] if fits[1:] and fits[-1] == "prompt" else fits


def text(value: object, column: str) -> str:
    """The value, which has to be text that can be written down."""
    if not isinstance(value, str):
        raise Bad(column, "missing" if value is None else "not_text", value)
    if not value.isascii() and _SURROGATE.search(value):
        raise Bad(column, "not_unicode", value)
    return value


def turns(value: object, column: str) -> Turns:
    """A prompt or conversation in any of its forms, as (role, content) in order."""
    if isinstance(value, str):
        return transcript(value, column) if value.startswith("\n\nHuman:") else (("user", text(value, column)),)
    if not isinstance(value, list):
        raise Bad(column, "missing" if value is None else "not_text", value)
    if not value:
        raise Bad(column, "empty", value)
    return tuple(_turn(message, column) for message in value)


def _turn(message: object, column: str) -> Turn:
    if not isinstance(message, dict):
        raise Bad(column, "not_a_message", message)
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise Bad(column, "unknown_role", role)
    content = message["content"] if "content" in message else message.get("value")
    return _ROLES[role.lower()], text(content, column)


def transcript(value: str, column: str) -> Turns:
    """Turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:". An unanswered "Assistant:" at the end is left out."""
    pieces = _SPEAKER.split(text(value, column))[1:]
    spoken = [
        ("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return tuple(spoken[:-1] if spoken[-1] == ("assistant", "") and len(spoken) > 1 else spoken)


def _listed(value: object, column: str) -> list[Any]:
    """A list; in CSV, written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Bad(column, "malformed_json", value) from error
    if not isinstance(value, list):
        raise Bad(column, "missing" if value is None else "not_a_list", value)
    return value


def _number(value: object, column: str) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise Bad(column, "not_a_number", value) from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Bad(column, "not_a_number", value)
    try:
        number = float(value)
    except OverflowError as error:
        raise Bad(column, "not_finite", value) from error
    if not math.isfinite(number):
        raise Bad(column, "not_finite", value)
    return number


# --- sft, prompt, feedback


def _sft(row: Row) -> Parsed:
    if row.get("messages") is None or row.get("response") is not None:
        return {"prompt": turns(row.get("prompt"), "prompt"), "response": _answer(row.get("response"), "response")}
    said = turns(_messages(row["messages"]), "messages")
    prompt, response = _last_answer(said, "messages")
    return {"prompt": prompt, "response": response}


def _messages(value: object) -> object:
    return _listed(value, "messages") if isinstance(value, str) and not value.startswith("\n\nHuman:") else value


def _answer(value: object, column: str) -> str:
    """An answer: text, or the one message of the assistant in a list."""
    if not isinstance(value, list):
        return text(value, column)
    said = turns(value, column)
    if len(said) != 1 or said[0][0] != "assistant":
        raise Bad(column, "not_one_answer", value)
    return said[0][1]


def _last_answer(said: Turns, column: str) -> tuple[Turns, str]:
    """A conversation, cut before the assistant's last turn."""
    *before, (role, content) = said
    if role != "assistant" or not before:
        raise Bad(column, "no_answer", content)
    return tuple(before), content


def _prompt(row: Row) -> Parsed:
    if row.get("prompt") is not None:
        return {"prompt": turns(row["prompt"], "prompt")}
    if row.get("turns") is not None:
        asked = _listed(row["turns"], "turns")
        if not asked:
            raise Bad("turns", "empty", asked)
        return {"prompt": (("user", text(asked[0], "turns")),)}
    if row.get("messages") is None:
        raise Bad("prompt", "missing")
    said = turns(_messages(row["messages"]), "messages")
    return {"prompt": said[:-1] if said[-1][0] == "assistant" and len(said) > 1 else said}


def _feedback(row: Row) -> Parsed:
    column = "completion" if "completion" in row or "response" not in row else "response"
    return {
        "prompt": turns(row.get("prompt"), "prompt"),
        "completion": _answer(row.get(column), column),
        "label": _thumb(row.get("label")),
    }


def _thumb(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower().replace(" ", "_") if isinstance(value, str) else value
    if word in (0, 1):
        return word == 1
    if isinstance(word, str) and (word in _UP or word in _DOWN):
        return word in _UP
    raise Bad("label", "missing" if value is None else "not_a_label", value)


# --- preference


def _preference(row: Row) -> Parsed:
    row = row if "chosen" in row or "rejected" in row or "a" not in row else _named_by_label(row)
    chosen_prompt, chosen = _side(row.get("chosen"), "chosen")
    rejected_prompt, rejected = _side(row.get("rejected"), "rejected")
    given = None if row.get("prompt") is None else turns(row["prompt"], "prompt")
    prompts = [prompt for prompt in (given, chosen_prompt, rejected_prompt) if prompt is not None]
    if not prompts:
        raise Bad("prompt", "missing")
    for other in prompts:
        if other != prompts[0]:
            raise Bad("rejected" if other is rejected_prompt else "chosen", "prompts_differ", other[-1][1])
    margin = None if row.get("margin") in (None, "") else _number(row["margin"], "margin")
    return {"prompt": prompts[0], "chosen": chosen, "rejected": rejected, "margin": margin}


def _side(value: object, column: str) -> tuple[Turns | None, str]:
    """One of two answers, and the conversation before it where the value holds that too."""
    if isinstance(value, str) and not value.startswith("\n\nHuman:"):
        return None, text(value, column)
    if isinstance(value, str):
        pieces = _SPEAKER.split(value)
        if pieces[-2] == "Assistant" and not pieces[-1].strip():
            raise Bad(column, "empty", value)
    said = turns(value, column)
    if len(said) == 1 and said[0][0] == "assistant":
        return None, said[0][1]
    return _last_answer(said, column)


def _named_by_label(row: Row) -> Row:
    """{a, b, label} as {chosen, rejected}; label is `a` or `b`, 1 or 2."""
    label = row.get("label")
    word = label.strip().lower() if isinstance(label, str) else label
    if word is None or isinstance(word, bool) or word not in ("a", "b", 1, 2, "1", "2"):
        raise Bad("label", "missing" if label is None else "tie" if word == "tie" else "not_a_label", label)
    better, worse = ("a", "b") if word in ("a", 1, "1") else ("b", "a")
    return {**row, "chosen": row.get(better), "rejected": row.get(worse)}


# --- ranking


def _ranking(row: Row) -> Parsed:
    prompt = turns(row.get("prompt"), "prompt")
    texts, names = _responses(_listed(row.get("responses"), "responses"))
    different = {said.strip(): said for said in reversed(texts)}  # reversed: the first of equals stays
    places = {said: place for place, said in enumerate(dict.fromkeys(said.strip() for said in texts))}
    merged = [places[said.strip()] for said in texts]
    if not row.keys() & {"comparisons", *_LEVELS}:
        raise Bad("scores", "missing")
    by = next((name for name in ("comparisons", *_LEVELS) if row.get(name) not in (None, [], "")), None)
    pairs: list[tuple[int, int]] = []
    margins, notes = None, ["identical_answers"] * (len(places) < len(texts))
    if by == "comparisons":
        pairs, odd = _from_comparisons(_listed(row[by], by), names, merged)
        notes += odd
    elif by is not None:
        pairs, levels = _from_levels(_LEVELS[by](_listed(row[by], by), names), merged)
        margins = levels if by == "scores" else None
    if not pairs:
        notes.append("not_ranked" if by is None else "all_tied")
    winners, losers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {
        **{"prompt": prompt, "responses": [different[said] for said in places]},
        **{"winners": winners, "losers": losers, "margins": margins, "notes": notes},
    }


def generated(row: Row) -> Parsed:
    """A ranking that stage `generate` made. A model now and then says nothing, which is no reason to refuse its rows:

    empty answers are left out with their scores and comparisons, and noted.
    """
    texts = row["responses"]
    used = [place for place, said in enumerate(texts) if not _unusable(said)]
    notes = ["empty_answers"] * (len(used) < len(texts))
    if len(used) < 2:
        nothing = {"responses": [texts[i] for i in used], "winners": [], "losers": [], "margins": None}
        return {"prompt": turns(row["prompt"], "prompt"), **nothing, "notes": [*notes, "all_tied"]}
    places = {old: new for new, old in enumerate(used)}
    fewer: dict[str, Any] = {**row, "responses": [texts[i] for i in used]}
    if row.get("scores"):
        fewer["scores"] = [row["scores"][i] for i in used]
    if row.get("comparisons"):
        fewer["comparisons"] = [
            {side: places.get(c[side]) for side in ("a", "b", "winner")}
            for c in row["comparisons"]
            if c["a"] in places and c["b"] in places
        ]
        if not fewer["comparisons"]:
            fewer["scores"] = [0] * len(used)
    parsed = _ranking(fewer)
    return {**parsed, "notes": [*notes, *parsed["notes"]]}


def _unusable(said: str) -> bool:
    invisible = all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in said)
    return invisible or "\x00" in said


def _responses(values: list[Any]) -> tuple[list[str], list[str | None]]:
    """The answers' texts, and the models they came from where that is told."""
    if len(values) < 2:
        raise Bad("responses", "fewer_than_two", values)
    texts: list[str] = []
    names: list[str | None] = []
    for value in values:
        told = isinstance(value, dict)
        texts.append(text(value.get("text", value.get("content")) if told else value, "responses"))
        names.append(value.get("model") if told and isinstance(value.get("model"), str) else None)
    return texts, names


def _place(value: object, names: Sequence[str | None], column: str) -> int:
    """Which answer a value names: its index from 0, or its model."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    if isinstance(value, str) and names.count(value) == 1:
        return names.index(value)
    raise Bad(column, "unknown_answer", value)


def _scores(values: list[Any], names: Sequence[str | None]) -> list[float]:
    if len(values) != len(names):
        raise Bad("scores", "wrong_number_of_scores", values)
    return [_number(value, "scores") for value in values]


def _ranks(values: list[Any], names: Sequence[str | None]) -> list[float]:
    if len(values) != len(names):
        raise Bad("ranks", "wrong_number_of_ranks", values)
    return [-_number(value, "ranks") for value in values]


def _order(values: list[Any], names: Sequence[str | None]) -> list[float]:
    level: dict[int, float] = {}
    for rank, value in enumerate(values):
        for tied in value if isinstance(value, list) else [value]:
            place = _place(tied, names, "order")
            if place in level:
                raise Bad("order", "not_a_permutation", values)
            level[place] = -rank
    if len(level) != len(names):
        raise Bad("order", "not_a_permutation", values)
    return [level[place] for place in range(len(names))]


_LEVELS: dict[str, Callable[[list[Any], Sequence[str | None]], list[float]]] = {
    "scores": _scores,
    "order": _order,
    "ranks": _ranks,
}


def _from_levels(levels: list[float], merged: list[int]) -> tuple[list[tuple[int, int]], list[float]]:
    """All pairs (better, worse) of a full ranking and their differences. Identical answers stand at their mean."""
    groups: list[list[float]] = [[] for _ in range(max(merged) + 1)]
    for place, level in zip(merged, levels, strict=True):
        groups[place].append(level)
    # Equal levels are taken as they stand: their mean may round to another number, and so make a pair of a tie.
    mean = [group[0] if len(set(group)) == 1 else fmean(group) for group in groups]
    pairs = [
        (i, j) if mean[i] > mean[j] else (j, i) for i, j in combinations(range(len(mean)), 2) if mean[i] != mean[j]
    ]
    return pairs, [mean[i] - mean[j] for i, j in pairs]


def _from_comparisons(
    values: list[Any], names: Sequence[str | None], merged: list[int]
) -> tuple[list[tuple[int, int]], list[str]]:
    """The pairs (better, worse) that the comparisons tell of, by majority where one pair was compared repeatedly."""
    votes: dict[tuple[int, int], list[int]] = {}
    for value in values:
        winner, loser = _judgement(value, names)
        if winner is not None and merged[winner] != merged[loser]:
            i, j = sorted((merged[winner], merged[loser]))
            votes.setdefault((i, j), []).append(1 if merged[winner] == i else -1)
    contradictory = any(min(vote) < 0 < max(vote) for vote in votes.values())
    pairs = [(i, j) if sum(vote) > 0 else (j, i) for (i, j), vote in votes.items() if sum(vote)]
    return pairs, ["contradictory"] * contradictory + ["cycle"] * has_cycle(pairs)


def _judgement(value: object, names: Sequence[str | None]) -> tuple[int | None, int]:
    """(winner, loser) of one comparison; the winner is None in a tie."""
    if not isinstance(value, dict):
        raise Bad("comparisons", "not_a_comparison", value)
    if value.get("a") is None or value.get("b") is None or "winner" not in value:
        raise Bad("comparisons", "not_a_comparison", value)
    a, b = (_place(value[side], names, "comparisons") for side in ("a", "b"))
    if a == b:
        raise Bad("comparisons", "compared_with_itself", value)
    winner = value["winner"]
    if isinstance(winner, bool):
        raise Bad("comparisons", "winner_not_compared", value)
    # A model may be called "b" and stand on side a: names go before sides. An index 0 goes before 0 for a tie.
    for first, second in ((value["a"], value["b"]), ("a", "b")):
        if winner is not None and winner in (first, second):
            return (a, b) if winner == first else (b, a)
    if winner in _TIES:
        return None, b
    raise Bad("comparisons", "winner_not_compared", value)


def has_cycle(pairs: Iterable[tuple[int, int]]) -> bool:
    """Whether some answer beats, over others, itself: taking away unbeaten answers one by one leaves something."""
    left = set(pairs)
    while left:
        beaten = {loser for _, loser in left}
        rest = {pair for pair in left if pair[0] in beaten}
        if rest == left:
            return True
        left = rest
    return False


_PARSERS: dict[Kind, Callable[[Row], Parsed]] = {
    "sft": _sft,
    "preference": _preference,
    "ranking": _ranking,
    "feedback": _feedback,
    "prompt": _prompt,
}


# --- to a frame

_TYPES: dict[Kind, dict[str, pl.DataType | type[pl.DataType]]] = {
    "sft": {"response": pl.String},
    "preference": {"chosen": pl.String, "rejected": pl.String, "margin": pl.Float64},
    "ranking": {"responses": Strings, "winners": Indices, "losers": Indices, "margins": Numbers},
    "feedback": {"completion": pl.String, "label": pl.Boolean},
    "prompt": {},
}


def to_frame(kind: Kind, numbers: Sequence[int], parsed: Sequence[Parsed]) -> pl.DataFrame:
    """Parsed rows and their row numbers as a frame with the columns of schemas/rows.py."""
    columns = {name: pl.Series(name, [row[name] for row in parsed], dtype=t) for name, t in _TYPES[kind].items()}
    frame = pl.DataFrame({"row": pl.Series(numbers, dtype=pl.Int64), "prompt": _messages_of(parsed), **columns})
    return with_prompt_ids(frame)


def _messages_of(parsed: Sequence[Parsed]) -> pl.Series:
    """The prompts as one column of messages, made from flat columns: from lists of dicts takes 40 times as long."""
    owner = [i for i, row in enumerate(parsed) for _ in row["prompt"]]
    flat = pl.DataFrame(
        {
            "owner": pl.Series(owner, dtype=pl.Int64),
            "role": pl.Series([turn[0] for row in parsed for turn in row["prompt"]], dtype=pl.String),
            "content": pl.Series([turn[1] for row in parsed for turn in row["prompt"]], dtype=pl.String),
        }
    )
    lists = flat.group_by("owner", maintain_order=True).agg(prompt=pl.struct("role", "content"))
    return lists.get_column("prompt").cast(Messages)
