"""What `alignflow validate`, `generate`, `rank`, `ab`, `chat` and `retrain` ask of their processes: their options."""

from typing import Annotated, Literal

from pydantic import Field

from schemas import Strict
from schemas.config import GenerateConfig
from schemas.config.data import MixtureParams, ValidateParams
from schemas.source import FilePath, PathText


class _Checking(Strict):
    """What every check of data is asked beside the data."""

    out: FilePath
    """Folder for Parquet, quarantine.jsonl and report.json."""
    model: FilePath | None = None
    """Model folder whose tokenizer tells what is too long."""
    evaluation: FilePath | None = None
    """Data folder whose evaluation prompts must not be trained on."""
    as_json: bool = False
    force: bool = False
    """Replace what an earlier call left in `out`, also where it was of other data."""


class ValidateCommand(_Checking, ValidateParams):
    """Check a data file, alone."""


class MixtureCommand(_Checking, MixtureParams):
    """Check the mixture of a config."""

    config: FilePath
    """Where the mixture stands."""
    slot: str
    """Its place in the config's `data`."""


class GenerateCommand(GenerateConfig):
    """Answer the prompts of a file."""

    model: FilePath
    prompts: PathText
    out: FilePath
    judge: PathText = "none"
    """`none` (people rank), `rule`, `sentiment`, or a reward model's folder."""
    seed: int = 0
    as_json: bool = False


RankForm = Literal["ranking", "pairs", "thumbs"]
AnnotatorName = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^\S(.*\S)?$")]


class Interview(Strict):
    """How a person is asked."""

    annotator: AnnotatorName
    terminal: bool = False
    open: bool = True
    """Whether the page is opened in a browser, where there is a screen."""
    port: int = Field(default=0, ge=0, le=65535)
    """0: a free one."""
    seed: int = 0


class RankCommand(Interview):
    """Let a person rank the answers of a file."""

    file: FilePath
    output: FilePath | None = None
    """Where the rows to train on go. Default: beside the file, as `NAME.ranked.jsonl`."""
    form: RankForm = "ranking"
    """All answers to a prompt at once, every two of them, or each one with a thumb."""
    columns: dict[str, str] = {}
    """Our name of a column -> its name in the file."""
    as_json: bool = False


class AbCommand(Interview):
    """Let a person judge the answers of two evaluated models."""

    model: str
    other: str
    first: FilePath
    """The first model's evaluation folder."""
    second: FilePath
    out: FilePath
    """Folder for `NAME-NAME.verdicts.jsonl` and `results/NAME-NAME.json`."""
    limit: int | None = Field(default=None, ge=1)
    """Ask about so many prompts only, drawn by the seed."""
    as_json: bool = False


class LabelCommand(Strict):
    """Send answers to a labelling tool, or take back what people said there."""

    action: Literal["export", "import"]
    file: FilePath
    """Of `import` with `url`, the number of a project."""
    to: Literal["label-studio"] = "label-studio"
    source: Literal["label-studio", "argilla", "mlflow"] = "label-studio"
    out: FilePath | None = None
    """Of `export` a folder, by default `NAME.label-studio` beside the file; of `import` a file, `NAME.rows.jsonl`."""
    form: Literal["ranking", "pairs"] = "ranking"
    name: str | None = None
    """MLflow's assessment that counts."""
    url: str | None = None
    """A running Label Studio, in place of files."""
    seed: int = 0


class ChatCommand(Strict):
    """Talk to a model, or to two side by side: each a folder, `models:/NAME@ALIAS` or `runs:/RUN_ID/model`."""

    model: str
    name: str | None = None
    """What to call the first; by default as it is given."""
    versus: str | None = None
    versus_name: str | None = None
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    seed: int = 0
    max_new_tokens: int = Field(default=128, ge=1)
    as_json: bool = False
    """One JSON object per message, and nothing else on stdout."""


class SmokeCommand(Strict):
    """Let a model answer a few held-out prompts as it will be served; asked by `alignflow retrain` alone."""

    model: str
    """Its uri in MLflow."""
    data: FilePath
    """Data folder with held-out prompts."""
    prompts: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
