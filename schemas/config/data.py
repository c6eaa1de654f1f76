"""Where rows come from, and how they are read and split: one source, or a mixture of several."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import ceil, floor
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from schemas import Strict
from schemas.source import Demo, Hub, PathText, Remote, data_source
from schemas.text import short

Kind = Literal["sft", "preference", "ranking", "feedback", "prompt"]
Format = Literal[
    "alpaca",
    "sharegpt",
    "ultrafeedback",
    "helpsteer",
    "nectar",
    "pku",
    "shp",
    "oasst",
    "webgpt",
    "summarize",
    "arena",
]
"""Public data sets whose rows are read as they come (stages/validate/forms/presets.py)."""
FewPrompts = Literal["warn", "refuse"]
Learn = Literal["last", "all"]
"""Which of the assistant's turns SFT learns."""
DERIVES: dict[Kind, Mapping[str, int | None]] = {
    "preference": {"preference": 1, "ranking": 1, "feedback": 2, "sft": 1, "prompt": 1},
    "ranking": {"ranking": 1, "preference": None, "feedback": None, "sft": None, "prompt": 1},
    "feedback": {"feedback": 1, "sft": None, "prompt": 1},
    "sft": {"sft": 1, "prompt": 1},
    "prompt": {"prompt": 1},
}
"""The kinds that a source of each kind gives, and how many rows each of its rows gives at most; None where it varies.
"""


SLOTS: dict[str, str] = {"ranking": "preference"}
"""A kind -> its place in a config's `data`, where that has another name."""


def _label_texts(value: Any) -> Any:
    """YAML reads `1: up` and `true: up` with a number and a truth value as keys, and `up: yes` with one as a value."""
    return {str(label): meaning for label, meaning in value.items()} if isinstance(value, dict) else value


class SourceConfig(Strict):
    """A file or data set, and how its rows are read."""

    path: PathText
    """JSONL, JSONL.gz, Parquet or CSV (`input:rows` inside a pipeline), on this disk or at `s3://`, `gs://` or
    `https://`; `hub:NAME` for a Hugging Face dataset; `demo:sft` or `demo:prompt`."""
    kind: Kind
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Digest that the file must have, so that the same config means the same rows; required of a file at an address."""
    revision: str | None = None
    """Commit of the Hugging Face dataset; without one, as `model.revision`."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset that has several (`main` of gsm8k)."""
    split: str = "train"
    columns: dict[str, str] = {}
    """Our column name -> the file's."""
    format: Format | None = None
    """The public data set whose shape the rows have; by default it is recognised where that is unmistakable."""
    label_map: Annotated[dict[str, str], BeforeValidator(_label_texts)] = {}
    """A value of the label column, or a bound such as `>=4` -> what it means: `up`, `down` or `skip` (feedback), `a`,
    `b`, `tie` or `skip` (preference). Without it the column has to speak for itself."""
    limit: int | None = Field(default=None, ge=1, lt=2**63)
    """Use only the first N rows."""

    @field_validator("path")
    @classmethod
    def _names_something(cls, path: str) -> str:
        source = data_source(path)
        if not path.strip() or (isinstance(source, Hub) and not source.name.strip()):
            raise PydanticCustomError("no_name", "must name a file, or hub:NAME")
        if isinstance(source, Remote) and source.has_secrets:
            fix = "leave it out (s3:// and gs:// take credentials from the environment), or fetch the file"
            what = "what stands before @ or after ? would be logged with the config"
            raise PydanticCustomError("secrets", "{what}. Fix: {fix}", {"what": what, "fix": fix})
        return path


class PartsConfig(Strict):
    """How rows are split and what is refused: the same for all sources of a mixture."""

    eval_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of prompts held out for evaluation. A prompt's part is told by the hash of its first user turn with the
    system message, so that a conversation and its later turns are on one side, and the same in all data."""
    test_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompts that nothing trains on and no comparison looks at: `alignflow sweep` measures its winner there.
    """
    gold_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training prompts kept for the gold reward model, which judges and never trains a policy."""
    max_bad: float = Field(default=0.1, ge=0, le=1)
    """Share of quarantined rows above which the flow stops; of a mixture for each of its sources."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of prompt and answer together above which a row is quarantined."""
    ngrams: int | None = Field(default=None, ge=2, le=50)
    """Count prompts that are nearly an earlier one, and rows to train on that overlap with prompts of the evaluation,
    by sequences of so many words: 13 is usual. None: neither is looked for."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "PartsConfig":
        if self.eval_fraction + self.test_fraction > 1 + 1e-9:
            raise PydanticCustomError(
                "parts",
                "eval_fraction = {held} and test_fraction = {test} are more than all prompts. Fix: lower one of them",
                {"held": self.eval_fraction, "test": self.test_fraction},
            )
        return self


class DataConfig(PartsConfig, SourceConfig):
    """One source of rows. Stage `validate` cleans, splits and derives other kinds from it."""

    @property
    def gives(self) -> set[str]:
        """The kinds of rows that it gives."""
        return set(DERIVES[self.kind])


# --- mixtures ---


def default_name(path: str) -> str:
    """What a source is called after its path: the file's name without its endings, or the data set's.

    Characters that a metric's name cannot hold become `_`.
    """
    source = data_source(path)
    stem = f"demo-{source.kind}" if isinstance(source, Demo) else PurePosixPath(path.removeprefix("hub:")).name
    for ending in (".gz", ".jsonl", ".ndjson", ".json", ".parquet", ".pq", ".csv"):
        stem = stem.removesuffix(ending)
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip("_.-")[:63] or "source"


def _kind_and_name_have_defaults(schema: dict[str, Any]) -> None:
    """Prefect checks a deployed run by the schema, before our code fills in the kind of the slot."""
    schema["required"] = [name for name in schema["required"] if name not in ("kind", "name")]


class MixtureSource(SourceConfig):
    """One of the sources of a mixture."""

    model_config = ConfigDict(json_schema_extra=_kind_and_name_have_defaults)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    """What it is called in reports, metrics and rows, by default as its file without the endings. It stands in the rows
    and so is a part of what training is reused by: where a file may be renamed, give the name."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the rows to train on is its weight over the sum of all; each source has one then."""
    epochs: float | None = Field(default=None, gt=0, le=1000)
    """How often each of its rows to train on is taken: 2.5 is twice all of them, and once more a half that is drawn.
    Default, without weights: 1."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_file(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in sorted(PartsConfig.model_fields.keys() & value.keys()):
            what = f"{name} is the same for all sources"
            fix = f"write it beside them: {{sources: [...], {name}: {short(value[name])}}}"
            raise PydanticCustomError("of_the_whole", "{what}. Fix: {fix}", {"what": what, "fix": fix})
        if value.get("name") is None:
            return {**value, "name": default_name(value["path"]) if isinstance(value.get("path"), str) else "source"}
        return value

    @field_validator("name")
    @classmethod
    def _is_no_condition(cls, name: str) -> str:
        if re.fullmatch(r"t[0-9.]+([eE][+-]?[0-9]+)?", name):  # eval/t0.3/... is another temperature
            fix = "give it another name, with a word in it"
            raise PydanticCustomError("taken", "metrics of a temperature are called so. Fix: {fix}", {"fix": fix})
        return name

    @property
    def share(self) -> Fraction | None:
        """Its weight as it is written: 0.7 is 7/10, which no float is."""
        return None if self.weight is None else Fraction(str(self.weight))

    @property
    def times(self) -> Fraction:
        """How often each row is taken where there are no weights."""
        return Fraction(str(self.epochs)) if self.epochs is not None else Fraction(1)


class Mixture(PartsConfig):
    """Several sources as one data set, checked together and split together."""

    sources: list[MixtureSource] = Field(min_length=1)
    """In order: of rows that two sources have, the first one's stays. In a config the list alone is a mixture too."""
    stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """How many rows weights give, as in `datasets.interleave_datasets`. `first_exhausted`: as many as there are without
    taking a row twice. `all_exhausted`: so many that each row is taken; rows of the other sources are taken again."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of what is drawn. Default: the run's."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Mixture":
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            what = f"several sources are called {', '.join(twice)}"
            raise PydanticCustomError("names", "{what}. Fix: give each a `name` of its own", {"what": what})
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and any(source.epochs is not None for source in self.sources):
            what = "weight and epochs exclude each other: a share of the rows, or how often each is taken"
            raise PydanticCustomError("weights", "{what}. Fix: use one of them in all sources", {"what": what})
        if weighted and len(weighted) < len(self.sources):
            rest = ", ".join(source.name for source in self.sources if source.weight is None)
            what = f"{', '.join(weighted)} has a weight, and {rest} has none"
            raise PydanticCustomError("weights", "{what}. Fix: give every source a weight, or none", {"what": what})
        if not weighted and self.stopping != "first_exhausted":
            what = f"stopping = {self.stopping} changes nothing without weights"
            raise PydanticCustomError("not_used", "{what}. Fix: give every source a weight", {"what": what})
        return self

    @property
    def gives(self) -> set[str]:
        """The kinds of rows that every source gives."""
        kinds = [set(DERIVES[source.kind]) for source in self.sources]
        return kinds[0].intersection(*kinds[1:])

    @property
    def kind(self) -> Kind:
        """The kind that all are counted in: the first one's that every source gives."""
        return next(source.kind for source in self.sources if source.kind in self.gives)

    @property
    def draws(self) -> bool:
        """Whether a seed decides which rows are taken."""
        return any(source.weight is not None or source.times.denominator > 1 for source in self.sources)

    def drawn(self, available: Mapping[str, int]) -> dict[str, int]:
        """How many rows to train on are taken from each source, of those that it has, by name.

        By weights the total T is the largest that takes no row twice, floor(min n / w), or the smallest that takes each
        row, ceil(max n / w), for n rows and a share w of a source. What T * w leaves over goes to the largest
        remainders, the first of equal ones, so that every share is exact to within a row. Else a source gives its n
        rows times its epochs, halves rounded up. Sources that have no rows have no part in it.
        """
        rows = {name: n for name, n in available.items() if n}
        shares = {source.name: source.share for source in self.sources if source.share and source.name in rows}
        if not shares:
            times = {source.name: source.times for source in self.sources}
            return {name: floor(n * times[name] + Fraction(1, 2)) for name, n in rows.items()}
        whole = sum(shares.values(), Fraction(0))
        reach = [rows[name] * whole / share for name, share in shares.items()]
        total = floor(min(reach)) if self.stopping == "first_exhausted" else ceil(max(reach))
        exact = {name: total * share / whole for name, share in shares.items()}
        by_remainder = sorted(exact, key=lambda name: floor(exact[name]) - exact[name])
        more = by_remainder[: total - sum(map(floor, exact.values()))]
        return {name: floor(value) + (name in more) for name, value in exact.items()}


def sources_of(data: DataConfig | Mixture) -> Iterator[tuple[str, SourceConfig]]:
    """Every source, each with where it stands below its slot: nowhere of its own, or `.sources.0`."""
    if isinstance(data, Mixture):
        yield from ((f".sources.{place}", source) for place, source in enumerate(data.sources))
    else:
        yield "", data


def _choose(value: Any, info: ValidationInfo) -> Any:
    """A list is a mixture, and so is what has `sources`. The kind of a source is by default that of its slot."""
    if isinstance(value, DataConfig | Mixture):
        return value
    if isinstance(value, list):
        value = {"sources": value}
    if isinstance(value, dict) and "sources" in value:
        kind = "prompt" if info.field_name == "evaluation" else info.field_name
        given = value["sources"]
        if isinstance(given, list):
            given = [{"kind": kind, **one} if isinstance(one, dict) else one for one in given]
        for name in sorted(SourceConfig.model_fields.keys() & value.keys()):
            what = f"{name} belongs to a source, not to the whole mixture"
            raise PydanticCustomError("of_a_source", "{what}. Fix: write it into the sources", {"what": what})
        mixture = Mixture.model_validate({**value, "sources": given})
        for source in mixture.sources:
            if kind not in DERIVES[source.kind]:
                what = f"{source.name} is of kind {source.kind}, which gives no rows of kind {kind}"
                raise PydanticCustomError("gives_none", "{what}. Fix: take it out of the mixture", {"what": what})
            if info.field_name == "evaluation" and (source.weight or source.epochs):
                what = (
                    f"{source.name} has a weight or epochs, which are of rows to train on; all prompts are asked once"
                )
                raise PydanticCustomError("not_used", "{what}. Fix: leave them out", {"what": what})
        return mixture
    return DataConfig.model_validate(value)


_Form = DataConfig | Mixture | Annotated[list[MixtureSource], Field(min_length=1)]
Slot = Annotated[DataConfig | Mixture, BeforeValidator(_choose, json_schema_input_type=_Form)]


class PipelineData(Strict):
    """The data of a pipeline, each one source, or a mixture as a list of sources. What is left out is derived from the
    others where that is possible."""

    sft: Slot | None = None
    """Default: the preferred answers of `preference`."""
    preference: Slot | None = None
    """Pairs or rankings. Left out when `generate` makes them."""
    feedback: Slot | None = None
    """Thumbs for KTO. Default: derived from `preference`."""
    prompt: Slot | None = None
    """Prompts for PPO and `generate`. Default: those of `preference`, else of `sft`."""
    evaluation: Slot | None = None
    """Prompts to evaluate on, all of them. Default: the held-out ones of `prompt`."""


# --- what stage `validate` is asked ---


class _Beside(Strict):
    """What the rest of the pipeline asks of a data set."""

    min_eval_prompts: int = Field(default=0, ge=0)
    """How many held-out prompts the pipeline's evaluation asks for."""
    min_test_prompts: int = Field(default=0, ge=0)
    """The same for the test part, where a sweep evaluates on it."""
    few_prompts: FewPrompts = "refuse"
    """What happens where there are fewer: a warning, or a refusal before anything is trained."""
    others_eval_fraction: float = Field(default=0.0, ge=0, le=1)
    """The largest `eval_fraction` in the pipeline's data. What lies between it and this data's own is left out of
    training, since other data may hold those prompts out."""
    others_test_fraction: float = Field(default=0.0, ge=0, le=1)
    """The same of `test_fraction`."""
    learn: Learn = "last"
    """`sft.learn`; the pipeline sets it. Only where all turns are learned the weights of earlier ones count."""


class ValidateParams(_Beside, DataConfig):
    """Stage `validate` of one source."""


class MixtureParams(_Beside, Mixture):
    """Stage `validate` of a mixture."""

    def of(self, source: MixtureSource) -> ValidateParams:
        """One source, as if it stood alone under the mixture's settings."""
        own = {name: getattr(source, name) for name in SourceConfig.model_fields}
        common = {name: getattr(self, name) for name in (*PartsConfig.model_fields, *_Beside.model_fields)}
        return ValidateParams.model_validate(own | common)
