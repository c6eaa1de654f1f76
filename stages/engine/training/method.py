"""The contract between a training method and the loop: SFT, reward model, DPO, KTO and PPO all fit it.

An online method is an offline method whose batches come from its own model, so the loop need not know which it runs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from schemas.config.training import Training
from stages.runtime.context import StageContext

Micro = TypeVar("Micro")

Totals = dict[str, Tensor]
"""Denominators of one optimizer step. Scalars; the loop adds them up over all ranks."""

Metrics = dict[str, Tensor]
"""Scalars that add up over micro-batches and ranks to the step's value: already divided by the totals.

Those whose name ends in `_max` are maxima instead. Those under `compute/` are added up over all steps as well;
`compute/train_tokens`, which may end a training, is `Batch.tokens`. The loop adds `train/loss` itself."""


class Method(Protocol[Micro]):
    """What the loop calls, in this order, for every optimizer step."""

    model: nn.Module
    """What is trained. The loop replaces it by Accelerate's wrapper; call it, don't reach into it."""
    total_steps: int
    """Optimizer steps of the whole training."""

    @property
    def training(self) -> Training:
        """Its settings: batch size, learning rate, when to save."""
        ...

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """All that is trained, in parts with a name: each has a gradient norm and a learning rate of its own."""
        ...

    def rate_factors(self, step: int) -> dict[str, float]:
        """Name of a part -> its learning rate in this step, over the schedule's. 0 leaves the part as it is."""
        ...

    def batches(self, start: int) -> Iterator[list[Micro]]:
        """This rank's micro-batches, one list per optimizer step, from step `start` on. A function of (seed, step)."""
        ...

    def prepare(self, micros: list[Micro]) -> Totals:
        """This rank's part of the step's denominators (tokens, pairs, KTO's z0 by a no-grad pass)."""
        ...

    def loss(self, micro: Micro, totals: Totals) -> tuple[Tensor, Metrics]:
        """The micro-batch's summand of the step's loss, divided by `totals`, with its metrics' summands."""
        ...

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """Called with the step's metrics, whole; returns more to log (PPO's KL coefficient)."""
        ...

    def held_out_metrics(self) -> dict[str, float]:
        """What it measures on held-out rows, after training and, where asked for, on the way; maybe nothing. Called on
        the first rank; where weights are sharded on all."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `batches` and `loss` need to resume exactly, beyond model and step: tensors and JSON values only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PublishedMethod(Method[Micro], Protocol[Micro]):
    """A method whose model a stage publishes, through `train_and_publish` in loop.py."""

    def __init__(self, config: Any, context: StageContext) -> None: ...

    def finish(self, folder: Path) -> dict[str, float]:
        """Write the trained model to `folder`; returns what is measured after training. Called on the first rank;
        where weights are sharded on all, of which the first writes."""
        ...
