"""Which layout a model takes: the wanted one where it compares equal with the padded one on the first batch."""

import gc
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from schemas.config.training import Training
from stages.engine.data.trees import Layout, Tree, collate, tree_tokens
from stages.engine.distributed import processes, rank
from stages.engine.models import sharding
from stages.engine.models.pieces import origin
from stages.engine.models.policy import Output, Policy, Scorer
from stages.engine.models.tree_attention import why_padded

TOLERANCE = 1e-4
"""Largest difference of a log-probability (or score) between two layouts, float32; relative above 1."""


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


def choose_and_shard(
    model: Policy | Scorer, training: Training, wanted: Layout, trees: Sequence[Tree], pad_id: int
) -> Layout:
    """`choose_layout`, then sharding where it is wanted; called on all ranks, of whose trees the first one's count.

    Where the first rank holds the weights it chooses. Where none does all choose together, on shares that are gathered
    in float32: bfloat16 differs by more than TOLERANCE.
    """
    if not sharding.wanted(training):
        return choose_layout(model, wanted, trees, pad_id)
    processes()
    if any(origin(parameter) for parameter in model.parameters()):
        return _choose_together(model, training, wanted, trees, pad_id)
    layout: list[Layout] = [choose_layout(model, wanted, trees, pad_id) if rank() == 0 else wanted]
    broadcast_object_list(layout)
    sharding.shard(model, training)
    return layout[0]


def _choose_together(
    model: Policy | Scorer, training: Training, wanted: Layout, trees: Sequence[Tree], pad_id: int
) -> Layout:
    given: list[Any] = [list(trees)]
    broadcast_object_list(given)
    exact = training.model_copy(update={"gather": "fp32"})
    as_it_is = training == exact or wanted == "padded"  # which is not tried
    tried = sharding.shard(model if as_it_is else sharding.twin(model), training if as_it_is else exact)
    with warnings.catch_warnings():
        if rank() > 0:
            warnings.simplefilter("ignore")
        layout = choose_layout(tried, wanted, given[0], pad_id)
    if tried is not model:
        del tried
        gc.collect()  # its shares hold each other
        sharding.shard(model, training)
    return layout


def _difference(model: Policy | Scorer, layout: Layout, trees: Sequence[Tree], pad_id: int) -> float:
    """Largest difference between a layout and the padded one, in float32 and without dropout."""
    training, precision = model.training, model.precision
    model.eval()
    model.precision = "fp32"
    try:
        outputs = [model(collate(trees, kind, pad_id).to(model.device)) for kind in (layout, "padded")]
    finally:
        model.train(training)
        model.precision = precision
    one, other = (out.logps_N if isinstance(out, Output) else out for out in outputs)
    return float(((one - other).abs() / other.abs().clamp(min=1.0)).max())
