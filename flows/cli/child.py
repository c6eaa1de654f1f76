"""A process of its own for what imports torch, which nothing here may."""

import subprocess
import sys
from typing import Any

import typer


def run_python(module: str, *arguments: object) -> int:
    """Run `python -P -m module` with arguments on this terminal; returns its exit code."""
    return subprocess.run([sys.executable, "-P", "-m", module, *map(str, arguments)]).returncode


def forward(module: str, positional: list[str], named: dict[str, Any]) -> None:
    """Run a module with the given options, and exit with its code."""
    arguments = list(positional)
    for name, value in named.items():
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                arguments.append(f"--{name}")
            elif one is not None and one is not False:
                arguments.append(f"--{name}={one}")
    raise typer.Exit(run_python(module, *arguments))
