"""Whatever hands on a prompt hands on its tools: answers to rank, stages, judges, evaluations, templates of a base."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from schemas.commands import GenerateCommand
from schemas.config import BaseParams, GenerateConfig
from schemas.config.data import ValidateParams
from schemas.conversation import opened, with_extra
from schemas.errors import StageError
from stages import generate
from stages.base import build, set_template
from stages.commands.generate import alone, prompts_of
from stages.engine.data.codec import Codec
from stages.engine.data.examples import read
from stages.engine.data.template import one_template
from stages.engine.scoring.endpoint import question
from stages.engine.scoring.evaluation_record import cluster_of, digest_of, text_of
from stages.engine.scoring.judges import RewardJudge
from stages.validate import check
from stages.validate.context import Context
from tests.support import models
from tests.support.chat_templates import template, tokenizer
from tests.support.context import MemoryContext
from tests.support.families import FAMILIES, Family, save_language_model, save_reward_model

FUNCTION = {"name": "sky", "description": "Its colour", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLS = [{"id": "c1", "type": "function", "function": {"name": "sky", "arguments": {"at": "noon"}}}]
CHAT = [
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "blue", "tool_call_id": "c1"},
]
PROMPT = [
    with_extra({"role": "user", "content": "how are you?"}, {"tools": TOOLS}),
    with_extra({"role": "assistant", "content": ""}, {"tool_calls": CALLS}),
    with_extra({"role": "tool", "content": "blue"}, {"tool_call_id": "c1"}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 2 whose template writes tools."""
    folder = tmp_path_factory.mktemp("tools")
    family = Family("qwen2", lambda: tokenizer(template("Qwen", False), "<|im_end|>"), "<|im_end|>")
    save_language_model(folder / "own", family, max_position_embeddings=2048)
    build(BaseParams(path=str(folder / "own")), 0, folder / "base")
    return folder / "base"


def file_of(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_opened_and_closed_again() -> None:
    assert opened(PROMPT) == (CHAT, TOOLS)


def test_answers_to_rank_keep_their_tools(model: Path, tmp_path: Path) -> None:
    """From a file to the file that people rank, and from that to training: the same conversation."""
    file = file_of(tmp_path, {"prompt": CHAT, "tools": json.dumps(TOOLS), "id": 7}, {"prompt": "hello", "id": 8})
    assert next(asked.prompt for asked in prompts_of(str(file), None)) == PROMPT
    out = tmp_path / "to_rank.jsonl"
    alone(GenerateCommand(model=model, prompts=str(file), answers=2, max_new_tokens=4, out=out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["prompt"], row.get("tools"), row["id"]) for row in rows] == [
        (CHAT, TOOLS, 7),
        ([{"role": "user", "content": "hello"}], None, 8),
    ]
    ranked = [{**row, "responses": ["good", "bad"], "order": [0, 1]} for row in rows]
    generate.write(ranked, out)
    check(Context(ValidateParams(path=str(out), kind="ranking", eval_fraction=0), Codec.load(model)), tmp_path / "out")
    assert [row["prompt"] for row in read(tmp_path / "out", "train", "preference")] == [
        PROMPT,
        [{"role": "user", "content": "hello"}],
    ]


def test_the_stage_hands_tools_to_the_next(model: Path, tmp_path: Path) -> None:
    """Rows that stage `generate` made, as stage `validate` reads them."""
    rows = [{**models.row(0, "x"), "prompt": PROMPT}, models.row(1, "hello")]
    plain = [{key: value for key, value in message.items()} | {"extra": message.get("extra")} for message in PROMPT]
    rows = [{**rows[0], "prompt": plain}, {**rows[1], "prompt": [{**rows[1]["prompt"][0], "extra": None}]}]
    data = models.data_folder(tmp_path / "data", prompt=rows)
    config = GenerateConfig(answers=2, max_new_tokens=4, judge=None)
    run = MemoryContext(tmp_path / "work", config, {"model": model, "data": data}, stage="generate")
    generate.run(run)
    made = run.published["rows"]
    lines = [json.loads(line) for line in (made / "rows.jsonl").read_text().splitlines()]
    assert lines[0]["tools"] == TOOLS and "tools" not in lines[1]
    judged = [{**line, "responses": ["good", "bad"], "scores": [1, 0]} for line in lines]
    generate.write([{k: v for k, v in line.items() if k != "order"} for line in judged], made / "rows.jsonl")
    params = ValidateParams(path="input:rows", kind="ranking", eval_fraction=0)
    check(Context(params, Codec.load(model), rows=made), tmp_path / "out")
    assert read(tmp_path / "out", "train", "ranking")[0]["prompt"] == PROMPT


def test_a_reward_model_whose_template_has_no_tools_is_refused(tmp_path: Path) -> None:
    """Before anything is sampled: it would judge another conversation."""
    judge = RewardJudge(save_reward_model(tmp_path / "judge", FAMILIES["qwen2"]))
    with pytest.raises(StageError, match="leaves out tools, arguments of calls, calls of tools") as refused:
        judge.check([PROMPT], 4)
    assert refused.value.problem.kind == "chat_template"


def test_a_judge_behind_an_endpoint_is_shown_tools_and_calls() -> None:
    text = question(PROMPT, "x", "y")[1]["content"]
    call = json.dumps(CALLS[0]["function"])
    conversation = f"user: how are you?\n\nassistant: {call}\n\ntool: blue"
    assert text.startswith(
        f"<tools>\n{json.dumps(FUNCTION)}\n</tools>\n\n<conversation>\n{conversation}\n</conversation>"
    )
    plain = question([{"role": "user", "content": "hello"}], "x", "y")[1]["content"]
    assert plain.startswith("<conversation>\nuser: hello\n</conversation>\n\n<answer_A>\nx\n")


def test_evaluations_tell_prompts_by_their_tools_too() -> None:
    """Other tools or other arguments: another digest; the same cluster, so that intervals draw them together."""
    other = [PROMPT[0], with_extra(PROMPT[1], {"tool_calls": [{**CALLS[0], "id": "c2"}]}), PROMPT[2]]
    without = [{"role": "user", "content": "how are you?"}, *PROMPT[1:]]
    assert len({digest_of(prompt) for prompt in (PROMPT, other, without)}) == 3
    assert len({cluster_of(prompt) for prompt in (PROMPT, other, without)}) == 1
    assert text_of(PROMPT).splitlines()[2] == f"assistant: {json.dumps(CALLS[0]['function'])}"


# --- templates of a base ---


def test_a_template_for_tools_of_its_own() -> None:
    """Models that bring two: the one for tools where a conversation has some, letter by letter."""
    both = {"default": "{%- for m in messages %}{{ m.content }}|{%- endfor %}", "tool_use": template("Qwen", False)}
    fast = tokenizer("", "<|im_end|>")
    fast.chat_template = both  # type: ignore[assignment]
    codec = set_template(fast, BaseParams(path="m"))
    alone_ = Codec(tokenizer(both["tool_use"], "<|im_end|>"))
    assert codec.render(PROMPT) == alone_.render(PROMPT)
    assert codec.render([{"role": "user", "content": "hello"}]) == "hello|"
    assert one_template({"tool_use": "x"}) is None and one_template({"default": "y"}) == "y"


def test_a_base_without_a_template_writes_tools_in_plain_transformers_too(tmp_path: Path) -> None:
    family = Family("gpt2", lambda: tokenizer("", "<|endoftext|>"), "<|endoftext|>")
    save_language_model(tmp_path / "own", family)
    build(BaseParams(path=str(tmp_path / "own")), 0, tmp_path / "base")
    text = AutoTokenizer.from_pretrained(tmp_path / "base").apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    call = json.dumps(CALLS[0]["function"])
    assert text == f"{json.dumps(FUNCTION)}\nhow are you?\n{call}<|endoftext|>\nblue"
