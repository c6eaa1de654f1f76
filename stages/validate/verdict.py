"""Whether what is left of the rows will do: too much may be bad, nothing may be left, or too little is held out."""

import polars as pl

from schemas.errors import StageError, refuse
from schemas.text import one_line
from stages.validate.context import Context
from stages.validate.quarantine import Quarantine


def refusal(frame: pl.DataFrame, context: Context, quarantine: Quarantine) -> StageError | None:
    """Why the rows, with column `part`, cannot be used; None when they can."""
    params, bad = context.params, len(quarantine.rows)
    share = bad / context.read
    usable = frame.filter(pl.col("winners").list.len() > 0) if params.kind == "ranking" else frame
    if share <= params.max_bad and usable.height:
        return _few_held_out(frame, context)
    if frame.height and not usable.height and "all_tied" not in quarantine.notes:
        return _unranked(frame.height, context, quarantine)
    counts = f"{one_line(params.path)}: {bad} of {context.read} rows ({share:.1%}) are bad"
    if not frame.height:
        message = f"{counts}: nothing is left"
    elif not usable.height:
        message = f"{counts}, and none of the other {frame.height} prefers one answer to another: nothing is left"
    else:
        message = f"{counts}, more than max_bad = {params.max_bad:.1%}"
    most = ", ".join(f"{name} ({n})" for name, n in list(quarantine.summary().items())[:3])
    rest = f" (the first {quarantine.listed} entries)" if quarantine.left_out else ""
    failed = f"most frequent: {most}. See {quarantine.file}{rest}" if most else "no check failed"
    if (room := _positions(context)) and "too_long" in most:
        failed += f"; the model has {room} positions, fewer than max_length = {params.max_length}"
        fix = f"give rows of at most {room} tokens, or a model with more positions"
        return StageError(f"{message}; {failed}.", kind="bad_data" if usable.height else "nothing_left", fix=fix)
    kind, fix = (
        ("bad_data", "fix the rows, map the right columns, or raise max_bad")
        if usable.height
        else ("nothing_left", "fix the rows or map the right columns")
    )
    return StageError(f"{message}; {failed}.", kind=kind, fix=fix)


def _positions(context: Context) -> int | None:
    """The model's positions where they, and not max_length, say what is too long."""
    room = context.codec.positions if context.codec is not None else None
    return room if room is not None and room < context.params.max_length else None


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


def _few_held_out(frame: pl.DataFrame, context: Context) -> StageError | None:
    """There would be too few prompts to evaluate on; found here, nothing has been trained yet."""
    params, prompts = context.params, frame["prompt_id"].n_unique()
    for part, least in {"eval": params.min_eval_prompts, "test": params.min_test_prompts}.items():
        held_out = frame.filter(pl.col("part") == part)["prompt_id"].n_unique()
        if held_out < least:
            where = "held out" if part == "eval" else "in the test part"
            message = f"{one_line(params.path)}: {held_out} of {prompts} prompts are {where}, too few to evaluate on."
            fix = f"raise {part}_fraction, give more rows or data.evaluation, or lower evaluate.min_prompts"
            if part == "eval":
                fix += " (and promote.gate.prompts_min, where the config has promote)"
            return refuse("evaluate.min_prompts", least, message, fix, kind="few_prompts")
    return None
