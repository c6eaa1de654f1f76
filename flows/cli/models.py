"""Commands for the models that runs have left: export, chat, trace back, roll back."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.child import start
from flows.cli.options import Annotator, AsJson, named, show_json


def rollback(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Registered model; default the only one with a champion.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore the previous champion. A version that was rolled back is not promoted again.

    Examples:

    - alignflow rollback
    - alignflow rollback my-assistant
    """
    from flows.results import registry
    from schemas.text import show

    bad, restored = registry.rollback(model)
    if as_json:
        return show_json({"model": restored.model, "champion": restored.number, "rolled_back": bad.number})
    show(f"restored {restored} as champion; rolled back version {bad.number}")


def lineage(
    what: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, a model of the last run (dpo); or a data file, or a sha256.")
    ],
    as_json: AsJson = False,
) -> None:
    """From a model back to the rows it was trained on; from a data file to every model that saw it.

    Examples:

    - alignflow lineage models:/my-assistant@champion
    - alignflow lineage dpo --json
    - alignflow lineage pairs.jsonl
    """
    from flows.results import lineage as trace
    from schemas.text import show

    tree = trace.lineage(what)
    show(trace.as_json(tree) if as_json else trace.as_text(tree))


def export(
    model: Annotated[str, typer.Argument(help="A name in the last run (dpo), models:/NAME@ALIAS or runs:/ID/model.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    as_json: AsJson = False,
) -> None:
    """Write a model to a folder that plain transformers loads, with a model card.

    Examples:

    - alignflow export dpo --out my-model
    - alignflow export models:/assistant@champion --out my-model
    """
    from flows.results.export import export as write
    from schemas.text import show

    folder = write(model, out)
    if as_json:
        return show_json({"model": model, "folder": str(folder)})
    show(f"{model} is in {folder}, with a model card in README.md")


def ab(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model of the run, such as dpo.")],
    other: Annotated[str, typer.Argument(help="Another model of the run, such as sft.")],
    run: Annotated[
        str | None, typer.Option(help="Whose models: a pipeline's name, or a run's id; default the last.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask about N prompts only, drawn by the seed.")] = None,
    annotator: Annotator = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Ask here, without a page in the browser.")] = False,
    open: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the page; default: a free one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed asks in another order.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let people judge two models blind on held-out prompts, and see how far the run's judge agrees with them.

    They see the answers that the evaluation has drawn and judged. Every verdict is saved at once; the same command
    resumes, and several people may judge. The report then shows their verdict beside the judge's.

    Examples:

    - alignflow ab dpo sft
    - alignflow ab dpo kto --limit 50 --annotator anna --terminal
    """
    from flows.planning.requests import people_folder
    from flows.results import ab as contest
    from schemas.commands import AbCommand
    from schemas.text import show

    asked = contest.request_of(run)
    names = contest.ordered(model, other)
    first, second = contest.evaluations(asked, *names)
    out = people_folder(asked.inputs)
    before = contest.results(out)
    values = {"model": names[0], "other": names[1], "first": first, "second": second, "out": out, "run": None}
    try:
        start(context, AbCommand, annotator=named(annotator), **values)
    except typer.Exit as ended:
        if ended.exit_code or contest.results(out) == before:
            raise
    report = contest.refresh(asked)
    if report is None:
        told = "the report does not show it: its judge would have to be asked again"
    else:
        told = f"report    {report}"
    show(told, sys.stderr if as_json else sys.stdout)


def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name in the last run (dpo), a uri, or a model folder.")],
    versus: Annotated[str | None, typer.Option(help="A second model, answering beside the first.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of an answer.")] = None,
) -> None:
    """Talk to a model, or to two side by side.

    Examples:

    - alignflow chat dpo
    - alignflow chat dpo --versus sft
    """
    from flows.results.lookup import model as find
    from schemas.commands import ChatCommand

    other = None if versus is None else str(find(versus).folder)
    start(context, ChatCommand, model=str(find(model).folder), name=model, versus=other, versus_name=versus)
