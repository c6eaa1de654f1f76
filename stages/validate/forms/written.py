"""Conversations that were written down as one text: rendered with a chat template, or as a transcript of speakers.

Whether a column holds such texts is told by all of its texts that were read so far. A single one among plain texts may
be what a person typed, so it stays as it is and is noted.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl

from schemas.config.data import Kind
from stages.validate.forms.cells import ROLES, BadRow, Turns

COLUMNS = ("prompt", "messages", "response", "completion", "chosen", "rejected", "a", "b")
"""The columns that may hold such texts."""


class _Dialect(NamedTuple):
    """How turns are marked."""

    mark: re.Pattern[str]
    """What begins a turn; its first group names the role."""
    rendered: bool = True
    """Rendered with a template: its marks are no words, so fewer such texts tell what the column is."""
    preface: bool = False
    """Text before the first turn is a system message, unless it is the dialect's own."""


_OWN_PREFACE = "Below is an instruction that describes a task"
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")
_ENDS += ("<｜end▁of▁sentence｜>", "<|eot|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "[/SYSTEM_PROMPT]")
_STARTS = ("<s>", "<|begin_of_text|>", "<bos>", "<BOS_TOKEN>", "<｜begin▁of▁sentence｜>")
_HEADS = "Human|User|Prompter|Instruction|Input|Assistant|Response|System"
_SPEAKERS = "human|user|prompter|assistant|ai|bot|chatbot|system"
_DIALECTS = {
    "ChatML": _Dialect(re.compile(r"<\|im_start\|>[ \t]*(\w+)[ \t]*\n")),
    "Llama 3": _Dialect(re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>")),
    "Gemma": _Dialect(re.compile(r"<start_of_turn>(\w+)\n")),
    "Llama 4": _Dialect(re.compile(r"<\|header_start\|>(\w+)<\|header_end\|>")),
    "Granite": _Dialect(re.compile(r"<\|start_of_role\|>(\w+)<\|end_of_role\|>")),
    "Harmony": _Dialect(re.compile(r"<\|start\|>(\w+)(?:<\|channel\|>final)?<\|message\|>")),
    "Cohere": _Dialect(re.compile(r"<\|START_OF_TURN_TOKEN\|><\|(\w+)_TOKEN\|>")),
    "Zephyr": _Dialect(re.compile(r"<\|(system|user|assistant)\|>")),
    "Llama 2": _Dialect(re.compile(r"(\[/?INST\]|\[SYSTEM_PROMPT\])")),
    "DeepSeek": _Dialect(re.compile(r"<｜(User|Assistant)｜>")),
    "Nemotron": _Dialect(re.compile(r"<extra_id_[01]>(System|User|Assistant)\n")),
    "Alpaca": _Dialect(re.compile(rf"#{{2,3}} ?({_HEADS}) ?:"), rendered=False, preface=True),
    "Vicuna": _Dialect(re.compile(r"(?:^|(?<=\s)|(?<=</s>))(USER|ASSISTANT):"), rendered=False, preface=True),
    "speakers": _Dialect(
        re.compile(rf"(?:^|[\r\n])[ \t]*(?:\*\*)?({_SPEAKERS})(?:\*\*)?[ \t]*:(?:\*\*)?", re.IGNORECASE),
        rendered=False,
    ),
}
_BEGINS = re.compile(
    rf"(?:{'|'.join(map(re.escape, _STARTS))})?\s*(?:"
    r"(?P<ChatML><\|im_start\|>)|(?P<Llama_3><\|start_header_id\|>)|(?P<Gemma><start_of_turn>)"
    r"|(?P<Llama_4><\|header_start\|>)|(?P<Granite><\|start_of_role\|>)|(?P<Harmony><\|start\|>)"
    r"|(?P<Cohere><\|START_OF_TURN_TOKEN\|>)"
    r"|(?P<Zephyr><\|(?:system|user|assistant)\|>)|(?P<Llama_2>\[INST\]|\[SYSTEM_PROMPT\])|(?P<DeepSeek><｜(?:User|Assistant)｜>)"
    rf"|(?P<Nemotron><extra_id_[01]>)|(?P<Alpaca>#{{2,3}} ?(?:{_HEADS}) ?:|Below is an instruction that describes)"
    r"|(?P<Vicuna>USER:|ASSISTANT:|A chat between a )"
    rf"|(?P<speakers>(?:\*\*)?(?:(?i:{_SPEAKERS}))(?:\*\*)?[ \t]*:))"
)
_FIRST_LETTERS = frozenset("<[#*HUPABSChupabsc \t\r\n")
_HEAD = 200
"""Characters within which the first mark of a conversation stands, so that a long text costs no more than a short one.
"""
_ROLE_OF = {
    **ROLES,
    **{"instruction": "user", "input": "user", "response": "assistant", "[inst]": "user", "[/inst]": "assistant"},
    **{"[system_prompt]": "system", "chatbot": "assistant"},
}
_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
# The share of a column's texts from which on it is taken for one of conversations.
_RENDERED_SHARE, _TRANSCRIPT_SHARE = 0.1, 0.5


def dialect_of(value: str) -> str | None:
    """The dialect as which a text begins."""
    begins = _BEGINS.match(value[:_HEAD].lstrip())
    return None if begins is None or begins.lastgroup is None else begins.lastgroup.replace("_", " ")


def may_be_written(text: pl.Expr) -> pl.Expr:
    """Whether a text may hold a conversation, or messages, or the end of a rendered one: at the speed of columns, true
    for all that `dialect_of`, `Written` and stages/validate/forms/cells.py look at more closely, and for few others."""
    space = r"[\s\x1c-\x1f]*"
    begins = rf"^{space}(?:{_BEGINS.pattern}|(?:array\()?{space}[\[{{]|Human:)"
    ends = rf"(?:{'|'.join(map(re.escape, _ENDS))}){space}$"
    return text.str.contains(begins) | text.str.contains(ends)


def conversation(value: str, name: str) -> Turns | None:
    """The turns of a text in the dialect; None where it is not a whole conversation, or one answer, in it.

    An unanswered turn of the assistant at the end is left out.
    """
    dialect = _DIALECTS[name]
    value = value.lstrip()
    value = value.removeprefix(next(filter(value.startswith, _STARTS), ""))
    marks = list(dialect.mark.finditer(value))
    if name == "speakers" and marks:  # a quoted line in other letters is no turn
        marks = [mark for mark in marks if _letters(mark.group(1)) == _letters(marks[0].group(1))]
    if not marks:
        return None
    preface = value[: marks[0].start()].strip()
    if preface and not dialect.preface:
        return None
    spoken = [("system", preface)] if preface and not preface.startswith(_OWN_PREFACE) else []
    ends = [mark.start() for mark in marks[1:]] + [len(value)]
    for mark, end in zip(marks, ends, strict=True):
        role = _ROLE_OF.get(mark.group(1).lower())
        words = without_end(value[mark.end() : end], (*_ENDS, *_STARTS)).strip()
        if role is None or any(token in words for token in _ENDS):
            return None
        if name == "Llama 2" and not spoken and (system := _SYSTEM.match(words)):
            spoken, words = [("system", system.group(1).strip())], words[system.end() :].strip()
        if mark.group(1) == "Input" and spoken and spoken[-1][0] == "user":  # goes on with the instruction
            spoken[-1] = ("user", f"{spoken[-1][1]}\n{words}".strip())
        else:
            spoken.append((role, words))
    if len(spoken) > 1 and spoken[-1] == ("assistant", ""):
        spoken.pop()
    if spoken[0] == ("system", ""):
        spoken.pop(0)
    return tuple(spoken) if _is_whole(spoken) else None


def without_end(value: str, tokens: tuple[str, ...] = _ENDS) -> str:
    """The text without the tokens at its end, nor white space around them."""
    end = len(value.rstrip())
    if not value.endswith(tokens, 0, end):
        return value
    while token := next((token for token in tokens if value.endswith(token, 0, end)), ""):
        end -= len(token)
        while end and value[end - 1].isspace():
            end -= 1
    return value[:end]


def _letters(label: str) -> tuple[bool, bool]:
    return label.isupper(), label.islower()


def _is_whole(spoken: Sequence[tuple[str, str]]) -> bool:
    """System first if at all, user and assistant in turn, nothing empty; or one answer alone."""
    roles = [role for role, _ in spoken]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[place % 2] for place in range(len(roles))]
    return bool(roles) and roles in (expected, ["assistant"]) and all(words for _, words in spoken)


@dataclass
class Written:
    """What the columns of one file have held so far."""

    texts: Counter[str] = field(default_factory=Counter)
    """Column -> its texts."""
    spoken: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Column and whether they were rendered -> texts that begin so, and of transcripts are whole ones."""
    ended: Counter[str] = field(default_factory=Counter)
    """Column -> plain texts with an end token of a template at their end."""

    def restore(
        self, rows: list[tuple[int, Any]], ours: Collection[str], says: Callable[[str], None]
    ) -> dict[int, list[str]]:
        """Put conversations in place of the texts that hold them, or `BadRow` in place of a row that cannot be read.

        `rows` are pairs of a number and a row, and are changed in place; `ours` are the columns that they may have.
        Returns number -> notes. `says` is told what was read as what.
        """
        marked: list[tuple[int, str, str | None]] = []
        for column in COLUMNS:
            if column not in ours:
                continue
            texts = 0
            for place, (_, row) in enumerate(rows):
                value = row.get(column) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value:
                    continue
                texts += 1
                if value.startswith("\n\nHuman:"):  # read as it is, and tells what the others are
                    self.spoken[column, False] += 1
                elif value[0] in _FIRST_LETTERS and (name := dialect_of(value)) is not None:
                    marked.append((place, column, name))
                elif value[-1] in "> \n" and value.rstrip().endswith(_ENDS):
                    self.ended[column] += 1
                    marked.append((place, column, None))
            self.texts[column] += texts
        read = [None if name is None else _read(rows[place][1][column], column, name) for place, column, name in marked]
        for (_, column, name), turns in zip(marked, read, strict=True):
            if name is not None and (turns is not None or _rendered(name)):
                self.spoken[column, _rendered(name)] += 1
        notes: dict[int, list[str]] = {}
        for (place, column, name), turns in zip(marked, read, strict=True):
            number, row = rows[place]
            if isinstance(row, BadRow):
                continue
            if not self._holds(column, name):
                notes.setdefault(number, []).append("looks_rendered" if _rendered(name) else "looks_like_transcript")
            elif name is None:
                rows[place] = number, {**row, column: without_end(row[column]).strip()}
                notes.setdefault(number, []).append("end_token_cut")
            elif turns is None:
                reason = "rendered_template" if _rendered(name) else "not_a_transcript"
                rows[place] = number, BadRow(column, reason, row[column])
            else:
                row = {**row, column: [{"role": turn[0], "content": turn[1]} for turn in turns]}
                if isinstance(row.get("responses"), list) and _rendered(name):
                    row["responses"] = [_bare(answer) for answer in row["responses"]]
                rows[place] = number, row
                notes.setdefault(number, []).append("template_read" if _rendered(name) else "transcript_read")
                says(f"`{column}`, rendered with {name}" if _rendered(name) else f"`{column}`, a transcript")
        return notes

    def _holds(self, column: str, name: str | None) -> bool:
        """Whether a column is one of conversations, or of answers with the end tokens of a template."""
        if name is None:
            share = self.ended[column] / self.texts[column]
            return share >= _TRANSCRIPT_SHARE or any(self._holds(other, "ChatML") for other in self.texts)
        rendered = _rendered(name)
        if not self.texts[column]:
            return False
        share = self.spoken[column, rendered] / self.texts[column]
        return share >= (_RENDERED_SHARE if rendered else _TRANSCRIPT_SHARE)


def _read(value: str, column: str, name: str) -> Turns | None:
    """The conversation in a column; in one of answers it ends with an answer."""
    turns = conversation(value, name)
    return None if turns and column not in ("prompt", "messages") and turns[-1][0] != "assistant" else turns


def _bare(answer: Any) -> Any:
    return without_end(answer).strip() if isinstance(answer, str) else answer


def _rendered(name: str | None) -> bool:
    return name is None or _DIALECTS[name].rendered


# --- the prompt at the head of the answers ---

_SHORTEST = 12
"""Characters of a prompt that nobody begins an answer with by chance."""
_REPEATED_SHARE = 0.5


def cut_repeated_prompts(frame: pl.DataFrame, answers: Sequence[str], kind: Kind) -> tuple[pl.DataFrame, list[int]]:
    """The frame with answers that no longer begin with their whole prompt, and the numbers of the rows that were cut.

    Cut where at least half of all rows are like that: other answers may repeat the question for a reason.
    """
    if not frame.height or kind == "prompt":
        return frame, []
    asked = pl.col("prompt").list.last().struct.field("content")
    texts = [pl.col(name) for name in answers]
    if kind == "ranking":
        begins = pl.col("responses").list.len() > 1
        heads = frame.with_row_index("place").select("place", "responses", asked=asked).explode("responses")
        repeated = heads.group_by("place", maintain_order=True).agg(
            pl.col("responses").str.starts_with(pl.col("asked").str.strip_chars_end()).all().alias("all")
        )
        repeats = frame.select(begins).to_series() & repeated["all"]
    else:
        repeats = frame.select(pl.all_horizontal(text.str.starts_with(asked.str.strip_chars_end()) for text in texts))
        repeats = repeats.to_series()
    repeats &= frame.select(asked.str.strip_chars().str.len_chars() >= _SHORTEST).to_series()
    if int(repeats.sum() or 0) < max(1, _REPEATED_SHARE * frame.height):
        return frame, []
    longest = asked.str.strip_chars_end().str.len_chars()
    if kind == "ranking":
        cut = frame.with_row_index("place").select("place", "responses", n=longest).explode("responses")
        cut = cut.with_columns(pl.col("responses").str.slice(pl.col("n")).str.strip_chars_start())
        lists = cut.group_by("place", maintain_order=True).agg("responses")["responses"]
        changed = frame.with_columns(responses=lists)
    else:
        changed = frame.with_columns(text.str.slice(longest).str.strip_chars_start() for text in texts)
    cells = {name: pl.when(repeats).then(changed[name]).otherwise(frame[name]) for name in answers}
    return frame.with_columns(**cells), frame.filter(repeats)["row"].to_list()
