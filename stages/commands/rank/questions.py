"""What people are asked: the prompts of a file with their answers, and the items that a form makes of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from schemas.commands import RankForm
from schemas.config.data import Kind, ValidateParams
from schemas.conversation import EXTRA, opened
from schemas.errors import refuse
from schemas.text import listed
from stages.validate import readers
from stages.validate.forms import cells, formats
from stages.validate.forms.cells import BadRow
from stages.validate.forms.column_advice import KNOWN
from stages.validate.forms.columns import Columns
from stages.validate.forms.rankings import generated

_ANSWERS: dict[Kind, tuple[set[str], ...]] = {
    "ranking": ({"responses"},),
    "preference": ({"chosen", "rejected"}, {"a", "b"}),
    "feedback": ({"completion"}, {"response"}),
}
"""A kind of rows -> the columns, of which any set shows that a file has such answers; the most telling kind first."""
_WRITTEN = {"prompt", "responses", "completion", "label", "order", "comparisons", "scores", "ranks", "tools"}


@dataclass(frozen=True)
class Question:
    """A prompt and the different answers to it, without empty ones."""

    prompt: list[dict[str, str]]
    """Messages, as in schemas/conversation.py."""
    texts: list[str]
    responses: list[Any]
    """The same answers as the file has them: texts, or objects that also name a model."""
    beside: dict[str, Any]
    """The other columns of its row."""

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the sha256 of prompt and answers: the same in every file and on every day."""
        return hashlib.sha256(json.dumps([self.prompt, self.texts]).encode()).hexdigest()[:16]

    def row(self, **columns: Any) -> dict[str, Any]:
        """A row of a data file: the prompt, these columns, and what stood beside the prompt."""
        prompt, tools = opened(self.prompt)
        return {"prompt": prompt, **({"tools": tools} if tools else {}), **columns, **self.beside}


@dataclass(frozen=True)
class Item:
    """What is judged at once: some of a question's answers, by their numbers in it."""

    question: Question
    places: tuple[int, ...]

    @property
    def id(self) -> str:
        """The question's id and the answers' numbers."""
        return "-".join([self.question.id, *map(str, self.places)])


@dataclass
class Asked:
    """The items of a file in its order, and how many rows gave none."""

    items: list[Item] = field(default_factory=list)
    repeated: int = 0
    """Rows whose prompt and answers an earlier row has."""
    nothing_to_compare: int = 0
    """Rows that have fewer than two different answers which are not empty; with thumbs, none."""


def read(file: Path, form: RankForm, named: Mapping[str, str] | None = None) -> Asked:
    """The items of a JSONL, JSON, CSV or Parquet file.

    `ranking` asks for all answers to a prompt at once, `pairs` for every two of them, `thumbs` for each one.
    named: our name of a column -> its name in the file, as `validate` takes it.

    Raises:
        StageError: the file cannot be read, holds no answers, or a row that is none (it is named).
    """
    asked, questions = Asked(), set[str]()
    columns: Columns | None = None
    for number, record in enumerate(readers.records(ValidateParams(path=str(file), kind="ranking"))):
        try:
            if record.row is None:
                raise BadRow("row", record.reason)
            columns = columns or _columns(file, record.row, form, named or {})
            question = _question(columns, record.row)
        except BadRow as problem:
            message = f"row {number} holds no prompt with answers: {problem}"
            fix = "correct that row; `alignflow validate` lists all rows that cannot be used"
            raise refuse("FILE", file, message, fix, kind="bad_data") from problem
        each = 1 if form == "thumbs" else 2 if form == "pairs" else max(2, len(question.texts))
        if question.id in questions:
            asked.repeated += 1
        elif len(question.texts) < each:
            asked.nothing_to_compare += 1
        else:
            asked.items += [Item(question, places) for places in combinations(range(len(question.texts)), each)]
        questions.add(question.id)
    if not asked.items:
        message = "the file holds no rows" if columns is None else "no row has two different answers"
        raise refuse("FILE", file, message, "give prompts with their answers", kind="empty_file")
    return asked


def _columns(file: Path, row: Mapping[str, Any], form: RankForm, named: Mapping[str, str]) -> Columns:
    """How the file's columns are read, told by its first row. Raises StageError where it has no answers."""
    for kind, forms in _ANSWERS.items():
        columns = Columns(ValidateParams(path=str(file), kind=kind, columns=dict(named)))
        try:
            columns.plan(row)
        except BadRow:  # the names that are given are those of another kind
            continue
        if columns.whole is None and any(columns.ours >= needed for needed in forms):
            if kind == "feedback" and form != "thumbs":
                message = "each row of the file has one answer, which can be compared with none"
                raise refuse("--form", form, message, "use --form thumbs")
            return columns
    fix = "name the columns `prompt` and `responses`, as `alignflow generate` does"
    message = f"the file has no column of answers; it has {listed(row)}"
    raise refuse("FILE", file, message, fix, kind="wrong_columns")


def _question(columns: Columns, row: Mapping[str, Any]) -> Question:
    """One row's prompt and answers; what it says of their order is left out. Raises BadRow."""
    kind, plan = columns.params.kind, columns.plan(row)
    ours = columns.row(row)
    given: list[Any] = []
    if kind == "ranking":
        given = cells.listed(ours.get("responses"), "responses")
        ours = {"prompt": ours.get("prompt"), "responses": given, "order": []}
    parsed = formats.parse(kind, ours)
    sides = {"preference": ("chosen", "rejected"), "feedback": ("completion",)}
    texts = parsed["responses"] if kind == "ranking" else [parsed[side] for side in sides[kind]]
    texts = generated({"prompt": "-", "responses": list(dict.fromkeys(texts)), "order": []})["responses"]
    named = [one for one in given if isinstance(one, dict) and isinstance(one.get("model"), str)]
    responses = [next((one for one in named if text in one.values()), text) for text in texts]
    turns = columns.around(row, parsed)["prompt"]
    prompt: list[dict[str, str]] = [dict(zip(("role", "content", EXTRA), turn, strict=False)) for turn in turns]
    spoken = {*KNOWN[kind], *plan.takes.values(), plan.system, plan.input, plan.history, plan.tools}
    beside = {name: value for name, value in row.items() if name not in spoken}
    beside = {f"prompt_{name}" if name in _WRITTEN else name: value for name, value in beside.items()}
    return Question(prompt, texts, responses, beside)
