"""What MLflow takes as names and values: flat, of plain characters, no longer than its limits."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

# MLflow's own limits, in characters.
PARAM_LENGTH = 6000
TAG_LENGTH = 5000
KEY_LENGTH = 250


SHOWN = {"baselines/": "sampling/", "budget/": "token_budget/", "compute/": "usage/", "data/": "input/"}
"""How groups of metrics begin, as stages and their results call them, and as MLflow has them: its page of charts lists
groups by name, and people look for quality (`eval/`) first. Older runs have some of them by the first name."""


def shown_name(name: str) -> str:
    """The name under which MLflow has a metric."""
    group, slash, rest = name.partition("/")
    return SHOWN.get(group + slash, group + slash) + rest


def own_name(name: str) -> str:
    """The name that stages have for one of MLflow's metrics."""
    own = {shown: begin for begin, shown in SHOWN.items()}
    group, slash, rest = name.partition("/")
    return own.get(group + slash, group + slash) + rest


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as flat names with dots: {"a": {"b": 1}} -> {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def acceptable_name(name: str) -> str:
    """A name that MLflow takes: other characters become `_`, and a long one ends in a digest."""
    clean = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII).strip("/") or "_"
    return shortened(clean, KEY_LENGTH)


def shortened(text: str, limit: int) -> str:
    """The text, or its start and a digest of the whole when it is longer than the limit."""
    if len(text) <= limit:
        return text
    end = f"...{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"
    return text[: limit - len(end)] + end
