"""The command line. `alignflow --help` lists the commands, in groups.

Imports of Prefect, MLflow and pydantic are inside the commands: together they take seconds, and help should not.
"""

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli import data, history, init, models, run, servers
from flows.cli.options import Group, register
from flows.execution import settings_files

app = typer.Typer(
    name="alignflow",
    cls=Group,
    help="Align a language model with PPO, DPO and KTO, and see which is better.",
    epilog="Start with: alignflow run demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
register(app, "Train", run.run, run.sweep, run.retrain, run.submit)
register(
    app, "Data and configs", init.init, data.presets, data.schema, data.validate, data.generate, data.rank, data.label
)
register(
    app, "Look", history.runs, history.compare, history.report, models.lineage, models.chat, models.ab, models.export
)
register(app, "Serve", models.approve, models.rollback, servers.ui, servers.up, servers.deploy)
register(app, "Serve", servers.data_arrived, servers.clean)
register(app, "", run.stage)

FOR_OTHERS = {"init", "validate", "generate", "rank", "export", "presets"}
"""Commands whose files a user asks for by name: they keep the user's umask. What others make is the home's."""
BY_THEMSELVES = {"run", "sweep", "stage", "init", "validate", "rank", "presets", "schema", "runs", "ui", "up"}
"""Commands that need no server, and use one only where the environment or the config's pools say so."""


def print_version(asked: bool) -> None:
    """Print the version and exit, where it is asked for."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"alignflow {version('alignflow')}")
        raise typer.Exit


@app.callback()
def before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make the other commands use what `alignflow up` or `ui` has running, as if its addresses were exported."""
    if context.invoked_subcommand not in FOR_OTHERS:
        os.umask(0o077)  # stages.runtime.workspace.PRIVATE, without its imports, for which help would wait
    if "MLFLOW_TRACKING_URI" in os.environ:
        from stages.tracking import answer_soon

        answer_soon()
    if (
        context.invoked_subcommand in BY_THEMSELVES
        and not {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"} & os.environ.keys()
    ):
        return
    from flows.servers import address_file

    if context.invoked_subcommand in BY_THEMSELVES:
        address_file.let_in(address_file.found())
    else:
        address_file.adopt()


def leave_out_working_directory() -> None:
    """Let neither this process, from here on, nor those that it starts import a file of the working directory, where
    data may have come with a `random.py` of its own. `python -m` puts it first, an empty entry of PYTHONPATH too.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = [path for path in given if os.path.isabs(path)]
    os.environ.update({"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(named)})
    with contextlib.suppress(FileNotFoundError):  # the folder is gone
        here, ours = os.getcwd(), str(Path(__file__).resolve().parents[2])
        if here not in (ours, *named):
            sys.path[:] = [path for path in sys.path if path not in ("", here)]


BARRED = (PermissionError, NotADirectoryError, IsADirectoryError)


def main() -> None:
    """Run the command line; a mistake of the user's becomes a message and an exit code, and no traceback."""
    leave_out_working_directory()
    settings_files.leave_out()
    from schemas.errors import EXIT_CODES, StageError
    from schemas.text import one_line, show, show_tracebacks

    os.environ.setdefault("DO_NOT_TRACK", "1")  # read when Prefect is imported
    show_tracebacks()
    try:
        app(prog_name="alignflow")
    except StageError as error:
        show(f"alignflow: {error}", sys.stderr)
        sys.exit(EXIT_CODES[error.status])
    except OSError as error:
        from stages.runtime.workspace import home

        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            fix = "name a path that exists"
            show(f"alignflow: {one_line(error.filename, 200)}: {error.strerror}. Fix: {fix}", sys.stderr)
            sys.exit(EXIT_CODES["refused"])
        place, barred = Path(str(error.filename)), isinstance(error, BARRED)
        if place != home() and not (barred and place.is_relative_to(home())):
            end_without_room(error)
            raise
        folder = isinstance(error, IsADirectoryError)  # where a file should be
        fix = "move it away" if folder else "give a folder that you may write to, with room"
        show(f"alignflow: ALIGNFLOW_HOME = {home()}: cannot be used: {error}. Fix: {fix}", sys.stderr)
        sys.exit(EXIT_CODES["refused"])
    except Exception as error:  # databases and libraries have errors of their own for a full disk
        end_without_room(error)
        raise


def end_without_room(error: Exception) -> None:
    """Exit with a message where an error means that the disk is full."""
    from schemas.errors import EXIT_CODES, StageError
    from schemas.text import show
    from stages.runtime.resources import out_of_resource

    problem = out_of_resource(error)
    if problem is not None and problem.kind == "disk":
        show(f"alignflow: {StageError(problem)}", sys.stderr)
        sys.exit(EXIT_CODES["failed"])
