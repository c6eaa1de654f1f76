"""The command line. `alignflow --help` lists the commands.

Imports of Prefect, MLflow and pydantic stand inside the commands: together they take seconds, and help should not.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from schemas.config import PipelineConfig

app = typer.Typer(
    name="alignflow",
    help="Align a language model with PPO, DPO and KTO, and see which is better.",
    epilog="Start with: alignflow run demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set align.dpo.beta=0.2. Can be repeated."),
]


BY_THEMSELVES = {"run", "sweep", "stage", "validate", "presets", "ui", "up"}
"""Commands that need no server, and use one only where the environment or the config's pools say so."""


@app.callback()
def before(context: typer.Context) -> None:
    """Let the other commands use what `alignflow up` or `ui` has running, as if its addresses were exported."""
    if context.invoked_subcommand not in BY_THEMSELVES:
        from flows.servers.address_file import adopt

        adopt()


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="A preset's name, or a YAML file.")],
    overrides: Overrides = [],  # noqa: B006 - typer reads it and changes nothing
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan without running anything.")] = False,
) -> None:
    """Run the whole pipeline: data checks, SFT, reward model, PPO, DPO, KTO, evaluation, comparison.

    Results of earlier runs with the same settings and data are reused.

    Examples:

    - alignflow run demo
    - alignflow run demo --set align.dpo.beta=0.2
    - alignflow run smollm2 --set data.preference.path=pairs.jsonl --dry-run
    - alignflow run my.yaml
    """
    from flows.planning import config_file

    plan = config_file.load(config, overrides)
    use_servers(plan.config)
    if dry_run:
        from flows.planning.dry_run import outlook

        print(outlook(plan))
        return
    from flows import pipeline

    pipeline.run(plan)


@app.command()
def retrain(
    config: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="A preset's name, or a YAML file.")],
    overrides: Overrides = [],  # noqa: B006 - typer reads it and changes nothing
    force: Annotated[bool, typer.Option("--force", help="Train even if nothing changed.")] = False,
) -> None:
    """Train if data or config changed since the champion was trained, and promote the model if it passes the gate.

    Ends as Unchanged, Promoted or Rejected (exit code 0), or with a conflict or a problem.

    Examples:

    - alignflow retrain my.yaml
    - alignflow retrain my.yaml --set promote.candidate=dpo
    """
    from flows import retrain as flow

    flow.run(config, overrides, force)


@app.command()
def rollback(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Registered model; default the only one with a champion.")
    ] = None,
) -> None:
    """Restore the previous champion. A version that was rolled back is not promoted again.

    Examples:

    - alignflow rollback
    - alignflow rollback my-assistant
    """
    from flows.results import registry

    bad, restored = registry.rollback(model)
    print(f"restored {restored} as champion; rolled back version {bad.number}")


@app.command()
def lineage(
    what: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, a model of the last run (dpo); or a data file, or a sha256.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """From a model back to the rows it was trained on; from a data file to every model that saw it.

    Examples:

    - alignflow lineage models:/my-assistant@champion
    - alignflow lineage dpo --json
    - alignflow lineage pairs.jsonl
    """
    from flows.results import lineage as trace

    tree = trace.lineage(what)
    print(trace.as_json(tree) if json else trace.as_text(tree))


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="A preset's name, or a YAML file.")],
    methods: Annotated[str, typer.Option(help="Comma-separated methods.")] = "dpo,kto,ppo",
    beta: Annotated[
        str, typer.Option(help="Comma-separated strengths of the pull to the reference; for PPO this is kl_coef.")
    ] = "0.05,0.1,0.3",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of the alignment runs.")] = "0,1,2",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training tokens of every variant; default: the smallest number that any method would use."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The tag `sweep` of the runs; default: the config's name.")] = None,
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan without running anything.")] = False,
) -> None:
    """Run methods x beta x seeds from one SFT model, and show judge score against distance with bars over the seeds.

    All variants train on the same number of tokens. A beta or seed that is added later runs alone: the rest is reused.

    Examples:

    - alignflow sweep demo --methods dpo,kto,ppo --beta 0.05,0.1,0.3 --seeds 0,1,2
    - alignflow sweep my.yaml --methods dpo --beta 0.01,0.1 --tokens 2000000 --dry-run
    """
    from flows.planning import sweep as sweeping

    plan = sweeping.load(config, overrides, methods, beta, seeds, tokens, name)
    use_servers(plan.config)
    if dry_run:
        from flows.planning.dry_run import outlook

        print(outlook(plan))
        return
    from flows import pipeline

    print(sweeping.tokens_line(plan.config, pipeline.run(plan)))


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset's YAML, to start a file of your own.")] = None,
) -> None:
    """List the presets, or print one.

    Examples:

    - alignflow presets
    - alignflow presets demo > my.yaml
    """
    from flows.planning import config_file

    if name is not None:
        print(config_file.find(name).read_text(), end="")
        return
    for preset, file in config_file.presets().items():
        print(f"{preset:12} {config_file.headline(file)}")


@app.command()
def validate(
    path: Annotated[str, typer.Argument(help="JSONL, JSONL.gz, Parquet or CSV file, or hub:NAME.")],
    kind: Annotated[str, typer.Option(help="What a row is: sft, preference, ranking, feedback or prompt.")],
    out: Annotated[Path, typer.Option(help="Folder for the clean rows, the quarantine and the report.")],
    columns: Annotated[list[str], typer.Option(metavar="OURS=THEIRS", help="A column's name in the file.")] = [],  # noqa: B006
    model: Annotated[Path | None, typer.Option(help="Model folder whose tokenizer tells what is too long.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Data folder whose held-out prompts must not leak.")] = None,
    max_bad: Annotated[float | None, typer.Option(help="Share of bad rows above which the data is refused.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens above which a row is too long; with --model.")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Share of prompts to hold out.")] = None,
    gold_fraction: Annotated[float | None, typer.Option(help="Share of prompts for the gold reward model.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N rows.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a Hugging Face dataset.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a Hugging Face dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face dataset.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: rows, kept, quarantined, reasons.")
    ] = False,
) -> None:
    """Check a data file without training anything. Exits 0, or 65 when the data is refused.

    Examples:

    - alignflow validate pairs.jsonl --kind preference --out checked
    - alignflow validate answers.csv --kind sft --columns prompt=question --columns response=answer --out checked
    - alignflow validate pairs.jsonl --kind preference --out checked --json
    """
    from flows.cli.options import check_data

    given = {"kind": kind, "max_bad": max_bad, "max_length": max_length, "eval_fraction": eval_fraction}
    given |= {"gold_fraction": gold_fraction, "limit": limit, "revision": revision, "subset": subset, "split": split}
    check_data(columns, model, evaluation, out, path=path, **given)
    named = {name.replace("_", "-"): value for name, value in given.items()}
    named |= {"out": out, "columns": columns, "model": model, "evaluation": evaluation, "json": json}
    forward("stages.commands.validate", [path], named)


@app.command()
def generate(
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
) -> None:
    """Let a model write several answers per prompt, for people (or a judge) to rank.

    The ranked file is data of kind `ranking`.

    Examples:

    - alignflow generate sft prompts.jsonl --answers 4 --out to_rank.jsonl
    - alignflow validate to_rank.jsonl --kind ranking --out checked
    """
    from flows.results.lookup import model as find

    named = {"model": find(model).folder, "prompts": prompts, "out": out, "answers": answers, "judge": judge}
    named |= {"noise": noise, "max-new-tokens": max_new_tokens, "temperature": temperature}
    forward("stages.commands.generate", [], named | {"limit": limit, "seed": seed})


@app.command()
def stage(
    name: Annotated[
        str, typer.Argument(help="base, validate, sft, generate, reward, budget, align, evaluate, compare or promote.")
    ],
    request: Annotated[Path, typer.Argument(help="The request, JSON; `config.json` of any run in MLflow is one.")],
) -> None:
    """Run a single stage from its request. Writes result.json beside it.

    Example:

    - alignflow stage sft request.json
    """
    forward("stages", [name, str(request)], {})


@app.command()
def compare(
    pipeline: Annotated[
        str | None, typer.Argument(metavar="[PIPELINE_RUN]", help="A pipeline run's id, or its config's name.")
    ] = None,
) -> None:
    """Print the table of the last pipeline run, and the path of its report.

    Examples:

    - alignflow compare
    - alignflow compare demo
    """
    from flows.results.lookup import comparison

    found = comparison(pipeline)
    print(f"pipeline run {found.pipeline_run}\n")
    print((found.folder / "table.txt").read_text())
    print(f"report: {found.folder / 'report.html'}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A name in the last run (dpo), models:/NAME@ALIAS or runs:/ID/model.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
) -> None:
    """Write a model to a folder that plain transformers loads, with a model card.

    Examples:

    - alignflow export dpo --out my-model
    - alignflow export models:/assistant@champion --out my-model
    """
    from flows.results.export import export as write

    print(f"{model} is in {write(model, out)}, with a model card in README.md")


@app.command()
def chat(
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

    named: dict[str, Any] = {"model": find(model).folder, "name": model}
    if versus is not None:
        named |= {"versus": find(versus).folder, "versus-name": versus}
    named |= {"system": system, "temperature": temperature, "seed": seed, "max-new-tokens": max_new_tokens}
    forward("stages.commands.chat", [], named)


@app.command()
def ui(
    mlflow_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default 5000, or a free one.")] = None,
    prefect_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default 4200, or a free one.")] = None,
) -> None:
    """Start MLflow (models and numbers) and Prefect (runs) on this machine, until Ctrl-C.

    Example:

    - alignflow ui
    """
    from flows.servers.up import up as start

    start([], mlflow_port=mlflow_port, prefect_port=prefect_port)


@app.command()
def up(
    pools: Annotated[list[str], typer.Option("--pool", help="Work pool to run a worker for. Can be repeated.")] = [  # noqa: B006
        "cpu",
        "gpu",
    ],
    host: Annotated[
        str, typer.Option(help="Address that the servers listen on; any other than loopback needs passwords.")
    ] = ("127.0.0.1"),
    mlflow_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default 5000, or a free one.")] = None,
    prefect_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default 4200, or a free one.")] = None,
) -> None:
    """Start MLflow, Prefect, work pools and their workers on this machine, until Ctrl-C. Results are kept.

    With PREFECT_API_URL and MLFLOW_TRACKING_URI set, it starts workers alone, for servers elsewhere.

    Examples:

    - alignflow up
    - alignflow up --pool gpu
    - alignflow up --host 0.0.0.0
    """
    from flows.servers.up import up as start

    start(pools, host, mlflow_port, prefect_port)


@app.command()
def deploy(
    file: Annotated[Path | None, typer.Option(help="Default: deploy/prefect.yaml of this project.")] = None,
) -> None:
    """Create or update work pools, deployments and automations on the Prefect server, without questions.

    The server is that of `alignflow up`, or PREFECT_API_URL.

    Example:

    - alignflow deploy
    """
    from flows.servers.deploy import deploy as create

    create(file)


@app.command()
def submit(
    config: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="A preset's name, or a YAML file.")],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Start the deployed pipeline, which a worker runs, and don't wait for it.

    The server is that of `alignflow up`, or PREFECT_API_URL. Files must lie below the worker's ALIGNFLOW_ROOTS; by
    their whole path they need not be on this machine.

    Examples:

    - alignflow submit demo
    - alignflow submit my.yaml --set pools.align=gpu
    """
    from flows.planning import config_file
    from flows.submit import submit as start

    print(start(config_file.load(config, overrides, here=False).config))


def use_servers(config: "PipelineConfig") -> None:
    """Let a run use the servers of `alignflow up` where it needs them: its stages are placed on work pools, or its
    experiment's artifacts lie behind MLflow's server.
    """
    from flows.servers.address_file import adopt, found
    from stages import tracking

    if found() is not None and (config.pools or tracking.behind_server(config.name)):
        adopt()


def forward(module: str, positional: list[str], named: dict[str, Any]) -> None:
    """Run `python -P -m module` with the given options, and exit with its code.

    A process of its own, because stages import torch, which nothing here may.
    """
    command = [sys.executable, "-P", "-m", module, *positional]
    for name, value in named.items():
        values = value if isinstance(value, list) else [value]
        for one in values:
            if one is True:
                command.append(f"--{name}")
            elif one is not None and one is not False:
                command.append(f"--{name}={one}")
    raise typer.Exit(subprocess.run(command).returncode)


def main() -> None:
    """Run the command line; a mistake of the user's becomes a message and an exit code, and no traceback."""
    from schemas.errors import EXIT_CODES, StageError

    os.environ.setdefault("DO_NOT_TRACK", "1")  # read when Prefect is imported
    try:
        app()
    except StageError as error:
        print(f"alignflow: {error}", file=sys.stderr)
        sys.exit(EXIT_CODES[error.status])
    except OSError as error:
        from stages.tracking import home

        place, barred = Path(str(error.filename)), isinstance(error, (PermissionError, NotADirectoryError))
        if place != home() and not (barred and place.is_relative_to(home())):
            raise
        fix = "give a folder that you may write to, with room"
        print(f"alignflow: ALIGNFLOW_HOME = {home()}: cannot be used: {error}. Fix: {fix}", file=sys.stderr)
        sys.exit(EXIT_CODES["refused"])
