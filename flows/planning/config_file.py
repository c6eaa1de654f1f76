"""From a preset or a YAML file and `--set` to a checked config: all mistakes are found here, before anything starts."""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    MappingStartEvent,
    ScalarEvent,
)

from flows.planning.config_checks import check, check_keys, check_places, check_ranks
from flows.planning.explain import validate
from flows.planning.plan import Plan, plan
from schemas.errors import Problem, StageError, refuse
from schemas.source import Hub, data_source, hub_errors, is_commit, model_source
from schemas.text import one_line, short
from stages.runtime import workspace

log = logging.getLogger("alignflow")

BYTES = 1 << 20
"""Of a config file. The bounds are far above what people write, and keep a hostile file to seconds and megabytes."""
DEPTH = 40
NODES = 20_000
"""Values of a config, each alias counted with all that it stands for; a long text counts once per 64 characters."""
_HUGE = 10**100
SCHEMA_LINE = "# yaml-language-server: $schema=alignflow.schema.json"
"""First line of a preset: where an editor finds what `alignflow schema` prints."""


# --- YAML, bounded ---


def parse(text: str) -> Any:
    """The value of a YAML 1.2 text: 1e-5 is a number and `on` is text. A key given twice is refused, and no code runs.

    Raises:
        YAMLError: it is not valid YAML, or goes beyond the bounds above.
    """
    if len(text) > BYTES:
        raise YAMLError(f"the text has {len(text)} characters; {BYTES} are allowed")
    _check_size(YAML(typ="safe", pure=True).parse(text))
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    return yaml.load(text)


def _check_size(events: Iterable[Event]) -> None:
    """Refuse what would take too long or too much to build: told from the events, of which no value is made yet."""
    weights: dict[str, int] = {}
    open_: list[list[Any]] = []  # of each collection around: whether it is a mapping, nodes in it, weight, anchor
    for event in events:
        weight, anchor = 1, None
        if isinstance(event, CollectionEndEvent):
            _, _, weight, anchor = open_.pop()
        elif isinstance(event, ScalarEvent):
            weight, anchor = 1 + len(event.value) // 64, event.anchor
        elif isinstance(event, AliasEvent):
            if any(around[-1] == event.anchor for around in open_):
                raise _marked(event, f"*{one_line(event.anchor, 60)} stands inside of what it names")
            weight = weights.get(event.anchor, 1)
        elif not isinstance(event, CollectionStartEvent):
            continue
        if open_ and not isinstance(event, CollectionEndEvent):
            is_mapping, nodes, *_ = open_[-1]
            if is_mapping and nodes % 2 == 0 and not isinstance(event, ScalarEvent):
                raise _marked(event, "a key must be a text")
            open_[-1][1] += 1
        if isinstance(event, CollectionStartEvent):
            if len(open_) >= DEPTH:
                raise _marked(event, f"values are nested more than {DEPTH} deep")
            open_.append([isinstance(event, MappingStartEvent), 0, 1, event.anchor])
            continue
        if anchor is not None:
            weights[anchor] = weight
        if open_:
            open_[-1][2] += weight
        if (open_[-1][2] if open_ else weight) > NODES:
            raise _marked(event, f"this is more than {NODES} values, with all that aliases (*name) stand for")


def _marked(event: Event, problem: str) -> YAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Constructor(SafeConstructor):
    """ruamel's, whose errors about a value always tell its place: some of Python's own come through it."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except YAMLError:
            raise
        except Exception as error:  # of int, float, date, base64, a dict: each means that the text is not of its tag
            kind = str(node.tag).rpartition(":")[2]
            problem = f"{short(node.value)} cannot be read as {one_line(kind, 60)}: {one_line(error, 120)}"
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
        if isinstance(value, int) and abs(value) >= _HUGE:
            raise MarkedYAMLError(problem="the number has more than 100 digits", problem_mark=node.start_mark)
        return value


# --- names on the Hub ---

HUB_COMMITS = "hub.json"
"""In the home: the commit that each name on the Hub stood at when it was first used without one."""


def pin(raw: dict[str, Any]) -> None:
    """Set the commit of models and data sets of the Hub that are named without one: asked once, then kept in the home,
    so that the same config means the same weights and rows. Where the Hub cannot be asked, they stay as they are.

    Raises:
        StageError: the Hub has no such model or data set, or does not give it to this user.
    """
    kept = workspace.home() / HUB_COMMITS
    known = _kept_commits(kept)
    for field, kind, name, place in _on_hub(raw):
        revision = place.get("revision") or "main"
        key = f"{kind} {name} {revision}"
        if key not in known:
            commit = _commit_of(field, kind, name, revision)
            if commit is None:
                continue
            with workspace.lock(kept.with_suffix(".lock")):  # another run may have added to it, or been first
                known = {key: commit, **_kept_commits(kept)}
                workspace.write_whole(kept, json.dumps(known, indent=1, sort_keys=True) + "\n")
            text = "%s = %s: %s is at commit %s, which %s keeps. Write it as `revision`, or another."
            log.info(text, field, name, revision, known[key], kept)
        place["revision"] = known[key]


def _on_hub(raw: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(field, `model` or `dataset`, name, mapping) of what a config, maybe wrong, names on the Hub by no commit."""
    model, data = raw.get("model"), raw.get("data")
    slots = list(data.items()) if isinstance(data, dict) else []
    many = [(slot, given.get("sources") if isinstance(given, dict) else given) for slot, given in slots]
    rows = [*slots, *((f"{slot}.{number}", one) for slot, all_ in many for number, one in enumerate(_list(all_)))]
    for field, place in [("model", model), *((f"data.{slot}", given) for slot, given in rows)]:
        path = place.get("path") if isinstance(place, dict) else None
        if not isinstance(path, str) or not isinstance(place.get("revision", ""), str | None) or "\0" in path:
            continue
        source = model_source(path) if field == "model" else data_source(path)
        named = isinstance(source, Hub) and (field == "model" or source.plain)
        if isinstance(source, Hub) and named and not is_commit(place.get("revision")):
            yield f"{field}.path", "model" if field == "model" else "dataset", source.name, place


def _kept_commits(kept: Path) -> dict[str, str]:
    try:
        return json.loads(kept.read_text()) if kept.is_file() else {}
    except ValueError as error:
        fix = "repair it, or remove it: commits are then asked for anew"
        raise refuse(HUB_COMMITS, kept, f"it cannot be read: {error}.", fix) from error


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _commit_of(field: str, kind: str, name: str, revision: str) -> str | None:
    """The commit of a branch or tag, from the Hub or, where that cannot be reached, from its cache on this machine."""
    # Imported here: only a name on the Hub needs them.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.file_download import repo_folder_name

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        ask = api.model_info if kind == "model" else api.dataset_info
        return ask(name, revision=revision, timeout=10).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as error:
        why = one_line(str(error).strip().splitlines()[0], 200)
        message = f"no such file or folder in {Path.cwd()}, and the Hugging Face Hub does not give it: {why}"
        fix = "check path, name and revision; for what is gated or private set HF_TOKEN"
        raise refuse(field, name, message, fix) from None
    except hub_errors():
        ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / revision
        cached = ref.read_text().strip() if ref.is_file() else None
        return cached if is_commit(cached) else None


# --- from a file to a plan ---


def presets() -> dict[str, Path]:
    """Name -> file of the presets that come with alignflow."""
    folder = Path(str(files("deploy"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def headline(file: Path) -> str:
    """The first sentence of the comment that a preset begins with, after the line for editors."""
    text = file.read_text(encoding="utf-8").removeprefix(f"{SCHEMA_LINE}\n")
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.removeprefix("#").strip() for line in lines))[0]


def load(source: str, overrides: Sequence[str] = (), here: bool = True) -> Plan:
    """Read a preset or file, apply `a.b=value` overrides, validate, plan, and check what can be checked cheaply.

    `here`: it runs on this machine. Elsewhere a whole path (`/data/pairs.jsonl`) may lead to what exists there only.

    Raises StageError, kind "config", with one line per mistake: field, value, what is wrong, fix.
    """
    return planned(raw_of(source, overrides), here)


def raw_of(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The YAML of a preset or file, with `a.b=value` overrides and names on the Hub pinned. Raises StageError."""
    raw = read(find(source))
    for override in overrides:
        apply(raw, override)
    pin(raw)
    return raw


def planned(raw: dict[str, Any], here: bool = True) -> Plan:
    """The plan of a config that is valid, and checked as far as that is cheap. Raises StageError as `load` does."""
    config = validate(raw)
    problems = list(check(config))
    if here:
        problems += check_keys(config)
    else:  # a whole path of which this machine has nothing may lead to what exists there
        paths = [(problem, Path(problem.value or "")) for problem in problems]
        problems = [problem for problem, path in paths if not path.is_absolute() or path.exists()]
    try:
        made = plan(config)
    except StageError as error:
        raise refusal([*problems, error.problem]) from None
    problems += check_ranks(made.nodes.values())
    problems += check_places(made.nodes.values(), config.pools, here)
    if problems:
        raise refusal(problems)
    return made


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
    with contextlib.suppress(OSError):  # a text too long for a path is none
        if Path(source).is_file():
            return Path(source)
    own = [one.name for one in Path.cwd().glob("*.y*ml")]
    near = get_close_matches(source, [*known, *own], 1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Presets: {', '.join(known)}."
    raise StageError(f"'{one_line(source, 200)}' is neither a preset nor a file in {Path.cwd()}. {hint}", kind="config")


def read(file: Path) -> dict[str, Any]:
    """The file's YAML mapping; StageError with line and column when it is none."""
    named = one_line(file)
    try:
        with file.open(encoding="utf-8") as stream:
            raw = parse(stream.read(BYTES + 1))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{named}:{mark.line + 1}:{mark.column + 1}" if mark else named
        raise StageError(f"{where}: {one_line(error.problem or error.context, 300)}", kind="config") from None
    except (YAMLError, UnicodeDecodeError) as error:
        why = one_line(" ".join(str(error).split()), 300)
        raise StageError(f"{named}: not valid YAML: {why}", kind="config") from None
    except OSError as error:
        raise StageError(f"{named}: cannot be read: {error.strerror}", kind="config") from None
    if not isinstance(raw, dict):
        raise StageError(
            f"{named}: holds {type(raw).__name__}, not keys with values. Fix: start from `alignflow presets demo`",
            kind="config",
        )
    return raw


def apply(raw: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in place; the value is YAML, and maps on the way are made where they are missing.

    Of a list a number names an item: `data.sft.0.weight=2`; as in a mixture that is no bare list, `sources` may stand
    before it.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise StageError(f"--set {one_line(override, 200)}: is not of the form a.b=value", kind="config")
    try:
        value = parse(text)
    except YAMLError:
        wrong = f"--set {one_line(override, 200)}: the value is not valid YAML. Fix: quote it"
        raise StageError(wrong, kind="config") from None
    place: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if key == "sources" and not last:
                continue
            if not (re.fullmatch("[0-9]{1,6}", key) and int(key) < len(place)):
                here = ".".join(keys[:depth])
                wrong = f"--set {one_line(override, 200)}: {here} is a list of {len(place)}"
                numbers = f", such as {here}.0, or" if place else ", or"
                fix = f"name an item by its number from 0{numbers} set {here} as a whole"
                raise StageError(wrong, kind="config", fix=fix)
            if last:
                place[int(key)] = value
            else:
                place = place[int(key)]
        elif not isinstance(place, dict):
            here = ".".join(keys[:depth])
            wrong = f"--set {one_line(override, 200)}: {here} is {short(place)} and has no keys"
            raise StageError(wrong, kind="config", fix=f"set {here} as a whole")
        elif last and value is None and keys[:-1] == ["align"]:
            place.pop(key, None)  # as `sft=null` leaves SFT out; in a file `dpo:` alone is DPO with its defaults
        elif last:
            place[key] = value
        else:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
