"""How a model is trained: optimizer, schedule, length, precision, LoRA, checkpoints. Shared by all training stages."""

import math
import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from schemas import Grown, Strict
from schemas.errors import refuse

Half = Literal["fp32", "bf16"]
Held = Literal["fp32", "bf16", "nf4"]

LARGE = 10**9
"""Parameters from which on a model is large: what is read of it alone is held in bfloat16, unless the config says."""


class LoRA(Grown):
    """Low-rank adapters (Hu et al. 2021) through peft; the published model has them merged."""

    later: ClassVar[frozenset[str]] = frozenset({"base"})
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """PPO trains without, whatever this says: its ratios compare two readings of the same tokens."""
    target: str = "all-linear"
    """Modules that get an adapter: peft's word `all-linear`, or a regular expression."""
    base: Held | None = None
    """Type in which the weights under the adapters are held, which never learn: 4, 2 or about half a byte each. The
    reference is the same weights, adapters off. `nf4`: linear layers in 4 bits, the rest in bfloat16 (QLoRA, Dettmers
    et al. 2023). None: as `frozen` says."""

    @field_validator("target")
    @classmethod
    def _is_an_expression(cls, target: str) -> str:
        try:
            re.compile(target)
        except re.error as error:
            raise PydanticCustomError(
                "no_expression", "is not a regular expression: {why}", {"why": str(error)}
            ) from None
        return target


class Training(Strict):
    """One optimizer step sees `batch_size` rows, however they are cut into micro-batches."""

    epochs: float | None = Field(default=1.0, gt=0, le=1_000_000)
    """Passes over the data. PPO counts iterations instead."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    train_tokens: int | None = Field(default=None, ge=1)
    """Train on this many tokens, whatever `epochs`, `max_steps` and PPO's `iterations` say; the step
    in which the number is reached is the last. A token counts when it is in a row (prompt or answer) of an optimizer
    step: a prompt once for all answers of its row, and again whenever its row is seen again; padding does not count,
    nor what is read without learning (the reference, KTO's mismatched answers, PPO's sampling and scoring). The
    schedule runs over the tokens. Counted in `compute/train_tokens`."""
    batch_size: int = Field(default=32, ge=1)
    """Rows (pairs, prompts with their answers) per optimizer step, over all devices."""
    tokens_per_micro_batch: int = Field(default=4096, ge=16)
    """Tokens of one forward pass: a bound on memory. It changes results by rounding alone, which PPO's sampling may
    amplify: one token that falls the other way begins another answer."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of prompt and answer together; longer rows are quarantined or left out, and counted."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Default with `lora`: ten times as much, about what adapters need to learn as fast."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: float32 weights, bfloat16 autocast."""
    frozen: Half | None = None
    """Type in which models are held that are only read: PPO's reference and reward model, what is under adapters. It
    takes 4 or 2 bytes a weight; products are computed in `precision` all the same, so that weights from files in
    bfloat16 give the same numbers. None: bf16 where the files are, from a billion parameters on; else fp32."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` holds Adam's two moments in 8 bits each, 2 bytes a weight where AdamW takes 8 (Dettmers et al. 2022);
    moments of vectors and small matrices stay float32."""
    publish: Half | None = None
    """Type of the published model's weights. None: bf16 where the model that training starts from is in bfloat16 and
    has a billion parameters or more, else fp32."""
    gradient_checkpointing: bool = False
    """Keep a layer's inputs alone, and compute the rest again for the backward pass: less memory, a third more time."""
    offload_activations: bool = False
    """Keep what a layer leaves for the backward pass in the memory of the host; on a GPU alone, without `sharding`. It
    costs time on the way, and changes no number."""
    layout: Literal["shared", "packed", "padded"] = "shared"
    """How a batch is laid out in memory: answers share a prompt, sequences end to end, or rows with padding."""
    lora: LoRA | None = None
    sharding: Literal["none", "full"] = "none"
    """`none`: every device holds all weights, gradients and optimizer states. `full`: with several `devices` each holds
    a share of them and gathers a layer where it is used (FSDP). Models that share frozen weights under `lora` have
    copies of their own then. On one device both are the same. It changes results by rounding alone."""
    gather: Literal["fp32", "bf16"] = "fp32"
    """What `sharding: full` gathers: the weights as they are kept, or in bfloat16, which halves traffic and gathered
    memory; with `precision: bf16` alone. Norms and residuals are then bfloat16 too."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    checkpoint_steps: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between two logged points."""
    measure_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two measurements on held-out rows: curves of `eval/loss`, `eval/accuracy` and so on,
    which turn where a model overfits. None: once, after training. The first device measures, the others wait, up to
    ALIGNFLOW_RANK_MINUTES. PPO logs its sampled answers instead."""

    @model_validator(mode="before")
    @classmethod
    def _adapters_learn_faster(cls, data: Any) -> Any:
        """Schulman et al. 2025, "LoRA Without Regret": the best rate is about ten times that of all weights."""
        if isinstance(data, dict) and data.get("lora") is not None and "learning_rate" not in data:
            return {**data, "learning_rate": LORA_RATE * cls.model_fields["learning_rate"].default}
        return data

    @model_validator(mode="after")
    def _gathers_what_it_computes_in(self) -> Self:
        if self.gather == "bf16" and not (self.sharding == "full" and self.precision == "bf16"):
            raise PydanticCustomError(
                "gather",
                "gather is bf16, with sharding {sharding} and precision {precision}. Fix: set sharding to full and "
                "precision to bf16, or leave gather at fp32",
                {"sharding": self.sharding, "precision": self.precision},
            )
        return self

    @model_validator(mode="after")
    def _what_is_gathered_stays(self) -> Self:
        if self.offload_activations and self.sharding == "full":
            raise PydanticCustomError(
                "offload_activations",
                "offload_activations is true, with sharding full: gathered weights would be moved too. Fix: set "
                "gradient_checkpointing instead, or sharding to none",
            )
        return self

    @model_validator(mode="after")
    def _a_share_of_four_bits_is_not_held(self) -> Self:
        if self.lora is not None and self.lora.base == "nf4" and self.sharding == "full":
            raise PydanticCustomError(
                "nf4",
                "lora.base is nf4, with sharding full. Fix: set lora.base to bf16, or sharding to none: in 4 bits each "
                "device holds all weights",
            )
        return self


def held_type(asked: Half | None, parameters: int, in_bf16: bool) -> Half:
    """Type in which weights that are only read are held. `in_bf16`: their files are, all of them."""
    return asked or ("bf16" if parameters >= LARGE and in_bf16 else "fp32")


def published_type(asked: Half | None, parameters: int, in_bf16: bool) -> Half:
    """Type of a published model's weights. `in_bf16`: the files that training starts from are, all of them."""
    return asked or ("bf16" if parameters >= LARGE and in_bf16 else "fp32")


LORA_RATE = 10
"""Default learning rate of adapters over that of all weights."""

NO_END = 2**62
"""Optimizer steps of a training that its tokens end."""


def steps_for(rows: int, training: Training) -> int:
    """Optimizer steps of a run over `rows` rows. Raises StageError when nothing bounds it."""
    if training.train_tokens is not None:
        return NO_END
    if training.epochs is None:
        if training.max_steps is None:
            raise refuse("epochs", None, "training has no end", "set epochs or max_steps", kind="input")
        return training.max_steps
    steps = max(1, math.ceil(rows * training.epochs / training.batch_size))
    return min(steps, training.max_steps or steps)
