"""What commands have in common: options, the groups of the help, how a command looks there, and results as JSON."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup


def presets() -> list[str]:
    """What a shell completes a config with; where none of them fits, it completes files."""
    from flows.planning import config_file

    return list(config_file.presets())


Config = Annotated[
    str,
    typer.Argument(metavar="PRESET_OR_FILE", help="A preset's name, or a YAML file.", autocompletion=presets),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set align.dpo.beta=0.2. Can be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan without running anything.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress: warnings, errors and the result.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log's lines, also on a terminal.")]
Annotator = Annotated[str | None, typer.Option(help="Who judges; default: the user's name on this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

if TYPE_CHECKING:
    from rich.text import Text

    from flows.execution.live import Loudness

_VALUES = {int: "N", float: "NUMBER", str: "TEXT"}


def _about(param: Any, ctx: Any = None) -> str | None:
    """What a parameter is for: said behind its name where it is missing."""
    about: str | None = getattr(param, "help", None)
    return about


class _Plain:
    """Of a help: values are named in capitals, and a switch has none."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            param.get_missing_message = partial(_about, param)
            if param.param_type_name == "argument":
                param.metavar = param.metavar or param.name.upper()
                param.display_type_rich = lambda ctx: None  # its name says more than `str`
            elif param.metavar is None:
                kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
                param.metavar = "" if param.is_flag else _VALUES.get(kind, param.opts[0].strip("-").upper())
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]


class Command(_Plain, TyperCommand):
    """One command."""


class Group(_Plain, TyperGroup):
    """All of them."""


def register(app: typer.Typer, group: str, *commands: Callable[..., Any]) -> None:
    """Add commands to a group of the help, in this order; those of no group are hidden."""
    for command in commands:
        app.command(cls=Command, rich_help_panel=group or None, hidden=not group)(command)


def named(annotator: str | None) -> str:
    """Who judges: the given name, else the user's. Raises StageError where this machine has none."""
    from getpass import getuser

    from schemas.errors import refuse

    try:
        return annotator or getuser()
    except (KeyError, OSError) as error:
        message = "this machine has no name for you."
        raise refuse("--annotator", None, message, "give your name", kind="no_name") from error


def loudness(quiet: bool, verbose: bool) -> "Loudness":
    """How much of a run is shown while it goes on."""
    return "quiet" if quiet else "verbose" if verbose else "usual"


def show_json(value: object) -> None:
    """Print a value as one JSON object or list. What JSON has no word for is text, but NaN and infinity are null."""
    from schemas.text import show

    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
    show(json.dumps(plain, indent=2))


def show_text(build: "Callable[[int, bool], Text]") -> None:
    """Print a text on stdout. `build` is told the width, and whether a terminal shows styles and links."""
    from schemas.text import show

    if not sys.stdout.isatty():
        return show(build(80, False).plain)
    from rich.console import Console

    console = Console(highlight=False)
    console.print(build(console.width, True), soft_wrap=True)
