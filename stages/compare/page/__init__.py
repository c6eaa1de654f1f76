"""The comparison as one HTML file that needs no network: what the template `report.html.j2` shows. No torch.

Texts come from models and data: all that enters the page is escaped, and its policy forbids scripts and network.
"""

import base64
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from schemas.text import visible
from stages.compare import by_source, frontier, plots
from stages.compare.findings import findings
from stages.compare.head_to_head import STARTING_POINTS, Duel, cell, percent
from stages.compare.origin import clock
from stages.compare.page import charts
from stages.compare.page.groups import EXAMPLES, groups
from stages.compare.plots import colours, colours_of
from stages.compare.table import (
    Column,
    Comparison,
    Row,
    caution,
    counted,
    finite,
    kl_cell,
    number,
    shown_columns,
    verdict,
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
    draw = partial(frontier.draw, points) if points else partial(plots.draw, baselines=comparison.baselines)
    # In light and dark, and each once more for a phone, where the wide one's letters would be too small to read.
    pictures = {
        f"{'small_' if small else ''}{'dark' if dark else 'light'}": base64.b64encode(
            draw(table, dark=dark, small=small)
        ).decode()
        for dark in (False, True)
        for small in (False, True)
    }
    method_colour = colours([point["method"] for point in points])
    highest = max((row["judge_score"] for row in table if finite(row, "judge_score")), default=None)
    matrices = [] if points else _matrices(comparison)
    lines, picked = _made(comparison), {"curves": [], "histograms": [], "groups": []}
    if not points:
        picked = _pictures_of(comparison)
    parts = {
        "models": "Models",
        "duels": "Head to head" if matrices else "",
        "gained": "" if points else "Gain and distance",
        "judge": "The judge",
        "spread": "Scores and lengths" if picked["histograms"] else "",
        "training": "Training" if picked["curves"] else "",
        "groups": "Prompts worth a look" if picked["groups"] else "",
        "answers": "Answers",
        "origin": "How they were made" if lines else "",
        "meanings": "What the numbers mean",
    }
    shown = {*range(min(SAMPLES, len(comparison.prompts)))}
    for group in picked["groups"]:
        shown |= {*group.places[:EXAMPLES]}
    measured = [f"{frontier.label(p)}: score {p['judge_score']:.2f}, KL {p['kl_to_reference']:.2f}" for p in points]
    measured = measured or [f"{r['model']}: score {number('judge_score', 2)(r)}, KL {kl_cell(r)}" for r in table]
    return PAGES.get_template("report.html.j2").render(
        vars(comparison),
        several=any(len(point["seeds"]) > 1 for point in points),
        counted=counted(len(comparison.prompts)),
        findings=findings(comparison),
        matrices=matrices,
        caution=caution(len(comparison.prompts)),
        pictures=pictures,
        says=f"Judge score against KL{', by method and beta' if points else ''}. {'; '.join(measured)}",
        points=[{"colour": method_colour[p["method"]], "cells": frontier.cells(p)} for p in points],
        point_head=frontier.HEAD,
        point_note=frontier.BARS,
        columns=columns,
        rows=[
            {
                "model": row["model"],
                "colour": colour[row["model"]],
                "cells": [_cell(column, row, highest) for column in columns],
            }
            for row in table
        ],
        source_head=by_source.HEAD,
        source_note=by_source.NOTE,
        source_lines=by_source.lines(table, comparison.sources),
        shown=comparison.prompts[:SAMPLES],
        answers_of=_answers(comparison, shown, colour),
        contents=[(id, title) for id, title in parts.items() if title],
        examples=EXAMPLES,
        colour_of=colour | {"reward": plots.CURVE_COLOUR},
        made=lines,
        percent=percent,
        **picked,
    )


def _pictures_of(comparison: Comparison) -> dict[str, Any]:
    """What is drawn and picked of single models: of many seeds and betas it would be too much to look at."""
    samples, firsts = comparison.samples, {}
    for name, own in samples.items():
        firsts[name] = [sample for sample in own if sample.draw == 0]
    scores = {name: [sample.score for sample in own] for name, own in samples.items()}
    lengths = {name: [float(sample.length) for sample in own] for name, own in samples.items()}
    ordered = [row["model"] for row in comparison.table if row["model"] in samples]
    shown = [("Judge scores", scores, "score")] if comparison.alone else []
    shown.append(("Lengths", lengths, "tokens"))
    return {
        "curves": [charts.line(one, *curve) for one in comparison.origin.trainings for curve in one.curves],
        "histograms": [
            (title, charts.histograms({name: values[name] for name in ordered}, unit), unit)
            for title, values, unit in shown
        ],
        "groups": groups(firsts, comparison.alone),
    }


def _made(comparison: Comparison) -> list[dict[str, Any]]:
    """A line per training: what it learned from, with which settings, and what that took."""
    return [
        {
            "model": one.model,
            "cells": [
                one.method,
                one.settings,
                one.data or "-",
                f"{one.run.metrics.get('compute/train_tokens', 0):,.0f}",
                clock(one.run.metrics.get("compute/stage_seconds", 0.0)),
                one.run.run_id[:8],
            ],
        }
        for one in comparison.origin.trainings
    ]


def _answers(
    comparison: Comparison, places: Iterable[int], colour: Mapping[str, str]
) -> dict[int, list[dict[str, Any]]]:
    """Number of a prompt -> all models' first answers to it and how each did; nothing where texts are not shown."""
    if not comparison.answers:
        return {}
    models = [row["model"] for row in comparison.table if row["model"] in comparison.answers]
    firsts = {name: [one for one in comparison.samples[name] if one.draw == 0] for name in models}
    shown = {}
    for place in places:
        every = {name: own[place] for name, own in firsts.items()}
        scores = [sample.score for sample in every.values()]
        shown[place] = []
        for name, sample in every.items():
            won = {1.0: "beats SFT", 0.0: "loses to SFT"}.get(sample.win, "level with SFT") if name != "sft" else ""
            best = comparison.alone and sample.score == max(scores) and scores.count(sample.score) == 1
            side = {"model": name, "colour": colour[name], "answer": sample.answer or "", "length": sample.length}
            side |= {"score": sample.score if comparison.alone else None}
            side |= {"verdict": " · ".join(filter(None, ["best score" if best else "", won]))}
            side |= {"mark": {1.0: "better", 0.0: "worse"}.get(sample.win, "soft") if won else "soft"}
            shown[place].append(side)
    return shown


def _cell(column: Column, row: Row, highest: float | None) -> dict[str, Any]:
    """A cell's text; of a win rate with its interval the verdict too, and where on a bar of 120 pixels it lies."""
    text = column.cell(row)
    top = column.title == "Judge score" and highest is not None and row.get("judge_score") == highest
    ends = [f"win_rate_vs_sft{end}" for end in ("_low", "", "_high")]
    if column.cell is not win_rate_cell or not all(finite(row, end) for end in ends):
        return {"text": text, "verdict": "", "bar": [], "top": top}
    return {"text": text, "verdict": verdict(row), "top": False, "bar": [f"{2 + 116 * row[end]:.1f}" for end in ends]}


def _matrices(comparison: Comparison) -> list[dict[str, Any]]:
    """Per temperature: the models but `base`, and a line of cells for each, its win rate against each of them."""
    models = [row["model"] for row in comparison.table if row["model"] != STARTING_POINTS[0]]
    if len(models) < 2:
        return []
    return [
        {
            "temperature": f"{temperature:g}",
            "models": models,
            "lines": [(one, [_duel(duels.get((one, other))) for other in models]) for one in models],
            "reasons": sorted({duel.reason for duel in duels.values() if duel.reason}),
        }
        for temperature, duels in comparison.duels.items()
    ]


def _duel(duel: Duel | None) -> tuple[str, str]:
    """A cell of the matrix, and how it is coloured."""
    return cell(duel), "" if duel is None or not duel.clear else "won" if duel.beats else "lost"
