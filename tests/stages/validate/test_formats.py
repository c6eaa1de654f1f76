"""The forms in which rows come: what each turns into, and what each refuses with which reason."""

import math
import time
from typing import Any

import pytest

from schemas.config.data import Kind
from stages.validate.forms.cells import BadRow
from stages.validate.forms.column_advice import fitting_kinds
from stages.validate.forms.formats import parse, to_frame
from stages.validate.forms.rankings import generated, has_cycle

USER, BOT, SYSTEM = (
    {"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "a"), ("system", "s"))
)
PAIR = ["x", "y"]


def reason(kind: Kind, row: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        parse(kind, row)
    return caught.value.column, caught.value.reason


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", (("user", "hi"),)),
        ([USER], (("user", "u"),)),
        ([SYSTEM, USER, BOT, USER], (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u"))),
        ([{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], (("user", "u"), ("assistant", "a"))),
        ("\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: no", (("user", "hi"), ("assistant", "yes?"), ("user", "no"))),
        ("\n\nHuman: hi\n\nAssistant:", (("user", "hi"),)),
        ("Human: hi", (("user", "Human: hi"),)),
    ],
)
def test_prompts(prompt: Any, expected: tuple) -> None:
    """Text, messages under both common names, transcripts with and without their open end."""
    assert parse("prompt", {"prompt": prompt}) == {"prompt": expected}


def test_prompts_that_are_lists_of_texts_are_noted() -> None:
    """Turns that were written down as JSON stay as they are, for they may be what was asked; a file of them shows."""
    kinds: dict[Kind, str] = {"prompt": '["hi"]', "sft": ' ["hi", "more"]', "feedback": '["hi"]'}
    for kind, prompt in kinds.items():
        row = {"prompt": prompt, "response": "a", "label": 1}
        parsed = parse(kind, row)
        assert parsed["prompt"] == (("user", prompt),) and parsed["notes"] == ["prompt_is_a_list"]
    for prompt in ("[]", "[1, 2]", '["hi"', '["hi"] is a list', "[" * 100_000):
        assert "notes" not in parse("prompt", {"prompt": prompt})


def test_prompt_from_other_columns() -> None:
    """The first turn counts, as a list or, in CSV, as JSON; of messages all up to the user's last."""
    for turns in (["hi", "more"], '["hi", "more"]'):
        assert parse("prompt", {"turns": turns}) == {"prompt": (("user", "hi"),)}
    for messages in ([USER, BOT], [USER]):
        assert parse("prompt", {"messages": messages}) == {"prompt": (("user", "u"),)}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("prompt", {}, ("prompt", "missing")),
        ("prompt", {"prompt": None}, ("prompt", "missing")),
        ("prompt", {"prompt": True}, ("prompt", "not_text")),
        ("prompt", {"prompt": 3}, ("prompt", "not_text")),
        ("prompt", {"prompt": {"role": "user"}}, ("prompt", "not_text")),
        ("prompt", {"prompt": []}, ("prompt", "empty")),
        ("prompt", {"prompt": ["hi"]}, ("prompt", "not_a_message")),
        ("prompt", {"prompt": [{"role": "robot", "content": "x"}]}, ("prompt", "unknown_role")),
        ("prompt", {"prompt": [{"role": 1, "content": "x"}]}, ("prompt", "unknown_role")),
        ("prompt", {"prompt": [{"role": "user", "content": True}]}, ("prompt", "not_text")),
        ("prompt", {"prompt": [{"role": "user"}]}, ("prompt", "missing")),
        ("prompt", {"prompt": "\ud800"}, ("prompt", "not_unicode")),
        ("prompt", {"turns": []}, ("turns", "empty")),
        ("prompt", {"turns": "hi"}, ("turns", "not_a_list")),
        ("prompt", {"turns": "[hi"}, ("turns", "malformed_json")),
        ("sft", {"prompt": "p"}, ("response", "missing")),
        ("sft", {"prompt": "p", "response": True}, ("response", "not_text")),
        ("sft", {"prompt": "p", "response": [USER]}, ("response", "no_answer")),
        ("sft", {"messages": [USER]}, ("messages", "no_answer")),
        ("sft", {"messages": [BOT]}, ("messages", "no_answer")),
        ("sft", {"messages": [USER, {"role": "assistant", "content": None}]}, ("messages", "missing")),
        ("feedback", {"prompt": "p", "completion": "c"}, ("label", "missing")),
        ("feedback", {"prompt": "p", "completion": "c", "label": math.nan}, ("label", "not_a_label")),
        ("feedback", {"prompt": "p", "completion": "c", "label": [True]}, ("label", "not_a_label")),
        ("feedback", {"prompt": "p", "completion": 1, "label": True}, ("completion", "not_text")),
        ("preference", {"prompt": "p", "chosen": "a"}, ("rejected", "missing")),
        ("preference", {"prompt": "p", "chosen": True, "rejected": "b"}, ("chosen", "not_text")),
        ("preference", {"chosen": "a", "rejected": "b"}, ("prompt", "missing")),
        ("preference", {"chosen": [USER, BOT], "rejected": [SYSTEM, USER, BOT]}, ("rejected", "prompts_differ")),
        ("preference", {"prompt": "v", "chosen": [USER, BOT], "rejected": "b"}, ("chosen", "prompts_differ")),
        ("preference", {"chosen": [USER], "rejected": [USER, BOT]}, ("chosen", "no_answer")),
        ("preference", {"chosen": "\n\nHuman: u\n\nAssistant: ", "rejected": "b"}, ("chosen", "empty")),
        (
            "preference",
            {"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: v\n\nAssistant: b"},
            ("rejected", "prompts_differ"),
        ),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, ("margin", "not_a_number")),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}, ("margin", "not_a_number")),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}, ("margin", "not_finite")),
        ("preference", {"prompt": "p", "a": "x", "b": "y"}, ("label", "missing")),
        ("ranking", {"prompt": "p", "responses": "x"}, ("responses", "not_a_list")),
        ("ranking", {"prompt": "p", "responses": ["x"], "scores": [1]}, ("responses", "fewer_than_two")),
        ("ranking", {"prompt": "p", "responses": ["x", True], "scores": [1, 2]}, ("responses", "not_text")),
        ("ranking", {"prompt": "p", "responses": ["x", {"model": "m"}], "scores": [1, 2]}, ("responses", "missing")),
        ("ranking", {"prompt": "p", "responses": PAIR}, ("scores", "missing")),
        ("ranking", {"prompt": "p", "responses": PAIR, "scores": [1]}, ("scores", "wrong_number_of_scores")),
        ("ranking", {"prompt": "p", "responses": PAIR, "scores": [1, True]}, ("scores", "not_a_number")),
        ("ranking", {"prompt": "p", "responses": PAIR, "scores": [1, math.nan]}, ("scores", "not_finite")),
        ("ranking", {"prompt": "p", "responses": PAIR, "order": [1, 2]}, ("order", "unknown_answer")),
        ("ranking", {"prompt": "p", "responses": PAIR, "order": [0]}, ("order", "not_a_permutation")),
        ("ranking", {"prompt": "p", "responses": PAIR, "order": [0, 0]}, ("order", "not_a_permutation")),
        ("ranking", {"prompt": "p", "responses": PAIR, "order": [-1, 0]}, ("order", "unknown_answer")),
        ("ranking", {"prompt": "p", "responses": PAIR, "ranks": [1]}, ("ranks", "wrong_number_of_ranks")),
    ],
)
def test_refused(kind: Kind, row: dict[str, Any], expected: tuple[str, str]) -> None:
    """Every row names the column and the reason; JSON `true` is no text and no number."""
    assert reason(kind, row) == expected


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "p", "response": "r"}, (("user", "p"),), "r"),
        ({"prompt": "p", "response": [BOT]}, (("user", "p"),), "a"),
        ({"messages": [SYSTEM, USER, BOT]}, (("system", "s"), ("user", "u")), "a"),
        (
            {"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'},
            (("user", "u"),),
            "a",
        ),
        ({"messages": "\n\nHuman: u\n\nAssistant: a"}, (("user", "u"),), "a"),
        ({"messages": [USER, BOT], "prompt": "p", "response": "r"}, (("user", "p"),), "r"),
    ],
)
def test_sft(row: dict[str, Any], prompt: tuple, response: str) -> None:
    assert parse("sft", row) == {"prompt": prompt, "response": response}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "u", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "u", "chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        {"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: u\n\nAssistant: b"},
        {"prompt": "u", "chosen": BOT, "rejected": {"from": "gpt", "value": "b"}},
    ],
)
def test_preference(row: dict[str, Any]) -> None:
    """All forms of the same pair are the same pair."""
    expected = {"prompt": (("user", "u"),), "chosen": "a", "rejected": "b", "margin": None}
    assert parse("preference", row) == expected
    for margin in (1, "1", 1.0):
        assert parse("preference", {**row, "margin": margin}) == {**expected, "margin": 1.0}


@pytest.mark.parametrize(
    ("label", "spelled"),
    [
        *((label, "true") for label in (True, "TRUE", " True ")),
        *((label, "1") for label in (1, 1.0, "1", "1.0", "+1")),
        *((label, "thumbs_up") for label in ("Thumbs up", "thumbs_up")),
        *((label, "-0.5") for label in (-0.5, "-.5", "-0.50")),
        ("[[A]]", "a"),
    ],
)
def test_labels_have_one_spelling(label: Any, spelled: str) -> None:
    """Whatever a file writes for one label is one label, whose meaning its whole column tells."""
    assert parse("feedback", {"prompt": "p", "response": "c", "label": label})["label"] == spelled


def ranked(row: dict[str, Any]) -> tuple[set[tuple[str, str]], list[str]]:
    """The pairs (better, worse) as texts, and the notes."""
    parsed = parse("ranking", {"prompt": "p", **row})
    texts = parsed["responses"]
    assert len(set(texts)) == len(texts)
    return {(texts[w], texts[x]) for w, x in zip(parsed["winners"], parsed["losers"], strict=True)}, parsed["notes"]


FULL = {("b", "a"), ("b", "c"), ("a", "c")}


@pytest.mark.parametrize(
    "rank",
    [
        {"scores": [2, 3, 1]},
        {"scores": ["2", "3", "1"]},
        {"scores": "[2, 3, 1]"},
        {"order": [1, 0, 2]},
        {"ranks": [2, 1, 3]},
        {
            "comparisons": [
                {"a": 0, "b": 1, "winner": 1},
                {"a": 0, "b": 2, "winner": 0},
                {"a": 2, "b": 1, "winner": "b"},
            ]
        },
    ],
)
def test_rankings_agree(rank: dict[str, Any]) -> None:
    """The same order, told in every way: b before a before c, all K(K-1)/2 = 3 pairs."""
    assert ranked({"responses": ["a", "b", "c"], **rank}) == (FULL, [])


def test_answers_that_nobody_has_ranked() -> None:
    """What was exported to be ranked and came back without is no error."""
    for rank in ({"order": []}, {"scores": None, "comparisons": []}, {"ranks": ""}):
        assert ranked({"responses": PAIR, **rank}) == (set(), ["not_ranked"])


def test_models_stand_for_answers() -> None:
    """Order and comparisons may name the models; a name goes before a side of the same letter."""
    answers = [{"model": name, "text": f"by {name}"} for name in ("m", "n")]
    assert ranked({"responses": answers, "order": ["n", "m"]})[0] == {("by n", "by m")}
    told = [{"a": "m", "b": "n", "winner": "n", "votes": [2, 2]}]
    assert ranked({"responses": answers, "comparisons": told})[0] == {("by n", "by m")}
    crossed = [{"model": name, "text": f"by {name}"} for name in ("a", "b")]
    assert ranked({"responses": crossed, "comparisons": [{"a": "b", "b": "a", "winner": "a"}]})[0] == {("by a", "by b")}


@pytest.mark.parametrize("rank", [{"scores": [1, 1, 0]}, {"order": [[0, 1], 2]}, {"ranks": [1, 1, 2]}])
def test_ties_are_left_out(rank: dict[str, Any]) -> None:
    assert ranked({"responses": ["a", "b", "c"], **rank}) == ({("a", "c"), ("b", "c")}, [])


@pytest.mark.parametrize("winner", [None, "tie", 0, ""])
def test_tied_comparison(winner: Any) -> None:
    """0 is a tie where no answer 0 is compared; between answers 0 and 1 it is the first of them."""
    row = {"responses": ["a", "b", "c"], "comparisons": [{"a": 1, "b": 2, "winner": winner}]}
    assert ranked(row) == (set(), ["all_tied"])
    if winner == 0:
        assert ranked({**row, "comparisons": [{"a": 1, "b": 0, "winner": 0}]})[0] == {("a", "b")}


@pytest.mark.parametrize(
    ("comparison", "why"),
    [
        ({"a": 0, "b": 7, "winner": 0}, "unknown_answer"),
        ({"a": 0, "b": "m", "winner": 0}, "unknown_answer"),
        ({"a": 0, "b": True, "winner": 0}, "unknown_answer"),
        ({"a": 0, "b": 0, "winner": 0}, "compared_with_itself"),
        ({"a": 0, "b": 1, "winner": 2}, "winner_not_compared"),
        ({"a": 0, "b": 1, "winner": True}, "winner_not_compared"),
        ({"a": 0, "b": 1, "winner": [0]}, "winner_not_compared"),
        ({"a": 0, "b": 1}, "not_a_comparison"),
        ({"a": 0, "winner": 0}, "not_a_comparison"),
        ("a > b", "not_a_comparison"),
    ],
)
def test_bad_comparisons(comparison: Any, why: str) -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "comparisons": [comparison]}
    assert reason("ranking", row) == ("comparisons", why)


def test_cycles_and_contradictions_are_noted() -> None:
    """A cycle of three stays and is noted. Of repeated judgements the majority counts; evenly split ones are a tie."""
    cycle = [{"a": i, "b": j, "winner": i} for i, j in ((0, 1), (1, 2), (2, 0))]
    assert ranked({"responses": ["a", "b", "c"], "comparisons": cycle}) == (
        {("a", "b"), ("b", "c"), ("c", "a")},
        ["cycle"],
    )
    votes = [{"a": 0, "b": 1, "winner": winner} for winner in (0, 1, 0)]
    assert ranked({"responses": PAIR, "comparisons": votes}) == ({("x", "y")}, ["contradictory"])
    assert ranked({"responses": PAIR, "comparisons": votes[:2]}) == (set(), ["contradictory", "all_tied"])


def test_identical_answers_become_one() -> None:
    """Scores of equal answers are averaged: mean(1, 4) = 2.5 > 2; comparisons between them say nothing."""
    pairs, notes = ranked({"responses": ["a", "b", " a"], "scores": [1, 2, 4]})
    assert (pairs, notes) == ({("a", "b")}, ["identical_answers"])
    parsed = parse("ranking", {"prompt": "p", "responses": ["a", "b", "a"], "scores": [1, 2, 4]})
    assert parsed["margins"] == [pytest.approx((1 + 4) / 2 - 2)]
    told = [{"a": 0, "b": 2, "winner": 2}, {"a": 1, "b": 2, "winner": 1}]
    assert ranked({"responses": ["a", "b", "a"], "comparisons": told}) == ({("b", "a")}, ["identical_answers"])


def test_averaging_equal_scores_makes_no_pair() -> None:
    """The mean of three times 0.1 may round away from 0.1; a tie has to stay one."""
    assert ranked({"responses": ["a", "a", "a", "b"], "scores": [0.1] * 4})[0] == set()


@pytest.mark.parametrize(
    ("pairs", "cyclic"),
    [
        ([], False),
        ([(0, 1), (1, 2), (0, 2)], False),
        ([(0, 1), (1, 2), (2, 0)], True),
        ([(3, 0), (0, 1), (1, 2), (2, 1)], True),
        ([(0, 1), (2, 1), (3, 1)], False),
    ],
)
def test_has_cycle(pairs: list[tuple[int, int]], cyclic: bool) -> None:
    assert has_cycle(pairs) is cyclic


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_long_chain_of_answers_takes_linear_time(cyclic: bool) -> None:
    """Where time grows with the square of its length this chain takes more than ten minutes."""
    began = time.monotonic()
    assert has_cycle([(place, place + 1) for place in range(100_000)] + [(99_999, 50_000)] * cyclic) is cyclic
    assert time.monotonic() - began < 30


def test_generated_rows_lose_their_empty_answers() -> None:
    """What a model left empty goes, with its scores or comparisons; the rest keeps its order."""
    prompt = [USER]
    parsed = generated({"prompt": prompt, "responses": ["", "b", "c\x00", "d"], "scores": [9, 1, 9, 2]})
    assert (parsed["responses"], parsed["winners"], parsed["losers"]) == (["b", "d"], [1], [0])
    told = [{"a": 0, "b": 1, "winner": 0}, {"a": 1, "b": 2, "winner": 2}]
    parsed = generated({"prompt": prompt, "responses": [" ", "b", "c"], "comparisons": told})
    assert (parsed["responses"], parsed["winners"], parsed["notes"]) == (["b", "c"], [1], ["empty_answers"])
    for row in ({"responses": ["", "b"], "scores": [0, 1]}, {"responses": ["", "b", "c"], "comparisons": told[:1]}):
        parsed = generated({"prompt": prompt, **row})
        assert parsed["winners"] == [] and parsed["notes"] == ["empty_answers", "all_tied"]


def test_fitting_kinds() -> None:
    """What a file's columns can be read as; prompts only where nothing else fits."""
    assert fitting_kinds({"id", "prompt", "response"}) == ["sft"]
    assert fitting_kinds({"prompt", "chosen", "rejected"}) == ["preference"]
    assert fitting_kinds({"prompt", "completion", "label"}) == ["feedback"]
    assert fitting_kinds({"prompt", "responses", "order"}) == ["ranking"]
    assert fitting_kinds({"turns"}) == ["prompt"]
    assert fitting_kinds({"text"}) == []


def test_frame_keeps_messages_in_order() -> None:
    """Prompts of different lengths come out of the flat columns as they went in."""
    prompts = [[USER], [SYSTEM, USER, BOT, USER], [USER]]
    frame = to_frame("prompt", [3, 5, 8], [parse("prompt", {"prompt": prompt}) for prompt in prompts])
    assert frame["prompt"].to_list() == prompts
    assert frame["row"].to_list() == [3, 5, 8]
