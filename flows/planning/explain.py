"""A config's mistakes, one line each: field, value, what is wrong, fix."""

import json
import re
import types
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from schemas.config import PipelineConfig
from schemas.config.data import DataConfig
from schemas.errors import StageError
from schemas.text import one_line, short

_MOST = 50
"""Mistakes that are listed."""


def validate(raw: dict[str, Any]) -> PipelineConfig:
    """The config; StageError with one line per mistake."""
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        lines = [explain(details, raw) for details in error.errors()[:_MOST]]
        if error.error_count() > _MOST:
            lines.append(f"and {error.error_count() - _MOST} more mistakes")
        raise StageError("\n".join(lines), kind="config") from None


def wording(details: Any) -> str:
    """What is wrong, in our words: `must be greater than 0`."""
    if details["type"] == "finite_number" and details["input"] != details["input"]:
        return "must be a number, which NaN is not"
    return details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def explain(details: Any, raw: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: field, value, what is wrong, fix."""
    loc = details["loc"]
    path = ".".join(one_line(part, 200) for part in loc)
    message = one_line(wording(details), 2000)
    if details["type"] == "extra_forbidden":
        known = known_keys(loc, raw)
        return (
            f"{path}: unknown key. {closest_match(one_line(loc[-1], 200), known) or 'Known here: ' + ', '.join(known)}"
        )
    if details["type"] == "missing":
        return f"{path}: missing. Fix: add it{_description(loc, raw)}"
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be keys with values, `{key: value}`"
    if details["type"] == "string_pattern_mismatch":
        message = "must be up to 63 letters, digits, dots, dashes and underscores, a letter or digit first"
    if details["type"] == "literal_error":
        hint = closest_match(short(details["input"]).strip("'\""), re.findall(r"'([^']*)'", details["ctx"]["expected"]))
        message += f". {hint}" if hint else ""
    if details["type"] == "value_error":
        return f"{path}: {message}"
    value = details["input"]
    written = json.dumps(value) if value is None or isinstance(value, bool) else short(value)
    return f"{path} = {written}: {message[0].lower()}{message[1:]}"


def closest_match(word: str, known: Iterable[str]) -> str:
    """A question that names the closest known word; empty when none is close."""
    near = get_close_matches(word, list(known), 1)
    return f"Did you mean '{near[0]}'?" if near else ""


def known_keys(loc: tuple[str | int, ...], raw: Any) -> list[str]:
    """The keys that are valid in place of the last one of `loc` in `raw`."""
    return sorted({name for model in _models(loc, raw) for name in model.model_fields})


def _description(loc: tuple[str | int, ...], raw: Any) -> str:
    fields = [model.model_fields.get(str(loc[-1])) for model in _models(loc, raw)]
    texts = [" ".join(field.description.split()) for field in fields if field and field.description]
    return f": {texts[0]}" if texts else ""


def _models(loc: tuple[str | int, ...], raw: Any) -> list[type[BaseModel]]:
    """The models that may hold the last key of `loc`: of a union, the one that `method` or `judge` names."""
    models: list[Any] = [PipelineConfig]
    for key in loc[:-1]:
        raw = raw.get(key) if isinstance(raw, dict) else None
        models = [inner for outer in models for inner in _inside(outer, key)]
        models = [inner for inner in models if _named(inner, key, raw)]
    return [model for model in models if isinstance(model, type) and issubclass(model, BaseModel)]


def _inside(outer: Any, key: str | int) -> Iterator[Any]:
    if get_origin(outer) is dict:
        yield from _members(get_args(outer)[1])
    elif get_origin(outer) is list:
        yield from _members(get_args(outer)[0])
    elif isinstance(outer, type) and issubclass(outer, BaseModel) and key in outer.model_fields:
        yield from _members(outer.model_fields[str(key)].annotation)


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _named(member: Any, key: str | int, raw: Any) -> bool:
    """False for a union's member that another `method` or `judge` was asked for, a method's name being its default; and
    for a single source of data where several are given."""
    if not (isinstance(member, type) and issubclass(member, BaseModel) and isinstance(raw, dict)):
        return True
    if member is DataConfig and "sources" in raw:
        return False
    tags = {"method": raw.get("method", key), "judge": raw.get("judge")}
    annotations = {name: member.model_fields[name].annotation for name in tags if name in member.model_fields}
    return all(tags[name] in get_args(kind) for name, kind in annotations.items() if get_origin(kind) is Literal)
