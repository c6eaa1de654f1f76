"""Which layout a model takes: the wanted one where it compares equal with the padded one on the first batch."""

import gc
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from schemas.config.training import Training
from schemas.text import one_line
from stages.engine.data.trees import Batch, Layout, Tree, collate, tree_tokens
from stages.engine.distributed import processes, rank
from stages.engine.models import sharding
from stages.engine.models.pieces import origin
from stages.engine.models.policy import Output, Policy, Scorer
from stages.engine.models.tree_attention import attend, attend_in_one_kernel, why_padded

TOLERANCE = 1e-4
"""Largest difference of a log-probability (or score) between two layouts, float32; relative above 1."""


@torch.no_grad()
def choose_layout(model: Policy | Scorer, wanted: Layout, trees: Sequence[Tree], pad_id: int) -> Layout:
    """The wanted layout where it is exact for this model, else `padded` with a warning.

    Exact: the model type is on the list, and on the longest and the shortest of these trees (the first batch's)
    log-probabilities or scores agree with the padded layout's within TOLERANCE. On CUDA FlexAttention is tried first.
    """
    if wanted == "padded":
        return wanted
    if reason := why_padded(model.plain.config):
        warnings.warn(f"layout {wanted!r} becomes 'padded': {reason}", stacklevel=2)
        return "padded"
    if not trees:
        return wanted
    ordered = sorted(trees, key=lambda tree: tree_tokens(tree, "packed"))
    two = [ordered[-1], *ordered[:-1][:1]]
    # Twice, since what is compiled for one number of tokens is compiled anew, for any, at the second.
    model.flex = model.device.type == "cuda" and all(
        _flex_works(model, wanted, some, pad_id) for some in (two, two[-1:])
    )
    difference = _difference(model, wanted, two, pad_id)
    if model.flex and not difference <= TOLERANCE:
        warnings.warn(f"attention goes by groups: FlexAttention's results differ by {difference:.2g}", stacklevel=2)
        model.flex = False
        difference = _difference(model, wanted, two, pad_id)
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
    chosen: list[Any] = [choose_layout(model, wanted, trees, pad_id) if rank() == 0 else wanted, model.flex]
    broadcast_object_list(chosen)
    layout, model.flex = chosen
    sharding.shard(model, training)
    return layout


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
    model.flex = tried.flex
    if tried is not model:
        del tried
        gc.collect()  # its shares hold each other
        sharding.shard(model, training)
    return layout


def _flex_works(model: Policy | Scorer, layout: Layout, trees: Sequence[Tree], pad_id: int) -> bool:
    """Whether FlexAttention compiles here, and gives values and gradients of tree_attention's groups; said if not."""
    try:
        difference = kernels_differ(model, collate(trees, layout, pad_id).to(model.device))
    except (ImportError, RuntimeError, ValueError) as error:  # what compiling raises
        warnings.warn(f"attention goes by groups: FlexAttention fails here: {one_line(error, 200)}", stacklevel=3)
        return False
    if not difference <= TOLERANCE:
        warnings.warn(f"attention goes by groups: FlexAttention's results differ by {difference:.2g}", stacklevel=3)
    return difference <= TOLERANCE


def kernels_differ(model: Policy | Scorer, batch: Batch) -> float:
    """Largest relative difference between FlexAttention and groups, of values and of gradients, on random queries, keys
    and values of the model's shapes in float32. Raises ImportError, RuntimeError or ValueError where that one fails.
    """
    config = model.plain.config.get_text_config()
    heads: int = config.num_attention_heads
    keys: int = getattr(config, "num_key_value_heads", None) or heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert batch.segments is not None, "only trees are tried"
    draw = torch.Generator().manual_seed(0)
    shapes = [(len(batch.segments.positions_T), count, size) for count in (heads, keys, keys, heads)]
    *given, weight = (torch.randn(shape, generator=draw).to(batch.device) for shape in shapes)
    results = []
    for product in (attend_in_one_kernel, attend):
        with torch.enable_grad():
            query, key, value = inputs = [tensor.clone().requires_grad_() for tensor in given]
            out = product(query, key, value, batch.segments, None, None)
            results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)])
    return max(float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True))


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
