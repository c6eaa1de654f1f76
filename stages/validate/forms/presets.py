"""The shapes of public data sets, each turned into our own columns. `PRESETS` is the registry, a name to its shapes.

A shape is recognised by columns that no other data has. One whose rows speak of one thing only together (the answers to
one prompt, the messages of one tree) is read as a whole (whole_files.py).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from schemas.config.data import Kind
from stages.validate.forms.cells import BadRow, Row, listed, number, text
from stages.validate.forms.whole_files import Numbered, helpsteer, oasst, oasst_trees, steered


class Shape(NamedTuple):
    """One form of a data set."""

    needs: frozenset[str]
    """Columns that tell it."""
    kinds: tuple[Kind, ...]
    """What it can be read as; the most telling first."""
    says: str
    """What is read as what, for people."""
    row: Callable[[Row], Row] | None = None
    """A row with our columns; None where the names of the columns are read by themselves."""
    reads: frozenset[str] = frozenset()
    """Further columns that it reads."""
    unread: frozenset[str] = frozenset()
    """Those of `needs` that it does not read."""
    whole: Callable[[Iterable[tuple[int, Row]], Kind], Iterator[Numbered]] | None = None
    """Rows with our columns from all rows of the file."""
    alone: frozenset[str] = frozenset()
    """Columns that it must have too to be recognised where no format is named."""
    only_named: bool = False
    """Never recognised by itself: another file with these columns would be read the wrong way round."""
    labels: tuple[str, str, str] | None = None
    """The columns that `label`, `a` and `b` come from."""


# --- a row each ---


def _alpaca_pair(row: Row) -> Row:
    """{"instruction": "Double it.", "input": "4", "output": ["8", "9"]}: the first answer is the better one."""
    answers = row.get("output")
    if not isinstance(answers, list) or len(answers) != 2:
        raise BadRow("output", "missing" if answers is None else "not_two_answers", answers)
    asked = [words for words in (row.get("instruction"), row.get("input")) if words not in (None, "")]
    if not all(isinstance(words, str) for words in asked):
        raise BadRow("instruction", "not_text", asked)
    return {"prompt": "\n".join(asked), "chosen": answers[0], "rejected": answers[1]}


def _ultrafeedback(row: Row) -> Row:
    """{"instruction": "Name a fruit.", "completions": [{"model": "m", "response": "Kiwi.", "overall_score": 8.5}, ...]}

    Raw UltraFeedback, ranked by `overall_score`, or by `fine-grained_score` where that is missing.
    """
    answers = row.get("completions")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise BadRow("completions", "missing" if answers is None else "not_a_list", answers)
    scores = [answer.get("overall_score") for answer in answers]
    if any(score is None for score in scores):
        scores = [answer.get("fine-grained_score") for answer in answers]
    responses = [{"text": answer.get("response"), "model": answer.get("model")} for answer in answers]
    return {"prompt": row.get("instruction"), "responses": responses, "scores": scores}


def _nectar(row: Row) -> Row:
    """{"prompt": "\\n\\nHuman: Why?\\n\\nAssistant: ", "answers": [{"answer": "So.", "model": "m", "rank": 1}, ...]}"""
    return {"prompt": row.get("prompt"), "responses": row.get("answers")}


def _pku(row: Row) -> Row:
    """{"prompt": "How?", "response_0": "So.", "response_1": "No.", "better_response_id": 0, "safer_response_id": 1}"""
    label = row.get("better_response_id")
    return {"prompt": row.get("prompt"), "a": row.get("response_0"), "b": row.get("response_1"), "label": label}


def _shp(row: Row) -> Row:
    """{"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1}: 1 says that A is better, 0 B."""
    label = _one_of(row, "labels", {1: "a", 0: "b"})
    return {"prompt": row.get("history"), "a": row.get("human_ref_A"), "b": row.get("human_ref_B"), "label": label}


def _webgpt(row: Row) -> Row:
    """{"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "No.", "score_0": 0.5, "score_1": -0.5}"""
    question = row.get("question")
    asked = question.get("full_text") if isinstance(question, dict) else question
    first, second = (number(row.get(name), name) for name in ("score_0", "score_1"))
    label = "tie" if first == second else "a" if first > second else "b"
    return {"prompt": asked, "a": row.get("answer_0"), "b": row.get("answer_1"), "label": label}


def _summarize(row: Row) -> Row:
    """{"info": {"title": "Dog", "post": "My dog"}, "summaries": [{"text": "A."}, {"text": "B."}], "choice": 0}

    The prompt is the post or the article, with the title and the subreddit before it where they are given.
    """
    info, summaries = row.get("info"), row.get("summaries")
    if not isinstance(info, dict):
        raise BadRow("info", "missing" if info is None else "not_an_object", info)
    body = info.get("post") or info.get("article")
    if not isinstance(body, str):
        raise BadRow("info", "missing", info)
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise BadRow("summaries", "not_two_answers", summaries)
    heads = [f"{name.upper()}: {info[name]}" for name in ("subreddit", "title") if info.get(name)]
    prompt = "\n".join([*heads, f"POST: {body}" if heads else body, "TL;DR:"])
    label = _one_of(row, "choice", {0: "a", 1: "b"})
    return {"prompt": prompt, "a": summaries[0].get("text"), "b": summaries[1].get("text"), "label": label}


def _arena(row: Row) -> Row:
    """{"conversation_a": [...], "conversation_b": [...], "winner": "model_a"}: or model_b, tie, tie (bothbad)."""
    return {"a": row.get("conversation_a"), "b": row.get("conversation_b"), "label": row.get("winner")}


_WINNERS = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "tie"}


def _arena_columns(row: Row) -> Row:
    """{"prompt": "[\\"Why?\\"]", "response_a": "[\\"So.\\"]", "response_b": "[\\"No.\\"]", "winner_model_a": 1, ...}

    The turns of a conversation stand in lists, of the user's and of each model's, or are plain texts, one each. The
    verdict is a column `winner`, or three of which one is 1.
    """
    columns = ("prompt", "response_a", "response_b")
    asked, *answers = [[row.get(column)] for column in columns]
    if all(isinstance(row.get(column), str) and row[column].startswith("[") for column in columns):
        with contextlib.suppress(BadRow):  # three texts that begin with a bracket
            asked, *answers = [listed(row[column], column) for column in columns]
    sides: Row = {}
    for side, column, said in zip("ab", columns[1:], answers, strict=True):
        if len(said) != len(asked):
            raise BadRow(column, "other_number_of_turns", row[column])
        talk = [("user", "prompt"), ("assistant", column)]
        sides[side] = [
            {"role": role, "content": text(words, source)}
            for turn in zip(asked, said, strict=True)
            for words, (role, source) in zip(turn, talk, strict=True)
        ]
    if "winner" in row:
        return {**sides, "label": row["winner"]}
    won = [label for column, label in _WINNERS.items() if number(row.get(column), column) == 1]
    if len(won) != 1:
        raise BadRow(next(iter(_WINNERS)), "not_a_label", [row.get(column) for column in _WINNERS])
    return {**sides, "label": won[0]}


def _strength(row: Row, column: str) -> str:
    """The better answer, told by a strength from -3 (the first is much better) to 3 (the second is)."""
    strength = number(row.get(column), column)
    if abs(strength) > 3:
        raise BadRow(column, "not_a_strength", strength)
    return "a" if strength < 0 else "b" if strength > 0 else "tie"


def _helpsteer2_pair(row: Row) -> Row:
    """{"prompt": "Why?", "response_1": "So.", "response_2": "No.", "preference_strength": -2}: below 0, 1 is better."""
    label = _strength(row, "preference_strength")
    answers = {"a": row.get("response_1"), "b": row.get("response_2")}
    return {"prompt": steered(row.get("prompt")), **answers, "label": label}


def _helpsteer_answer(row: Row) -> Row:
    """{"prompt": "Why?", "response": "So.", "helpfulness": 3, "correctness": 4, ...}"""
    return {"prompt": steered(row.get("prompt")), "response": row.get("response")}


def _helpsteer3(row: Row) -> Row:
    """{"context": [{"role": "user", ...}], "response1": "So.", "response2": "No.", "overall_preference": 2}"""
    label = _strength(row, "overall_preference")
    return {"prompt": row.get("context"), "a": row.get("response1"), "b": row.get("response2"), "label": label}


def _one_of(row: Row, column: str, labels: Mapping[int, str]) -> str:
    """The label that a number stands for in this data set. Raises BadRow for any other value."""
    value = row.get(column)
    place = None if isinstance(value, bool) or value in (None, "") else number(value, column)
    if place is None or place not in labels:
        raise BadRow(column, "missing" if value in (None, "") else "not_a_label", value)
    return labels[int(place)]


# --- the registry ---


def _of(*names: str) -> frozenset[str]:
    return frozenset(names)


_PAIRS: tuple[Kind, ...] = ("preference",)
_RANKED: tuple[Kind, ...] = ("ranking", "preference")
PRESETS: dict[str, tuple[Shape, ...]] = {
    "alpaca": (
        Shape(_of("instruction"), ("sft", "preference", "feedback", "prompt"), "`instruction` with `input`"),
        Shape(
            _of("instruction", "output"),
            _PAIRS,
            "the first of two in `output` is better",
            _alpaca_pair,
            _of("input"),
            only_named=True,
        ),
    ),
    "sharegpt": (Shape(_of("conversations"), ("sft", "preference", "feedback", "prompt"), "`conversations`"),),
    "ultrafeedback": (
        Shape(
            _of("instruction", "completions"), ("ranking",), "`completions`, ranked by overall_score", _ultrafeedback
        ),
        Shape(_of("prompt", "chosen", "rejected", "score_chosen", "score_rejected"), _PAIRS, "`chosen`, `rejected`"),
    ),
    "helpsteer": (
        Shape(
            _of("prompt", "response", "helpfulness", "correctness", "coherence"),
            _RANKED,
            "rows of one prompt, ranked by `helpfulness`",
            unread=_of("correctness", "coherence"),
            whole=helpsteer,
        ),
        Shape(
            _of("prompt", "response", "helpfulness", "correctness", "coherence"),
            ("sft",),
            "every response, whatever its `helpfulness`",
            _helpsteer_answer,
            unread=_of("helpfulness", "correctness", "coherence"),
        ),
        Shape(
            _of("prompt", "response_1", "response_2", "preference_strength"),
            _PAIRS,
            "`response_1` is better where `preference_strength` is below 0",
            _helpsteer2_pair,
        ),
        Shape(
            _of("context", "response1", "response2", "overall_preference"),
            _PAIRS,
            "`response1` is better where `overall_preference` is below 0",
            _helpsteer3,
        ),
    ),
    "nectar": (
        Shape(
            _of("prompt", "answers"),
            ("ranking",),
            "`answers`, rank 1 is the best",
            _nectar,
            alone=_of("num_responses"),
        ),
    ),
    "pku": (
        Shape(
            _of("prompt", "response_0", "response_1", "better_response_id"),
            _PAIRS,
            "`better_response_id` names the more helpful answer "
            "(the safer one: --format pku --columns label=safer_response_id)",
            _pku,
            labels=("better_response_id", "response_0", "response_1"),
        ),
    ),
    "shp": (
        Shape(
            _of("history", "human_ref_A", "human_ref_B", "labels"),
            _PAIRS,
            "`human_ref_A` is better where `labels` is 1, `human_ref_B` where it is 0",
            _shp,
        ),
    ),
    "oasst": (
        Shape(
            _of("message_id", "parent_id", "text", "role"),
            ("ranking", "preference", "sft", "prompt"),
            "the replies to each message of a user, `rank` 0 is the best",
            reads=_of("rank", "deleted", "message_tree_id"),
            whole=oasst,
        ),
        Shape(
            _of("message_tree_id", "prompt"),
            ("ranking", "preference", "sft", "prompt"),
            "the replies to each message of a user, `rank` 0 is the best",
            whole=oasst_trees,
        ),
    ),
    "webgpt": (
        Shape(
            _of("question", "answer_0", "answer_1", "score_0", "score_1"),
            _PAIRS,
            "the answer with the higher score is better",
            _webgpt,
        ),
    ),
    "summarize": (
        Shape(
            _of("info", "summaries", "choice"),
            _PAIRS,
            "`choice` is the number of the better summary, 0 or 1",
            _summarize,
        ),
    ),
    "arena": (
        Shape(_of("conversation_a", "conversation_b", "winner"), _PAIRS, "`winner` names the better one", _arena),
        Shape(
            _of("prompt", "response_a", "response_b", "winner"),
            _PAIRS,
            "`winner` names the better one",
            _arena_columns,
        ),
        Shape(
            _of("prompt", "response_a", "response_b", *_WINNERS),
            _PAIRS,
            "the better one is that whose column `winner_...` is 1",
            _arena_columns,
        ),
    ),
}


def recognised(names: Iterable[str], preset: str | None = None) -> list[tuple[str, Shape]]:
    """The shapes that columns of these names have, of all presets or of one; first the one that names most of them."""
    given = frozenset(names)
    among = PRESETS if preset is None else {preset: PRESETS[preset]}
    fits = [
        (name, shape)
        for name, shapes in among.items()
        for shape in shapes
        if shape.needs <= given and (preset or (shape.alone <= given and not shape.only_named))
    ]
    return sorted(fits, key=lambda fit: -len(fit[1].needs))
