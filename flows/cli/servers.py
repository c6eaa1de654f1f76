"""Commands for the servers: started, watched, and told what to deploy."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import AsJson, show_json

if TYPE_CHECKING:
    from flows.servers.address_file import Addresses

Pools = Annotated[
    list[str], typer.Option("--pool", metavar="POOL", help="Work pool to run a worker for. Can be repeated.")
]
MlflowPort = Annotated[int | None, typer.Option(min=0, max=65535, help="Default 5000, or a free one.")]
PrefectPort = Annotated[int | None, typer.Option(min=0, max=65535, help="Default 4200, or a free one.")]


ReadyAsJson = Annotated[
    bool, typer.Option("--json", help="Print the addresses as one JSON object once they answer, all else on stderr.")
]


def ui(mlflow_port: MlflowPort = None, prefect_port: PrefectPort = None, as_json: ReadyAsJson = False) -> None:
    """Start MLflow (models and numbers) and Prefect (runs) on this machine, until Ctrl-C.

    Example:

    - alignflow ui
    """
    from flows.servers.up import up as start

    with _aside(as_json) as ready:
        start([], mlflow_port=mlflow_port, prefect_port=prefect_port, ready=ready)


def up(
    pools: Pools = ["cpu", "gpu"],
    host: Annotated[
        str, typer.Option(help="Address that the servers listen on; any other than loopback needs passwords.")
    ] = "127.0.0.1",
    mlflow_port: MlflowPort = None,
    prefect_port: PrefectPort = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time on each of the pools cpu and gpu. Default: by cores and memory."),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Retrain with each preference file that is put here, once it is whole."),
    ] = None,
    as_json: ReadyAsJson = False,
) -> None:
    """Start MLflow, Prefect, work pools and their workers on this machine, until Ctrl-C. Results are kept.

    With PREFECT_API_URL and MLFLOW_TRACKING_URI set, it starts workers alone, for servers elsewhere.

    Examples:

    - alignflow up
    - alignflow up --pool gpu
    - alignflow up --host 0.0.0.0
    - alignflow up --watch incoming
    """
    from flows.servers.up import up as start

    often = None
    if watch is not None:
        from flows.arrivals import FolderWatch

        often = FolderWatch(watch)
    with _aside(as_json) as ready:
        start(pools, host, mlflow_port, prefect_port, limit, often, ready)


@contextlib.contextmanager
def _aside(as_json: bool) -> "Iterator[Callable[[Addresses], None] | None]":
    """Where JSON is asked for: what is said meanwhile goes to stderr, and the addresses, given to this, to stdout."""
    if not as_json:
        yield None
        return
    out = sys.stdout

    def tell(there: "Addresses") -> None:
        with contextlib.redirect_stdout(out):
            show_json(there.model_dump(mode="json", include={"pid", "mlflow", "prefect", "pools"}))

    with contextlib.redirect_stdout(sys.stderr):
        yield tell


def deploy(
    file: Annotated[Path | None, typer.Option(help="Default: deploy/prefect.yaml of this project.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create or update work pools, deployments and automations on the Prefect server, without questions.

    The server is that of `alignflow up`, or PREFECT_API_URL.

    Example:

    - alignflow deploy
    """
    from flows.servers.deploy import deploy as create

    if not as_json:
        create(file)
        return
    with contextlib.redirect_stdout(sys.stderr):
        there = create(file)
    show_json(there)


def data_arrived(
    path: Annotated[Path, typer.Argument(help="Data file, or folder, as the workers see it too.")],
    part: Annotated[
        str, typer.Option("--as", metavar="KIND", help="Which of `data` in the config it is.")
    ] = "preference",
    as_json: AsJson = False,
) -> None:
    """Tell the Prefect server of new data, where its content changed since the last time.

    The automation `alignflow data changed`, which `alignflow deploy` makes, then starts the deployment `retrain`.

    Examples:

    - alignflow data-arrived /data/pairs.jsonl
    - alignflow data-arrived /data/thumbs.parquet --as feedback
    """
    from flows.arrivals import arrived
    from flows.servers import checks
    from schemas.text import show

    checks.check_servers()
    sha256 = arrived(path, part)
    if as_json:
        return show_json({"path": str(path), "changed": sha256 is not None, "sha256": sha256})
    show(f"{path}: told, sha256 {sha256[:12]}" if sha256 else f"{path}: the same content as before, nothing to do")


def clean(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and how large it is.")
    ] = False,
    days: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Days in which nothing has used it.")
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Remove what nothing needs any more: checkpoints of abandoned runs, copies, old models and data, flow runs.

    Registered versions and all that they were made from stay, as do the numbers and reports of every run. What is
    removed and asked for again is made again.

    Examples:

    - alignflow clean --dry-run
    - alignflow clean --older-than 90
    """
    from flows.results import clean as cleaning
    from schemas.text import show

    items = cleaning.clean(days, dry_run)
    if as_json:
        sizes = [{"kind": item.kind, "where": item.where, "bytes": item.size} for item in items]
        return show_json({"removed": not dry_run, "bytes": sum(item.size for item in items), "items": sizes})
    show(cleaning.as_text(items, dry_run))
