"""Whether what is left of the rows will do: too much may be bad, nothing may be left, or too little is held out."""

import logging
import re

import polars as pl

from schemas.config.data import MixtureParams, ValidateParams
from schemas.errors import StageError, refuse
from schemas.source import File, data_source
from schemas.text import listed, one_line, short
from stages.validate.checks.table_checks import IN_ANOTHER
from stages.validate.context import Context
from stages.validate.forms.cells import ROLES
from stages.validate.forms.column_advice import KNOWN
from stages.validate.quarantine import Quarantine
from stages.validate.readers.files import how_to_convert

log = logging.getLogger("alignflow")


def refusal(frame: pl.DataFrame, context: Context, quarantine: Quarantine) -> StageError | None:
    """Why the rows of one source cannot be used; None when they can."""
    params, bad = context.params, quarantine.bad
    share = bad / context.read
    usable = frame.filter(pl.col("winners").list.len() > 0) if params.kind == "ranking" else frame
    if share <= params.max_bad and usable.height:
        return None
    if frame.height and not usable.height and "all_tied" not in quarantine.notes:
        return _unranked(frame.height, context, quarantine)
    if not frame.height and quarantine.reasons.get(IN_ANOTHER, 0) == context.read - bad > 0:
        message = f"{one_line(params.path)}: the sources before it have all of its rows that are not bad"
        return StageError(f"{message}.", kind="nothing_left", fix="take it out, or put it before the others")
    counts = f"{one_line(params.path)}: {bad} of {context.read} rows ({share:.1%}) are bad"
    if not frame.height:
        message = f"{counts}: nothing is left"
    elif not usable.height:
        message = f"{counts}, and none of the other {frame.height} prefers one answer to another: nothing is left"
    else:
        message = f"{counts}, more than max_bad = {params.max_bad:.1%}"
    checks = quarantine.checks.most_common(3)
    most = ", ".join(_check(column, reason, n, quarantine) for (column, reason), n in checks)
    rest = f" (the first {quarantine.listed} entries)" if quarantine.left_out else ""
    failed = f"most frequent: {most}. See {quarantine.file}{rest}" if most else "no check failed"
    room = context.codec.positions if context.codec is not None else None
    few = room is not None and room < context.params.max_length  # they, and not max_length, say what is too long
    if few and any(reason == "too_long" for (_, reason), _ in checks):
        failed += f"; the model has {room} positions, fewer than max_length = {params.max_length}"
        fix = f"give rows of at most {room} tokens, or a model with more positions"
        return StageError(f"{message}; {failed}.", kind="bad_data" if usable.height else "nothing_left", fix=fix)
    kind, fix = "nothing_left" if not usable.height else "bad_data", "fix the rows"
    if checks:
        (column, reason), _ = checks[0]
        fix = _fix(column, reason, context)
    if usable.height:
        fix += ", or raise max_bad: the rows that are bad are left out"
    source, counts_of = data_source(params.path), quarantine.reasons
    halves = any(_HALF.search(text) for (_, reason), text in quarantine.examples.items() if reason == "not_unicode")
    if isinstance(source, File) and 2 * counts_of.get("not_unicode", 0) > bad and not halves:
        kind, fix = "not_utf8", how_to_convert(source.path)
    if 2 * (counts_of.get("unknown_tokens", 0) + counts_of.get("equal_tokens", 0)) > bad:
        fix = "take a model whose tokenizer knows these texts: it does not tell them apart"
    return StageError(f"{message}; {failed}.", kind=kind, fix=fix)


_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Half a character that JSON escapes stand for; a byte that is not UTF-8 is one of the others."""
_ALLOWED = {
    "unknown_role": f"rename the role: user, assistant, system, or another name of theirs ({', '.join(ROLES)})",
    "not_text": "give a text, or a list of messages with `role` and `content`",
    "not_a_message": 'write each message as {"role": "user", "content": "..."}',
    "not_a_list": "give a list",
    "malformed_json": "write valid JSON: an object on each line, a list in a column of lists",
    "not_a_number": "give a number",
    "tools": "write calls as `tool_calls` of the assistant's message, and results as messages of role `tool`",
    "tools_not_a_list": "give `tools` as a list of functions, or as JSON of one",
    "broken_tools": "write `tools` as JSON",
    "not_a_tool": 'write each tool as {"type": "function", "function": {"name": ..., "parameters": {...}}}',
    "two_lists_of_tools": "give the tools in one column: `tools`",
    "tools_in_a_message": "give the tools in a column of their own, beside the messages",
    "broken_tool_calls": "write the calls as JSON",
    "not_a_tool_call": 'write each call as {"type": "function", "function": {"name": ..., "arguments": {...}}}',
    "two_kinds_of_calls": "keep `tool_calls` and take `function_call` out",
    "broken_arguments": "write the arguments as a JSON object",
    "unknown_key_of_a_call": "name what a call hands over `arguments`, and take the other keys out of it",
    "arguments_not_an_object": 'write the arguments as an object: {"city": "Paris"}',
    "calls_of_another_role": "let the assistant alone call tools",
    "not_a_tool_result": "give `name` and `tool_call_id` of a result as texts",
    "calls_in_text": "give calls that were rendered into the text as `tool_calls` of the assistant's message",
    "result_without_call": "put results right behind the assistant's message whose `tool_calls` they answer",
    "call_without_result": "give each call its result, a message of role `tool`, before anybody else speaks",
    "result_of_another_call": "give each result the `tool_call_id` of a call right before it",
    "answer_is_a_call": "take out the rows whose judged answers call tools: only kind sft learns calls",
    "tools_left_out": "set model.chat_template to one that writes tools, or use a model that was made for them",
    "unknown_weight": "give the assistant's messages weight 0 or 1",
    "has_image": "take out the rows with images: only text is read",
    "rendered_template": "give the conversations as they were before a chat template was applied, as lists of messages",
    "not_a_transcript": "give the conversations as lists of messages with `role` and `content`",
    "prompts_differ": "give both answers after the same conversation; they may differ in the last turn alone",
    "not_learned": "take out the rows whose last answer has weight 0, or set sft.learn: all where earlier turns have 1",
    "template_refuses": "take out what it refuses (a system message, turns out of turn), or use another model",
    "no_answer": "end every conversation with the assistant's answer",
    "roles_out_of_order": "let user and assistant speak in turn, the user first, after one system message at most",
    "not_a_permutation": "name every answer once in each order; a list within it is a tie",
    "not_a_comparison": 'write each comparison as {"a": 0, "b": 1, "winner": 0}, answers by their numbers from 0',
    "wrong_number_of_cells": 'put cells that hold separators or quotes in double quotes, a quote inside as ""',
    "unknown_answer": "name answers by their numbers, from 0",
    "not_unicode": "take out half characters such as \\ud83d, or write both halves",
    "two_system_messages": "keep one system message: in the conversation, or in a column of its own",
}
"""Reason -> what is allowed in its place."""
_ELSEWHERE = ("missing", "not_text", "not_a_list", "not_a_number", "empty")
"""Reasons that another column may cure."""


def _check(column: str, reason: str, count: int, quarantine: Quarantine) -> str:
    """A check that failed, how often, and the first value that it found."""
    name = f"{column}: {reason} ({count})" if column else f"{reason} ({count})"
    example = quarantine.examples.get((column, reason))
    return name if example is None else f"{name}, such as {short(example)}"


def _fix(column: str, reason: str, context: Context) -> str:
    """What to do about the check that fails most often."""
    free = [name for name in context.unread if "[]" not in name]
    if reason in _ELSEWHERE and column in KNOWN[context.params.kind] and free:
        mapping = f"--columns {column}=NAME"
        return f"{_ALLOWED.get(reason, 'fix the rows')}, or map another column (`{mapping}`: {listed(free)})"
    return _ALLOWED.get(reason, "fix the rows or map the right columns")


def _unranked(rows: int, context: Context, quarantine: Quarantine) -> StageError:
    """The answers wait for people to rank them."""
    columns, bad = {*context.columns, *context.params.columns}, len(quarantine.rows)
    column = next(name for name in ("order", "ranks", "scores", "comparisons") if name in columns)
    how = " (numbers of the answers from 0, best first)" if column == "order" else ""
    rest = f"; the other {bad} are bad: see {quarantine.file}" if bad else ""
    message = (
        f"{one_line(context.params.path)}: no line has {'an order' if column == 'order' else column} yet: "
        f"nobody has ranked the answers of {rows} of {context.read} lines{rest}."
    )
    return StageError(message, kind="not_ranked", fix=f"fill in `{column}` on each line{how}")


def few_held_out(frame: pl.DataFrame, params: ValidateParams | MixtureParams, name: str) -> StageError | None:
    """There would be too few prompts to evaluate on; found here, nothing has been trained yet. Where `few_prompts` is
    `warn`, a warning and None.

    `frame`: all rows, with column `part`; `name`: of the data, for people.
    """
    prompts = frame["prompt_id"].n_unique()
    for part, least in {"eval": params.min_eval_prompts, "test": params.min_test_prompts}.items():
        held_out = frame.filter(pl.col("part") == part)["prompt_id"].n_unique()
        if held_out < least:
            where = "held out" if part == "eval" else "in the test part"
            share = f"{one_line(name)}: {held_out} of {prompts} prompts are {where}"
            fix = f"raise {part}_fraction, give more rows or data.evaluation, or lower evaluate.min_prompts"
            if part == "eval":
                fix += " (and promote.gate.prompts_min, where the config has promote)"
            if params.few_prompts == "warn" and held_out > 0:
                log.warning("%s, %d are asked for: differences will be hard to tell. Fix: %s", share, least, fix)
                continue
            message = f"{share}, too few to evaluate on."
            return refuse("evaluate.min_prompts", least, message, fix, kind="few_prompts")
    return None
