"""Weights in and out of safetensors files a piece at a time, for models that no process should hold whole.

Loading: a weight stands for its place in a file until its rows are read (`Origin`). Saving: a file is written tensor by
tensor, byte for byte as safetensors writes it (https://github.com/huggingface/safetensors#format): the length of the
header in 8 bytes, the header as JSON padded with spaces to a multiple of 8, and the tensors end to end.
"""

import json
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from schemas.model_folder import weight_files

_FLOATS = ("F32", "BF16", "F16")
"""Types that float32 holds exactly."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Origin(NamedTuple):
    """Where the values of a weight are."""

    file: Path
    key: str

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end), in float32; no others are read."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_slice(self.key)[begin:end].float()


def origin(parameter: Tensor) -> Origin | None:
    """Where a weight's values are to be read; None where it holds them, or another rank does."""
    return getattr(parameter, "origin", None)


def stand_in(shape: torch.Size, place: Origin, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A weight of a shape that takes no memory, for values that are read later."""
    parameter = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape))
    parameter.origin = place  # type: ignore[attr-defined]
    return parameter


def converts(hf: PreTrainedModel) -> bool:
    """Whether weights of this type have other names or shapes in files than in the model."""
    return any(not isinstance(one, PrefixChange) for one in get_model_conversion_mapping(hf, add_legacy=False))


def stand_in_for_all(hf: PreTrainedModel, folder: Path, fresh: Collection[str]) -> bool:
    """Put stand-ins in the place of a model's weights. False, and nothing done, where its files need transformers.

    Every weight has to be in the files once, under its own name and in its own shape. The head of a reward model is
    read whole, since it may be changed before it is trained; a `fresh` one is left as it was made, on the CPU.
    """
    files = _files(folder)
    if files is None or converts(hf):
        return False
    names: dict[int, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    new: dict[int, nn.Parameter] = {}
    for every in names.values():
        parameter = hf.get_parameter(every[0])
        there = [name for name in every if name in files]
        if every[0] in fresh:
            new[id(parameter)] = nn.Parameter(torch.zeros(parameter.shape))
            continue
        if len(there) != 1 or not _fits(place := Origin(files[there[0]], there[0]), parameter):
            return False
        head = every[0].startswith("score.")
        whole = nn.Parameter(place.rows(0, parameter.shape[0])) if head else stand_in(parameter.shape, place)
        new[id(parameter)] = whole
    own = {name for every in names.values() for name in every}
    if (hf.state_dict().keys() - own) & files.keys():  # buffers with values of their own
        return False
    for module in hf.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = new[id(parameter)]
    return True


def _files(folder: Path) -> dict[str, Path] | None:
    """Name of a tensor -> its file, of those files that transformers would read; None where it has to decide."""
    if (folder / "adapter_config.json").exists():
        return None
    files, places = weight_files(folder), {}
    if not files:
        return None
    for file in files:
        with safe_open(file, framework="pt") as content:
            places |= dict.fromkeys(content.keys(), file)
    return places


def _fits(place: Origin, parameter: Tensor) -> bool:
    with safe_open(place.file, framework="pt") as file:
        piece = file.get_slice(place.key)
        return piece.get_shape() == list(parameter.shape) and piece.get_dtype() in _FLOATS


def write(
    file: Path | None, shapes: Mapping[str, torch.Size], value: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """Write tensors of a type as one safetensors file, each asked for when its turn comes, in safetensors' order.

    Without a `file` the tensors are asked for and dropped: `value` may be collective.
    """
    names, end = sorted(shapes), 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name in names:
        size = dtype.itemsize * shapes[name].numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if file is None:
        for name in names:
            value(name)
        return
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            stream.write(value(name).detach().reshape(-1).view(torch.uint8).numpy().data)
