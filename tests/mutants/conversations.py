"""One-line mistakes in how conversations are read, rendered and learned."""

_TOOLS = ("tests/stages/validate/test_tools.py",)
_TURNS = ("tests/engine/test_turns.py",)
_LEARN = ("tests/stages/test_learn_all.py",)

BY_FILE: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {
    ("stages/validate/checks/table_checks.py", _TOOLS): [
        ('("label", "winners", "calls")', '("label", "winners")'),
        ("characters=prompt + tools + (", "characters=prompt + ("),
        ("return [extra, *calls] if is_wide(frame) else calls", "return calls"),
        ('rf"{HIDING}|{_ESCAPED}"', "HIDING"),
        (r"(?:^|[^\\])(?:\\\\)*\\u00", r"\\u00"),
    ],
    ("stages/commands/validate.py", ("tests/stages/validate/test_mixtures.py",)): [
        ("raise about_source(place, one.name, error) from error", "raise"),
    ],
    ("stages/runtime/limits.py", ("tests/stages/runtime/test_limits.py",)): [
        ("signal.ITIMER_REAL, seconds, _AGAIN)", "signal.ITIMER_REAL, seconds)"),
        ("    if _inside:\n        raise _Late", "    raise _Late"),
        ("signal.ITIMER_REAL, *timer)", "signal.ITIMER_REAL, 0)"),
    ],
    ("stages/engine/data/turns.py", _TURNS): [
        ("codec.refuse_left_out(messages)\n    places", "places"),
        ("if len(tagged) == len(places):", "if True:"),
        ("if not is_unlearned(messages[place]):", "if True:"),
        ("if place not in spans and not is_unlearned(messages[place])]", "if place not in spans]"),
        ("without_empty_thought(through[len(before) :])", "through[len(before) :]"),
        ("return ids if ids[-1] in codec.stop_ids else [*ids, codec.end_id]", "return [*ids, codec.end_id]"),
        ("if turn is None or not rendered.startswith", "if turn is None or rendered.startswith"),
        ("return start, end + len(codec.end)", "return start, end"),
        ("start = next((at + len(prompt) for at in places", "start = next((start for at in places"),
        ("turn = turn.rstrip()", "turn = turn"),
        ("            return turn[: found.end()]\n", "            break\n"),
    ],
    ("stages/engine/data/tools.py", _TURNS): [
        ("if word not in rendered", "if False"),
        ('content = mark("texts beside calls") if content else ""', 'content = ""'),
        ('content = mark("results of tools")', "content = _PLAIN"),
        ('arguments = {_PLAIN: mark("arguments of calls")}', "arguments = {_PLAIN: _PLAIN}"),
    ],
    ("stages/engine/data/guard.py", _TURNS): [
        ("messages = [{**_changed(message, marked)", "messages = [{**message"),
        ("_changed(tools, marked), left", "tools, left"),
        ("{change(key): _changed(part, change)", "{key: _changed(part, change)"),
    ],
    ("stages/engine/data/examples.py", _LEARN + _TURNS): [
        ("masks = ((*mask[first:], *[True] * len(last)),)", "masks = ((*mask[first:], *[False] * len(last)),)"),
        ("return [whole, *(", "return [*("),
    ],
    ("stages/engine/data/trees.py", _LEARN): [
        ("learned_N] for name", "~learned_N] for name"),
        ('torch.bincount(per_token["answer_N"], minlength=len(answers))', "lengths_A"),
        ("None if tree.masks is None else (tree.masks[number],)", "None"),
        ("else sum(map(sum, self.masks))", "else sum(map(len, self.answers))"),
    ],
    ("stages/sft.py", _LEARN): [("(sum(logps), example.tree.learned)", "(sum(logps), len(example.tree.answers[0]))")],
    ("stages/validate/forms/tools.py", _TOOLS): [
        ("open_calls -= 1", "pass"),
        ("if own is not None and ids and own not in ids:", "if False:"),
        ("        if open_calls:\n            raise", "        if False:\n            raise"),
        ('if open_calls and turns[-1][0] == "tool":', "if False:"),
        ('if arguments in (None, ""):', "if False:"),
        ("parse_constant=_refuse_constant", "parse_constant=None"),
        ("if not known:", "if False:"),
    ],
    ("stages/validate/forms/cells.py", _TOOLS + _LEARN): [
        ('if calls and role != "assistant":', "if False:"),
        ("return weight == 1", "return True"),
        ("if isinstance(weight, bool) or weight not in (0, 1):", "if False:"),
        ('if learn == "last":\n        return unweighed', 'if learn == "all":\n        return unweighed'),
        ("0 if odd is False else odd", "odd"),
    ],
    ("stages/validate/forms/formats.py", _TOOLS + _LEARN): [
        ('if learn == "last" or not any(', 'if learn == "all" or not any('),
        ("last = max(place for", "last = min(place for"),
        ('        raise BadRow(column, "answer_is_a_call"', '        print(column, "answer_is_a_call"'),
    ],
    ("stages/validate/checks/token_checks.py", _TOOLS): [
        (
            "if length > self.max_length:\n                yield Finding(row",
            "if False:\n                yield Finding(row",
        ),
        ('return "tools_left_out" if', 'return "template_refuses" if'),
    ],
    ("schemas/rows/__init__.py", _TOOLS): [
        ("+ pl.element().struct.field(EXTRA)).fill_null", '+ pl.lit("")).fill_null'),
    ],
    ("schemas/rows/models.py", _TOOLS): [
        ("silent = (content ==", "silent = (role =="),
    ],
    ("stages/engine/scoring/evaluation_record.py", ("tests/stages/test_tools_everywhere.py",)): [
        ('message["role"], words_of(message)]', 'message["role"], message["content"]]'),
    ],
    ("stages/generate.py", ("tests/stages/test_tools_everywhere.py",)): [
        ('**({"tools": tools} if tools else {}), "responses"', '"responses"'),
    ],
    ("stages/validate/forms/rankings.py", ("tests/stages/test_tools_everywhere.py",)): [
        (
            'prompt = with_tools(turns(row["prompt"], "prompt"), row.get("tools"), "tools")',
            'prompt = turns(row["prompt"], "prompt")',
        ),
    ],
}
"""File and tests -> lines with their mistakes."""
