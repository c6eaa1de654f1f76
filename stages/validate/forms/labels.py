"""What the values of a label column mean, told by all of them together: 1 is a thumb up beside 0, and bad beside 5.

A column whose values can mean one thing only is read; any other is refused as a whole, until `label_map` says what each
value means.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError, refuse
from schemas.text import one_line
from stages.validate.forms.cells import BadRow, text

Meanings = dict[str, str | None]
"""A label as `canonical` writes it -> `up`, `down`, `a`, `b`, `tie` or `skip`; None where it is none of the labels."""

_UP = "true yes y up thumbs_up thumb_up good positive desirable like liked upvote helpful chosen \U0001f44d"
_DOWN = "false no n down thumbs_down thumb_down bad negative undesirable dislike disliked downvote incorrect \U0001f44e"
_UP, _DOWN = f"{_UP} correct accepted", f"{_DOWN} unhelpful rejected"
_THUMBS = {**dict.fromkeys(_UP.split(), "up"), **dict.fromkeys(_DOWN.split(), "down")}
_TIES = frozenset(("tie", "tied", "draw", "both", "equal", "same", "neither", "both_good", "both_bad", "bothbad"))
_SIDE = re.compile(r"(?:(?:model|response|answer|assistant|option|output|completion|text|conversation)_?)?([ab]|[0-9])")
_ORDINALS = {"first": "a", "second": "b", "left": "a", "right": "b"}
_INDEX = re.compile(r"(?:^|_)(?:id|idx|index|choice)$")
_SHOWN = 8
_LOST = "worse worst loser losing lost rejected bad wrong"
_FAULTS = "incorrect error toxic toxicity unsafe harmful spam flagged negative undesirable unhelpful"
_AGAINST = {"feedback": f"{_LOST} {_FAULTS} disliked dislike downvote downvoted".split(), "preference": _LOST.split()}
"""Words in a label column's name that turn around what its values say."""
_NEGATED = frozenset(("not", "non", "no", "less", "least", "without"))
_BARE = frozenset(("true", "false", "yes", "no", "y", "n"))


class Names(NamedTuple):
    """What the file calls the columns."""

    label: str = "label"
    a: str = "a"
    b: str = "b"


def canonical(value: object) -> str:
    """One spelling of a label: 1, 1.0, "1" and "1.0" are one label; so are `Thumbs up` and `thumbs_up`.

    Raises:
        BadRow: it is missing, or neither text nor a number.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number_text(float(value)) if abs(value) < 1e300 and math.isfinite(value) else _no_label(value)
    if not isinstance(value, str):
        raise BadRow("label", "missing" if value is None else "not_a_label", value)
    word = re.sub(r"\s+", "_", text(value, "label").strip().lower()).strip("[]\"'")
    if not word:
        raise BadRow("label", "missing", value)
    number = _number(word)
    return word if number is None else _number_text(number)


def _no_label(value: object) -> str:
    raise BadRow("label", "not_a_label", value)


def _number_text(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in word else None


def side_of(value: object) -> str | None:
    """The side that a word names by itself, a, b or tie; None where it takes more than the word to tell."""
    word = canonical(value) if isinstance(value, str) and value.strip() else ""
    side = _SIDE.fullmatch(word)
    if word in _ORDINALS or word.split("_(")[0] in _TIES:
        return _ORDINALS.get(word, "tie")
    return side.group(1) if side and side.group(1) in "ab" else None


def meanings(params: ValidateParams, counts: Mapping[str, int], names: Names) -> Meanings:
    """What each label of the column means. Raises StageError where the column as a whole could mean several things."""
    if params.label_map:
        return _mapped(params, counts, names)
    words = {label for label in counts if _number(label) is None}
    numbers = {label: number for label in counts if (number := _number(label)) is not None}
    if why := _turned(params.kind, words, names.label):
        raise _refusal(params, counts, names, why)
    told, why = (_thumbs if params.kind == "feedback" else _sides)(words, sorted(set(numbers.values())), names)
    unknown = sum(counts[label] for label in counts if told.get(label) is None)
    if not why and unknown > params.max_bad * sum(counts.values()):
        why = "holds values that are no labels"
    if why:
        raise _refusal(params, counts, names, why)
    return {label: told.get(label) for label in counts}


def _turned(kind: Kind, words: set[str], name: str) -> str:
    """Why the column's name says the reverse of what its values would be read as; empty where it does not.

    A word such as `good` means the same under any name; of two answers, `a` in a column `loser` is the worse one.
    """
    called = _words(name)
    against = [word for word in called if word in _AGAINST.get(kind, ())]
    if not against or _NEGATED.intersection(called) or (kind == "feedback" and words - _BARE):
        return ""
    return f"has `{against[0]}` in its name, so its values may say the reverse"


def _words(name: str) -> list[str]:
    """The words of a column's name: isBad, is_bad and is-bad have two each."""
    return re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _thumbs(words: set[str], numbers: Sequence[float], names: Names) -> tuple[dict[str, str], str]:
    """Label -> up, down or skip, and why the column is ambiguous."""
    told = {word: _THUMBS[word] for word in words if word in _THUMBS}
    if not numbers:
        return told, ""
    if told.keys() - {"true", "false"}:
        return told, "mixes numbers with words"
    if set(numbers) <= {0, 1}:
        return {**told, "0": "down", "1": "up"}, ""
    if set(numbers) <= {-1, 0, 1} and -1 in numbers and not told:
        return {"-1": "down", "0": "skip", "1": "up"}, ""
    return told, "holds a scale, not thumbs up and down"


def _sides(words: set[str], numbers: Sequence[float], names: Names) -> tuple[dict[str, str], str]:
    """Label -> a, b or tie, and why the column is ambiguous."""
    told: dict[str, str] = {}
    places: dict[str, float] = {}
    called = {canonical(names.a): "a", canonical(names.b): "b"} if names.a != names.b else {}
    for word in words:
        side = _SIDE.fullmatch(word)
        if word in called:
            told[word] = called[word]
        elif (named := side_of(word)) is not None:
            told[word] = named
        elif side:
            places[word] = float(side.group(1))
    if words & {"true", "false"}:
        return told, "holds true and false, which do not say which of two answers is better"
    if not numbers and not places:
        return told, ""
    if numbers and any(meaning != "tie" for meaning in told.values()):
        return told, "mixes numbers with words"
    found = {*numbers, *places.values()}
    first = _first_place(found, names)
    if first is None:
        return told, "holds numbers that do not say whether the first answer is 0 or 1"
    sides: dict[float, str] = {first: "a", first + 1: "b"}
    told |= {word: sides[place] for word, place in places.items() if place in sides}
    return told | {_number_text(number): sides[number] for number in numbers if number in sides}, ""


def _first_place(found: set[float], names: Names) -> int | None:
    """The number of the first answer, 0 or 1; None where neither names nor numbers tell."""
    if _about_one_side(names):
        return None  # there 1 says yes
    ends = [name[-1:] for name in (names.a, names.b)]
    for first in (0, 1):
        if ends == [str(first), str(first + 1)]:
            return first if found <= {first, first + 1} else None
    if found == {1, 2} or found == {2}:
        return 1
    return 0 if found <= {0, 1} and 0 in found and _INDEX.search(names.label.lower()) else None


def _about_one_side(names: Names) -> bool:
    """Whether the label column asks of one answer whether it is the better one, as `response_0_better` does."""
    label, sides = _words(names.label), [_words(name) for name in (names.a, names.b)]
    named = any(
        len(side) > 1 and any(label[place : place + len(side)] == side for place in range(len(label))) for side in sides
    )
    ends = {side[-1] for side in sides if side}
    return named or bool({"first", "second"}.intersection(label)) or ("is" in label and bool(ends.intersection(label)))


# --- what the user says of it ---

_BOUND = re.compile(r"(>=|<=|>|<)\s*(\S+)")
_TESTS: dict[str, Callable[[float, float], bool]] = {
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
}
MEANINGS: dict[Kind, tuple[str, ...]] = {"feedback": ("up", "down", "skip"), "preference": ("a", "b", "tie", "skip")}
"""What a label can mean, by kind."""


def wrong_map(params: ValidateParams) -> StageError | None:
    """The map is for another kind, or says what no label can mean."""
    if not params.label_map:
        return None
    if params.kind not in MEANINGS:
        fix = "leave label_map out: only the kinds feedback and preference have labels"
        written = ", ".join(f"{label}={meaning}" for label, meaning in params.label_map.items())
        return refuse("label_map", written, f"kind {params.kind} has no labels", fix)
    meant: dict[str, str] = {}
    for label, meaning in params.label_map.items():
        if meaning not in MEANINGS[params.kind]:
            allowed = ", ".join(MEANINGS[params.kind])
            message = f"label {one_line(label, 60)} cannot mean this; for kind {params.kind} it can mean {allowed}"
            return refuse("label_map", meaning, message, f"write one of {allowed}")
        bound = _BOUND.fullmatch(label.strip())
        if bound and _number(bound.group(2)) is None:
            return refuse("label_map", label, "this is not a bound", "write a number after it, such as '>=4': up")
        if bound:
            continue
        try:
            one = canonical(label)
        except BadRow:
            fix = "name a value of the column; rows without a label are put aside by themselves"
            return refuse("label_map", label, "this is not a label", fix)
        if meant.setdefault(one, meaning) != meaning:
            message = f"label {one_line(one, 60)} is given twice, as {meant[one]} and as {meaning}"
            return refuse("label_map", label, message, "give it once: letters' case and a number's zeros do not count")
    return None


def _mapped(params: ValidateParams, counts: Mapping[str, int], names: Names) -> Meanings:
    exact: dict[str, str] = {}
    bounds: list[tuple[str, float, str]] = []
    for label, meaning in params.label_map.items():
        if bound := _BOUND.fullmatch(label.strip()):
            bounds.append((bound.group(1), float(bound.group(2)), meaning))
        else:
            exact[canonical(label)] = meaning
    told: Meanings = {}
    for label in counts:
        number = _number(label)
        within = {meaning for test, bound, meaning in bounds if number is not None and _TESTS[test](number, bound)}
        told[label] = exact.get(label) or (within.pop() if len(within) == 1 else None)
    unsaid = Counter({label: counts[label] for label in counts if told[label] is None})
    if unsaid:
        raise _refusal(params, unsaid, names, "holds values of which label_map says nothing, or two things")
    return told


def _refusal(params: ValidateParams, counts: Mapping[str, int], names: Names, why: str) -> StageError:
    """The column cannot be read as it is: the values found, those allowed, and the map to write."""
    common = sorted(counts, key=lambda label: (-counts[label], label))
    labels = sorted(common[:_SHOWN], key=lambda label: (_number(label) is None, _number(label) or 0.0, label))
    shown = ", ".join(f"{one_line(label, 40)} ({counts[label]})" for label in labels)
    if len(counts) > _SHOWN:
        shown += f" and {len(counts) - _SHOWN} other values"
    if params.kind == "feedback":
        allowed = "1 and 0, true and false, or words for thumbs up and down"
        meant = ("up", "down", "skip")
    else:
        allowed = "a and b (or model_a, response_1 and so on), 1 and 2, or the names of the answers' columns; tie"
        meant = ("a", "b", "tie")
    numbers = [number for label in counts if (number := _number(label)) is not None]
    if len(numbers) == len(counts) > _SHOWN:
        middle = sorted(numbers)[len(numbers) // 2]
        example = {f"<{_number_text(middle)}": meant[1], f">={_number_text(middle)}": meant[0]}
    else:
        example = {label: " or ".join(meant) for label in labels}
    if any(" or " in meaning for meaning in example.values()):
        options = " ".join(f"--label-map {_quoted(label)}=..." for label in example)
        fix = f"say what each value means, {', '.join(meant[:-1])} or {meant[-1]}: {options}"
        pairs = ", ".join(f"{_quoted(label)}: ..." for label in example)
    else:
        options = " ".join(f"--label-map '{label}={meaning}'" for label, meaning in example.items())
        fix = f"say what the values mean, such as {options}"
        pairs = ", ".join(f"'{label}': {meaning}" for label, meaning in example.items())
    message = f"column `{one_line(names.label)}` {why}; kind {params.kind} allows {allowed}"
    return refuse("label", shown, message, f"{fix} (config: `label_map: {{{pairs}}}`)", kind="unknown_labels")


def _quoted(label: str) -> str:
    return one_line(label, 40) if re.fullmatch(r"[\w.-]+", label) else f"'{one_line(label, 40)}'"
