"""What a file's columns and keys are read as, what is not read, and what cannot be left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError
from stages.validate import check
from stages.validate.context import Context
from stages.validate.forms.cells import BadRow
from stages.validate.forms.formats import parse
from stages.validate.quarantine import Report
from tests.support.models import given

Rows = list[dict[str, Any]]


def checked(rows: Rows, kind: Kind, folder: Path, log_text: bool = True, **more: Any) -> tuple[Report, Rows]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = ValidateParams(path=str(file), kind=kind, eval_fraction=0, **more)
    report = check(Context(params, log_text=log_text), folder / "out")
    return report, given(folder / "out", "train", kind).sort("row").to_dicts()


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row["prompt"]]


def user(text: str) -> tuple[str, str]:
    return "user", text


# --- columns


@pytest.mark.parametrize(
    ("kind", "row", "prompt"),
    [
        ("sft", {"instruction": "Double it.", "input": "4", "output": "8"}, [user("Double it.\n4")]),
        ("sft", {"instruction": "Sing.", "input": "", "output": "La."}, [user("Sing.")]),
        ("sft", {"instruction": "Name it.", "context": "A cat.", "response": "Cat."}, [user("Name it.\nA cat.")]),
        ("sft", {"question": "Who?", "context": "Bo came.", "answer": "Bo."}, [user("Bo came.\n\nWho?")]),
        (
            "sft",
            {"question": "Who?", "context": ["Al left.", "Bo came."], "answer": "Bo."},
            [user("Al left.\nBo came.\n\nWho?")],
        ),
        ("sft", {"prompt": "Who?", "completion": "Bo."}, [user("Who?")]),
        ("sft", {"system": "Be kind.", "prompt": "Who?", "response": "Bo."}, [("system", "Be kind."), user("Who?")]),
        ("sft", {"system_prompt": None, "question": "Who?", "response": "Bo."}, [user("Who?")]),
        (
            "sft",
            {"instruction": "And?", "input": "", "output": "Bo.", "history": [["Who?", "Al."]], "system": "Be brief."},
            [("system", "Be brief."), user("Who?"), ("assistant", "Al."), user("And?")],
        ),
        (
            "sft",
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Bo."}], "system": "Hm."},
            [("system", "Hm."), user("Who?")],
        ),
        (
            "sft",
            {"conversation": [{"input": "Who?", "output": "Al."}, {"input": "Who?", "output": "Bo."}]},
            [user("Who?"), ("assistant", "Al."), user("Who?")],
        ),
        (
            "preference",
            {"system": "Be kind.", "input": "Who?", "chosen": "Bo.", "rejected": "No.", "order": ["chosen"]},
            [("system", "Be kind."), user("Who?")],
        ),
        (
            "feedback",
            {"instruction": "Double it.", "input": "4", "output": "8", "kto_tag": True},
            [user("Double it.\n4")],
        ),
        ("ranking", {"query": "Who?", "candidates": ["Bo.", "No."], "scores": [1, 0]}, [user("Who?")]),
        ("prompt", {"system": "Be kind.", "question": "Who?"}, [("system", "Be kind."), user("Who?")]),
    ],
)
def test_prompts_from_several_columns(kind: Kind, row: dict[str, Any], prompt: list, tmp_path: Path) -> None:
    """Columns under their usual names, and what stands around a prompt, are all of it read."""
    report, [written] = checked([row], kind, tmp_path)
    assert said(written) == prompt
    if "response" in written:
        assert written["response"] in ("8", "La.", "Cat.", "Bo.")
    assert set(report.unused) <= {"order"}


def test_mapped_columns_keep_what_stands_around_them(tmp_path: Path) -> None:
    """An instruction has its input, whoever maps it; other columns can be mapped as what they are."""
    mapped = {"prompt": "instruction", "response": "output"}
    row = {"instruction": "Double it.", "input": "4", "output": "8", "topic": "sums", "preamble": "Be exact."}
    report, [written] = checked([row], "sft", tmp_path, columns=mapped)
    assert said(written) == [user("Double it.\n4")]
    assert report.unused == {"preamble": "Be exact.", "topic": "sums"}
    _, [written] = checked([row], "sft", tmp_path, columns={**mapped, "system": "preamble", "input": "topic"})
    assert said(written) == [("system", "Be exact."), user("Double it.\nsums")]


def test_unused_columns_are_listed_with_an_example(tmp_path: Path) -> None:
    """The first value that says something; names of ours that another column took, and idle ones, among them."""
    rows = [
        {"prompt": "p", "question": f"q{i}", "response": f"r{i}", "messages": [], "id": None if i < 2 else i}
        for i in range(4)
    ]
    report, written = checked(rows, "sft", tmp_path, columns={"prompt": "question"})
    assert report.unused == {"id": "2", "messages": None, "prompt": "p"}
    assert said(written[3]) == [user("q3")]
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "label": "b"} for i in range(2)]
    assert checked(pairs, "preference", tmp_path)[0].unused == {"label": "b"}
    hidden, _ = checked(rows, "sft", tmp_path, log_text=False, columns={"prompt": "question"})
    assert "2" not in json.dumps(hidden.unused) and not {"id", "p"} & hidden.unused.keys()


@pytest.mark.parametrize("better, worse", [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")])
def test_scores_that_contradict_the_verdict(better: str, worse: str, tmp_path: Path) -> None:
    """Three rows of six say so: equal scores, and a missing one, do not."""
    scores = [(8.0, 3.0), (3.0, 8), (5, 5), (None, 2.0), (1, 1.5), (-2, -1)]
    rows = [
        {"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No.", better: high, worse: low}
        for i, (high, low) in enumerate(scores)
    ]
    report, written = checked(rows, "preference", tmp_path)
    assert report.notes["scores_contradict"] == 3 and [row["chosen"] for row in written] == ["So."] * 6
    assert f"`{better}` and `{worse}`: held against the verdict" in report.read and not report.unused


def test_keys_of_messages_are_listed(tmp_path: Path) -> None:
    spoken = [
        {"role": "user", "content": "Who?", "name": "Al", "id": None},
        {"role": "assistant", "content": "Bo.", "reasoning_content": "Hm."},
    ]
    report, _ = checked([{"messages": spoken}], "sft", tmp_path)
    assert report.unused == {"messages[].name": "Al", "messages[].reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": "hammer"}, "broken_tools"),
        ({"tools": {"name": "price"}}, "tools_not_a_list"),
        ({"tools": [{"name": "price"}], "functions": [{"name": "price"}]}, "two_lists_of_tools"),
        ({"images": ["a.png"]}, "has_image"),
        ({"audio": {"path": "a.wav"}}, "has_audio"),
        (
            {
                "system": "Be rude.",
                "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "u"}],
            },
            "two_system_messages",
        ),
        ({"history": "what was said"}, "not_a_list"),
    ],
)
def test_rows_that_mean_something_else_without_a_column(more: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """They are put aside; the rows in which the column is empty stay."""
    empty = {name: None for name in more if name != "prompt"}
    rows = [{"prompt": "u", "response": f"r{i}", **empty} for i in range(3)]
    report, _ = checked([*rows, {"prompt": "u", "response": "x", **more}], "sft", tmp_path, max_bad=0.5)
    assert (report.kept, report.reasons) == (3, {reason: 1})


# --- messages


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    "spoken",
    [
        [message("prompter", "u"), message("model", "a")],
        [message("Human", "u"), message("chatgpt", "a")],
        [message("system", ""), message("user", "u"), message("bot", "a")],
        [message("system", None), message("user", "u"), message("assistant", "a")],
        [message("developer", "  \n"), message("user", "u"), message("assistant", "a")],
        [{"from": "human", "value": "u", "role": None, "content": None}, {"from": "gpt", "value": "a", "role": None}],
        [message("user", [{"type": "text", "text": "u"}]), message("assistant", ["a"])],
        [message("user", [{"type": "input_text", "text": "u", "image_url": None}]), message("assistant", "a")],
        [message("user", "u", weight=0), message("assistant", "a", weight=1, tool_calls=[])],
        [message("user", "u", train=False), message("assistant", "a", train=True)],
    ],
)
def test_messages_in_other_spellings(spoken: Rows) -> None:
    assert parse("sft", {"messages": spoken}) == {"prompt": (user("u"),), "response": "a"}


def test_lists_within_an_object() -> None:
    """So `datasets` hands out a sequence of features: one list for each key."""
    spoken = {"role": ["user", "assistant"], "content": ["u", "a"]}
    assert parse("sft", {"messages": spoken}) == {"prompt": (user("u"),), "response": "a"}
    answers = {"text": ["x", "y"], "score": [1, 2]}
    assert parse("ranking", {"prompt": "p", "responses": answers})["winners"] == [1]
    with pytest.raises(BadRow, match="not_text"):
        parse("sft", {"messages": {"role": ["user", "assistant"], "content": ["u"]}})


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Look:"}, {"type": "text", "text": "a cat"}]
    assert parse("prompt", {"prompt": [message("user", parts)]}) == {"prompt": (user("Look:\na cat"),)}


def test_what_stands_beside_a_conversation_is_said(tmp_path: Path) -> None:
    """Also where columns have the names by which we call them; `tools` are nothing but tools."""
    rest = {"output": "Bo.", "history": [["Who?", "Al."]], "system": "Be brief."}
    row = {"instruction": "And?", "input": "Now.", **rest, "tools": [{"name": "sky"}]}
    report, _ = checked([row], "sft", tmp_path)
    assert [what for what in report.read if " as " in what] == [
        "`instruction` as prompt",
        "`output` as response",
        "`system` as the system message",
        "`input` as part of the prompt",
        "`history` as earlier turns",
    ]


@pytest.mark.parametrize(
    ("bad", "reason", "value"),
    [
        (message("user", [{"type": "image_url", "image_url": {"url": "x"}}]), "has_image", None),
        (message("user", [{"type": "input_audio", "input_audio": {}}]), "has_audio", None),
        (message("user", [{"type": "poem", "text": "x"}]), "unknown_part", None),
        (message("user", [{"type": "tool_result", "content": "x"}]), "tools", None),
        (message("user", []), "empty", []),
        (message("tool", "x"), "result_without_call", "x"),
        (message("ghost", "x"), "unknown_role", "ghost"),
        (message("assistant", "x", tool_calls=[{"id": "1"}]), "not_a_tool_call", {"id": "1"}),
        (message("assistant", None, function_call={"title": "f"}), "not_a_tool_call", {"title": "f"}),
        (message("assistant", "x", weight=0), "not_learned", "x"),
        (message("assistant", "x", loss=0.5), "unknown_weight", 0.5),
    ],
)
def test_messages_that_are_not_read(bad: dict[str, Any], reason: str, value: Any) -> None:
    with pytest.raises(BadRow) as caught:
        parse("sft", {"messages": [message("user", "u"), bad]})
    assert caught.value.reason == reason
    assert value is None or caught.value.value == value


TALK = [message("user", "u"), message("assistant", "a"), message("user", "v")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("u", [user("u"), ("assistant", "a"), user("v")]),
        (" v\n", [user("u"), ("assistant", "a"), user("v")]),
        (TALK[:1], [user("u"), ("assistant", "a"), user("v")]),
        ([message("system", "s"), *TALK], [("system", "s"), user("u"), ("assistant", "a"), user("v")]),
        ([message("user", "before"), message("assistant", "b"), *TALK], None),
    ],
)
def test_prompts_beside_whole_conversations(prompt: Any, expected: list | None) -> None:
    """The conversation counts where `prompt` is a part of it, and `prompt` where it holds more."""
    sides = {side: [*TALK, message("assistant", side)] for side in ("chosen", "rejected")}
    parsed = parse("preference", {"prompt": prompt, **sides})["prompt"]
    assert list(parsed) == (expected or [user("before"), ("assistant", "b"), user("u"), ("assistant", "a"), user("v")])
    with pytest.raises(BadRow, match="prompts_differ"):
        parse("preference", {"prompt": "something else", **sides})


# --- what is said


def test_refusals_name_what_was_found(tmp_path: Path) -> None:
    """The value, what is allowed, and the mapping to type."""
    with pytest.raises(StageError) as caught:
        checked([{"messages": [message("ghost", "x")]}] * 3, "sft", tmp_path)
    assert "unknown_role (3), such as 'ghost'" in str(caught.value) and "prompter" in str(caught.value)
    rows = [{"prompt": f"p{i}", "response": {"id": 1}, "reply": "r"} for i in range(3)]
    with pytest.raises(StageError) as caught:
        checked(rows, "sft", tmp_path)
    assert "or map another column (`--columns response=NAME`: reply)" in str(caught.value)
    assert checked(rows, "sft", tmp_path, columns={"response": "reply"})[0].kept == 3
    with pytest.raises(StageError) as caught:
        checked([{"messages": [message("ghost", "x")]}] * 3, "sft", tmp_path, log_text=False)
    assert "ghost" not in str(caught.value)


def test_lengths(tmp_path: Path) -> None:
    """Characters of prompt and answer: of the sums 2, 3, ..., 21 the median is 11 or 12, and 95 % are at most 20."""
    rows = [{"prompt": "p", "response": "r" * n} for n in range(1, 21)]
    lengths = checked(rows, "sft", tmp_path)[0].lengths
    assert lengths is not None and lengths.unit == "characters"
    assert lengths.median in (11, 12) and lengths.p95 == 20 and lengths.longest == 21
