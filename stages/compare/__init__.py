"""Stage `compare`: the evaluations of all models in one table, one picture and one HTML page. No torch."""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import refuse
from schemas.stage import Request
from stages.compare import frontier
from stages.compare.page import render_html
from stages.compare.plots import STARTING_POINTS, draw
from stages.compare.table import Comparison, over, render_text
from stages.engine.scoring import metrics
from stages.engine.scoring.evaluation_record import Evaluation, check_comparable, text_of
from stages.runtime.context import StageContext

log = logging.getLogger("alignflow")

LOGGED = ("judge_score", "win_rate_vs_sft", "kl_to_reference")

JUDGES = {
    "rule": "a rule, the demo's programmed ground truth",
    "sentiment": "vaderSentiment, a lexicon that scores how positive a text is",
    "reward": "a reward model that no policy was trained on",
}


def run(context: StageContext) -> dict[str, float]:
    """Compare the evaluations that the inputs bring (model name -> evaluation) and publish `comparison`.

    Raises StageError when there is none, or when they were not made under the same conditions.
    """
    request = context.request
    evaluations = {name: Evaluation.load(context.input(name)) for name in request.inputs}
    comparison = compare(evaluations, variants_of(request), request.log_text)
    log.info("%s", "\n" + text(comparison))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(comparison, folder)
        for file in sorted(folder.iterdir()):
            context.file(file)  # at the run's top, where MLflow's UI shows picture and page at a click
        context.publish("comparison", folder)
    return {f"{key}/{row['model']}": row[key] for row in comparison.table for key in LOGGED}


def variants_of(request: Request) -> Mapping[str, Any]:
    """Of a sweep: model -> its method, beta and seed; of another comparison nothing."""
    variants = request.params.get("variants", {})
    assert isinstance(variants, dict)
    return variants


def compare(
    evaluations: Mapping[str, Evaluation], variants: Mapping[str, Any] | None = None, log_text: bool = True
) -> Comparison:
    """The comparison of evaluations made under the same conditions; raises StageError otherwise.

    Without `log_text`, or where an evaluation has kept no texts, no answers are shown. In a sweep the models stand in
    the order of its variants, and of each method and beta the first seed's answers.
    """
    if not evaluations:
        message = "there is no evaluation to compare."
        fix = "give the outputs `evaluation` of stage evaluate, by the models' names"
        raise refuse("inputs", "none", message, fix, kind="missing_input")
    names = list(evaluations)
    first = evaluations[names[0]]
    prompts = first.prompts
    for name in names[1:]:
        check_comparable(names[0], first.settings, prompts, name, evaluations[name])
    table = sorted((row_of(name, evaluations[name]) for name in names), key=_place)
    if variants:
        place = {model: number for number, model in enumerate([*STARTING_POINTS, *variants])}
        table = [row | variants.get(row["model"], {}) for row in table]
        table.sort(key=lambda row: place.get(row["model"], len(place)))
        unseen = {model for point in frontier.points(table) for model in point["models"][1:]}
        names = [name for name in names if name not in unseen]
    shown = log_text and all(s.answer is not None for name in names for s in evaluations[name].first)
    return Comparison(
        table=table,
        prompts=[text_of(prompt) for prompt in prompts],
        answers={
            name: [
                {"answer": s.answer, "score": s.score, "length": s.length}
                for s in evaluations[name].first
                if s.draw == 0
            ]
            for name in names
        }
        if shown
        else {},
        judge=describe_judge(first.settings["judge"]),
        settings={
            "sampling temperature": f"{first.temperatures[0]:g}",
            "at most": f"{first.settings['max_new_tokens']} new tokens",
            "seed": str(first.settings["seed"]),
        },
    )


def row_of(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """One line of the table: the model's name and its `eval/` metrics, with the judge score's standard error."""
    values = {key.removeprefix("eval/"): value for key, value in evaluation.metrics.items() if key.startswith("eval/")}
    error = metrics.mean_and_error([sample.score for sample in evaluation.first])[1]
    return {"model": name, **values, "judge_score_se": error}


def _place(row: Mapping[str, Any]) -> tuple[int, float, str]:
    """base and sft first, then the best judged."""
    if row["model"] in STARTING_POINTS:
        return STARTING_POINTS.index(row["model"]), 0.0, ""
    return len(STARTING_POINTS), -row["judge_score"], row["model"]


def describe_judge(judge: Mapping[str, Any]) -> str:
    """A judge's config in words."""
    if judge["judge"] == "endpoint":
        return f"the model {judge['model']}, asked which of two answers is better, in both orders"
    return JUDGES[judge["judge"]]


def text(comparison: Comparison) -> str:
    """The table for people, and over how many prompts it is; of a sweep the frontier first."""
    points = frontier.points(comparison.table)
    above = f"{frontier.render_text(points)}\n\n" if points else ""
    return f"{above}{render_text(comparison.table)}\n{over(len(comparison.prompts))}"


def write(comparison: Comparison, folder: Path) -> None:
    """table.json, table.txt (the same for people), reward_kl.png and report.html; of a sweep frontier.json too."""
    table, points = comparison.table, frontier.points(comparison.table)
    (folder / "table.json").write_text(json.dumps(list(table), indent=2), encoding="utf-8")
    (folder / "table.txt").write_text(text(comparison) + "\n", encoding="utf-8")
    if points:
        (folder / "frontier.json").write_text(json.dumps(points, indent=2), encoding="utf-8")
    (folder / "reward_kl.png").write_bytes(frontier.draw(points, table) if points else draw(table))
    (folder / "report.html").write_text(render_html(comparison), encoding="utf-8")
