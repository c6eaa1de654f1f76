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


def approve(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Id of the run that waits, or its beginning; or the registered model."),
    ] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Reject the candidate; no alias moves.")] = False,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who decides. Default: user@host.")] = None,
    note: Annotated[str, typer.Option(help="Why; kept with the version.")] = "",
    as_json: AsJson = False,
) -> None:
    """Approve the candidate of a retraining that waits (promote.approval), which makes it the champion; or reject it.

    Examples:

    - alignflow approve
    - alignflow approve 3f2a9c1e --note "read 50 answers"
    - alignflow approve my-assistant --reject
    """
    from flows.gate import approval
    from schemas.text import show

    one = approval.decide(run, not reject, by, note)
    if as_json:
        about = {name: one.tags.get(name) for name in ("approval", "approval.by", "approval.at", "approval.note")}
        return show_json({"model": one.model, "version": one.number, "decision": one.tags["decision"], **about})
    show(f"{one} is the champion" if one.tags["decision"] == "promoted" else f"rejected {one}; no alias has moved")


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
    out: Annotated[Path | None, typer.Option(help="New folder for the model.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Send it to the Hugging Face Hub, where it stays private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: everybody may read it.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, for peft.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="With --adapter: where others find the base it is put on.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(metavar="LLAMA_CPP", help="Also a GGUF file, by the converter in this checkout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model to a folder that plain transformers loads, with a model card; or push it to the Hub.

    Examples:

    - alignflow export dpo --out my-model
    - alignflow export models:/assistant@champion --push my-name/my-model
    - alignflow export dpo --adapter --out my-adapter
    - alignflow export dpo --out my-model --gguf llama.cpp
    """
    from flows.results.export import export as write
    from schemas.text import show

    made = write(model, out, adapter=adapter, base=base, converter=gguf, push=push, public=public)
    sent = made.pushed
    if as_json:
        hub = None if sent is None else {"url": sent.url, "commit": sent.commit, "private": sent.private}
        return show_json({"model": model, "folder": None if made.folder is None else str(made.folder), "hub": hub})
    if made.folder is not None:
        show(f"{model} is in {made.folder}, with a model card in README.md")
    if sent is not None:
        show(f"{model} is at {sent.url} ({'private' if sent.private else 'public'}), commit {sent.commit}")


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
    values = {"model": names[0], "other": names[1], "first": first, "second": second, "out": out, "run": None}
    try:
        start(context, AbCommand, annotator=named(annotator), **values)
    except typer.Exit as ended:
        if ended.exit_code or contest.shown(asked, out):
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per message.")] = False,
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
