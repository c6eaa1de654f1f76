"""Commands for the runs that there were: listed, compared, opened."""

import os
import sys
from typing import Annotated

import typer

from flows.cli.options import AsJson, show_json, show_text
from flows.results import LISTED  # the package alone: what it holds imports more

Run = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="A run's id, or the start of it, or its config's name; default: the last run."),
]


def runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show the last N runs.")] = LISTED,
    as_json: AsJson = False,
) -> None:
    """List the runs of this home: when, how they ended, which model came out best, what was changed by --set.

    Several names under `best` cannot be told apart.

    Examples:

    - alignflow runs
    - alignflow runs --json
    """
    import shutil

    from flows.results import history
    from schemas.text import show

    known = history.records()[:limit]
    if as_json:
        return show_json([record.as_json() for record in known])
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # a pipe gets whole lines
    show(history.as_text(known, width))


def compare(
    run: Run = None,
    other: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A second run: the models of both, head to head.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what came out of the last run, or of the named one; or compare the models of two runs.

    Two runs can be compared where judge and held-out prompts are the same. Models that differ get their run's id.

    Examples:

    - alignflow compare
    - alignflow compare demo
    - alignflow compare 4f1c9a02 b7730e15
    """

    from flows.results import across
    from flows.results.lookup import comparison
    from flows.results.summary import Compared

    if run is not None and other is not None:
        compared, about = across.compare(run, other), {"runs": [run, other]}
    else:
        last = comparison(run)
        compared, about = Compared(last.folder), {"run": last.pipeline_run}
    if as_json:
        return show_json(about | compared.numbers())
    shown = [("run", about["run"])] if "run" in about else []
    below = "".join(f"\n{label:8}{value}" for label, value in [*shown, ("report", compared.report)])
    show_text(lambda width, terminal: compared.text(width).append(f"\n{below}"))


def report(run: Run = None, as_json: AsJson = False) -> None:
    """Print where the report of a run is; on a desktop's terminal also open it in the browser.

    Examples:

    - alignflow report
    - alignflow report demo
    """
    from flows.results.lookup import comparison
    from schemas.text import show

    last = comparison(run)
    page = last.folder / "report.html"
    if as_json:
        return show_json({"run": last.pipeline_run, "report": str(page)})
    show(page)
    desktop = sys.platform == "darwin" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if sys.stdout.isatty() and desktop:  # elsewhere a browser would take over this terminal
        import webbrowser

        webbrowser.open(page.as_uri())
