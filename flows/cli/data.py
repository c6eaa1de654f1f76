"""Commands for data: presets to start from, a check of rows, answers to rank, and people who rank them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flows.cli.child import start
from flows.cli.options import Annotator, AsJson, named, show_json


def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset's YAML, to start a file of your own.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the presets, or print one.

    Examples:

    - alignflow presets
    - alignflow presets demo > my.yaml
    """
    from flows.planning import config_file
    from schemas.text import show

    if name is not None:
        file = config_file.find(name)
        if as_json:
            show_json(config_file.read(file))
        else:
            show(file.read_text().removesuffix("\n"))
        return
    known = {preset: config_file.headline(file) for preset, file in config_file.presets().items()}
    if as_json:
        show_json(known)
    for preset, headline in known.items() if not as_json else ():
        show(f"{preset:12} {headline}")


def schema() -> None:
    """Print the JSON Schema of configs, by which editors complete and check them.

    Editors with YAML's language server look for the file that the first line of a preset names.

    Example:

    - alignflow schema > alignflow.schema.json
    """
    from schemas.config import PipelineConfig

    show_json(PipelineConfig.model_json_schema())


def validate(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(help="JSONL, JSONL.gz, Parquet or CSV file, or hub:NAME; or a config's .yaml file.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="What a row is: sft, preference, ranking, feedback or prompt. Of a config: whose data, such as sft."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the clean rows, the quarantine and the report.")],
    columns: Annotated[list[str], typer.Option(metavar="OURS=THEIRS", help="A column's name in the file.")] = [],
    format: Annotated[
        str | None, typer.Option(help="Public data set whose shape the rows have, such as pku or oasst.")
    ] = None,
    label_map: Annotated[
        list[str], typer.Option(metavar="VALUE=MEANING", help="What a label means: up, down, a, b, tie or skip.")
    ] = [],
    model: Annotated[Path | None, typer.Option(help="Model folder whose tokenizer tells what is too long.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Data folder whose held-out prompts must not leak.")] = None,
    max_bad: Annotated[float | None, typer.Option(help="Share of bad rows above which the data is refused.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens above which a row is too long; with --model.")] = None,
    ngrams: Annotated[
        int | None, typer.Option(help="Count near-duplicates and overlap with the evaluation by N words; 13 is usual.")
    ] = None,
    learn: Annotated[
        str | None, typer.Option(help="The assistant's turns that SFT is to learn: last (the default) or all.")
    ] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Share of prompts to hold out.")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Share of prompts to keep for a last test.")] = None,
    gold_fraction: Annotated[float | None, typer.Option(help="Share of prompts for the gold reward model.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N rows.")] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Digest that the file must have; required at s3://, gs:// or https://.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hugging Face dataset.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a Hugging Face dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face dataset.")] = None,
    as_json: AsJson = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what the folder holds of other data.")] = False,
) -> None:
    """Check a data file without training anything. Exits 0, or 65 when the data is refused.

    Examples:

    - alignflow validate pairs.jsonl --kind preference --out checked
    - alignflow validate answers.csv --kind sft --columns prompt=question --columns response=answer --out checked
    - alignflow validate stars.csv --kind feedback --label-map '<3=down' --label-map '>=3=up' --out checked
    - alignflow validate pairs.jsonl --kind preference --out checked --json
    - alignflow validate my.yaml --kind sft --out checked
    """
    from schemas.commands import ValidateCommand
    from schemas.errors import refuse

    if model is not None and not model.is_dir():
        raise refuse("--model", model, "there is no such folder.", f"give its path as seen from {Path.cwd()}")
    if evaluation is not None and not any((evaluation / "eval").glob("*.parquet")):
        fix = "name the folder that `alignflow validate ... --out` wrote, with prompts held out"
        raise refuse("--evaluation", evaluation, "there are no held-out prompts.", fix)
    if out.exists() and not out.is_dir():
        raise refuse("--out", out, "this is not a folder.", "name a folder, or one that does not exist yet")
    if path.endswith((".yaml", ".yml")):
        _validate_config(context, Path(path), kind)
    meant = [pair.rpartition("=") for pair in label_map]  # a bound has its own: >=4=up
    form = "VALUE=MEANING, such as 5=up or '>=4=up'"
    meanings = _pairs("--label-map", meant, "a value and what it means", form)
    start(context, ValidateCommand, columns=_columns(columns), label_map=meanings)


_OF_THE_COMMAND = {"path", "kind", "out", "model", "evaluation", "as_json", "force"}
"""Options of `validate` that a config does not say."""


def _validate_config(context: typer.Context, file: Path, slot: str) -> NoReturn:
    """Check the data that a config has in a slot, as a run would read and split it. Raises StageError."""
    from flows.planning import config_file
    from flows.planning.explain import validate as checked
    from flows.planning.plan import Planner
    from schemas.commands import MixtureCommand, ValidateCommand
    from schemas.errors import refuse

    config = checked(config_file.read(file))
    slots = [name for name in type(config.data).model_fields if getattr(config.data, name) is not None]
    if slot not in slots:
        message = f"{file} has no data.{slot}."
        raise refuse("--kind", slot, message, f"use one of {', '.join(slots)}" if slots else "set data in it")
    sources = {name: context.get_parameter_source(name) for name in context.params}
    said = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    given = [name for name in said if name not in _OF_THE_COMMAND]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        place = "sft.learn" if given[0] == "learn" else f"data.{slot}"
        fix = f"write it into {place}, or check a file by itself"
        raise refuse(option, context.params[given[0]], "how data is read and split stands in the config.", fix)
    planner = Planner(config, {})
    params = planner.data_params(slot) | planner.held_out_elsewhere()
    params = dict.fromkeys(context.params.keys() - _OF_THE_COMMAND) | params  # which are not given: the config's
    if "sources" in params:
        start(context, MixtureCommand, **params | {"path": None, "kind": None, "config": file, "slot": slot})
    start(context, ValidateCommand, **params)


def _columns(given: Sequence[str]) -> dict[str, str]:
    """`--columns` as our name -> theirs. Raises StageError for what is not such a pair."""
    parts = [pair.partition("=") for pair in given]
    return _pairs("--columns", parts, "a pair of column names", "OURS=THEIRS, such as prompt=question")


def _pairs(option: str, parts: Sequence[tuple[str, str, str]], what: str, form: str) -> dict[str, str]:
    """What an option gives as pairs, each split at its `=`. Raises StageError for one that is none, or is repeated."""
    from schemas.errors import refuse

    found: dict[str, str] = {}
    for left, sign, right in parts:
        if not (left and right):
            raise refuse(option, left + sign + right, f"this is not {what}.", f"write {form}")
        if left in found:
            raise refuse(option, left + sign + right, f"{left} is given twice.", "give each of them once")
        found[left] = right
    return found


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name in the last run (sft), a uri, or a model folder.")],
    prompts: Annotated[str, typer.Argument(help="File of prompts: JSONL, JSONL.gz, Parquet or CSV.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; must not exist yet.")],
    answers: Annotated[int | None, typer.Option(help="Answers per prompt; default 4.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="none (people rank; the default), rule, sentiment, or a reward model's folder.")
    ] = None,
    noise: Annotated[float | None, typer.Option(help="Temperature of Bradley-Terry label noise; default 0.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of an answer; default 64.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; default 1.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N prompts.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write several answers per prompt, for people (or a judge) to rank.

    The ranked file is data of kind `ranking`.

    Examples:

    - alignflow generate sft prompts.jsonl --answers 4 --out to_rank.jsonl
    - alignflow validate to_rank.jsonl --kind ranking --out checked
    """
    from flows.results.lookup import model as find
    from schemas.commands import GenerateCommand

    start(context, GenerateCommand, model=find(model).folder)


def rank(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(help="Prompts with their answers, as `generate` writes them, or pairs: JSONL, Parquet, CSV."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="JSONL file for the rows to train on; default: beside FILE, NAME.ranked.jsonl.")
    ] = None,
    annotator: Annotator = None,
    form: Annotated[
        str | None,
        typer.Option(help="ranking (all answers at once; the default), pairs (every two), or thumbs (each one)."),
    ] = None,
    columns: Annotated[list[str], typer.Option(metavar="OURS=THEIRS", help="A column's name in the file.")] = [],
    terminal: Annotated[bool, typer.Option("--terminal", help="Ask here, without a page in the browser.")] = False,
    open: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the page; default: a free one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed shows the answers in another order.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let people rank answers, blind and shuffled, on a page of this machine; write the rows to train on.

    Every verdict is saved at once, beside the output; the same command resumes. Several people, each with a name, may
    judge the same file: what they say becomes one row per prompt, and the command says how far they agree.

    Examples:

    - alignflow rank to_rank.jsonl
    - alignflow rank to_rank.jsonl --annotator anna --terminal
    - alignflow rank pairs.jsonl --form pairs --output judged.jsonl
    - alignflow rank answers.csv --columns prompt=question --columns responses=outputs --json
    """
    from schemas.commands import RankCommand

    start(context, RankCommand, annotator=named(annotator), columns=_columns(columns))


def label(
    context: typer.Context,
    action: Annotated[str, typer.Argument(help="export or import.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="Prompts with answers; of import, the tool's export as JSON, or with --url a project's number."
        ),
    ],
    to: Annotated[str | None, typer.Option(help="Tool to export to: label-studio.")] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Tool to import from: label-studio, argilla or mlflow.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tasks, or JSONL file for the rows; default: beside FILE.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="ranking (all answers at once; the default) or pairs (every two).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of MLflow: the assessment that counts, where there are several.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed shows the answers in another order.")] = None,
    url: Annotated[
        str | None, typer.Option(help="A running Label Studio, in place of files; its token in LABEL_STUDIO_API_KEY.")
    ] = None,
) -> None:
    """Send answers to Label Studio, or make rows of what people said in Label Studio, Argilla or MLflow.

    Answers go blind and shuffled. What several people said of a prompt becomes one row, as with `rank`.

    Examples:

    - alignflow label export to_rank.jsonl --to label-studio --form pairs
    - alignflow label import project-1.json --from label-studio --out ranked.jsonl
    - alignflow label import 7 --from label-studio --url http://127.0.0.1:8080 --out ranked.jsonl
    - alignflow label import traces.json --from mlflow --name helpful --out thumbs.jsonl
    """
    from schemas.commands import LabelCommand
    from schemas.errors import refuse

    needed, other = ("--to", "--from") if action == "export" else ("--from", "--to")
    given = {"--to": to, "--from": source}
    if action in ("export", "import") and (given[needed] is None or given[other] is not None):
        message = f"{action} needs it, and takes no {other}."
        raise refuse(needed, given[needed], message, f"give {needed} label-studio, and no {other}")
    start(context, LabelCommand)
