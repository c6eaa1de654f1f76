"""Prefect's settings come from the environment and the user's profile. Left to itself Prefect also reads `.env`,
`prefect.toml` and `pyproject.toml` of the working directory, where data may have come with files of its own; and some
settings name code to run.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

BASE = "prefect.settings.base"
LEFT_OUT = ("FilteredDotEnvSettingsSource", "PrefectTomlConfigSettingsSource", "PyprojectTomlConfigSettingsSource")


def leave_out() -> None:
    """Let Prefect, once it is imported, read no settings file of the working directory. Costs no import by itself."""
    profiles = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "profiles.toml"
    os.environ.setdefault("PREFECT_PROFILES_PATH", str(profiles))
    if BASE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds Prefect's base of settings as usual, and takes the sources out of it before a setting is made."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == BASE else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_run_and_take_out, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _run_and_take_out(run: Callable[[ModuleType], None], module: Any) -> None:
    run(module)
    # pydantic tells of settings for sources that are no longer there
    warnings.filterwarnings("ignore", r"Config key `\w+` is set in model_config but will be ignored", UserWarning)
    base = module.PrefectBaseSettings
    usual = base.settings_customise_sources.__func__

    def without_files(cls: Any, *given: Any, **named: Any) -> tuple[Any, ...]:
        return tuple(one for one in usual(cls, *given, **named) if type(one).__name__ not in LEFT_OUT)

    base.settings_customise_sources = classmethod(without_files)
