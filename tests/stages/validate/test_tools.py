"""Tools, calls and results in rows: what is read as what, what is refused by name, and what reaches the template."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.config.data import DERIVES, Kind, ValidateParams
from schemas.conversation import extra_of, opened
from schemas.rows import cluster_id, prompt_id
from stages.engine.data.codec import Codec
from stages.engine.data.examples import encode, encode_sft, read
from stages.validate import check
from stages.validate.context import Context
from stages.validate.quarantine import Report
from tests.support.chat_templates import ENDS, template, tokenizer
from tests.support.models import given

Rows = list[dict[str, Any]]

FUNCTION = {"name": "sky", "description": "Its colour", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": {"at": "noon", "in": 3}}}
WRITTEN = {**CALL, "function": {"name": "sky", "arguments": json.dumps(CALL["function"]["arguments"])}}  # type: ignore[index]


def user(content: str = "hello") -> dict[str, Any]:
    return {"role": "user", "content": content}


def calls(*given: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(given), **more}


def result(content: str = "blue", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def answer(content: str = "It flew.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = [user(), calls(CALL), result(tool_call_id="c1"), answer()]


def codec(style: str = "Qwen") -> Codec:
    return Codec(tokenizer(template(style, False), ENDS[style]))


def checked(
    rows: Rows, folder: Path, kind: Kind = "sft", reader: Codec | None = None, **params: Any
) -> tuple[Report, dict[int, tuple[str, str]]]:
    """The report, and row -> (column, reason) of the quarantine."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"path": str(file), "kind": kind, "eval_fraction": 0, "max_bad": 1, **params}
    try:
        report = check(Context(ValidateParams(**settings), reader), folder / "data")
    finally:
        lines = (folder / "data" / "quarantine.jsonl").read_text().splitlines()
    return report, {entry["row"]: (entry["column"], entry["reason"]) for entry in map(json.loads, lines)}


GOOD = {"messages": [user("sat?"), answer("No")]}
"""A plain row beside the others, so that something is left."""


def written(row: dict[str, Any], folder: Path, kind: Kind = "sft", **params: Any) -> dict[str, Any]:
    """The row as training reads it."""
    _, bad = checked([row, GOOD if kind == "sft" else row], folder, kind, **params)
    assert 0 not in bad, bad
    return read(folder / "data", "train", kind)[0]


# --- forms ---

SPELLINGS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": [user(), calls(WRITTEN), result(tool_call_id="c1"), answer()], "tools": TOOLS},
    "objects": {"messages": TALK, "tools": TOOLS},
    "text beside it is empty": {"messages": [user(), calls(CALL, content=""), *TALK[2:]], "tools": TOOLS},
    "no text beside it": {
        "messages": [user(), {"role": "assistant", "tool_calls": [CALL]}, *TALK[2:]],
        "tools": TOOLS,
    },
    "a blank text beside it": {"messages": [user(), calls(CALL, content=" \n"), *TALK[2:]], "tools": TOOLS},
    "no calls as JSON": {
        "messages": [{**user(), "tool_calls": "[]"}, *TALK[1:3], answer(tool_calls="[]", function_call="null")],
        "tools": TOOLS,
    },
    "tools as JSON": {"messages": TALK, "tools": json.dumps(TOOLS)},
    "bare functions": {"messages": TALK, "tools": json.dumps([FUNCTION])},
    "column `functions`": {"messages": TALK, "functions": [FUNCTION]},
    "calls as JSON": {
        "messages": [user(), {**calls(), "tool_calls": json.dumps([WRITTEN])}, *TALK[2:]],
        "tools": TOOLS,
    },
    "messages as JSON": {"messages": json.dumps(TALK), "tools": TOOLS},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_conversation(name: str, tmp_path: Path) -> None:
    row = written(SPELLINGS[name], tmp_path)
    assert opened(row["prompt"]) == (
        [user(), {"role": "assistant", "content": "", "tool_calls": [CALL]}, result(tool_call_id="c1")],
        TOOLS,
    )
    assert (row["response"], row.get("calls")) == ("It flew.", None)


@pytest.mark.parametrize(
    ("messages", "called", "named"),
    [
        (
            [
                user(),
                {"role": "assistant", "content": None, "function_call": {"name": "sky", "arguments": "{}"}},
                {"role": "function", "name": "sky", "content": "blue"},
                answer(),
            ],
            {"name": "sky", "arguments": {}},
            {"name": "sky"},
        ),
        (
            [
                {"from": "human", "value": "hello"},
                {"from": "function_call", "value": json.dumps(FUNCTION | {"arguments": {"x": 1}})},
                {"from": "observation", "value": "blue"},
                {"from": "gpt", "value": "It flew."},
            ],
            {"name": "sky", "arguments": {"x": 1}},
            {},
        ),
        (
            [user(), calls({"name": "sky", "arguments": ""}), result(), answer()],
            {"name": "sky", "arguments": {}},
            {},
        ),
        (
            [
                user(),
                {"role": "tool_call", "content": '{"name": "sky", "arguments": {"x": 1}}'},
                {"role": "tool_response", "content": "blue"},
                answer(),
            ],
            {"name": "sky", "arguments": {"x": 1}},
            {},
        ),
        (
            [user(), calls({"name": "sky", "parameters": {"x": 1}}), result(), answer()],
            {"name": "sky", "arguments": {"x": 1}},
            {},
        ),
        (
            [
                user(),
                calls({"index": 0, "function": {"name": "sky", "arguments": "", "parameters": '{"x": 1}', "args": ""}}),
                result(),
                answer(),
            ],
            {"name": "sky", "arguments": {"x": 1}},
            {},
        ),
    ],
    ids=[
        "older OpenAI",
        "ShareGPT",
        "bare call without arguments",
        "roles of calls and responses",
        "Llama 3",
        "Llama 3 as JSON, from a table with the keys of all",
    ],
)
def test_other_forms(messages: Rows, called: dict, named: dict, tmp_path: Path) -> None:
    row = written({"messages": messages, "tools": TOOLS}, tmp_path)
    chat, tools = opened(row["prompt"])
    assert tools == TOOLS and [call["function"] for call in chat[1]["tool_calls"]] == [called]
    assert chat[2] == {"role": "tool", "content": "blue", **named}


def test_a_system_message_and_tools_of_columns_of_their_own(tmp_path: Path) -> None:
    """The tools stand on the first message, whichever that is; `--columns tools=NAME` names their column."""
    row = written({"system": "Be kind", "messages": TALK, "mine": TOOLS}, tmp_path, columns={"tools": "mine"})
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "tool"]
    assert extra_of(row["prompt"][0]) == {"tools": TOOLS} and row["prompt"][1] == user()


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("preference", {"chosen": "It flew.", "rejected": "No"}),
        ("feedback", {"completion": "It flew.", "label": True}),
        ("ranking", {"responses": ["It flew.", "No"], "order": [0, 1]}),
        ("prompt", {}),
    ],
)
def test_tools_before_judged_answers(kind: Kind, rest: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": TALK[:3], "tools": TOOLS, **rest}
    made = written(row, tmp_path, kind)
    assert opened(made["prompt"])[1] == TOOLS and made["prompt"][2]["role"] == "tool"
    assert codec().render(made["prompt"]).endswith("\nblue\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    if kind == "preference":  # what is derived from it keeps them
        for derived in ("sft", "feedback", "ranking", "prompt"):
            assert read(tmp_path / "data", "train", derived)[0]["prompt"] == made["prompt"]
    [example] = encode([made], lambda _: ["No"], codec())[:1]
    assert example.tree.prompt == tuple(codec().prompt(made["prompt"]))


def test_plain_rows_beside_tools_stay_plain(tmp_path: Path) -> None:
    """A file with both: rows without tools are read without an extra, and have the ids that they have alone."""
    checked([{"messages": TALK, "tools": TOOLS}, GOOD], tmp_path / "both")
    checked([GOOD], tmp_path / "alone")
    both, alone = (read(tmp_path / name / "data", "train", "sft")[-1] for name in ("both", "alone"))
    assert both["prompt"] == alone["prompt"] == [user("sat?")]
    assert (both["prompt_id"], both["cluster"]) == (alone["prompt_id"], alone["cluster"])
    table = given(tmp_path / "alone" / "data", "train", "sft")
    assert table.columns == ["row", "prompt", "prompt_id", "cluster", "response"]


def test_tools_are_part_of_a_prompts_id_and_not_of_its_cluster(tmp_path: Path) -> None:
    """The same question with other tools is another prompt, on the same side of the split."""
    rows = [{"prompt": "hello", "tools": tools} for tools in (TOOLS, [], [{**FUNCTION, "name": "sea"}])]
    checked(rows, tmp_path, "prompt")
    found = read(tmp_path / "data", "train", "prompt")
    assert len({row["prompt_id"] for row in found}) == 3 and len({row["cluster"] for row in found}) == 1
    for row in found:
        assert (row["prompt_id"], row["cluster"]) == (prompt_id(row["prompt"]), cluster_id(row["prompt"]))


def test_weights_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    """What a model is asked is the same with them: the same ids, one prompt. Only kind `sft` keeps them. An argument of
    that name is no weight.
    """
    weighs = {**CALL, "function": {"name": "sky", "arguments": {"weight": 0}}}
    other = {**CALL, "function": {"name": "sky", "arguments": {}}}
    talks = [
        [user(), calls(call, content="so", **weight), *TALK[2:]]
        for call, weight in ((CALL, {}), (CALL, {"weight": 0}), (weighs, {}), (weighs, {"weight": 0}), (other, {}))
    ]
    plain = [[user("sat?"), answer("No", **weight), user(), answer()] for weight in ({"weight": 0}, {})]
    checked([{"messages": talk} for talk in talks + plain], tmp_path, learn="all")
    rows, asked = (read(tmp_path / "data", "train", kind) for kind in ("sft", "prompt"))
    ids = [row["prompt_id"] for row in rows]
    assert ids == [prompt_id(row["prompt"]) for row in rows]
    assert ids[0] == ids[1] and ids[2] == ids[3] and ids[5] == ids[6] and len(set(ids)) == 4
    assert ids[5] == prompt_id(plain[1][:3])
    assert [[extra_of(message).get("weight") for message in row["prompt"]][1] for row in rows] == [
        *[None, 0, None, 0, None],
        *[0, None],
    ]
    assert [row["prompt"] for row in asked] == [rows[place]["prompt"] for place in (0, 2, 4, 6)]


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("preference", {"chosen": "It flew.", "rejected": "No"}),
        ("feedback", {"completion": "It flew.", "label": True}),
        ("ranking", {"responses": ["It flew.", "No"], "order": [0, 1]}),
    ],
)
def test_no_judged_row_has_weights(kind: Kind, rest: dict[str, Any], tmp_path: Path) -> None:
    prompt = [user(), answer("No", weight=0), user("sat?")]
    checked([{"prompt": prompt, **rest}], tmp_path, kind, learn="all")
    names: list[Any] = list(DERIVES[kind])
    for name in names:
        [row] = given(tmp_path / "data", "train", name).to_dicts()[:1]
        assert any(map(extra_of, row["prompt"])) == (name == "sft"), name


# --- tokens ---


def test_a_call_as_the_answer_to_its_tokens(tmp_path: Path) -> None:
    """The row's table holds the call; its tokens are those that the template writes behind the generation prompt."""
    own = codec()
    checked([{"messages": TALK[:2], "tools": TOOLS}, GOOD], tmp_path, reader=own)
    rows = read(tmp_path / "data", "train", "sft")
    assert (rows[0]["response"], json.loads(rows[0]["calls"])) == ("", [CALL])
    first, plain = (example.tree for example in encode_sft(rows, "last", own))
    text = '<tool_call>\n{"name": "sky", "arguments": {"at": "noon", "in": 3}}\n</tool_call>'
    assert first.answers == ((*own.encode_all([text])[0], own.end_id),)
    assert first.prompt == tuple(own.prompt(rows[0]["prompt"]))
    assert plain.answers == (tuple(own.answer("No")),)


def test_a_template_without_tools_refuses_their_rows_alone(tmp_path: Path) -> None:
    """Zephyr's style writes calls and results, and no tools."""
    rows = [{"messages": TALK, "tools": TOOLS}, {"messages": TALK}, GOOD]
    report, bad = checked(rows, tmp_path, reader=codec("Zephyr"))
    assert bad == {0: ("prompt", "tools_left_out")}
    entry = json.loads((tmp_path / "data" / "quarantine.jsonl").read_text())
    assert entry["value"] == "the chat template leaves out tools"
    assert report.notes == {"calls_without_tools": 1}


def test_a_call_as_the_answer_that_the_template_leaves_out(tmp_path: Path) -> None:
    poor = Codec(tokenizer(template("Qwen", False).replace("m.tool_calls or []", "[]"), "<|im_end|>"))
    _, bad = checked([{"messages": TALK[:2], "tools": TOOLS}, GOOD], tmp_path, reader=poor)
    assert bad == {0: ("response", "tools_left_out")}


def test_a_call_that_is_too_long(tmp_path: Path) -> None:
    own = codec()
    length = len(encode_sft([written({"messages": TALK[:2]}, tmp_path / "a")], "last", own)[0].tree.answers[0])
    prompt = len(own.prompt(TALK[:1]))
    for room, expected in ((length + prompt, {}), (length + prompt - 1, {0: ("response", "too_long")})):
        _, bad = checked([{"messages": TALK[:2]}, GOOD], tmp_path / str(room), reader=own, max_length=room)
        assert bad == expected


def test_earlier_calls_that_cannot_be_learned_are_put_aside(tmp_path: Path) -> None:
    """A generation prompt that opens a thought: an earlier text is learned apart, an earlier call cannot be. What
    `validate` keeps, training tokenizes.
    """
    plain = "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    assert template("Qwen", False).endswith(plain)
    opens = template("Qwen", False).replace(plain, plain.replace("assistant\\n", "assistant\\n<think>\\n"))
    own = Codec(tokenizer(opens, ENDS["Qwen"]))
    spoken = [user("sat?"), answer("No"), user("how?"), answer("It flew.")]
    unlearned = [user("you?"), calls(CALL, weight=0), *TALK[2:]]
    rows = [{"messages": TALK, "tools": TOOLS}, {"messages": spoken}, {"messages": unlearned, "tools": TOOLS}]
    report, bad = checked(rows, tmp_path / "all", reader=own, learn="all")
    assert bad == {0: ("prompt", "template_refuses")} and report.noted == {"turns_learned_apart": [1]}
    assert len(encode_sft(read(tmp_path / "all" / "data", "train", "sft"), "all", own)) == 3
    assert checked(rows, tmp_path / "last", reader=own, learn="last")[1] == {}


def test_that_tools_and_calls_were_read_is_said(tmp_path: Path) -> None:
    """Whoever does not know that the file has them learns it, and nobody thinks them dropped."""
    shown, written = (
        "tools: shown by the model's template",
        "tool calls: the assistant's, written by the model's template",
    )
    several = {
        "both": ([{"messages": TALK, "tools": TOOLS}], [shown, written]),
        "calls": ([{"messages": TALK}], [written]),
        "answer": ([{"prompt": "hello", "response": "It flew.", "tools": TOOLS}], [shown]),
        "neither": ([{"messages": [user(), answer()], "tools": []}], []),
    }
    for name, (rows, said) in several.items():
        assert checked(rows, tmp_path / name)[0].read == said, name


def test_odd_calls_are_noted(tmp_path: Path) -> None:
    other = {**CALL, "function": {"name": "sea", "arguments": {}}}
    rows = [
        {"messages": [user(f"{i}"), calls(call), result(), answer()], "tools": tools}
        for i, (call, tools) in enumerate([(CALL, TOOLS), (other, TOOLS), (CALL, None)])
    ]
    report, bad = checked([*rows, {"messages": [user("4"), calls(other)], "tools": TOOLS}], tmp_path)
    assert bad == {} and report.noted == {"unknown_tool": [1, 3], "calls_without_tools": [2]}


def test_calls_that_stand_in_the_answers_text_are_noted(tmp_path: Path) -> None:
    """They are learned as they are spelled, which is right for a template that spells them so alone."""
    spelled = '<tool_call>\n{"name": "sky"}\n</tool_call>'
    rows = [{"messages": [user(), answer(spelled)], "tools": TOOLS}, {"messages": [user("you?"), answer(spelled)]}]
    report, bad = checked(rows, tmp_path)
    assert bad == {} and report.noted == {"looks_like_calls": [0]}


# --- what is refused ---

BAD: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "calls as broken JSON": (
        {"messages": [user(), {**calls(), "tool_calls": '[{"name": '}]},
        ("messages", "broken_tool_calls"),
    ),
    "calls that are a number": ({"messages": [user(), {**calls(), "tool_calls": 3}]}, ("messages", "not_a_tool_call")),
    "calls without a name": (
        {"messages": [user(), calls({"function": {"arguments": {}}})]},
        ("messages", "not_a_tool_call"),
    ),
    "a call of another type": (
        {"messages": [user(), calls({"type": "code", "name": "sky"})]},
        ("messages", "not_a_tool_call"),
    ),
    "an id that is a number": ({"messages": [user(), calls({**CALL, "id": 7})]}, ("messages", "not_a_tool_call")),
    "arguments as broken JSON": (
        {"messages": [user(), calls({"name": "sky", "arguments": '{"at": '})]},
        ("messages", "broken_arguments"),
    ),
    "arguments that are NaN": (
        {"messages": [user(), calls({"name": "sky", "arguments": '{"at": NaN}'})]},
        ("messages", "broken_arguments"),
    ),
    "arguments nested without end": (
        {"messages": [user(), calls({"name": "sky", "arguments": "[" * 100_000})]},
        ("messages", "broken_arguments"),
    ),
    "arguments that are a list": (
        {"messages": [user(), calls({"name": "sky", "arguments": [1]})]},
        ("messages", "arguments_not_an_object"),
    ),
    "arguments that are JSON of a number": (
        {"messages": [user(), calls({"name": "sky", "arguments": "3"})]},
        ("messages", "arguments_not_an_object"),
    ),
    "arguments under another name": (
        {"messages": [user(), calls({"name": "sky", "args": {"at": "noon"}})]},
        ("messages", "unknown_key_of_a_call"),
    ),
    "arguments under another name within": (
        {"messages": [user(), calls({"function": {"name": "sky", "input": "noon"}})]},
        ("messages", "unknown_key_of_a_call"),
    ),
    "arguments beside the function": (
        {"messages": [user(), calls({"arguments": {"at": "noon"}, "function": {"name": "sky"}})]},
        ("messages", "unknown_key_of_a_call"),
    ),
    "a tool where its call belongs": (
        {"messages": [user(), calls(FUNCTION)]},
        ("messages", "unknown_key_of_a_call"),
    ),
    "parameters that are a list": (
        {"messages": [user(), calls({"name": "sky", "parameters": [1]})]},
        ("messages", "arguments_not_an_object"),
    ),
    "half a character in an argument": (
        {"messages": [user(), calls({"name": "sky", "arguments": {"at": "\ud83d"}})]},
        ("messages", "not_unicode"),
    ),
    "calls of the user": (
        {"messages": [{**user(), "tool_calls": [CALL]}, answer()]},
        ("messages", "calls_of_another_role"),
    ),
    "neither a text nor calls": (
        {"messages": [user(), {"role": "assistant", "tool_calls": "[]"}]},
        ("messages", "missing"),
    ),
    "tools in a message without a text": (
        {"messages": [user(), {"role": "assistant", "tools": TOOLS}]},
        ("messages", "tools_in_a_message"),
    ),
    "both kinds of calls": (
        {"messages": [user(), calls(CALL, function_call={"name": "sky"})]},
        ("messages", "two_kinds_of_calls"),
    ),
    "a result without a call": ({"messages": [user(), result(), answer()]}, ("messages", "result_without_call")),
    "a result behind an answer": (
        {"messages": [user(), answer(), result(), answer()]},
        ("messages", "result_without_call"),
    ),
    "more results than calls": (
        {"messages": [user(), calls(CALL), result(), result(), answer()]},
        ("messages", "result_without_call"),
    ),
    "fewer results than calls": (
        {"messages": [user(), calls(CALL, CALL), result(), answer()]},
        ("messages", "call_without_result"),
    ),
    "a call without a result": (
        {"messages": [user(), calls(CALL), user(), answer()]},
        ("messages", "call_without_result"),
    ),
    "a result of another call": (
        {"messages": [user(), calls(CALL), result(tool_call_id="c2"), answer()]},
        ("messages", "result_of_another_call"),
    ),
    "a result whose id is a list": (
        {"messages": [user(), calls(CALL), result(tool_call_id=["c1"]), answer()]},
        ("messages", "not_a_tool_result"),
    ),
    "calls within a text": (
        {"messages": [user(), answer('<tool_call>\n{"name": "sky"}\n</tool_call>'), result(), answer()]},
        ("messages", "calls_in_text"),
    ),
    "a conversation that ends with a result": ({"messages": TALK[:3]}, ("messages", "no_answer")),
    "tools that are not a list": ({"messages": TALK, "tools": {"sky": FUNCTION}}, ("tools", "tools_not_a_list")),
    "tools as broken JSON": ({"messages": TALK, "tools": "[{"}, ("tools", "broken_tools")),
    "tools that are names": ({"messages": TALK, "tools": ["sky"]}, ("tools", "broken_tools")),
    "tools without a name": (
        {"messages": TALK, "tools": [{"type": "function", "function": {}}]},
        ("tools", "not_a_tool"),
    ),
    "tools whose parameters are a text": (
        {"messages": TALK, "tools": [{"name": "sky", "parameters": "none"}]},
        ("tools", "not_a_tool"),
    ),
    "fewer results than calls at the end": (
        {"messages": [user(), calls(CALL, CALL), result()]},
        ("messages", "call_without_result"),
    ),
    "tools in a message": (
        {"messages": [{"role": "system", "content": "Be kind", "tools": TOOLS}, *TALK]},
        ("messages", "tools_in_a_message"),
    ),
    "a weight that is a text": ({"messages": [user(), answer(weight="0")]}, ("messages", "unknown_weight")),
    "half a weight": ({"messages": [user(), answer(weight=0.5)]}, ("messages", "unknown_weight")),
    "nothing to learn": ({"messages": [user(), answer(weight=0)]}, ("messages", "not_learned")),
    "a blank answer": ({"messages": [*TALK[:3], answer("")], "tools": TOOLS}, ("response", "empty")),
    "a blank question": ({"messages": [user(""), *TALK[1:]], "tools": TOOLS}, ("prompt", "empty")),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_rows(name: str, tmp_path: Path) -> None:
    """Each is put aside by name, with a fix, and nothing else is."""
    row, expected = BAD[name]
    report, bad = checked([row, GOOD], tmp_path)
    assert bad == {0: expected} and report.kept == 1


def test_every_reason_has_a_fix() -> None:
    from stages.validate.verdict import _ALLOWED

    named = {reason for _, (_, reason) in BAD.values()} | {"tools_left_out", "answer_is_a_call", "two_lists_of_tools"}
    assert named - {"empty", "missing"} <= _ALLOWED.keys()


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("preference", {"chosen": TALK[:2], "rejected": [user(), answer("No")]}),
        ("feedback", {"messages": TALK[:2], "label": True}),
    ],
)
def test_calls_as_judged_answers_are_refused(kind: Kind, row: dict[str, Any], tmp_path: Path) -> None:
    plain = (
        {"prompt": "sat?", "chosen": "No", "rejected": "It"}
        if kind == "preference"
        else {"prompt": "sat?", "completion": "No", "label": True}
    )
    _, bad = checked([row, plain], tmp_path, kind)
    assert bad == {0: ("chosen" if kind == "preference" else "messages", "answer_is_a_call")}


def call_of(text: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": {"at": text}}}


def test_what_cannot_be_seen_is_noted_in_calls_too(tmp_path: Path) -> None:
    """A mark that turns text around, and a control, which JSON writes as an escape; before the answer and as it."""
    rows = [
        {"messages": [user("a"), calls(call_of("no\u202eon")), result(), answer()], "tools": TOOLS},
        {"messages": [user("b"), calls(call_of("no\x07on")), result(), answer()], "tools": TOOLS},
        {"messages": [user("c"), calls(call_of("no\u202eon"))], "tools": TOOLS},
        {"messages": [user("d"), calls(call_of("no\x1bon"))], "tools": TOOLS},
        {"messages": [user("e"), calls(call_of("noon\tu0007 \\u0007"))], "tools": TOOLS},
        {"messages": [user("f"), calls(call_of("noon")), result(), answer()], "tools": TOOLS},
    ]
    report, bad = checked(rows, tmp_path)
    assert not bad and report.notes["hidden_characters"] == 4


def test_answers_that_call_something_else_are_no_look_alikes(tmp_path: Path) -> None:
    rows = [{"messages": [user(), calls(call_of(at))], "tools": TOOLS} for at in ("noon", "night")]
    report, bad = checked(rows, tmp_path)
    assert not bad and "look_alike" not in report.notes


def test_calls_count_where_characters_tell_that_a_row_is_too_long(tmp_path: Path) -> None:
    """Without a tokenizer; at most 16 characters a token, so that 32 tokens have at most 512."""
    rows = [
        {"messages": [user("a"), calls(call_of("x" * size)), result(), answer()], "tools": TOOLS} for size in (1, 400)
    ]
    _, bad = checked(rows, tmp_path, max_length=32)
    assert list(bad) == [1] and bad[1] == ("response", "too_long")
