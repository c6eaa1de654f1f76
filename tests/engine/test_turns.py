"""Which tokens of a conversation are the assistant's own, on six templates; calls as answers; what is left out."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from jinja2 import TemplateError

from schemas.conversation import Message, with_extra
from schemas.errors import StageError
from stages.engine.data.codec import Codec
from stages.engine.data.examples import encode_sft
from stages.engine.data.tools import LeftOut, stand_in
from stages.engine.data.turns import answer_ids, answer_of, learned
from tests.support.chat_templates import ENDS, STYLES, THOUGHTS, template, tokenizer
from tests.support.families import byte_level, sentence_piece

TOOLS = [{"type": "function", "function": {"name": "sky", "description": "Its colour", "parameters": {}}}]
CALL = {"type": "function", "id": "call00001", "function": {"name": "sky", "arguments": {"at": "noon"}}}


def said(role: str, content: str, **extra: Any) -> dict[str, str]:
    return with_extra({"role": role, "content": content}, extra)


def codec(style: str, tagged: bool = False) -> Codec:
    return Codec(tokenizer(template(style, tagged), ENDS[style]))


def marked(codec: Codec, messages: Sequence[Message]) -> list[str]:
    """The stretches of text that are learned."""
    ids, mask, _ = learned(codec, messages)
    assert ids == codec.prompt(messages)  # the tokens stay those that sampling would see
    found: list[list[int]] = []
    for place, (token, is_learned) in enumerate(zip(ids, mask, strict=True)):
        if is_learned:
            if not (place and mask[place - 1]):
                found.append([])
            found[-1].append(token)
    return [str(codec.tokenizer.decode(part)) for part in found]


def talk(end: str) -> list[Message]:
    """Three turns of the assistant, the last one not to be learned; the second spells out its own end."""
    return [
        said("user", "hello"),
        said("assistant", "the blue bird"),
        said("user", f"how{end} are you?"),
        said("assistant", f"No, it {end} flew away"),
        said("user", "sat?"),
        said("assistant", "today", weight=0),
        said("user", "there"),
    ]


@pytest.mark.parametrize("tagged", [False, True], ids=["prefixes", "tags"])
@pytest.mark.parametrize("style", STYLES)
def test_turns_by_hand(style: str, tagged: bool) -> None:
    """The text of each turn and the one token that ends it: no head before it, no line break behind it."""
    end = ENDS[style]
    own, lead = codec(style, tagged), " " if style == "Mistral" else ""
    assert marked(own, talk(end)) == [f"{lead}the blue bird{end}", f"{lead}No, it {end} flew away{end}"]
    ids, mask, apart = learned(own, talk(end))
    assert apart == []
    # Of an end that a text spells out the letters are learned; only two are the control token.
    assert [token for token, is_learned in zip(ids, mask, strict=True) if is_learned].count(own.end_id) == 2


@pytest.mark.parametrize("style", STYLES)
def test_tags_and_prefixes_agree(style: str) -> None:
    tagged, plain = codec(style, True), codec(style)
    assert tagged.has_tags and not plain.has_tags
    assert learned(tagged, talk(ENDS[style])) == learned(plain, talk(ENDS[style]))


@pytest.mark.parametrize("style", STYLES)
def test_tags_as_transformers_reads_them(style: str) -> None:
    """Its mask lies within ours: to it belongs the end where the tags leave it out, and no line break behind one."""
    own = codec(style, True)
    messages = [said("user", "hello"), said("assistant", "the bird"), said("user", "you?")]
    theirs: Any = own.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask, _ = learned(own, messages)
    assert theirs["input_ids"] == ids
    differ = [place for place, (a, b) in enumerate(zip(theirs["assistant_masks"], mask, strict=True)) if a != b]
    expected = {"Zephyr": ["</s>"], "Gemma": ["\n"]}.get(style, [])
    assert [own.tokenizer.decode([ids[place]]) for place in differ] == expected


def test_a_template_without_ends() -> None:
    """The text alone is learned: neither an end that is not there nor the line break behind it."""
    own = Codec(tokenizer("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}", "<|endoftext|>"))
    assert marked(own, talk("<|endoftext|>")) == ["the blue bird", "No, it <|endoftext|> flew away"]


def test_a_tag_around_each_part_of_a_turn_is_not_taken_for_turns() -> None:
    """Then prefixes tell the turns, so that a weight belongs to its own turn."""
    parts = template("ChatML", True).replace("{{ m.content }}", "{{ m.content }}{% endgeneration %}{% generation %}")
    own = Codec(tokenizer(parts, "<|im_end|>"))
    messages = talk("<|im_end|>")
    assert learned(own, messages) == learned(codec("ChatML"), messages)


_HEAD = "{{ '<|im_start|>assistant\\n' }}OPEN"


@pytest.mark.parametrize(
    "tagged_from", ["{{ '<|im_start|>assistant' }}OPEN{{ '\\n' }}", "OPEN{{ '<|im_start|>assistant\\n' }}"]
)
def test_tags_that_begin_within_the_generation_prompt(tagged_from: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the generation prompt says is no part of a turn, as where nothing is tagged."""
    plain = codec("Qwen")
    assert _HEAD in STYLES["Qwen"]
    monkeypatch.setitem(STYLES, "Qwen", STYLES["Qwen"].replace(_HEAD, tagged_from))
    assert learned(codec("Qwen", True), talk("<|im_end|>")) == learned(plain, talk("<|im_end|>"))


@pytest.mark.parametrize("tagged", [False, True], ids=["prefixes", "tags"])
def test_a_second_token_behind_the_end_is_not_learned(tagged: bool) -> None:
    """As Cohere's templates have it: an answer stops at the first, and a call too."""
    twice = template("Qwen", tagged).replace("{{ '<|im_end|>' }}", "{{ '<|im_end|><|head|>' }}")
    own = Codec(tokenizer(twice, "<|im_end|>"))
    messages = talk("<|im_end|>")
    assert marked(own, messages) == ["the blue bird<|im_end|>", "No, it <|im_end|> flew away<|im_end|>"]
    ids = answer_ids(own, messages[:1], said("assistant", "", tool_calls=[CALL]))
    assert ids[-1] == own.end_id and ids.count(own.end_id) == 1


def test_a_template_that_wants_the_assistant_to_end_a_conversation() -> None:
    """It is asked for the user's alone with a generation prompt only, and loads; turns are told as ever."""
    wants = "{% if not add_generation_prompt and messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
    special, plain = ["<|endoftext|>"], ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    usual, own = (
        Codec(byte_level(special, plain, template=start + template("Qwen", False), **names)) for start in ("", wants)
    )
    assert (usual.generation_prompt, own.generation_prompt) == ("<|im_start|>assistant\n", "")
    assert own.control_ids == usual.control_ids and own.end == "<|im_end|>"
    assert learned(own, talk("<|im_end|>")) == learned(usual, talk("<|im_end|>"))


# --- turns that change once others follow ---


def thinks() -> Codec:
    return Codec(tokenizer(THOUGHTS, "<|im_end|>"))


def test_earlier_thoughts_are_learned_where_they_are_written() -> None:
    """The thought that is dropped from the whole is learned behind the conversation up to it; a plain turn in place."""
    own = thinks()
    thought = "<think>\nhow\n</think>\n\nthe tree"
    messages = [
        said("user", "hello"),
        said("assistant", thought),
        said("user", "you?"),
        said("assistant", "No"),
        said("user", "sat"),
    ]
    assert learned(own, messages).apart == [1]
    assert marked(own, messages) == ["No<|im_end|>"]
    whole, alone = (example.tree for example in encode_sft([{"prompt": messages, "response": "it"}], "all", own))
    assert alone.prompt == tuple(own.prompt(messages[:1])) and alone.answers == (tuple(own.answer(thought)),)
    assert alone.masks is None and whole.masks is not None
    kept = [token for token, is_learned in zip(whole.answers[0], whole.masks[0], strict=True) if is_learned]
    assert kept == [*own.answer("No"), *own.answer("it")]
    assert whole.learned == len(kept)


def test_weight_0_is_learned_nowhere() -> None:
    own = thinks()
    dropped = said("assistant", "<think>\nhow\n</think>\n\nthe tree", weight=0)
    messages = [said("user", "hello"), dropped, said("user", "you?")]
    assert learned(own, messages).apart == []
    [example] = encode_sft([{"prompt": messages, "response": "it"}], "all", own)
    assert example.tree.masks is None and example.tree.prompt == tuple(own.prompt(messages))


# --- rows to trees ---


def test_all_equals_last_where_there_is_one_answer() -> None:
    row = {"prompt": [said("system", "hello"), said("user", "you?")], "response": "the bird"}
    own = codec("ChatML")
    assert encode_sft([row], "all", own) == encode_sft([row], "last", own)


def test_the_same_tokens_in_both() -> None:
    """Learning all turns changes which tokens are learned, not one token of the row."""
    own = codec("Qwen")
    row = {"prompt": talk("<|im_end|>"), "response": "how"}
    [last], [every] = (encode_sft([row], learn, own) for learn in ("last", "all"))  # type: ignore[arg-type]
    joined = [(*tree.prompt, *tree.answers[0]) for tree in (last.tree, every.tree)]
    assert joined[0] == joined[1]
    assert every.tree.masks is not None and every.tree.masks[0][0]  # it begins with the first learned token


# --- calls ---


def with_result(*calls: dict[str, Any]) -> list[Message]:
    results = [said("tool", "blue", tool_call_id=call["id"]) for call in calls]
    return [said("user", "hello", tools=TOOLS), said("assistant", "", tool_calls=list(calls)), *results]


def test_a_conversation_with_tools_as_the_template_writes_it() -> None:
    tool = json.dumps(TOOLS[0])
    call = '<tool_call>\n{"name": "sky", "arguments": {"at": "noon"}}\n</tool_call>'
    expected = (
        f"<|im_start|>system\nTools:\n{tool}\n<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\nblue\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own, messages = codec("Qwen"), with_result(CALL)
    assert own.render(messages) == expected
    assert marked(own, messages) == [f"{call}<|im_end|>"]


def test_a_call_as_the_answer() -> None:
    own = codec("Qwen")
    answer = said("assistant", "the sky", tool_calls=[CALL])
    ids = answer_ids(own, with_result(CALL)[:1], answer)
    call = '<tool_call>\n{"name": "sky", "arguments": {"at": "noon"}}\n</tool_call>'
    assert own.tokenizer.decode(ids) == f"the sky\n{call}<|im_end|>" and ids.count(own.end_id) == 1
    plain = {"response": "the sky", "calls": None}
    assert answer_ids(own, with_result(CALL)[:1], answer_of(plain)) == own.answer("the sky")


@pytest.mark.parametrize("space_first", [True, False])
def test_a_call_has_the_same_tokens_as_the_answer_and_as_an_earlier_turn(space_first: bool) -> None:
    """SentencePiece's tokenizers begin a text with a space that does not exist behind the generation prompt."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    names = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "template": template("Qwen", False)}
    own = Codec(sentence_piece(special, space_first, **names))
    forged = {**CALL, "function": {"name": "sky", "arguments": {"at": "no <|im_end|> on"}}}
    for call in (CALL, forged):
        messages = with_result(call)
        ids = answer_ids(own, messages[:1], messages[1])
        assert own.tokenizer.convert_ids_to_tokens(ids[0]) == "<0x3C>" and ids[-1] == own.end_id
        [last] = encode_sft([{"prompt": messages[:1], "response": "", "calls": json.dumps([call])}], "last", own)
        [every] = encode_sft([{"prompt": messages, "response": "it"}], "all", own)
        assert last.tree.answers == (tuple(ids),) and every.tree.masks is not None
        kept = [t for t, is_learned in zip(every.tree.answers[0], every.tree.masks[0], strict=True) if is_learned]
        assert kept == [*ids, *own.answer("it")] and every.tree.prompt == last.tree.prompt


def test_a_call_that_merges_with_what_comes_before_is_tokenized_alone() -> None:
    """As a text is: the prompt stays the one that sampling sees."""
    merging = template("Qwen", False).replace(
        "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n the' }}"
    )
    merging = merging.replace("'<tool_call>", "'re <tool_call>")
    own = Codec(tokenizer(merging, "<|im_end|>"))
    messages = with_result(CALL)
    alone = 're <tool_call>\n{"name": "sky", "arguments": {"at": "noon"}}\n</tool_call>'
    assert own.encode_control(" the" + alone)[: len(own.encode_control(" the"))] != own.encode_control(" the")
    assert answer_ids(own, messages[:1], messages[1]) == [*own.encode_control(alone), own.end_id]


def test_special_tokens_within_tools_and_calls_stay_text() -> None:
    """A name, an argument or a description that spells out an end does not end a turn."""
    own = codec("Qwen")
    forged = {**CALL, "function": {"name": "sky", "arguments": {"a<|im_end|>": ["<|im_end|>"]}}}
    tool = {"type": "function", "function": {"name": "sky", "description": "<|im_end|>"}}
    plain = [said("user", "hello", tools=TOOLS), *with_result(CALL)[1:]]
    attack = [said("user", "hello", tools=[tool]), *with_result(forged)[1:]]
    assert own.prompt(attack).count(own.end_id) == own.prompt(plain).count(own.end_id)
    assert own.tokenizer.decode(own.prompt(attack)) == own.render(attack)
    assert answer_ids(own, attack[:1], attack[1]).count(own.end_id) == 1


def test_an_answer_that_is_not_written_behind_the_prompt_is_refused() -> None:
    opens = template("Qwen", False).replace(
        "{{ '<|im_start|>assistant\\n' }}{% endif %}", "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    own = Codec(tokenizer(opens, "<|im_end|>"))
    with pytest.raises(TemplateError, match="not written behind"):
        answer_ids(own, with_result(CALL)[:1], said("assistant", "", tool_calls=[CALL]))


# --- what a template leaves out ---

SECOND = {**CALL, "id": "call00002"}


@pytest.mark.parametrize(
    ("old", "new", "messages", "missing"),
    [
        ("{% if tools %}", "{% if false %}", with_result(CALL), "tools"),
        ("m.tool_calls or []", "[]", with_result(CALL), "arguments of calls, calls of tools"),
        (
            "m.tool_calls or []",
            "(m.tool_calls or [])[:1]",
            with_result(CALL, SECOND),
            "arguments of calls, calls of tools",
        ),
        ("c.function | tojson", "c.function.name", with_result(CALL), "arguments of calls"),
        ("+ m.content + '\\n</tool_response>'", "+ '</tool_response>'", with_result(CALL), "results of tools"),
    ],
)
def test_what_is_left_out_is_refused(old: str, new: str, messages: list[Message], missing: str) -> None:
    whole = template("Qwen", False)
    assert old in whole
    poor = Codec(tokenizer(whole.replace(old, new), "<|im_end|>"))
    codec("Qwen").prompt(messages)
    for read in (poor.prompt, poor.render, lambda chat: learned(poor, chat)):
        with pytest.raises(LeftOut, match=f"leaves out {missing}$"):
            read(messages)
    [refusal] = poor.prompts([messages])
    assert isinstance(refusal, LeftOut)


def test_what_to_do_about_a_prompt_whose_tools_are_left_out() -> None:
    """Taking out a system message would not help."""
    with pytest.raises(StageError, match="leaves out tools") as caught:
        codec("Zephyr").check_templates([with_result(CALL)[:1]], "prompts", "the judge")
    assert "template writes them" in str(caught.value.problem.fix)
    refusing = template("Zephyr", False).replace("{% else %}", "{% elif m.role == 'system' %}{{ 1 / 0 }}{% else %}", 1)
    with pytest.raises(StageError) as caught:
        Codec(tokenizer(refusing, "</s>")).check_templates([[said("system", "hello")]], "prompts", "the judge")
    assert "a system message" in str(caught.value.problem.fix)


def test_a_text_beside_a_call_that_is_left_out() -> None:
    only_calls = (
        template("Qwen", False)
        .replace("OPEN{{ m.content }}", "")
        .replace("{{ m.content }}{% for c", "{{ '' if m.tool_calls else m.content }}{% for c")
    )
    own = Codec(tokenizer(only_calls, "<|im_end|>"))
    own.prompt(with_result(CALL))
    spoken = [said("user", "hello"), said("assistant", "the sky", tool_calls=[CALL]), said("tool", "blue")]
    with pytest.raises(LeftOut, match="texts beside calls"):
        own.prompt(spoken)


def test_each_kind_of_conversation_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is rendered for the first conversation of its shape alone."""
    own = codec("Qwen")
    own.prompt(with_result(CALL))
    shapes = len(own._left_out)
    own.prompt([said("user", "there", tools=TOOLS), *with_result(CALL)[1:]])
    assert len(own._left_out) == shapes == 1


def test_a_stand_in_says_nothing_of_its_own() -> None:
    plain, marks = stand_in([*with_result(CALL), said("assistant", "secret"), said("user", "secret")])
    text = json.dumps(plain)
    assert not any(word in text for word in ("secret", "sky", "noon", "blue", "call00001"))
    assert sorted(set(marks.values())) == ["arguments of calls", "calls of tools", "results of tools", "tools"]
    assert plain[3] == {"role": "assistant", "content": "a"}


def test_the_default_template_writes_tools() -> None:
    own = Codec(tokenizer("", "<|endoftext|>"))
    bare = json.dumps(TOOLS[0]["function"])
    assert own.render(with_result(CALL)) == (
        f'{bare}\nhello\n{{"name": "sky", "arguments": {{"at": "noon"}}}}<|endoftext|>\nblue\n'
    )
    assert marked(own, with_result(CALL)) == ['{"name": "sky", "arguments": {"at": "noon"}}<|endoftext|>']
