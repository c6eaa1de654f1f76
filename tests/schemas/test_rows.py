"""The pandera models: every reason they know is found, on the row that has it and on no other."""

import hashlib
import unicodedata
from typing import Any, get_args

import polars as pl
import pytest
from pandera.errors import SchemaError

from schemas.config.data import Kind
from schemas.rows import (
    Indices,
    Messages,
    Numbers,
    Strings,
    cluster_id,
    may_repeat,
    normalise,
    prompt_id,
    text_id,
    text_ids,
    with_prompt_ids,
)
from schemas.rows.models import ROWS, problems

ASK = [{"role": "user", "content": "Name a river."}]
GOOD: dict[Kind, dict[str, Any]] = {
    "sft": {"prompt": ASK, "response": "The Rhine."},
    "preference": {"prompt": ASK, "chosen": "The Rhine.", "rejected": "No.", "margin": 0.5},
    "ranking": {
        **{"prompt": ASK, "responses": ["The Rhine.", "No.", "Bern."]},
        **{"winners": [0, 0], "losers": [1, 2], "margins": [1.0, 2.0]},
    },
    "feedback": {"prompt": ASK, "completion": "The Rhine.", "label": True},
    "prompt": {"prompt": ASK},
}
TYPES = {
    **{"prompt": Messages, "margin": pl.Float64, "responses": Strings, "label": pl.Boolean},
    **{"winners": Indices, "losers": Indices, "margins": Numbers},
}


def frame(kind: Kind, *changes: dict[str, Any]) -> pl.DataFrame:
    """One good row, then one per change."""
    rows = [{"row": i, **GOOD[kind], **change} for i, change in enumerate([{}, *changes])]
    types = {name: TYPES[name] for name in GOOD[kind] if name in TYPES}
    strings = {name: pl.String for name in GOOD[kind] if name not in TYPES}
    return with_prompt_ids(pl.DataFrame(rows, schema_overrides=types | strings))


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "Well."} for role in roles]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_good_rows_pass(kind: Kind) -> None:
    """A clean row has no problem, and neither has a frame without rows."""
    assert problems(kind, frame(kind)).height == 0
    assert problems(kind, frame(kind).clear()).height == 0


BAD: list[tuple[Kind, dict[str, Any], str, str]] = [
    ("sft", {"response": ""}, "response", "empty"),
    ("sft", {"response": " \n\t\u200b\u00ad"}, "response", "empty"),
    ("sft", {"response": "a\x00b"}, "response", "contains_nul"),
    ("sft", {"response": None}, "response", "missing"),
    ("sft", {"prompt": turns("assistant", "user")}, "prompt", "roles_out_of_order"),
    ("sft", {"prompt": turns("user", "assistant")}, "prompt", "roles_out_of_order"),
    ("sft", {"prompt": turns("user", "user")}, "prompt", "roles_out_of_order"),
    ("sft", {"prompt": turns("user", "assistant", "system", "user")}, "prompt", "roles_out_of_order"),
    ("sft", {"prompt": []}, "prompt", "roles_out_of_order"),
    ("prompt", {"prompt": [{"role": "user", "content": "\r\n"}]}, "prompt", "empty"),
    ("prompt", {"prompt": [{"role": "user", "content": "a\x00"}]}, "prompt", "contains_nul"),
    ("feedback", {"completion": ""}, "completion", "empty"),
    ("feedback", {"label": None}, "label", "missing"),
    ("preference", {"chosen": " "}, "chosen", "empty"),
    ("preference", {"rejected": "\x00No."}, "rejected", "contains_nul"),
    ("preference", {"chosen": "No.", "rejected": "No."}, "rejected", "chosen_equals_rejected"),
    ("preference", {"chosen": "No.", "rejected": " No.\n"}, "rejected", "chosen_equals_rejected"),
    ("preference", {"margin": -0.1}, "margin", "negative"),
    ("preference", {"margin": float("nan")}, "margin", "not_finite"),
    ("preference", {"margin": float("inf")}, "margin", "not_finite"),
    ("ranking", {"responses": ["a", "", "b"]}, "responses", "empty"),
    ("ranking", {"responses": ["a", "b", "\x00"]}, "responses", "contains_nul"),
    ("ranking", {"winners": [0, 3]}, "winners", "comparisons_do_not_fit"),
    ("ranking", {"losers": [-1, 2]}, "winners", "comparisons_do_not_fit"),
    ("ranking", {"winners": [0]}, "winners", "comparisons_do_not_fit"),
    ("ranking", {"margins": [1.0]}, "winners", "comparisons_do_not_fit"),
]


@pytest.mark.parametrize(("kind", "change", "column", "reason"), BAD)
def test_every_problem_is_found(kind: Kind, change: dict[str, Any], column: str, reason: str) -> None:
    """The bad row, the last one, is named with column and reason; a NUL alone is blank besides."""
    found = problems(kind, frame(kind, {}, change)).rows()
    assert (2, column, reason) in found
    assert {index for index, _, _ in found} == {2}


def test_what_is_allowed() -> None:
    """A system message first, several turns, no margin, no comparisons, other alphabets, an emoji as an answer."""
    long = turns("system", "user", "assistant", "user", "assistant", "user")
    assert problems("sft", frame("sft", {"prompt": long}, {"response": "数"}, {"response": "👍"})).height == 0
    assert problems("preference", frame("preference", {"margin": None}, {"margin": 0.0})).height == 0
    none = {"winners": [], "losers": [], "margins": None}
    assert problems("ranking", frame("ranking", none, {**none, "responses": []})).height == 0


def test_a_wrong_frame_is_a_bug() -> None:
    """Other columns or types than the kind's are no bad rows: they raise."""
    with pytest.raises(SchemaError):
        problems("sft", frame("sft").with_columns(more=pl.lit(1)))
    with pytest.raises(SchemaError):
        problems("sft", frame("sft").with_columns(response=pl.lit(1)))


def test_every_kind_has_a_model() -> None:
    assert set(ROWS) == set(get_args(Kind))


def test_prompt_id_by_its_formula() -> None:
    """First 16 hex digits of the sha256 of the normalised contents, written out here step by step."""
    messages = [{"role": "system", "content": "Be BRIEF!"}, {"role": "user", "content": "Ｗhat   is\n2+2？"}]
    text = unicodedata.normalize("NFKC", "Be BRIEF! Ｗhat   is\n2+2？").casefold()
    words = " ".join("".join(c if c.isalnum() or c == "_" else " " for c in text).split())
    assert words == "be brief what is 2 2"
    expected = hashlib.sha256(words.encode()).hexdigest()[:16]
    assert prompt_id(messages) == expected
    assert with_prompt_ids(pl.DataFrame({"prompt": [messages]}))["prompt_id"].to_list() == [expected]


def test_cluster_id_is_that_of_the_beginning() -> None:
    """The system message and the first user turn; a column's is the function's, whatever the order of roles."""
    system, user, answer = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    prompts = [[user], [user, answer, user], [system, user], [system, user, answer, user], [answer], []]
    one, two, three, four, *_ = clusters = list(map(cluster_id, prompts))
    assert one == two == prompt_id([user]) and three == four == prompt_id([system, user]) != one
    column = with_prompt_ids(pl.DataFrame({"prompt": prompts}, schema={"prompt": Messages}))
    assert column["cluster"].to_list() == clusters
    assert column["prompt_id"].to_list() == list(map(prompt_id, prompts))


def test_prompts_without_words_keep_apart() -> None:
    """Where normalising leaves nothing, the text itself counts."""
    assert normalise("?!") == normalise("🙂") == ""
    assert prompt_id([{"content": "?!"}]) != prompt_id([{"content": "🙂"}])


def test_ids_of_many_texts_are_those_of_each() -> None:
    """Whatever stands beside a text: other letters, nothing, no words, line ends, spaces at both ends or in a row."""
    plain = [
        "What is 2+2?",
        "  what  IS\t2 , 2 ",
        "",
        "?!",
        "...",
        "a\nb",
        "\n",
        "\x00\x7f",
        "_",
        "so\x1fit",
        "x" * 999,
    ]
    others = ["Straße", "\x80", "？！", "", "🙂", "é", *plain[:5]]
    texts = [text for pair in zip(plain, others, strict=True) for text in pair]
    for some in (texts, plain, ["é", "ß"], ["."], [" ", "."], []):
        assert text_ids(pl.Series(some, dtype=pl.String)).to_list() == list(map(text_id, some))


@pytest.mark.parametrize("size", (1, 2, 3, 100))
def test_alike_misses_no_repetition(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Equal rows are found wherever the slices are cut, as polars has them equal: null is null, and -0.0 is 0.0."""
    monkeypatch.setattr("schemas.rows._SLICE", size)
    numbers = (1.0, -0.0, None, 2.0, 0.0, None)
    table = frame("preference", *({"margin": number} for number in numbers))
    content = ["prompt", "chosen", "margin"]
    assert may_repeat(table, content).to_list() == [False, False, True, True, False, True, True]
    assert may_repeat(table.clear(), content).to_list() == []
