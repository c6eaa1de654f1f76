"""Which layout a model may take: by its type, and by comparing the shared layout with the padded one."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from stages.engine.data.trees import Batch, Layout, Tree, collate, tree_tokens
from stages.engine.models.policy import Output, Policy, Scorer

# Types whose every layer outside attention treats tokens one by one, whose attention is softmax(QK) over positions and
# passes keyword arguments down, and whose logits are the head's product as it is.
TREE_TYPES = frozenset(
    {
        "gemma",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)

_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # the others look at the batch's longest row

TOLERANCE = 1e-4
"""Largest difference of a log-probability (or score) between two layouts, float32; relative above 1."""


def why_padded(config: PretrainedConfig) -> str | None:
    """Why a model cannot take shared and packed layouts; None when it can."""
    if config.model_type not in TREE_TYPES:
        return f"model type {config.model_type!r} is not on the list of those whose attention takes trees"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        return f"rope type {kind!r} of {config.model_type!r} depends on the whole batch"
    if getattr(config, "add_cross_attention", False):
        return f"{config.model_type!r} with cross-attention is not on the list of those whose attention takes trees"
    return None


@torch.no_grad()
def choose_layout(model: Policy | Scorer, wanted: Layout, trees: Sequence[Tree], pad_id: int) -> Layout:
    """The wanted layout where it is exact for this model, else `padded` with a warning.

    Exact: the model type is on the list, and on the longest and the shortest of these trees (the first batch's)
    log-probabilities or scores agree with the padded layout's within TOLERANCE.
    """
    if wanted == "padded":
        return wanted
    if reason := why_padded(model.plain.config):
        warnings.warn(f"layout {wanted!r} becomes 'padded': {reason}", stacklevel=2)
        return "padded"
    if not trees:
        return wanted
    ordered = sorted(trees, key=lambda tree: tree_tokens(tree, "packed"))
    difference = _difference(model, wanted, [ordered[-1], *ordered[:-1][:1]], pad_id)
    if not difference <= TOLERANCE:
        warnings.warn(f"layout {wanted!r} becomes 'padded': results differ by {difference:.2g}", stacklevel=2)
        return "padded"
    return wanted


def _difference(model: Policy | Scorer, layout: Layout, trees: Sequence[Tree], pad_id: int) -> float:
    """Largest difference between a layout and the padded one, in float32 and without dropout."""
    training, precision = model.training, model.precision
    model.eval()
    model.precision = "fp32"
    try:
        one, other = (_numbers(model, collate(trees, kind, pad_id)) for kind in (layout, "padded"))
    finally:
        model.train(training)
        model.precision = precision
    return float(((one - other).abs() / other.abs().clamp(min=1.0)).max())


def _numbers(model: Policy | Scorer, batch: Batch) -> Tensor:
    out = model(batch.to(model.device))
    return out.logps_N if isinstance(out, Output) else out
