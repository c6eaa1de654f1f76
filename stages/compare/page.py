"""The comparison as one HTML file that needs no network. No torch.

Texts come from models and data: all that enters the page is escaped, and its policy forbids scripts and network.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from stages.compare.plots import STARTING_POINTS, colours_of, draw, visible
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

SAMPLES, OPEN_SAMPLES = 20, 3


def verdict(row: Row) -> str:
    """`better`, `worse` or `level`: which side of 1/2 the interval of the win rate lies on."""
    if row["win_rate_vs_sft_low"] > 0.5:
        return "better"
    return "worse" if row["win_rate_vs_sft_high"] < 0.5 else "level"


STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --paper: #ffffff; --card: #f7f8fa; --line: #e3e6eb;
  --good: #067a54; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #a0a8b5; --paper: #16181d; --card: #1e2128;
  --line: #333842; --good: #4fd1a1; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
p { max-width: 72ch; margin: 8px 0; }
.soft { color: var(--soft); }
.finding { font-size: 18px; margin: 18px 0; max-width: 68ch; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
thead th { font-weight: 600; font-size: 13px; color: var(--soft); background: var(--card); vertical-align: bottom;
  white-space: normal; line-height: 1.3; min-width: 84px; }
th:first-child { text-align: left; }
td svg { display: block; margin: 4px 0 0 auto; }
.better { color: var(--good); } .worse { color: var(--bad); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
picture img { width: 100%; max-width: 820px; height: auto; display: block; border: 1px solid var(--line);
  border-radius: 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 20px; font-size: 15px; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); max-width: 72ch; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 10px; } }
details { border: 1px solid var(--line); border-radius: 10px; margin: 10px 0; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 12px;
  padding: 0 16px 16px; }
.card { background: var(--card); border-radius: 8px; border-top: 4px solid; padding: 10px 12px; min-width: 0; }
.card header { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 8px; font-size: 13.5px;
  margin-bottom: 6px; }
.card pre { margin: 0; font: inherit; font-size: 14.5px; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 18em; overflow-y: auto; unicode-bidi: isolate; }
""".strip()

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def escape(value: object) -> str:
    """Text for the page: visible, and its markup escaped."""
    return html.escape(visible(value), quote=True)


def render_html(comparison: Comparison, finding: str = "", frontier: str = "") -> str:
    """The whole report as one page: findings, table, picture, what each number means, answers side by side.

    Of a sweep come its own finding and, as markup, its frontier, which takes the place of the picture.
    """
    names = ", ".join(str(row["model"]) for row in comparison.table)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Alignment report: {escape(names)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<h1>Which alignment method did better?</h1>
{_intro(comparison)}
<p class="finding">{escape(finding or headline(comparison.table))} {caution(len(comparison.prompts))}</p>
{frontier}
<h2>The models side by side</h2>
{_table(comparison.table)}
{"" if frontier else _gained(comparison.table)}
<h2>What the numbers mean</h2>
{_meanings(comparison.table)}
<h2>Answers to the same prompts</h2>
{_samples(comparison)}
</main>
</body>
</html>
"""


def _intro(comparison: Comparison) -> str:
    settings = " · ".join(f"{escape(name)}: {escape(value)}" for name, value in comparison.settings.items())
    return (
        "<p>Every aligned model below started from the same fine-tuned model, called SFT, and was then taught from "
        f"preferences by another method. All models answered the same {counted(len(comparison.prompts))}, which "
        "none of them had trained on, under the same random seeds. Judge of the answers: "
        f"{escape(comparison.judge)}.</p>" + (f'<p class="soft">{settings}</p>' if settings else "")
    )


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


def _table(table: Sequence[Row]) -> str:
    columns = shown_columns(table)
    colour = colours_of(table)
    head = "".join(f'<th scope="col" title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in columns)
    body = "\n".join(
        f'<tr><th scope="row">{_name(row["model"], colour)}</th>'
        + "".join(_cell(column, row, colour[row["model"]]) for column in columns)
        + "</tr>"
        for row in table
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr><th scope="col">Model</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _name(model: str, colour: Mapping[str, str]) -> str:
    return f'<span class="swatch" style="background:{colour[model]}"></span>{escape(model)}'


def _cell(column: Column, row: Row, colour: str) -> str:
    text = escape(column.cell(row))
    if column.cell is not win_rate_cell or text == "-" or not bounded(row):
        return f"<td>{text}</td>"
    if row["model"] in STARTING_POINTS:
        return f"<td>{text}{_interval(row, colour)}</td>"
    found = verdict(row)
    note = {"better": "clearly better than SFT", "worse": "clearly worse than SFT"}.get(
        found, "no clear difference from SFT"
    )
    return f'<td title="{note}"><span class="{found}">{text}</span>{_interval(row, colour)}</td>'


def _interval(row: Row, colour: str) -> str:
    """The win rate and its interval drawn on a line from 0 to 100 %, with a mark at 50 %."""
    low, mid, high = (2 + 116 * row[key] for key in ("win_rate_vs_sft_low", "win_rate_vs_sft", "win_rate_vs_sft_high"))
    return (
        '<svg width="120" height="10" viewBox="0 0 120 10" aria-hidden="true">'
        '<path d="M2 5H118M60 1V9" stroke="currentColor" stroke-opacity=".25"/>'
        f'<path d="M{low:.1f} 5H{high:.1f}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{mid:.1f}" cy="5" r="4" fill="{colour}"/></svg>'
    )


def _gained(table: Sequence[Row]) -> str:
    points = "; ".join(f"{r['model']}: score {number('judge_score', 2)(r)}, KL {kl_cell(r)}" for r in table)
    return f"""<h2>What was gained, and at what distance</h2>
<p class="soft">Higher is better; farther right is farther from the SFT model. Bars are 95 % intervals. The best
place is the upper left: much gained, little lost of what the model was before.</p>
{picture(draw(table), draw(table, dark=True), f"Judge score against KL. {points}")}"""


def picture(light: bytes, dark: bytes, says: str) -> str:
    """Markup of a PNG for light and one for dark pages; `says` tells the same in words."""
    light_data, dark_data = (base64.b64encode(data).decode() for data in (light, dark))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark_data}">'
        f'<img src="data:image/png;base64,{light_data}" alt="{escape(says)}"></picture>'
    )


def _meanings(table: Sequence[Row]) -> str:
    lines = (f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in shown_columns(table))
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _samples(comparison: Comparison) -> str:
    if not comparison.answers:
        return '<p class="soft">Prompts and answers are not shown: log_text is false.</p>'
    models = [row["model"] for row in comparison.table if row["model"] in comparison.answers]
    colour = colours_of(comparison.table)
    blocks = [
        f'<p class="soft">The first {min(SAMPLES, len(comparison.prompts))} of {len(comparison.prompts)} prompts, in '
        "the order of the data: none was picked by hand.</p>"
    ]
    for i, prompt in enumerate(comparison.prompts[:SAMPLES]):
        cards = "\n".join(_card(model, comparison.answers[model][i], colour) for model in models)
        opened = " open" if i < OPEN_SAMPLES else ""
        blocks.append(
            f'<details{opened}><summary dir="auto">{escape(prompt)}</summary>\n'
            f'<div class="cards">\n{cards}\n</div></details>'
        )
    return "\n".join(blocks)


def _card(model: str, sample: Mapping[str, Any], colour: Mapping[str, str]) -> str:
    answer = sample["answer"]
    text = escape(answer) if answer.strip() else '<em class="soft">(empty)</em>'
    notes = f"score {sample['score']:.2f} · {sample['length']} tokens"
    return (
        f'<article class="card" style="border-color:{colour[model]}"><header><strong>{escape(model)}</strong>'
        f'<span class="soft">{notes}</span></header><pre dir="auto">{text}</pre></article>'
    )
