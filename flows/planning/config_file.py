"""From a preset or a YAML file and `--set` to a checked config: all mistakes are found here, before anything starts."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from flows.planning.config_checks import check, check_keys
from flows.planning.explain import validate
from flows.planning.plan import Plan, plan
from schemas.errors import Problem, StageError


def parse(text: str) -> Any:
    """The value of a YAML 1.2 text: 1e-5 is a number and `on` is text. A key given twice is refused, and no code runs.

    Raises:
        YAMLError: it is not valid YAML.
    """
    return YAML(typ="safe", pure=True).load(text)


def presets() -> dict[str, Path]:
    """Name -> file of the presets that come with alignflow."""
    folder = Path(str(files("deploy"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def headline(file: Path) -> str:
    """The first sentence of the comment that a preset begins with."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.removeprefix("#").strip() for line in lines))[0]


def load(source: str, overrides: Sequence[str] = (), here: bool = True) -> Plan:
    """Read a preset or file, apply `a.b=value` overrides, validate, plan, and check what can be checked cheaply.

    `here`: it runs on this machine. Elsewhere a whole path (`/data/pairs.jsonl`) may lead to what exists there only.

    Raises StageError, kind "config", with one line per mistake: field, value, what is wrong, fix.
    """
    return planned(raw_of(source, overrides), here)


def raw_of(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The YAML of a preset or file, with `a.b=value` overrides. Raises StageError."""
    raw = read(find(source))
    for override in overrides:
        apply(raw, override)
    return raw


def planned(raw: dict[str, Any], here: bool = True) -> Plan:
    """The plan of a config that is valid, and checked as far as that is cheap. Raises StageError as `load` does."""
    config = validate(raw)
    problems = [problem for problem in check(config) if here or not only_elsewhere(problem.value or "")]
    problems += check_keys(config) if here else ()
    try:
        made = plan(config)
    except StageError as error:
        raise refusal([*problems, error.problem]) from None
    if problems:
        raise refusal(problems)
    return made


def only_elsewhere(path: str) -> bool:
    """Whether a value is a whole path of which this machine has nothing."""
    return Path(path).is_absolute() and not Path(path).exists()


def refusal(problems: Sequence[Problem]) -> StageError:
    """One error for all problems; a single one keeps its parts."""
    if len(problems) == 1:
        return StageError(problems[0])
    return StageError("\n".join(str(problem) for problem in problems), kind="config")


def find(source: str) -> Path:
    """The file of a preset's name, or the file itself."""
    known = presets()
    if source in known:
        return known[source]
    if Path(source).is_file():
        return Path(source)
    near = get_close_matches(source, known, 1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Presets: {', '.join(known)}."
    raise StageError(f"'{source}' is neither a preset nor a file in {Path.cwd()}. {hint}", kind="config")


def read(file: Path) -> dict[str, Any]:
    """The file's YAML mapping; StageError with line and column when it is none."""
    try:
        raw = parse(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise StageError(f"{where}: {error.problem or error.context}", kind="config") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"{file}: not valid YAML: {' '.join(str(error).split())}", kind="config") from None
    if not isinstance(raw, dict):
        raise StageError(
            f"{file}: holds {type(raw).__name__}, not keys with values. Fix: start from `alignflow presets demo`",
            kind="config",
        )
    return raw


def apply(raw: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in place; the value is YAML, and maps on the way are made where they are missing."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise StageError(f"--set {override}: is not of the form a.b=value", kind="config")
    try:
        value = parse(text)
    except YAMLError:
        raise StageError(f"--set {override}: the value is not valid YAML. Fix: quote it", kind="config") from None
    place: Any = raw
    for depth, key in enumerate(keys[:-1], 1):
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            here = ".".join(keys[:depth])
            raise StageError(
                f"--set {override}: {here} is {place!r} and has no keys. Fix: set {here} as a whole", kind="config"
            )
    place[keys[-1]] = value
