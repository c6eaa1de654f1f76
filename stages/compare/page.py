"""The comparison as one HTML file that needs no network: what the template `report.html.j2` shows. No torch.

Texts come from models and data: all that enters the page is escaped, and its policy forbids scripts and network.
"""

import base64
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from schemas.text import visible
from stages.compare import frontier, plots
from stages.compare.plots import STARTING_POINTS, colours, colours_of
from stages.compare.table import (
    Column,
    Comparison,
    Row,
    bounded,
    caution,
    counted,
    finite,
    kl_cell,
    number,
    shown_columns,
    win_rate_cell,
)

SAMPLES = 20

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: value if hasattr(value, "__html__") else visible(value),  # a macro gives markup
)


def render_html(comparison: Comparison) -> str:
    """The whole report as one page: findings, table, picture, what each number means, answers side by side.

    Of a sweep its frontier takes the place of the picture.
    """
    table, columns, colour = comparison.table, shown_columns(comparison.table), colours_of(comparison.table)
    points = comparison.points
    draw = partial(frontier.draw, points) if points else plots.draw
    light, dark = (base64.b64encode(draw(table, dark=dark)).decode() for dark in (False, True))
    method_colour = colours([point["method"] for point in points])
    measured = [f"{frontier.label(p)}: score {p['judge_score']:.2f}, KL {p['kl_to_reference']:.2f}" for p in points]
    measured = measured or [f"{r['model']}: score {number('judge_score', 2)(r)}, KL {kl_cell(r)}" for r in table]
    return PAGES.get_template("report.html.j2").render(
        vars(comparison),
        counted=counted(len(comparison.prompts)),
        finding=frontier.headline(points, comparison.chosen) if points else headline(table),
        caution=caution(len(comparison.prompts)),
        light=light,
        dark=dark,
        says=f"Judge score against KL{', by method and beta' if points else ''}. {'; '.join(measured)}",
        points=[{"colour": method_colour[p["method"]], "cells": frontier.cells(p)} for p in points],
        point_head=frontier.HEAD,
        point_note=frontier.BARS,
        columns=columns,
        rows=[
            {"model": row["model"], "colour": colour[row["model"]], "cells": [_cell(column, row) for column in columns]}
            for row in table
        ],
        shown=comparison.prompts[:SAMPLES],
    )


def _cell(column: Column, row: Row) -> dict[str, Any]:
    """A cell's text; of a win rate with its interval the verdict too, and where on a bar of 120 pixels it lies."""
    text = column.cell(row)
    if column.cell is not win_rate_cell or text == "-" or not bounded(row):
        return {"text": text, "verdict": "", "bar": []}
    ends = [f"{2 + 116 * row[f'win_rate_vs_sft{end}']:.1f}" for end in ("_low", "", "_high")]
    return {"text": text, "verdict": "" if row["model"] in STARTING_POINTS else verdict(row), "bar": ends}


def verdict(row: Row) -> str:
    """`better`, `worse` or `level`: which side of 1/2 the interval of the win rate is on."""
    if row["win_rate_vs_sft_low"] > 0.5:
        return "better"
    return "worse" if row["win_rate_vs_sft_high"] < 0.5 else "level"


def headline(table: Sequence[Row]) -> str:
    """One or two sentences: the highest win rate, which models are not clearly apart from it, how many beat SFT.

    Two models are clearly apart where their 95 % intervals do not overlap; of those that are not, the one nearest to
    SFT is named.
    """
    aligned = [row for row in table if row["model"] not in STARTING_POINTS]
    rated = [row for row in aligned if finite(row, "win_rate_vs_sft")]
    if not rated:
        return "No aligned model has a win rate yet." if aligned else "No aligned model is among these yet."
    best = max(rated, key=lambda row: row["win_rate_vs_sft"])
    others = [row for row in rated if row is not best]
    with_interval = [row for row in rated if bounded(row)]
    rate = f"{best['model']} has the highest win rate against SFT, {100 * best['win_rate_vs_sft']:.0f} %"
    if len(with_interval) < len(rated):
        return f"{rate}; without all 95 % intervals it cannot be said which models are clearly apart."
    low, high = best["win_rate_vs_sft_low"], best["win_rate_vs_sft_high"]
    rate += f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    level = [row for row in others if row["win_rate_vs_sft_high"] >= low]
    if level:
        rate += f", but is not clearly apart from {_listed(level)}{_nearest([best, *level])}"
    elif others:
        rate += f", clearly above {_listed(others)}, at KL {number('kl_to_reference', 1)(best)}"
    better = sum(verdict(row) == "better" for row in rated)
    models = f"aligned model{'s' if len(rated) > 1 else ''}"
    count = f"{better} of {len(rated)} {models} {'is' if better == 1 else 'are'}" if better else "No aligned model is"
    return f"{rate}. {count} clearly better than SFT."


def _listed(rows: Sequence[Row]) -> str:
    *first, last = [str(row["model"]) for row in rows]
    return f"{', '.join(first)} and {last}" if first else last


def _nearest(rows: Sequence[Row]) -> str:
    """Which of these models is nearest to SFT; empty where a distance is missing."""
    if not all(finite(row, "kl_to_reference") for row in rows):
        return ""
    nearest, *rest = sorted(rows, key=lambda row: row["kl_to_reference"])
    distances = ", ".join(f"{row['model']} {row['kl_to_reference']:.1f}" for row in rest)
    return f"; nearest to SFT of these is {nearest['model']} (KL {nearest['kl_to_reference']:.1f}; {distances})"
