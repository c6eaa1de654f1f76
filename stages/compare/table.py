"""A comparison as a table: its columns, its text for the terminal, and the caution about too few prompts. No torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.config import EvaluateConfig

Row = Mapping[str, Any]
"""One model's line of the table: `model`, and the metrics by their names without `eval/`; None where there is none."""

ENOUGH_PROMPTS = EvaluateConfig().min_prompts


@dataclass(frozen=True)
class Comparison:
    """All that a report shows. `answers`: model -> its samples, one per prompt, in one order for all models; models
    whose answers are not shown are left out, and without any model no prompt is shown either."""

    table: Sequence[Row]
    prompts: Sequence[str]
    answers: Mapping[str, Sequence[Mapping[str, Any]]]
    judge: str
    settings: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[Row] = ()
    """Where several seeds are compared: `frontier.points`."""
    chosen: str = ""
    """Where the best of the points is chosen by these numbers, a sweep: `tested` if it is measured on other prompts."""


@dataclass(frozen=True)
class Column:
    """A column of the table: how its cell reads, and what it means in one line."""

    title: str
    cell: Callable[[Row], str]
    meaning: str


def finite(row: Row, key: str) -> bool:
    """Whether a row has a finite number of this name."""
    return row.get(key) is not None and math.isfinite(row[key])


def bounded(row: Row) -> bool:
    """Whether a row has the interval of its win rate."""
    return finite(row, "win_rate_vs_sft_low") and finite(row, "win_rate_vs_sft_high")


def number(key: str, digits: int) -> Callable[[Row], str]:
    """Writes row[key] with `digits` decimals, `-` where there is none."""
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"


def percent(key: str) -> Callable[[Row], str]:
    """Writes row[key] as a percentage, `-` where there is none."""
    return lambda row: "-" if row.get(key) is None else f"{100 * row[key]:.0f} %"


def win_rate_cell(row: Row) -> str:
    """The win rate against SFT in percent, with its interval where there is one; `-` without."""
    if row.get("win_rate_vs_sft") is None:
        return "-"
    if not bounded(row):
        return percent("win_rate_vs_sft")(row)
    low, high = row["win_rate_vs_sft_low"], row["win_rate_vs_sft_high"]
    return f"{100 * row['win_rate_vs_sft']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def kl_cell(row: Row) -> str:
    """The distance from the SFT model in nats, with its standard error; `-` without."""
    if row.get("kl_to_reference") is None:
        return "-"
    return f"{row['kl_to_reference']:.2f} ± {row['kl_to_reference_se']:.2f}"


COLUMNS = [
    Column("Judge score", number("judge_score", 2), "Mean score that the judge gave the answers; higher is better."),
    Column(
        "Win rate vs SFT",
        win_rate_cell,
        "Share of prompts on which the judge prefers this model's answer to the SFT model's, ties counted half, with "
        "its 95 % interval. 50 % means no difference; an interval that keeps clear of 50 % is a real one.",
    ),
    Column(
        "At equal length",
        percent("length_controlled_win_rate"),
        "The win rate that is left when the effect of longer or shorter answers is taken out.",
    ),
    Column(
        "KL to SFT",
        kl_cell,
        "How far the model has moved from the SFT model, in nats per answer (mean ± standard error). "
        "Equal gains at a smaller distance are the better bargain.",
    ),
    Column("Length", number("length", 1), "Mean length of an answer in tokens."),
    Column(
        "Distinct-2",
        number("distinct_2", 2),
        "Share of word pairs that are unique over all answers; a sharp fall means the model repeats itself.",
    ),
    Column(
        "Reference NLL",
        number("reference_nll", 2),
        "How surprising the answers are to the SFT model, in nats per token; a sharp rise hints at broken language.",
    ),
    Column(
        "Preference acc.",
        percent("preference_accuracy"),
        "Share of held-out pairs on which the model raised the preferred answer more than the other one, ties half.",
    ),
    Column(
        "Reward score",
        number("reward_score", 2),
        "Mean score by the reward model that PPO was trained on. Rising while the judge's falls means it was gamed.",
    ),
]


def shown_columns(table: Sequence[Row]) -> list[Column]:
    """The columns in which at least one model has a value."""
    return [column for column in COLUMNS if any(column.cell(row) != "-" for row in table)]


def render_text(table: Sequence[Row]) -> str:
    """The table for a terminal, in plain characters."""
    columns = shown_columns(table)
    lines = [["Model", *(column.title for column in columns)]]
    return lay_out(lines + [[str(row["model"]), *(column.cell(row) for column in columns)] for row in table])


def over(prompts: int) -> str:
    """The line under a table: over how many prompts its numbers are, and a caution where these are few."""
    return f"Over {counted(prompts)}; in brackets: 95 % intervals. {caution(prompts)}".strip()


def counted(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


def caution(prompts: int) -> str:
    """What numbers over few prompts cannot tell; nothing where there are enough."""
    if prompts >= ENOUGH_PROMPTS:
        return ""
    return f"With fewer than {ENOUGH_PROMPTS} prompts differences may be chance, whatever the intervals say."


def lay_out(lines: Sequence[Sequence[str]]) -> str:
    """A head and lines of cells as plain text in columns, the first one to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])
