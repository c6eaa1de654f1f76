"""What a model was made from, followed back through the requests of stages: its base, its data, their licence."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, try_to_load_from_cache

from flows.results import lookup
from schemas.errors import StageError
from schemas.source import File, Hub, data_source, is_commit, model_source
from schemas.stage import Artifact, Request

NOT_LEARNED_FROM = {"evaluation", "baseline"}
"""Inputs that leave no trace in what is trained."""


@dataclass(frozen=True)
class Pinned:
    """A model on the Hub at one commit, or a folder."""

    name: str
    """Empty where only this home has it."""
    commit: str = ""

    def as_arguments(self) -> str:
        """What transformers' `from_pretrained` takes to load it."""
        name = json.dumps(self.name or "FOLDER_OF_ITS_BASE")
        return f'{name}, revision="{self.commit}"' if self.commit else name


def maker(artifact: Artifact | None) -> Request | None:
    """The request of the stage that has published an artifact; None where that is not known any more."""
    if artifact is None or not artifact.uri.startswith(("models:/", "runs:/")):
        return None
    with suppress(StageError):
        run_id = lookup.maker(artifact.uri)
        return lookup.request_of(run_id) if run_id else None
    return None


def base_of(request: Request | None) -> Request | None:
    """The request of stage `base` from whose model a model was trained, over all stages between."""
    while request is not None and request.stage != "base":
        request = maker(request.inputs.get("model"))
    return request


def pinned(base: Request | None) -> Pinned | None:
    """What a stage `base` has loaded from the Hub; None for a model from elsewhere."""
    path, revision = ("", "") if base is None else (base.params.get("path"), base.params.get("revision"))
    source = model_source(path) if isinstance(path, str) and path else None
    return Pinned(source.name, str(revision)) if isinstance(source, Hub) and is_commit(str(revision)) else None


def datasets(request: Request | None) -> list[str]:
    """Names on the Hub of the data sets that it, and the models it was trained with, learned from; sorted."""
    sources = map(data_source, _data_paths(request, set()))
    return sorted({source.name for source in sources if isinstance(source, Hub) and source.plain})


def _data_paths(request: Request | None, seen: set[str]) -> Iterator[str]:
    if request is None or request.key() in seen:
        return
    seen.add(request.key())
    if request.stage == "validate":
        several = request.params.get("sources")
        for one in several if isinstance(several, list) else [request.params]:
            if isinstance(one, dict) and isinstance(path := one.get("path"), str):
                yield path
    for name, artifact in request.inputs.items():
        if name not in NOT_LEARNED_FROM:
            yield from _data_paths(maker(artifact), seen)


def licence(base: Request | None) -> str | None:
    """The licence that the base model's own card names; None where no card of it is on this disk."""
    path = None if base is None else base.params.get("path")
    if base is None or not isinstance(path, str):
        return None
    card: Path | None = None
    if (source := pinned(base)) is not None:
        cached = try_to_load_from_cache(source.name, "README.md", revision=source.commit)
        card = Path(cached) if isinstance(cached, str) else None
    elif isinstance(place := model_source(path), File):
        card = place.path / "README.md"
    if card is None or not card.is_file():
        return None
    with suppress(ValueError, OSError, TypeError, AttributeError):  # whatever people write into a card
        named = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
        return named if isinstance(named, str) else None
    return None
