"""A comparison as a table: its columns, its text for the terminal, and the caution about too few prompts. No torch."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.config import ENOUGH_PROMPTS
from stages.compare.curve import Gain, Point
from stages.compare.head_to_head import Duel
from stages.compare.origin import Origin
from stages.compare.people import People
from stages.engine.scoring.evaluation_record import Sample

Row = Mapping[str, Any]
"""One model's line of the table: `model`, and the metrics by their names without `eval/`; None where there is none."""

WIDTH = 80  # of a terminal
WIDTHS = (WIDTH, 100, 120)  # for which a table is written down


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
    agreement: str = ""
    """How often the judge is right on held-out pairs, where that is known."""
    duels: Mapping[float, Mapping[tuple[str, str], Duel]] = field(default_factory=dict)
    """By temperature, the evaluations' first one first: (model, other) -> their duel."""
    gains: Mapping[str, Gain] = field(default_factory=dict)
    """Of aligned models over the curve of the baselines, at temperature 1."""
    baselines: Sequence[Point] = ()
    """The SFT model and its baselines, from near to far."""

    sources: Mapping[str, int] = field(default_factory=dict)
    """Where the prompts are a mixture's: name of a source -> its prompts."""
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    """Model -> its samples at the first temperature. They may have no texts."""
    alone: bool = True
    """Whether the judge scores answers by themselves; else it compares them with the SFT model's."""
    doubt: str = ""
    """What this kind of judge cannot be trusted with."""
    people: Sequence[People] = ()
    """What people said of two of the models."""
    origin: Origin = field(default_factory=Origin)
    """How the models were made."""

    @property
    def first_duels(self) -> Mapping[tuple[str, str], Duel]:
        """Those of the first temperature."""
        return next(iter(self.duels.values()), {})


@dataclass(frozen=True)
class Column:
    """A column of the table: how its cell reads, and what it means in one line."""

    title: str
    cell: Callable[[Row], str]
    meaning: str
    short: str = ""
    """Its title in a terminal, where there is room for few columns; empty: it is not among them."""
    brief: Callable[[Row], str] | None = None
    """How its cell reads there, where that is another way."""


def finite(row: Row, key: str) -> bool:
    """Whether a row has a finite number of this name."""
    return row.get(key) is not None and math.isfinite(row[key])


def number(key: str, digits: int) -> Callable[[Row], str]:
    """Writes row[key] with `digits` decimals, `-` where there is none."""
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"


def percent(key: str) -> Callable[[Row], str]:
    """Writes row[key] as a percentage, `-` where there is none."""
    return lambda row: "-" if row.get(key) is None else f"{100 * row[key]:.0f} %"


def verdict(row: Row) -> str:
    """`better`, `worse` or `level` than SFT, head to head; nothing where that is not known."""
    return row.get("verdict", "")


def rate_cell(key: str) -> Callable[[Row], str]:
    """Writes row[key] in percent, with its interval where there is one; `-` without a value."""

    def cell(row: Row) -> str:
        if not finite(row, key):
            return "-"
        if not (finite(row, f"{key}_low") and finite(row, f"{key}_high")):
            return percent(key)(row)
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return f"{100 * row[key]:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"

    return cell


win_rate_cell = rate_cell("win_rate_vs_sft")


def gain_cell(row: Row) -> str:
    """Height above the curve of the baselines with its interval, and a mark where it is not clearly above 0."""
    if not finite(row, "gain"):
        return "-"
    return f"{row['gain']:+.2f} [{row['gain_low']:.2f}, {row['gain_high']:.2f}]{' ' if row['gain_low'] > 0 else '!'}"


def kl_cell(row: Row) -> str:
    """The distance from the SFT model in nats, with its standard error; `-` without."""
    if row.get("kl_to_reference") is None:
        return "-"
    return f"{row['kl_to_reference']:.2f} ± {row['kl_to_reference_se']:.2f}"


COLUMNS = [
    Column(
        "Judge score",
        number("judge_score", 2),
        "Mean score that the judge gave the answers; higher is better.",
        "Judge",
    ),
    Column(
        "Win rate vs SFT",
        win_rate_cell,
        "Share of prompts on which the judge prefers this model's answer to the SFT model's, ties counted half, with "
        "its 95 % interval over prompts. 50 % means no difference. The colour is head to head, corrected for the "
        "number of pairs; it is about this model, and another seed of its method may do otherwise.",
        "Win vs SFT",
    ),
    Column(
        "Over the curve",
        gain_cell,
        "Judge score (or win rate, where the judge only compares) above the best that mixing the baselines gives at "
        "the same distance from SFT: that model at lower temperatures, and the best of n of its answers. Mean of the "
        "paired differences, 95 % interval over prompts. !: not clearly above 0, so that nothing is shown to have "
        "been gained beyond sharpening or selecting.",
        "Over curve",
    ),
    Column(
        "At equal length",
        rate_cell("length_controlled_win_rate"),
        "The win rate with the effect of longer or shorter answers removed, by a logistic fit with the prior N(0, 1) "
        "on that effect, and its 95 % interval over prompts. -: the lengths have shifted together by more than 1.5 "
        "standard deviations, and nothing can be said.",
    ),
    Column(
        "KL to SFT",
        kl_cell,
        "How far the model has moved from the SFT model, in nats per answer (mean ± standard error). "
        "Equal gains at a smaller distance are the better bargain.",
        "KL",
        number("kl_to_reference", 2),
    ),
    Column("Length", number("length", 1), "Mean length of an answer in tokens.", "Length"),
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
    # The win rates at the other temperatures than the first, a column each.
    matches = (re.fullmatch(r"t([0-9.]+(?:e[+-]?[0-9]+)?)/win_rate_vs_sft", key) for row in table for key in row)
    temperatures = list(dict.fromkeys(match[1] for match in matches if match))
    meaning = (
        "The win rate against SFT where both answer at temperature {}: what is left beyond a sharper distribution."
    )
    colder = [
        Column(f"At T = {t}", rate_cell(f"t{t}/win_rate_vs_sft"), meaning.format(t), f"At T={t}") for t in temperatures
    ]
    columns = [*COLUMNS[:2], *colder, *COLUMNS[2:]]
    return [column for column in columns if any(column.cell(row) != "-" for row in table)]


def render_text(table: Sequence[Row], width: int = WIDTH) -> str:
    """The table for a terminal, in plain characters: the columns that fit into its width, the first ones first."""
    columns = [column for column in shown_columns(table) if column.short or width > WIDTH]
    while True:
        lines = [["Model", *(column.short or column.title for column in columns)]]
        for row in table:
            lines.append([str(row["model"]), *((column.brief or column.cell)(row).rstrip() for column in columns)])
        text = lay_out(lines)
        if len(columns) < 2 or len(text.partition("\n")[0]) <= width:
            return text
        columns = columns[:-1]


def over(prompts: int) -> str:
    """The line under a table: over how many prompts its numbers are, and a caution where these are few."""
    return f"Over {counted(prompts)}; in brackets: 95 % intervals over prompts. {caution(prompts)}".strip()


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
