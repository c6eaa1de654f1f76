"""Commands that run something: the whole pipeline, a retraining, a sweep, one stage, or a deployed pipeline."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.child import run_python
from flows.cli.options import AsJson, Config, DryRun, Overrides, Quiet, Verbose, loudness, show_json, show_text

if TYPE_CHECKING:
    from flows.execution.live import Loudness
    from flows.planning.plan import Plan
    from schemas.stage import Result


def run(
    config: Config,
    seeds: Annotated[
        str | None, typer.Option(help="Comma-separated seeds: every method is trained once per seed.")
    ] = None,
    overrides: Overrides = [],
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage and what it needs: --until sft.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline: data checks, SFT, reward model, PPO, DPO, KTO, evaluation, comparison.

    Results of earlier runs with the same settings and data are reused. One seed says something of these models; only
    several say something of the methods.

    Examples:

    - alignflow run demo
    - alignflow run demo --seeds 0,1,2
    - alignflow run demo --set align.dpo.beta=0.2
    - alignflow run smollm2 --set data.preference.path=pairs.jsonl --dry-run
    - alignflow run my.yaml --until sft
    """
    from flows.planning import config_file, sweep

    if seeds is not None:
        overrides = [*overrides, f"seeds={sweep.numbers('--seeds', seeds, int)}"]
    _run(config_file.load(config, overrides), overrides, dry_run, as_json, loudness(quiet, verbose), until)


def retrain(
    config: Config,
    overrides: Overrides = [],
    force: Annotated[bool, typer.Option("--force", help="Train even if nothing changed.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train if data or config changed since the champion was trained, and promote the model if it passes the gate.

    Ends as Unchanged, Promoted or Rejected (exit code 0), or with a conflict or a problem.

    Examples:

    - alignflow retrain my.yaml
    - alignflow retrain my.yaml --set promote.candidate=dpo
    """
    from flows import retrain as flow
    from flows.execution import live
    from schemas.text import show

    with live.watched(loudness(quiet, verbose)):
        outcome = flow.run(config, overrides, force)
    if as_json:
        version, decision = outcome.version and str(outcome.version), outcome.decision
        about = {"outcome": outcome.ending, "message": outcome.message, "version": version}
        return show_json(about | {"decision": decision and decision.model_dump(mode="json")})
    show(f"{outcome.ending}: {outcome.message}")


def sweep(
    config: Config,
    methods: Annotated[str, typer.Option(help="Comma-separated methods.")] = "dpo,kto,ppo",
    beta: Annotated[
        str, typer.Option(help="Comma-separated strengths of the pull to the reference; for PPO this is kl_coef.")
    ] = "0.05,0.1,0.3",
    learning_rate: Annotated[
        str | None, typer.Option(help="Comma-separated learning rates; default: each method's own in the config.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of the alignment runs.")] = "0,1,2",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training tokens of every variant; default: the smallest number that any method would use."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The tag `sweep` of the runs; default: the config's name.")] = None,
    overrides: Overrides = [],
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run methods x beta (x learning rate) x seeds from one SFT model; show judge score against distance.

    All variants train on the same number of tokens. A beta, rate or seed that is added later runs alone: the rest is
    reused.

    Examples:

    - alignflow sweep demo --methods dpo,kto,ppo --beta 0.05,0.1,0.3 --seeds 0,1,2
    - alignflow sweep my.yaml --methods dpo --beta 0.1 --learning-rate 1e-6,3e-6
    - alignflow sweep my.yaml --methods dpo --beta 0.01,0.1 --tokens 2000000 --dry-run
    """
    from flows.planning import sweep as sweeping
    from schemas.text import show

    plan = sweeping.load(config, overrides, methods, beta, seeds, tokens, name, learning_rate)
    results = _run(plan, [f"sweep={plan.config.sweep}", *overrides], dry_run, as_json, loudness(quiet, verbose))
    if results is not None and not as_json:
        show(sweeping.tokens_line(plan.config, results))


def stage(
    name: Annotated[
        str,
        typer.Argument(
            help="base, validate, sft, generate, reward, budget, align, evaluate, baselines, compare or promote."
        ),
    ],
    request: Annotated[Path, typer.Argument(help="The request, JSON; `config.json` of any run in MLflow is one.")],
) -> None:
    """Run a single stage from its request. Writes result.json beside it.

    Example:

    - alignflow stage sft request.json
    """
    raise typer.Exit(run_python("stages", name, request))


def submit(
    config: Config,
    overrides: Overrides = [],
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the run ends, and print what came out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start the deployed pipeline, which a worker runs. Without --wait this ends as soon as the run is there.

    The server is that of `alignflow up`, or PREFECT_API_URL. Files must be below the worker's ALIGNFLOW_ROOTS; by
    their whole path they need not be on this machine. Ctrl-C ends the wait, and not the run. Exit codes of --wait are
    those of `run`; 75 means stopped or cancelled.

    Examples:

    - alignflow submit demo
    - alignflow submit demo --wait
    - alignflow submit my.yaml --set pools.align=gpu
    """
    from flows import submit as deployed
    from flows.execution import live
    from flows.planning import config_file
    from flows.results import announce, history, lookup
    from schemas.text import show

    planned, began = config_file.load(config, overrides, here=False), time.monotonic()
    name = planned.config.name
    flow_run, page = deployed.submit(planned.config, overrides)
    run = str(flow_run.id)
    if not wait:
        return show_json({"run": run, "name": name, "page": page}) if as_json else show(f"{name}: {page}")
    show(f"{name}: {page}", sys.stderr)
    with live.watched("usual"):
        live.expect(planned.nodes, history.usual_seconds(name))
        deployed.wait(flow_run, page)
    summary = announce.summary(run, name, lookup.of_run(run), time.monotonic() - began)
    if as_json:
        show_json(summary.as_json() | {"page": page})
    elif summary.results:
        show_text(summary.text)
    else:
        show(
            f"{name}: done. Its results are in the MLflow of its workers. "
            "Fix: set MLFLOW_TRACKING_URI to that server to see them here."
        )


def _run(
    plan: "Plan",
    changed: Sequence[str],
    dry_run: bool,
    as_json: bool,
    loudness: "Loudness",
    until: str | None = None,
) -> "dict[str, Result] | None":
    """Run a plan, print what came out and return its results; or print what it would do.

    It uses the servers of `alignflow up` where it needs them: its stages are placed on work pools, or its experiment's
    artifacts are behind MLflow's server.
    """
    from flows.planning.nodes import until as nodes_until
    from flows.servers import address_file
    from stages import tracking

    plan = plan if until is None else nodes_until(plan, until)
    if address_file.found() is not None and (plan.config.pools or tracking.behind_server(plan.config.name)):
        address_file.adopt()
    if dry_run:
        from flows.planning.dry_run import as_json as planned
        from flows.planning.dry_run import outlook
        from schemas.text import show

        show_json(planned(plan)) if as_json else show(outlook(plan))
        return None
    from flows import pipeline
    from flows.execution import live
    from flows.results import announce

    began = time.monotonic()
    with live.watched(loudness):
        finished = pipeline.run(plan, changed, until)
    summary = announce.summary(finished.run, plan.config.name, finished.results, time.monotonic() - began)
    if as_json:
        show_json(summary.as_json())
    else:
        show_text(summary.text)
    return finished.results
