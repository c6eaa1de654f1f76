"""Checkpoints that verify: written beside, sealed by a manifest, renamed into place. Only safetensors and JSON.

Training waits for the copy of its state in memory (`snapshot`); a side thread (`Writer`) does the rest. torch's
distributed checkpoints are not used: their metadata is a pickle. Those of sharded weights: `shards.py`.
"""

import errno
import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.runtime.workspace import move_aside, remove, sync

log = logging.getLogger("alignflow")

ENDS = (".json", ".safetensors")
"""Of the files of one part."""
MANIFEST = "manifest.json"
KEEP = 2


def split_state(state: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Move the tensors out of a nested state into `tensors`; the JSON that is left names them by `{"tensor": path}`."""
    if isinstance(state, Tensor):
        # A copy always: training continues while it is written, and safetensors refuses shared memory.
        tensors[path] = state.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(state, dict):
        return {"dict": {k: split_state(v, tensors, f"{path}/{k}") for k, v in state.items()}}
    if isinstance(state, list | tuple):
        return {"list": [split_state(v, tensors, f"{path}/{i}") for i, v in enumerate(state)]}
    return {"value": state}


def join_state(state: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `split_state`."""
    ((kind, content),) = state.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: join_state(v, tensors) for k, v in content.items()}
    if kind == "list":
        return [join_state(v, tensors) for v in content]
    return content


class Snapshot(NamedTuple):
    """A nested state as it was: copies of its tensors, and the rest as JSON."""

    tensors: dict[str, Tensor]
    rest: str


def snapshot(state: Any) -> Snapshot:
    """Copy a nested state of tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    rest = split_state(state, tensors)
    return Snapshot(tensors, json.dumps(rest))


def write(folder: Path, name: str, taken: Snapshot) -> None:
    """Write a snapshot as `name.safetensors` and `name.json`."""
    save_file(taken.tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(taken.rest)


def read_state(folder: Path, name: str) -> Any:
    """Read what `write` wrote."""
    return join_state(json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digest(TypedDict):
    """What a manifest says of a file."""

    size: int
    sha256: str


def digest(path: Path) -> Digest:
    """A file's size and sha256, once it is on disk."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def seal(draft: Path, target: Path, *, key: str, step: int, known: Mapping[str, Digest] | None = None) -> None:
    """Turn a folder of written files into a checkpoint: manifest, fsync, rename. Once it verifies, prune older ones.

    known: digests of files by those who wrote them; these are not read here.

    Raises:
        OSError: it cannot be written, or does not read back as it was written. Older ones are kept then.
    """
    known = known or {}
    files = {p.name: known[p.name] if p.name in known else digest(p) for p in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps({"key": key, "step": step, "files": files}, indent=1))
    sync(draft / MANIFEST)
    sync(draft)
    remove(target)  # the same step, saved twice
    draft.rename(target)
    sync(target.parent)
    reason = fault(target, key, lambda name: name not in known)
    if reason is not None:
        raise OSError(errno.EIO, f"the checkpoint does not read back as it was written: {reason}", str(target))
    for old in list(_newest_first(target.parent))[KEEP:]:
        remove(old)


class Writer:
    """Does one piece of writing at a time beside training; leaving the block waits for it.

    What goes wrong is raised by the next call, or on leaving; beside another error it is logged.
    """

    def __init__(self) -> None:
        self._side = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work once the one before is done."""
        self.wait()
        self._last = self._side.submit(work)

    def check(self) -> None:
        """Raise what the work has met, if it has ended."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the write is done. Raises its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as second:
            if error is None:
                raise
            log.warning("a checkpoint could not be written: %s", second)
        finally:
            self._side.shutdown()


def _newest_first(folder: Path) -> Iterator[Path]:
    """The checkpoints of a folder. What bears another name (`step-3.bak`, `step-3 (copy)`) is not ours: it stays."""
    names = ((path, re.fullmatch(r"step-([0-9]+)", path.name)) for path in folder.iterdir())
    steps = {path: int(name[1]) for path, name in names if name}
    yield from sorted(steps, key=steps.__getitem__, reverse=True)


def fault(checkpoint: Path, key: str, read: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with a checkpoint, or None: a missing, cut or altered file, or another run's key.

    read: which files are read whole and held against their digests; of the others the size must be right.

    Raises:
        OSError: it cannot be read now, which says nothing about it: no file handles, a network disk that is away.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["key"] != key:
            return f"it belongs to another run ({manifest['key'][:12]})"
        for name, expected in manifest["files"].items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            same_size = (checkpoint / name).stat().st_size == expected["size"]
            if not same_size or (read(name) and _sha256(checkpoint / name) != expected["sha256"]):
                return f"{name} was altered or cut"
        present = {p.name for p in checkpoint.iterdir()}
        extra = present - set(manifest["files"]) - {MANIFEST}
        return f"{', '.join(sorted(extra))} is not in the manifest" if extra else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"its manifest cannot be read ({error})"
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(checkpoint)) from error  # a failed read names no file
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"


def newest(
    folder: Path,
    key: str,
    read: Callable[[str], bool] = lambda name: True,
    agree: Callable[[str | None], str | None] = lambda reason: reason,
    moves: bool = True,
) -> Path | None:
    """The newest checkpoint that verifies. Bad ones are moved to `bad/`, with the reason in the log.

    Several ranks share the work: `read` says which files are this one's, `agree` makes of all ranks' verdicts one, and
    one of them `moves` what is bad.
    """
    for checkpoint in list(_newest_first(folder)):
        reason = agree(fault(checkpoint, key, read))
        if reason is None:
            return checkpoint
        if not moves:
            continue
        bad = folder / "bad"
        if bad.exists() and not bad.is_dir():
            move_aside(bad)
        bad.mkdir(exist_ok=True)
        attempt = sum(1 for p in bad.glob(f"{checkpoint.name}*"))
        checkpoint.rename(bad / (checkpoint.name if not attempt else f"{checkpoint.name}.{attempt}"))
        log.warning("checkpoint %s was moved to %s: %s", checkpoint.name, bad, reason)
    return None


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name; tied ones once. The rest is rebuilt from the base model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def model_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trainable weights and, per weight, the optimizer's state."""
    parameters = trainable(model)
    return {
        "model": dict(parameters),
        "optimizer": {name: dict(optimizer.state.get(p, {})) for name, p in parameters.items()},
    }


def rng_state() -> dict[str, Any]:
    """States of this process's random generators. Steps seed what they draw from: these are for what comes between."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def load_model_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `model_state`, in place. Raises ValueError when names or shapes differ."""
    parameters = trainable(model)
    check_names(parameters, state["model"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            check_shape(name, parameter, state["model"][name].shape)
            parameter.copy_(state["model"][name])
            optimizer.state[parameter] = {
                k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in state["optimizer"][name].items()
            }


def check_names(parameters: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Raise ValueError when a checkpoint's weights are not the model's."""
    if odd := sorted(set(parameters) ^ set(saved)):
        raise ValueError(f"the checkpoint's weights are not this model's: {', '.join(odd[:3])}")


def check_shape(name: str, parameter: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError when a weight has another shape in the checkpoint."""
    if tuple(parameter.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(shape)} in the checkpoint")
