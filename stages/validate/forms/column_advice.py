"""What a file's columns must be, and the advice when they are not: each function returns a StageError, or None."""

import difflib
import re
from collections.abc import Iterable, Mapping

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError, refuse
from schemas.text import listed, one_line
from stages.validate.forms.presets import recognised

COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "ranking": (
        ("prompt", "responses", "comparisons"),
        ("prompt", "responses", "scores"),
        ("prompt", "responses", "order"),
        ("prompt", "responses", "ranks"),
    ),
    "preference": (
        ("prompt", "chosen", "rejected"),
        ("chosen", "rejected"),
        ("prompt", "a", "b", "label"),
        ("a", "b", "label"),
    ),
    "feedback": (("prompt", "completion", "label"), ("prompt", "response", "label"), ("messages", "label")),
    "sft": (("prompt", "response"), ("messages",)),
    "prompt": (("prompt",), ("turns",), ("messages",)),
}
"""What a file must have to be read as a kind. The first form is the one that errors speak of."""
KNOWN: dict[Kind, frozenset[str]] = {kind: frozenset(sum(forms, ())) for kind, forms in COLUMNS.items()}
KNOWN["preference"] |= {"margin"}
AROUND = frozenset({"system", "input", "history", "tools"})
"""What may stand around a prompt in columns of its own: its system message, what it is about, the turns before it, and
what the assistant may call."""

_SIDES = ("chosen", "rejected")
"""Never guessed: the wrong way round they invert every preference."""
_YOURS = "YOUR_COLUMN"
_ANSWER = re.compile(
    r"(response|answer|assistant|option|output|completion|text|conversation)[ _]?([ab0-2])", re.IGNORECASE
)
"""How the columns of two answers are called of which another column names the better one."""


def fitting_kinds(columns: Iterable[str]) -> list[Kind]:
    """The kinds as which a file with these columns can be read; the most telling first."""
    names = set(columns)
    fits: list[Kind] = [kind for kind, forms in COLUMNS.items() if any(names.issuperset(form) for form in forms)]
    fits = fits[:-1] if fits[1:] and fits[-1] == "prompt" else fits
    known: list[Kind] = [kind for _, shape in recognised(names) if shape.row or shape.whole for kind in shape.kinds]
    return list(dict.fromkeys((*known, *fits)))


def shown(params: ValidateParams, columns: Iterable[str]) -> list[str]:
    """The columns' names, where they are names for sure; the others by their place."""
    known = {*KNOWN[params.kind], *AROUND, *params.columns.values()}
    return [name if name in known else f"column {place}" for place, name in enumerate(columns, 1)]


def unknown_mapping(params: ValidateParams) -> StageError | None:
    """The config maps to a column that the kind does not have."""
    known = KNOWN[params.kind] | AROUND
    name = next((name for name in params.columns if name not in known), None)
    if name is None:
        return None
    theirs = params.columns[name]
    swapped = theirs in known and theirs not in params.columns
    near = theirs if swapped else _nearest(name, sorted(known))
    if near and (swapped or near not in _SIDES):
        meant = _mapping({near: name if swapped else theirs})
        fix = f"did you mean `{near}`? Write our name first: {meant}"
    else:
        fix = f"write one of our names first, then the file's: --columns OURS={theirs}"
    message = f"kind {params.kind} has no column `{name}`; it has {', '.join(sorted(known))}"
    return refuse("columns", name, message, fix, kind="unknown_column")


def other_json(params: ValidateParams, first_line: bytes, broken: int, rows: int) -> StageError | None:
    """JSON lines are expected, and the file is an array, or one object over several lines."""
    array = first_line.startswith(b"[")
    if not (array or first_line == b"{") or broken < rows / 2 or broken <= params.max_bad * rows:
        return None
    what = "a JSON array" if array else "JSON with objects over several lines"
    message = f"the file looks like {what}: {broken} of {rows} lines are not JSON objects"
    fix = "write one JSON object per line (JSONL)" + (", or name the file .json" if array else "")
    return refuse("path", params.path, message, fix, kind="bad_data")


def wrong_columns(
    params: ValidateParams, columns: list[str], prompt_missing: bool, had: Iterable[str] = ()
) -> StageError | None:
    """The file has not the columns that the config names, or not those of its kind.

    `had`: our columns that its rows had once they were read, under whatever names.
    `prompt_missing`: no row has one. Chosen and rejected alone will do only as conversations that hold their prompts.
    """
    if not columns:
        return None
    for ours, theirs in params.columns.items():
        if theirs not in columns:
            near = None if ours in _SIDES else _nearest(theirs, columns)
            message = (
                f"{one_line(params.path)} has no column `{theirs}` to take `{ours}` from; it has {listed(columns)}"
            )
            return refuse(
                f"columns.{ours}",
                theirs,
                message,
                f"did you mean `{near}`? {_mapping({ours: near})}"
                if near
                else f"name the column that holds it: {_mapping({ours: _YOURS})}",
                kind="missing_column",
            )
    named = {*columns, *params.columns, *had}
    without_prompt = prompt_missing and "prompt" not in named
    forms = COLUMNS[params.kind][:1] if without_prompt else COLUMNS[params.kind]
    if not without_prompt and any(named.issuperset(form) for form in forms):
        return None
    return _other_kind(params, columns, forms, named)


def _other_kind(
    params: ValidateParams, columns: list[str], forms: tuple[tuple[str, ...], ...], named: set[str]
) -> StageError:
    """What is missing of the form that comes closest, the kinds that would fit, and the mapping to write."""
    begun = [form for form in forms if named.intersection(form)] or forms[:1]
    lacking = [[name for name in form if name not in named] for form in begun]
    missing = min(lacking, key=len)
    free = [name for name in columns if name not in (*KNOWN[params.kind], *params.columns.values())]
    answers = {} if params.kind != "preference" or named & {*_SIDES, "a", "b"} else _two_answers(free)
    if answers:
        missing = [*(("prompt",) if "prompt" in missing else ()), *answers, "label"]
    names = [*missing, *(name for lack in lacking if len(lack) == len(missing) == 1 for name in lack)]
    near = {name: _nearest_of(name, free) for name in names} | answers
    if len(missing) == 1:  # any of these columns would do
        missing = [next((name for name in names if near[name]), "scores" if "scores" in names else names[0])]
    instead = [f"`{name}`" for name in dict.fromkeys(names) if name not in missing]
    fits = [kind for kind in fitting_kinds(named) if kind != params.kind]
    mapping = _mapping({name: near[name] or _YOURS for name in missing})
    lacks = " and no ".join([*(f"`{name}`" for name in missing), *instead])
    message = (
        f"{one_line(params.path)} cannot be read as {params.kind}: it has no column {lacks}. "
        f"It has {listed(columns)}. Kind {params.kind} needs {', or '.join(' + '.join(form) for form in forms)}."
    )
    fix = (
        f"read it as kind {' or '.join(fits)}, or " if fits else ""
    ) + f"map {'the columns' if missing[1:] else 'the column'}: {mapping}"
    fix += f"; {' or '.join(instead)} will do too" if instead else ""
    return refuse("kind", params.kind, message, fix, kind="wrong_columns")


def _two_answers(columns: Iterable[str]) -> dict[str, str]:
    """`a` and `b` -> the columns that hold the two answers; empty where their names do not tell one pair from all."""
    named = {(match[1].lower(), match[2].lower()): name for name in columns if (match := _ANSWER.fullmatch(name))}
    pairs = [
        {"a": named[stem, first], "b": named[stem, second]}
        for (stem, first) in named
        for second in ({"a": "b", "0": "1", "1": "2"}.get(first),)
        if second and (stem, second) in named
    ]
    return pairs[0] if len(pairs) == 1 else {}


def _nearest_of(name: str, others: Iterable[str]) -> str | None:
    """The column that was probably meant; of chosen and rejected only one that differs in capitals alone."""
    if name not in _SIDES:
        return _nearest(name, others)
    return next((other for other in others if other.strip().lower() == name), None)


def _nearest(name: str, others: Iterable[str]) -> str | None:
    """The one name that differs in the closest match; None when there is none, or more than one."""
    near = difflib.get_close_matches(name, [other for other in others if len(other) < 200], n=2, cutoff=0.8)
    return near[0] if len(near) == 1 else None


def _mapping(columns: Mapping[str, str]) -> str:
    """How a mapping is written, on the command line and in a config."""
    options = " ".join(f"--columns {ours}={one_line(theirs)}" for ours, theirs in columns.items())
    pairs = ", ".join(f"{ours}: {one_line(theirs)}" for ours, theirs in columns.items())
    return f"`{options}` (config: `columns: {{{pairs}}}`)"
