"""Whether the parts of a model folder fit together, from its JSON files and the headers of its weights: no weight is
read, nothing imported.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from schemas.architectures import why_no_policy, why_no_scorer

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
"""Files of which a tokenizer has one; transformers converts the older ones."""
MOST_PARTS = 100_000
"""Layers times experts of a model. The largest have some ten thousand."""
MOST_BYTES = 512 << 20
"""Of a JSON file. Vocabularies have tens of megabytes."""
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What reading such a file may raise: it may be nested deeply, or hold anything anywhere."""


def why_unusable(folder: Path, scorer: bool) -> tuple[str, str] | None:
    """What does not fit, and its fix; None for a folder in order. `scorer`: a reward model is wanted.

    What the files do not tell (a tokenizer without tokenizer.json, no `vocab_size`) is left to those who load them.
    """
    try:
        config = read_json(folder / "config.json")
        tokenizer = read_json(folder / "tokenizer.json")
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        last = max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])], default=None)
        rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        head = _why_head_unusable(config, scorer)
        stale = stale_end(folder)
    except UNREADABLE as error:
        return f"its JSON files cannot be read: {error}", "name the folder that save_pretrained wrote"
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter, which names its model elsewhere", "merge the adapter into its model and save that"
    if problem := too_many_parts(config) or why_unreadable(folder, config):
        return problem
    if last is not None and isinstance(rows, int) and last >= rows:
        return f"the tokenizer has {last + 1} tokens, the model only {rows}", "give the tokenizer that belongs to it"
    if not any(file for name in _VOCABULARIES for file in folder.glob(name)):
        what = "it has no tokenizer: there is no tokenizer.json"
        return what, "put the model's tokenizer into it: tokenizer.save_pretrained(folder)"
    return head or (why_no_scorer(config) if scorer else why_no_policy(config)) or stale


def why_unreadable(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why a folder's weights cannot or must not be read, and the fix."""
    if "quantization_config" in config:
        return "the weights are quantized", "give the plain weights (or a GGUF file)"
    if any(folder.glob("*.safetensors")):
        try:
            stored(folder)
        except UNREADABLE as error:
            return f"its weights cannot be read: {error}", "give its files whole (those of Git LFS: git lfs pull)"
        return None
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth"})
    what = f"{pickles[0]} is a pickle, which can run code and is never read" if pickles else "there are no weights"
    return what, "save the model as safetensors: model.save_pretrained(folder) does"


class Stored(NamedTuple):
    """A tensor as a safetensors file's header tells of it."""

    dtype: str
    """BF16, F32 and so on."""
    shape: tuple[int, ...]


def stored(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors files, from the files' headers.

    Each begins with the length of its header (8 bytes, little-endian), then the header as JSON, which says for each
    tensor where its bytes lie behind the header. Raises one of `UNREADABLE` for a file that is cut short, or is none
    (a pointer of Git LFS, say).
    """
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder) or sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            begin, size = stream.read(8), file.stat().st_size
            length = int.from_bytes(begin, "little")
            if len(begin) < 8 or length > size - 8:
                raise ValueError(f"{file.name} is no safetensors file, or is cut short: it has {size} bytes")
            header = json.loads(stream.read(length))
        every = {name: one for name, one in header.items() if name != "__metadata__"}
        whole = 8 + length + max((int(one["data_offsets"][1]) for one in every.values()), default=0)
        if size < whole:
            raise ValueError(f"{file.name} is cut short: it has {size} of {whole} bytes")
        tensors |= {name: Stored(str(one["dtype"]), tuple(map(int, one["shape"]))) for name, one in every.items()}
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that transformers reads; none where they have other names than it gives them.

    Raises one of `UNREADABLE`.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    parts = read_json(folder / "model.safetensors.index.json").get("weight_map") or {}
    return sorted({folder / Path(name).name for name in parts.values()})


def in_bf16(folder: Path) -> bool:
    """Whether all weights of a folder's safetensors files are bfloat16."""
    return {one.dtype for one in stored(folder).values()} == {"BF16"}


def listed_ends(folder: Path) -> list[int]:
    """The tokens that end an answer by generation_config.json. Raises one of `UNREADABLE`."""
    listed = read_json(folder / "generation_config.json").get("eos_token_id")
    return [] if listed is None else [int(i) for i in (listed if isinstance(listed, list) else [listed])]


def stale_end(folder: Path) -> tuple[str, str] | None:
    """Where generation_config.json ends answers at an ordinary word of the tokenizer, and the fix; else None.

    That is so where the file is of another tokenizer: every sampled answer would stop at its first full stop, say.
    Raises one of `UNREADABLE`.
    """
    ends = listed_ends(folder)
    tokenizer = read_json(folder / "tokenizer.json") if ends else {}
    if not tokenizer:
        return None
    added = {token["id"] for token in tokenizer.get("added_tokens") or []}
    named = set(map(_spelling, read_json(folder / "tokenizer_config.json").values()))
    named |= set(map(_spelling, read_json(folder / "special_tokens_map.json").values()))
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    items = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
    words = {i: word for word, i in items if i in ends and i not in added and word not in named}
    for end in ends:
        if end in words:
            good = [i for i in ends if i not in words]
            what = (
                f"generation_config.eos_token_id = {ends if len(ends) > 1 else end} ends every answer at token {end}, "
            )
            what += f"which is the ordinary word {words[end]!r} in tokenizer.json"
            fix = (
                f"set eos_token_id in generation_config.json to {good}"
                if good
                else (
                    "take eos_token_id out of generation_config.json, or set it to the id of the tokenizer's end token"
                )
            )
            return what, fix
    return None


def _spelling(token: Any) -> str | None:
    """A special token's text as the tokenizer's files hold it: plain, or with its settings."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def is_reward_model(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a sequence classifier; a language model's else."""
    names = config.get("architectures")
    return isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)


def _why_head_unusable(config: dict[str, Any], scorer: bool) -> tuple[str, str] | None:
    classifier = is_reward_model(config)
    if scorer and not classifier:
        return "it is a language model without a score", "train a reward model from it (stage `reward`), or name one"
    if classifier and not scorer:
        return "it is a reward model, not a language model", "give it as `reward_model`"
    labels = len(config.get("id2label") or {0: "", 1: ""})  # transformers' default is two
    if scorer and labels != 1:
        fix = "give a classifier with one label, whose logit is the score"
        return f"a reward model has one score, this one has {labels}", fix
    return None


def too_many_parts(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a config asks for that no model has, and its fix: each layer is built, so millions would never end."""
    layers = experts = 1
    for name, value in _numbers(config):
        if re.search(r"layers?$|blocks?$|depth$", name):
            layers = max(layers, value)
        elif re.search(r"experts?$", name):
            experts = max(experts, value)
        elif re.search(r"(^|_)(labels|heads?|groups)$", name) and value > MOST_PARTS:
            return f"config.json says {name} = {value}; {MOST_PARTS} are allowed", "give the model's own config.json"
    if layers * experts > MOST_PARTS:
        what = f"config.json asks for {layers} layers with {experts} experts each; {MOST_PARTS} parts are allowed"
        return what, "give the model's own config.json"
    return None


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """All whole numbers of a config with their names, the parts of a nested one too."""
    rest = [config]
    while rest:
        for name, value in rest.pop().items():
            if isinstance(value, dict):
                rest.append(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                yield str(name), value


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json; empty where it is not there or cannot be read, which `why_unusable` tells."""
    try:
        return read_json(folder / "config.json")
    except UNREADABLE:
        return {}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is none. Raises one of `UNREADABLE`."""
    if not file.is_file():
        return {}
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file.name} has more than {MOST_BYTES >> 20} MiB")
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content
