"""Which of a file's columns are read as what: mapped by the user, of a known data set, or under their usual names.

What is not read is listed with an example; a row that means something else without it is put aside.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError, refuse
from schemas.text import listed as shown_list
from schemas.text import one_line
from stages.validate.forms.cells import (
    KNOWN_KEYS,
    BadRow,
    Parsed,
    Row,
    Turns,
    extra_of_turn,
    known_keys,
    listed,
    text,
    turn_with,
    turns,
    weighed,
)
from stages.validate.forms.column_advice import COLUMNS, KNOWN
from stages.validate.forms.labels import Names
from stages.validate.forms.presets import PRESETS, Shape, recognised
from stages.validate.forms.tools import TOOL_KEYS, WrongTools, odd, tools_of
from stages.validate.forms.whole_files import Numbered

_PROMPTS = ("instruction", "question", "query")
_CONVERSATIONS = ("conversations", "conversation")
_ALIASES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "sft": {"messages": (*_CONVERSATIONS, "text"), "response": ("completion", "output", "answer")},
    "preference": {},
    "feedback": {"completion": ("output", "answer"), "messages": _CONVERSATIONS, "label": ("kto_tag",)},
    "ranking": {"responses": ("answers", "completions", "generations", "candidates")},
    "prompt": {"messages": _CONVERSATIONS},
}
"""Our column -> the names under which data sets have it, where the file has no column of ours."""
_SYSTEMS = ("system", "system_prompt")
_INPUTS = {"instruction": ("input", "context"), "question": ("context",), "query": ("context",)}
"""Where the prompt comes from -> what it is about. Beside a `prompt` such columns may be anything."""
_SCORED = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"))
"""Columns that say by how much the better answer is better, as data sets call them. Only held against the verdict."""
_SAYS = {"system": "the system message", "input": "part of the prompt", "history": "earlier turns", "tools": "tools"}
_REFUSED = {
    **dict.fromkeys(TOOL_KEYS, "two_lists_of_tools"),
    **{name: f"has_{name.rstrip('s')}" for name in ("image", "images", "video", "videos", "audio", "audios")},
}
"""Columns without which a row means something else -> the reason to put it aside."""
NOTHING = (None, "", [], {}, "[]", "null", "None")
_EXAMPLE = 80
_LISTED = 200
"""Unread columns that are listed."""


@dataclass
class Plan:
    """How rows with one set of columns are read."""

    shape: Shape | None = None
    takes: dict[str, str] = field(default_factory=dict)
    """Our column -> the file's."""
    system: str | None = None
    input: str | None = None
    before: bool = False
    """Whether `input` stands before the prompt, as the text that a question is about does."""
    history: str | None = None
    scored: tuple[str, str] | None = None
    """The columns with the scores of the better and of the worse answer."""
    tools: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    """Columns without an example yet."""
    ours: frozenset[str] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether rows are in our columns as they are, and nothing stands beside them."""
        return not ((self.shape and self.shape.row) or self.takes or self.refused or self.unread or self.system)


class Columns:
    """Reads the columns of one file."""

    def __init__(self, params: ValidateParams, log_text: bool = True) -> None:
        self.params, self.log_text = params, log_text
        self.unread: dict[str, str | None] = {}
        """Column, or `messages[].key` -> the beginning of a value found there."""
        self.read: dict[str, None] = {}
        """What was read as what, for people."""
        self.ours: set[str] = set()
        """Our columns that rows had."""
        self.names = Names()
        self.whole: Callable[[Iterable[tuple[int, Row]], Kind], Iterator[Numbered]] | None = None
        """Set where the file's rows give rows of ours only together."""
        self.beside = False
        """Whether system messages, earlier turns or tools stand in columns of their own."""
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._last: tuple[tuple[str, ...], Plan] | None = None

    def say(self, what: str) -> None:
        """Note what was read as what."""
        self.read[what] = None

    def plan(self, row: Row) -> Plan:
        """How a row is read."""
        names = tuple(row)
        if self._last is not None and self._last[0] == names:
            return self._last[1]
        if names not in self._plans:
            if len(self._plans) >= _LISTED:  # every row another set of columns: nothing is gained by keeping them
                self._plans.clear()
            self._plans[names] = self._made(names)
        self._last = names, self._plans[names]
        return self._plans[names]

    def _made(self, names: tuple[str, ...]) -> Plan:
        """The plan for rows with these columns; says what is read as what."""
        params, given = self.params, set(names)
        shape = self._shape(names)
        converts = shape is not None and bool(shape.row or shape.whole)
        taken = set((shape.needs | shape.reads) - shape.unread) if shape is not None and converts else set()
        if shape is not None and shape.labels and "label" in params.columns:
            taken.discard(shape.labels[0])
        ours = {**({} if converts else _aliases(params.kind, given, set(params.columns))), **params.columns}
        known = KNOWN[params.kind] - _idle(params.kind, given | ours.keys()) - (ours.keys() - ours.values())
        read = {*taken, *ours.values(), *(() if converts else known)}
        plan = Plan(shape=shape, takes=ours)
        if shape is None or not shape.whole:
            prompt = ours.get("prompt", "prompt")
            around = {"system": _SYSTEMS, "input": _INPUTS.get(prompt, ()), "history": ("history",)}
            around["tools"] = TOOL_KEYS
            beside = {
                name: next((theirs for theirs in usual if theirs in given - read), None)
                for name, usual in around.items()
            }
            beside |= {name: params.columns[name] for name in around if name in params.columns}
            plan.system, plan.input, plan.history, plan.tools = (beside[name] for name in around)
            plan.before = prompt in _PROMPTS[1:]
            if params.kind == "preference" and {"chosen", "rejected"} <= given | ours.keys():
                plan.scored = next((pair for pair in _SCORED if given >= set(pair)), None)
                if plan.scored is not None:
                    self.say("`{}` and `{}`: held against the verdict".format(*plan.scored))
            self.beside = self.beside or any((plan.system, plan.history, plan.tools, plan.scored))
        beside = {"system": plan.system, "input": plan.input, "history": plan.history, "tools": plan.tools}
        for name, theirs in {**ours, **beside}.items():
            if theirs in given and not (theirs == name == "tools") and name not in params.columns:
                self.say(f"`{theirs}` as {_SAYS.get(name, name)}")
        read |= {name for name in (*beside.values(), *(plan.scored or ())) if name}
        plan.refused = {name: reason for name, reason in _REFUSED.items() if name in given - read}
        plan.unread = [name for name in names if name not in read and name not in plan.refused]
        for name in plan.unread:
            self._unread(name, None)
        usual = shape.labels if shape is not None and shape.labels else Names()
        sources = [ours.get(name, theirs) for name, theirs in zip(Names._fields, usual, strict=True)]
        if sources[0] in given:
            self.names = Names(*sources)
        plan.ours = frozenset({*ours, *(given & KNOWN[params.kind])})
        self.ours |= plan.ours | set(COLUMNS[params.kind][0] if converts else ())
        return plan

    def _shape(self, names: tuple[str, ...]) -> Shape | None:
        """The shape of a public data set that columns have: the one that is named, else one that is unmistakable."""
        fits = recognised(names, self.params.format)
        if self.params.columns and not self.params.format:  # the user says what is what, or whose verdict counts
            fits = [fit for fit in fits if fit[1].labels and self.params.columns.keys() == {"label"}]
        name, shape = next(((name, shape) for name, shape in fits if self.params.kind in shape.kinds), ("", None))
        if shape is None:
            return None
        if shape.row or shape.whole or self.params.format:
            self.say(f"{name}: {shape.says}")
        self.whole = self.whole or shape.whole
        return shape

    def row(self, row: Row) -> Row:
        """The row with our columns. Raises BadRow where something stands beside them that changes what it means."""
        plan = self.plan(row)
        if plan.plain:
            return row
        for name, reason in plan.refused.items():
            if row.get(name) not in NOTHING:
                raise BadRow(name, reason, row[name])
        if plan.unread:
            self._examples(row, plan)
        source = row
        if plan.shape is not None and plan.shape.row is not None:
            row = plan.shape.row(row)
            self.ours |= row.keys()
        if plan.takes:
            row = {**row, **{ours: source.get(theirs) for ours, theirs in plan.takes.items()}}
        if plan.input is not None and source.get(plan.input) not in NOTHING and isinstance(row.get("prompt"), str):
            about = _joined(source[plan.input], plan.input)
            row = {**row, "prompt": f"{about}\n\n{row['prompt']}" if plan.before else f"{row['prompt']}\n{about}"}
        return row

    def _examples(self, row: Row, plan: Plan) -> None:
        for name in list(plan.unread):
            if row.get(name) not in NOTHING:
                self._unread(name, row[name])
                plan.unread.remove(name)

    def _unread(self, name: str, value: object) -> None:
        """List a column, or a key, that is not read, with the first value found."""
        if not self.log_text:
            name, value = "(left out: log_text is false)", None
        if self.unread.get(name) is None and (name in self.unread or len(self.unread) < _LISTED):
            self.unread[name] = None if value is None else one_line(value, _EXAMPLE)

    def keys(self, row: Row) -> None:
        """List the keys of messages and answers that are not read."""
        for column, value in row.items():
            for entry in value if isinstance(value, list) and column in _OF_OBJECTS else ():
                if isinstance(entry, dict) and not entry.keys() <= _KNOWN_KEYS:
                    for key in sorted(entry.keys() - _KNOWN_KEYS - known_keys(entry)):
                        if entry[key] not in NOTHING:
                            self._unread(f"{column}[].{key}", entry[key])

    def around(self, source: Row, parsed: Parsed) -> Parsed:
        """The parsed row with its system message, earlier turns and tools, where columns of their own hold them.

        Notes where columns of scores say that the rejected answer is the better one. Raises BadRow.
        """
        plan = self.plan(source)
        if plan.scored is not None:
            better, worse = (source.get(name) for name in plan.scored)
            if isinstance(better, int | float) and isinstance(worse, int | float) and better < worse:
                parsed["notes"] = [*parsed.get("notes", ()), "scores_contradict"]
        if plan.history is not None and source.get(plan.history) not in NOTHING:
            earlier = weighed(_earlier(source[plan.history], plan.history), self.params.learn, plan.history)
            parsed["prompt"] = (*earlier, *parsed["prompt"])
        if plan.system is not None and source.get(plan.system) not in NOTHING:
            parsed["prompt"] = _with_system(parsed["prompt"], text(source[plan.system], plan.system), plan.system)
        if plan.tools is not None and source.get(plan.tools) not in NOTHING:
            parsed["prompt"] = with_tools(parsed["prompt"], source[plan.tools], plan.tools)
        return parsed

    def calls(self, parsed: Parsed) -> list[str]:
        """Notes on the calls of a row. That there are tools or calls is said: they are part of what is learned."""
        if "calls" not in parsed and all(len(turn) == 2 for turn in parsed["prompt"]):
            return []
        extras = [extra_of_turn(turn) for turn in parsed["prompt"] if len(turn) > 2]
        tools = [tool for extra in extras for tool in extra.get("tools", ())]
        calls = [call for extra in extras for call in extra.get("tool_calls", ())] + list(parsed.get("calls") or ())
        if tools:
            self.say("tools: shown by the model's template")
        if calls:
            self.say("tool calls: the assistant's, written by the model's template")
        texts = [turn[1] for turn in parsed["prompt"] if turn[0] == "assistant"] + [parsed.get("response") or ""]
        return odd(tools, calls, texts)


def _with_system(prompt: Turns, system: str, column: str) -> Turns:
    if not system.strip():
        return prompt
    if prompt[0][0] != "system":
        return (("system", system), *prompt)
    if prompt[0][1].strip() != system.strip():
        raise BadRow(column, "two_system_messages", system)
    return prompt


def with_tools(prompt: Turns, value: object, column: str) -> Turns:
    """The prompt with the tools of a column on its first turn. Raises BadRow."""
    try:
        tools = tools_of(value)
    except WrongTools as wrong:
        raise BadRow(column, wrong.reason, wrong.value) from wrong
    first, *rest = prompt
    return (turn_with(first, {**extra_of_turn(first), "tools": tools}, column), *rest) if tools else prompt


_OF_OBJECTS = frozenset(
    {"prompt", *_CONVERSATIONS, "messages", "chosen", "rejected", "completion", "response", "responses"}
)
_KNOWN_KEYS = KNOWN_KEYS | {"answer", "response", "completion", "model", "rank", "score"}


def _joined(value: object, column: str) -> str:
    """A text, or several, one below the other."""
    return "\n".join(text(part, column) for part in value) if isinstance(value, list) else text(value, column)


def _idle(kind: Kind, have: set[str]) -> set[str]:
    """The columns of a kind that say nothing where the file has others of it, which count."""
    if kind == "preference":
        return {"a", "b", "label"} if have >= {"chosen", "rejected"} else set()
    if kind == "sft":
        return {"messages"} if "response" in have else {"prompt"} if "messages" in have else set()
    if kind == "feedback":
        return {"response", "messages"} if "completion" in have else {"messages"} if "response" in have else set()
    return {"turns", "messages"} if kind == "prompt" and "prompt" in have else set()


def _aliases(kind: Kind, given: set[str], mapped: set[str]) -> dict[str, str]:
    """Our columns that the file has under another usual name."""
    have = given | mapped
    found: dict[str, str] = {}
    answered = kind == "preference" or (kind == "feedback" and bool(have & {"completion", "response", "output"}))
    prompts = (*_PROMPTS, *(_CONVERSATIONS if answered else ()), "input")
    whole = not answered and have & {*_CONVERSATIONS, "messages"}
    if not (have & {"prompt", "turns"} or whole):
        asked = next((name for name in prompts if name in given), None)
        found |= {} if asked is None else {"prompt": asked}
    for ours, names in _ALIASES[kind].items():
        theirs = next((name for name in names if name in given and name not in found.values()), None)
        if ours in have or theirs is None:
            continue
        spoken = ours == "messages" and (have | found.keys()) & {"prompt"}
        # A conversation holds its answer; and answers with a verdict beside them are not all to be imitated.
        answer = ours in ("response", "completion") and (have | found.keys()) & {
            "messages",
            "response",
            *_CONVERSATIONS,
        }
        if not (spoken or answer or (kind == "sft" and ours == "response" and "label" in given)):
            found[ours] = theirs
    return found


def _earlier(value: object, column: str) -> Turns:
    """Earlier turns as messages, or as pairs of what was asked and what was answered."""
    spoken: list[tuple[str, str]] = []
    pairs = listed(value, column)
    if pairs and all(isinstance(message, dict) for message in pairs):
        return turns(pairs, column)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(column, "not_a_pair_of_turns", pair)
        spoken += [("user", text(pair[0], column)), ("assistant", text(pair[1], column))]
    return tuple(spoken)


def wrong_format(params: ValidateParams, columns: Mapping[str, None]) -> StageError | None:
    """The config names a format that the file's columns, or the kind, do not fit."""
    if params.format is None or not columns:
        return None
    fits = recognised(columns, params.format)
    if any(params.kind in shape.kinds for _, shape in fits):
        return None
    if fits:
        kinds = ", ".join(dict.fromkeys(kind for _, shape in fits for kind in shape.kinds))
        message = f"{params.format} rows of these columns cannot be read as {params.kind}"
        return refuse("kind", params.kind, message, f"use kind {kinds.replace(', ', ' or ')}", kind="wrong_columns")
    forms = ", or ".join(" + ".join(sorted(shape.needs)) for shape in PRESETS[params.format])
    message = f"{one_line(params.path)} has {shown_list(columns)}; {params.format} rows have {forms}"
    fix = "leave the format out, and map the columns with --columns OURS=THEIRS"
    return refuse("format", params.format, message, fix, kind="wrong_columns")
