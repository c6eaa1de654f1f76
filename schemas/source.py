"""Where a model or a data set comes from: written as one text in a config, parsed here and nowhere else.

Everybody else matches on the type: File | Hub | Package for a model, File | Remote | Hub | Demo | Generated for data.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from schemas.errors import refuse

_NAME = r"[A-Za-z0-9_][\w.-]*"
_HUB_MODEL = re.compile(f"{_NAME}/{_NAME}", re.ASCII)
_HUB_DATASET = re.compile(f"{_NAME}(/{_NAME})?", re.ASCII)


Place = TypeVar("Place", str, Path)
_TEMPLATE_CHARACTERS = 1 << 20
_PATH_BYTES, _NAME_BYTES = 4095, 255  # Linux refuses to look for more


def could_exist(path: Place) -> Place:
    """The path, or name; refused as a value where no disk could hold it: asking for it would be an error."""
    encoded = str(path).encode(errors="surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    if len(encoded) > _PATH_BYTES or longest > _NAME_BYTES:
        where = f"a path has at most {_PATH_BYTES} bytes and each part of it {_NAME_BYTES}; this has {len(encoded)}"
        raise PydanticCustomError("path_too_long", "is too long: {where}", {"where": f"{where} and {longest}"})
    if b"\0" in encoded:
        raise PydanticCustomError("path_with_nul", "holds a NUL character, which no path can")
    return path


PathText = Annotated[str, AfterValidator(could_exist)]
"""A path, or a name in its place, as a config has it."""
FilePath = Annotated[Path, AfterValidator(could_exist)]
"""A path, as a command has it."""


@dataclass(frozen=True)
class File:
    """A file or a folder on this disk, which may be missing. `~` is expanded."""

    path: Path


@dataclass(frozen=True)
class Hub:
    """A name on the Hugging Face Hub. `datasets` also takes a folder or an address in its place: see `plain`."""

    name: str

    @property
    def plain(self) -> bool:
        """Whether it can only be a name of a data set: neither a folder on this disk nor an address."""
        return _HUB_DATASET.fullmatch(self.name) is not None and not Path(self.name).expanduser().exists()


@dataclass(frozen=True)
class Package:
    """The one GGUF file inside an installed Python package, which is looked up without being imported."""

    name: str

    @property
    def module(self) -> str:
        """The package's name as Python imports it."""
        return self.name.replace("-", "_")

    @property
    def plain(self) -> bool:
        """Whether it is one name: looking up a dotted one would import the package before the dot."""
        return self.module.isidentifier()

    def ggufs(self) -> list[Path] | None:
        """All its GGUF files; None when it is not installed."""
        spec = importlib.util.find_spec(self.module) if self.plain else None
        if spec is None or not spec.submodule_search_locations:
            return None
        return sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))

    def __str__(self) -> str:
        return f"package:{self.name}"


@dataclass(frozen=True)
class Remote:
    """A file at an address: `s3://`, `gs://` or `https://`. What it holds is told by a digest alone."""

    url: str

    @property
    def scheme(self) -> str:
        """`s3`, `gs` or `https`."""
        return self.url.partition(":")[0]

    @property
    def has_secrets(self) -> bool:
        """Whether it holds a user or a query, as signed addresses do: whoever reads one may fetch the file."""
        parts = urlsplit(self.url)
        return "@" in parts.netloc or bool(parts.query)


HOW_TO_PIN = "set it to what `sha256sum` prints for a copy of the file"
_REMOTE = ("s3://", "gs://", "https://")


@dataclass(frozen=True)
class Demo:
    """Rows that the demo makes: `sft` or `prompt`."""

    kind: str


@dataclass(frozen=True)
class Generated:
    """The rows of stage `generate` in the same pipeline."""


GENERATED = "input:rows"
"""How a config names `Generated`."""


def model_source(path: str) -> File | Hub | Package:
    """What `model.path` names. `owner/name` is a name on the Hub unless such a folder or file exists here."""
    if path.startswith("package:"):
        return Package(path.removeprefix("package:"))
    local = _expanded(path)
    if _HUB_MODEL.fullmatch(path) and local.suffix != ".gguf" and not local.exists():
        return Hub(path)
    return File(local)


def data_source(path: str) -> File | Remote | Hub | Demo | Generated:
    """What a data set's `path` names. Whatever has no known scheme is a file."""
    if path == GENERATED:
        return Generated()
    if path.startswith(_REMOTE):
        return Remote(path)
    scheme, _, rest = path.partition(":")
    if scheme == "demo":
        return Demo(rest)
    if scheme == "hub":
        return Hub(rest)
    return File(_expanded(path))


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the Hub refuses, cannot be reached, or must not be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub.errors import HfHubHTTPError  # late: only a name on the Hub needs it

    http_error: Any = HfHubHTTPError.__mro__[1]  # of its HTTP library: httpx, or in newer versions httpx2
    return http_error, OSError, ValueError


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit, which never moves, and not a branch or a tag."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def template_file(template: str) -> Path | None:
    """The file that a chat template names, which may be missing; None when the text is the template itself (Jinja)."""
    return None if "{" in template or "\n" in template else _expanded(template)


def read_template(file: Path) -> str:
    """The chat template in a file. Raises StageError when it is not a text, or far too long for a template."""
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_TEMPLATE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        fix = "name a text file that holds a Jinja template"
        raise refuse("model.chat_template", file, f"the file cannot be read: {error}.", fix) from error
    if len(text) > _TEMPLATE_CHARACTERS:
        what = f"the file has more than {_TEMPLATE_CHARACTERS} characters, too many for a template."
        raise refuse("model.chat_template", file, what, "name a file with a Jinja template")
    return text


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # `~name` of a user that this machine does not have: whoever opens it says so
        return Path(path)
