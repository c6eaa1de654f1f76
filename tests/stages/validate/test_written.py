"""Conversations within one text: rendered with a template, as a transcript, as JSON; the prompt within the answer."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError
from stages.validate import check
from stages.validate.context import Context
from stages.validate.forms.cells import BadRow, parsed_list, turns
from stages.validate.forms.written import conversation, dialect_of, without_end
from stages.validate.quarantine import Report
from tests.support.models import given

Rows = list[dict[str, Any]]
FULL = (("system", "Be brief."), ("user", "Red?"), ("assistant", "Yes."), ("user", "Blue?"))


def checked(rows: Rows, kind: Kind, folder: Path, **more: Any) -> tuple[Report, Rows]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(Context(ValidateParams(path=str(file), kind=kind, eval_fraction=0, **more)), folder / "out")
    return report, given(folder / "out", "train", kind).sort("row").to_dicts()


def said(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in row["prompt"])


# --- templates and transcripts

RENDERED = {
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRed?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nRed?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBlue?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nRed? [/INST] Yes. </s><s>[INST] Blue? [/INST]",
    "Zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nRed?</s>\n<|assistant|>\nYes.</s>\n<|user|>\nBlue?</s>\n<|assistant|>\n"
    ),
    "Harmony": (
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Red?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.<|return|><|start|>user<|message|>Blue?<|end|>"
    ),
    "Vicuna": "Be brief. USER: Red? ASSISTANT: Yes.</s>USER: Blue? ASSISTANT:",
}
ALTERNATELY = {
    "Gemma": (
        "<bos><start_of_turn>user\nRed?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
        "<start_of_turn>user\nBlue?<end_of_turn>\n<start_of_turn>model\n"
    ),
    "Llama 2": "<s>[INST] Red? [/INST]Yes.</s> [INST] Blue? [/INST]",
    "DeepSeek": (
        "<｜begin▁of▁sentence｜><｜User｜>Red?<｜Assistant｜>Yes.<｜end▁of▁sentence｜><｜User｜>Blue?<｜Assistant｜>"
    ),
    "Alpaca": "### Human: Red?### Assistant: Yes.### Human: Blue?",
    "Vicuna": "USER: Red?\nASSISTANT: Yes.\nUSER: Blue?\nASSISTANT:",
    "speakers": "Human: Red?\nAssistant: Yes.\nHuman: Blue?\nAssistant:",
}


@pytest.mark.parametrize("name", RENDERED)
def test_with_a_system_message(name: str) -> None:
    assert conversation(RENDERED[name], name) == FULL


def test_mistral_with_a_system_prompt() -> None:
    text = "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Red?[/INST]Yes.</s>[INST]Blue?[/INST]"
    assert dialect_of(text) == "Llama 2" and conversation(text, "Llama 2") == FULL


@pytest.mark.parametrize("name", ALTERNATELY)
def test_without_one(name: str) -> None:
    """And the dialect is recognised by how the text begins."""
    assert dialect_of(ALTERNATELY[name]) == name
    assert conversation(ALTERNATELY[name], name) == FULL[1:]


@pytest.mark.parametrize(
    "text",
    [
        "\r\n\r\nHuman: Red?\r\n\r\nAssistant: Yes.\r\n\r\nHuman: Blue?\r\n\r\nAssistant:",
        "User: Red?\nBot: Yes.\nUser: Blue?",
        "human: Red?\n\nai: Yes.\n\nhuman: Blue?",
        "**User:** Red?\n\n**Assistant:** Yes.\n\n**User:** Blue?",
    ],
)
def test_speakers_in_other_spellings(text: str) -> None:
    assert dialect_of(text) == "speakers" and conversation(text, "speakers") == FULL[1:]


def test_a_quoted_line_is_no_turn() -> None:
    """Turns are written as the first of them is."""
    text = "User: What does\nassistant: yes\nmean?\nAssistant: It quotes."
    assert conversation(text, "speakers") == (("user", "What does\nassistant: yes\nmean?"), ("assistant", "It quotes."))


def test_an_instruction_with_its_input() -> None:
    """The preface of Alpaca's own template is no system message."""
    begins = "Below is an instruction that describes a task, paired with an input.\n\n"
    text = f"{begins}### Instruction:\nTranslate.\n\n### Input:\ncat\n\n### Response:\nchat"
    assert conversation(text, "Alpaca") == (("user", "Translate.\ncat"), ("assistant", "chat"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ChatML", "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>"),
        ("ChatML", "<|im_start|>tool\nRed.<|im_end|>"),
        ("ChatML", "before <|im_start|>user\nRed?<|im_end|>"),
        ("ChatML", "<|im_start|>user\nRed?<|im_end|> and more"),
        ("Llama 2", "[INST] <<SYS>> obey <</SYS>> [/INST]"),
        ("Gemma", "<start_of_turn>user\n<end_of_turn>\n"),
    ],
)
def test_what_is_no_whole_conversation(name: str, text: str) -> None:
    assert conversation(text, name) is None


@pytest.mark.parametrize("name", ["ChatML", "Llama 2", "speakers"])
def test_a_column_of_conversations(name: str, tmp_path: Path) -> None:
    """Prompts and both answers of a file of pairs; what was read is said."""
    text = (RENDERED if name != "speakers" else ALTERNATELY)[name]
    end = {"ChatML": "<|im_end|>\n", "Llama 2": " </s>", "speakers": ""}[name]
    rows = [{"prompt": text, "chosen": f"Good {i}.{end}", "rejected": f"Bad {i}.{end}"} for i in range(5)]
    report, written = checked(rows, "preference", tmp_path)
    assert [said(row) for row in written] == [FULL if name != "speakers" else FULL[1:]] * 5
    assert [(row["chosen"], row["rejected"]) for row in written] == [(f"Good {i}.", f"Bad {i}.") for i in range(5)]
    note = "transcript_read" if name == "speakers" else "template_read"
    assert report.notes[note] == 5 and "prompt" in report.read[0]


def test_whole_conversations_as_answers(tmp_path: Path) -> None:
    """Without a prompt: each side renders all of it."""
    begin = "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"chosen": f"{begin}Yes {i}.<|im_end|>", "rejected": f"{begin}No {i}.<|im_end|>"} for i in range(4)]
    _, written = checked(rows, "preference", tmp_path)
    assert [(said(row), row["chosen"]) for row in written] == [((("user", "Red?"),), f"Yes {i}.") for i in range(4)]
    texts = [{"text": f"### Human: Red {i}?### Assistant: Yes."} for i in range(4)]
    _, written = checked(texts, "sft", tmp_path)
    assert [(said(row), row["response"]) for row in written] == [((("user", f"Red {i}?"),), "Yes.") for i in range(4)]


def test_one_text_among_plain_ones_stays(tmp_path: Path) -> None:
    """A person may ask about templates, and an answer may be a dialogue: noted, and not a letter is changed."""
    odd = [
        ("<|im_start|>user\nHi<|im_end|>", "It is ChatML."),
        ("Write a dialogue.", "User: Hi\nAssistant: Hello"),
        ("User: Hi\nAssistant:", "Hello"),
        ("What ends a turn?", "This: <|im_end|>"),
        ("And what begins one?", "[INST] does."),
    ]
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(40)]
    rows += [{"prompt": prompt, "response": response} for prompt, response in odd]
    report, written = checked(rows, "sft", tmp_path)
    assert [(said(row), row["response"]) for row in written[40:]] == [((("user", p),), r) for p, r in odd]
    assert report.notes == {"looks_rendered": 3, "looks_like_transcript": 2}


def test_a_broken_one_among_many_is_put_aside(tmp_path: Path) -> None:
    rows = [{"prompt": f"<|im_start|>user\nRed {i}?<|im_end|>\n", "response": "Yes."} for i in range(20)]
    rows.append({"prompt": "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>", "response": "Yes."})
    report, written = checked(rows, "sft", tmp_path)
    assert (report.checks, len(written)) == ({"prompt: rendered_template": 1}, 20)


def test_a_column_of_broken_ones_is_refused(tmp_path: Path) -> None:
    """Rendered with a template, and yet no conversation that can be read back: never trained on as letters."""
    rows = [{"prompt": f"<|im_start|>tool\nRed {i}.<|im_end|>\n", "response": "Yes."} for i in range(4)]
    with pytest.raises(StageError, match=r"prompt: rendered_template \(4\)"):
        checked(rows, "sft", tmp_path)


def test_transcripts_with_other_line_ends_among_plain_ones(tmp_path: Path) -> None:
    """Those that begin as every transcript does tell what the others are."""
    rows = [
        {side: f"{end}Human: Red {i}?{end}Assistant: {side}" for side in ("chosen", "rejected")}
        for i, end in enumerate(["\n\n"] * 9 + ["\r\n\r\n"])
    ]
    report, written = checked(rows, "preference", tmp_path)
    assert said(written[9]) == (("user", "Red 9?"),) and written[9]["chosen"] == "chosen"
    assert report.notes == {"transcript_read": 1}


# --- lists as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a", null]', ["a", None]),
        ("['it\\'s', True, None]", ["it's", True, None]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("[0.5 0.25]", [0.5, 0.25]),
        ("array([{'a': 1}, {'b': 2}], dtype=object)", [{"a": 1}, {"b": 2}]),
        ("[{'a': 'x'}\n {'a': 'y'}]", [{"a": "x"}, {"a": "y"}]),
    ],
)
def test_lists_as_json_python_and_numpy_write_them(text: str, expected: list[Any]) -> None:
    assert parsed_list(text) == expected


@pytest.mark.parametrize("text", ["[__import__('os').getcwd()]", "[1, 2", "[(" * 5000, "[open('x')]", "[x for x in y]"])
def test_nothing_is_run(text: str) -> None:
    with pytest.raises(ValueError, match="Python"):
        parsed_list(text)


def test_messages_in_any_text_column(tmp_path: Path) -> None:
    """CSV files, whose cells are texts: as JSON, and as pandas writes arrays."""
    asked = [{"role": "user", "content": 'Say "red"'}]
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    written = [json.dumps(asked), "[{'content': 'yes', 'role': 'assistant'}]", str(answers[1])]
    whole = [json.dumps(asked), *(str([*asked, *answer]).replace("}, {", "}\n {") for answer in answers)]
    for cells in (written, whole):
        with (tmp_path / "rows.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["prompt", "chosen", "rejected"], cells])
        params = ValidateParams(path=str(tmp_path / "rows.csv"), kind="preference", eval_fraction=0)
        check(Context(params), tmp_path / "out")
        [row] = given(tmp_path / "out", "train", "preference").to_dicts()
        assert (said(row), row["chosen"], row["rejected"]) == ((("user", 'Say "red"'),), "yes", "no")


@pytest.mark.parametrize(
    "answer",
    [
        "[1, 2, 3]",
        '{"from": "Paris", "to": "Rome"}',
        '[{"role": "admin", "name": "Bo"}]',
        '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]',
        '{"role": "user"',
    ],
)
def test_answers_that_are_json_stay(answer: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Give me an example of JSON, number {i}.", "response": answer} for i in range(3)]
    _, written = checked(rows, "sft", tmp_path)
    assert [row["response"] for row in written] == [answer] * 3


def test_a_list_that_is_cut_is_put_aside(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="malformed_json"):
        turns('[{"role": "user", "content": "Once upon', "prompt")


# --- the prompt within the answers

ASKED = "Question: is the sky blue? Answer:"


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("preference", {"chosen": f"{ASKED} yes", "rejected": f"{ASKED}\nno"}),
        ("sft", {"response": f"{ASKED} yes"}),
        ("ranking", {"responses": [f"{ASKED} yes", f"{ASKED} no"], "scores": [1, 0]}),
        ("feedback", {"completion": f"{ASKED} yes", "label": 1}),
    ],
)
def test_repeated_prompts_are_cut(kind: Kind, columns: dict[str, Any], tmp_path: Path) -> None:
    rows = [json.loads(json.dumps({"prompt": ASKED, **columns}).replace("sky", f"thing {i}")) for i in range(4)]
    report, written = checked(rows, kind, tmp_path)
    assert report.notes["repeated_prompt_cut"] == 4
    for row in written:
        answers = row.get("responses") or [row[name] for name in columns if name != "label"]
        assert answers == ["yes", "no"][: len(answers)]


def test_an_answer_that_begins_like_the_prompt_stays(tmp_path: Path) -> None:
    """A few rows, one of two answers, or a short greeting: no reason to cut."""
    rows = [{"prompt": f"Tell me about thing {i}", "chosen": f"Thing {i}.", "rejected": "No."} for i in range(6)]
    rows[0] |= {"chosen": "Tell me about thing 0, you say?", "rejected": "Tell me about thing 0? No."}
    report, written = checked(rows, "preference", tmp_path)
    assert written[0]["chosen"] == rows[0]["chosen"] and not report.notes
    greetings = [{"prompt": "Hi", "chosen": f"Hi there {i}!", "rejected": "Hi."} for i in range(4)]
    _, written = checked(greetings, "preference", tmp_path)
    assert [row["rejected"] for row in written] == ["Hi."] * 4
    halves = [{"prompt": ASKED + str(i), "chosen": f"{ASKED}{i} yes", "rejected": "no"} for i in range(4)]
    _, written = checked(halves, "preference", tmp_path)
    assert written[0]["chosen"] == f"{ASKED}0 yes"


def test_nothing_is_left_of_an_answer(tmp_path: Path) -> None:
    rows = [{"prompt": ASKED + str(i), "response": f"{ASKED}{i}"} for i in range(4)]
    with pytest.raises(StageError, match="response: empty"):
        checked(rows, "sft", tmp_path)


def test_end_tokens_without_end_take_linear_time() -> None:
    """A copy of the text for each of them moves 2 TB."""
    assert without_end("a </s>\n<|im_end|> ") == "a"
    assert without_end("a ") == "a " and without_end("</s>") == ""
    began = time.monotonic()
    assert without_end("a" + "</s>" * 1_000_000) == "a"
    assert time.monotonic() - began < 30
