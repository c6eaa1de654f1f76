"""`alignflow export`: a model as a folder that plain transformers loads, with a model card; or its adapter alone, as a
GGUF file too, on the Hub."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.results.export import gguf, hub, origins
from flows.results.export.card import card
from flows.results.lookup import Model, model
from schemas.errors import refuse
from schemas.model_folder import is_reward_model, read_json
from stages import tracking
from stages.runtime import workspace

ADAPTER = "adapter"
WITH_ADAPTER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Exported:
    """Where a model has gone."""

    folder: Path | None
    """None where it was only pushed."""
    pushed: hub.Pushed | None = None


def export(
    what: str,
    out: Path | None = None,
    *,
    adapter: bool = False,
    base: str | None = None,
    converter: Path | None = None,
    push: str | None = None,
    public: bool = False,
) -> Exported:
    """Write the model to the folder `out`, which must not hold anything yet, and push that folder.

    adapter: its LoRA adapter alone, whose base is called `base` on the Hub; by default what is known of it.
    converter: a checkout of llama.cpp, whose converter makes a GGUF file of the model, into the folder.
    push: the repository on the Hub, `ORG/NAME`; it is private unless `public`.

    Raises:
        StageError: there is no such model, or nothing of the kind that is asked for; `out` is taken or cannot be
            written; the model cannot be pushed, which is said before anything is sent.
    """
    if out is None and push is None:
        raise refuse("--out", "not given", "nothing says where the model is to go.", "give --out, --push, or both")
    if base is not None and not adapter:
        raise refuse("--base", base, "only an adapter alone has one.", "add --adapter, or leave --base out")
    if public and push is None:
        raise refuse("--public", "given", "nothing is pushed.", "add --push ORG/NAME, or leave --public out")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise refuse("--out", out, "already exists.", "name a new folder", kind="export")
    if converter is not None:
        gguf.check(converter, adapter)
    door = None if push is None else hub.door(push, public)
    chosen = model(what)
    on = adapter_base(chosen, base) if adapter else None
    if door is not None:
        hub.check(chosen, on)
    if out is not None:
        return Exported(_make(chosen, out, on, converter), None if door is None else door.push(out))
    assert door is not None and push is not None
    with TemporaryDirectory() as temporary:
        made = _make(chosen, Path(temporary) / push.rpartition("/")[2], on, converter, named=False)
        return Exported(None, door.push(made))


def _make(
    chosen: Model, out: Path, adapter: origins.Pinned | None, converter: Path | None, *, named: bool = True
) -> Path:
    """Write the whole folder. named: whether the user has chosen it; else it is a temporary one."""
    try:
        write(chosen, out, adapter)
    except OSError as error:
        message, fix = f"cannot be written: {error}.", "name a place where you may write, with room for the model"
        if named:
            raise refuse("--out", out, message, fix, kind="export") from error
        message = f"the model is written here before it is sent, which fails: {error.strerror}."
        fix = "set TMPDIR to a folder with room for the model, or give --out too"
        raise refuse("TMPDIR", out.parents[1], message, fix, kind="export") from error
    if converter is not None:
        gguf.convert(converter, out)
    return out


def write(chosen: Model, out: Path, adapter: origins.Pinned | None = None) -> None:
    """Put the model's files and card into a new folder; under its name it is whole at once.

    `adapter`: the base of the adapter that is written alone.
    """
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    left = tracking.FOR_MLFLOW if (chosen.folder / "MLmodel").exists() else ()
    # As new files, under the user's umask: those of the home are for nobody else.
    for file in filter(Path.is_file, chosen.folder.rglob("*")):
        inner = file.relative_to(chosen.folder)
        if inner.parts[0] in left:
            continue
        if adapter is not None and inner.parts[0] == ADAPTER:
            inner = inner.relative_to(ADAPTER)
        elif adapter is not None and not any(map(inner.match, WITH_ADAPTER)):
            continue
        copy = beside / inner
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    if adapter is not None:
        _name_base(beside / "adapter_config.json", adapter)
    card(chosen, out, adapter).save(beside / "README.md")
    workspace.sync_all(beside)
    if out.exists():
        out.rmdir()
    beside.replace(out)
    workspace.sync(out.parent)


def _name_base(file: Path, base: origins.Pinned) -> None:
    """Let peft find the adapter's base by its name, where it has one, instead of by a digest that only we know."""
    config = json.loads(file.read_text()) | {"task_type": "CAUSAL_LM"}
    if base.name:
        config |= {"base_model_name_or_path": base.name, "revision": base.commit or None}
    file.write_text(json.dumps(config, indent=2) + "\n")


def adapter_base(chosen: Model, named: str | None) -> origins.Pinned:
    """What the model's adapter is put on: as named, else the Hub model that it was trained from; without a name where
    that is a model of this home alone.

    Raises:
        StageError: the model has no adapter, or one that means nothing without its weights.
    """
    if is_reward_model(read_json(chosen.folder / "config.json")):
        message = "a reward model's adapter lacks the head that gives the score."
        raise refuse("--adapter", chosen.name, message, "export the whole model", kind="export")
    if not (chosen.folder / ADAPTER / "adapter_config.json").is_file():
        message = "this model has no LoRA adapter."
        fix = "export the whole model, or train it with `lora: {}`"
        raise refuse("--adapter", chosen.name, message, fix, kind="export")
    if named is not None:
        return origins.Pinned(named)
    below = None if chosen.request is None else origins.maker(chosen.request.inputs.get("model"))
    known = origins.pinned(below) if below is not None and below.stage == "base" else None
    return known or origins.Pinned("")
