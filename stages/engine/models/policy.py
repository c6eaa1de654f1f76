"""Policies and scorers: one forward over any layout."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from schemas.config.training import Half, Held
from stages.engine.data.trees import Batch, Tree
from stages.engine.models import cpu, lora
from stages.engine.models.logprobs import Rows, linear_log_probs, linear_logps
from stages.engine.models.tree_attention import TREE_TYPES, why_padded


class Output(NamedTuple):
    """A policy's output for a batch's answer tokens."""

    logps_N: Tensor
    values_N: Tensor | None
    entropy_N: Tensor | None
    log_probs: Rows | None = None
    """Of a slice of the tokens over the whole vocabulary, where asked for."""


class _Trunk(nn.Module):
    """A transformers model, adapters perhaps around it, run over a batch up to its last hidden states."""

    def __init__(self, hf: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.hf = hf
        self.precision = precision
        self.flex = False
        """Whether attention over trees is FlexAttention's (on CUDA, where the layout's choice found it exact)."""
        self.dropouts: dict[str, Any] = {}
        """The dropouts of the config as loaded; all are 0 while the model is here."""
        self.held: Held = "fp32"
        """Type of the weights that never learn."""
        self.rounded = False
        """Whether those are bfloat16 and their files are not."""
        self.publish: Half = "fp32"
        """Type in which it is to be saved."""
        self.empty: tuple[Any, ...] = ()
        """Of a sharded model: the same without weights and shards, in a tuple, so that it is not a part of this."""

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model itself; adapters, where there are some, sit inside its layers."""
        return lora.plain(self.hf)

    @property
    def numbers(self) -> str:
        """What decides its log-probs beside the weights in its files."""
        return self.precision if self.held == "fp32" else f"{self.precision}/{self.held}"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(self, batch: Batch) -> Tensor:
        """(B*T, D): the last hidden states, final norm included."""
        out = self.plain.base_model(**self.inputs(batch))
        return out.last_hidden_state.flatten(0, 1)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What transformers' forward takes. Padding is on the right, so default positions are right there."""
        if batch.segments is None:
            return {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "use_cache": False}
        if reason := why_padded(self.plain.config):
            raise ValueError(f"{reason}; use the padded layout (choose_layout does)")
        return {
            "input_ids": batch.input_ids_BT,
            "position_ids": batch.position_ids_BT,
            # A mask of rank 4 is passed on as it is: transformers must not read sequences out of the positions.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.device),
            "segments": batch.segments,
            "flex": self.flex,
            "use_cache": False,
        }

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


class Policy(_Trunk):
    """A causal language model, and a value head where asked for."""

    def __init__(self, hf: nn.Module, *, value_head: bool = False, precision: str = "fp32") -> None:
        super().__init__(hf, precision)
        self.value_head: nn.Linear | None = None
        if value_head:
            head = nn.Linear(self.plain.config.get_text_config().hidden_size, 1, device=self.device)
            head.load_state_dict({name: torch.zeros_like(value) for name, value in head.state_dict().items()})
            self.value_head = head

    def forward(
        self,
        batch: Batch,
        *,
        value: bool = False,
        entropy: bool = False,
        temperature: float = 1.0,
        head_alone: bool = False,
        log_probs: bool = False,
    ) -> Output:
        """log pi of every answer token, float32; the value before it and the entropy there (no gradient) if asked.

        pi is the model's distribution at `temperature`. `head_alone`: values send no gradient beyond their head.
        """
        with self.autocast():
            logps_N, entropy_N, hidden_ND, rows = self._logps(batch, value, entropy, temperature, log_probs)
        if head_alone:
            hidden_ND = hidden_ND.detach()
        values_N = None
        if value:
            if self.value_head is None:
                raise ValueError("this policy has no value head: load it with value_head=True")
            with torch.autocast(self.device.type, enabled=False):
                values_N = self.value_head(hidden_ND.float()).squeeze(-1)
        return Output(logps_N, values_N, entropy_N, rows if log_probs else None)

    def _logps(
        self, batch: Batch, value: bool, entropy: bool, temperature: float, log_probs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Rows]:
        """The head works at `predict_N` alone; models with more than a linear head make their own logits."""
        head = self.plain.get_output_embeddings()
        if isinstance(head, cpu.Linear) and self.plain.config.model_type in TREE_TYPES:
            hidden_ND = self.hidden(batch).index_select(0, batch.predict_N)
            given = (hidden_ND, head.weight, head.bias, batch.labels_N)
            kept = given[:3]
            if log_probs and isinstance(self, FSDPModule):  # read after this pass, when what it gathered is gone
                kept = (hidden_ND, head.weight.detach().clone(), None if head.bias is None else head.bias.clone())
            rows = linear_log_probs(*kept, temperature)
            return *linear_logps(*given, entropy=entropy, temperature=temperature), hidden_ND, rows
        out = self.hf(**self.inputs(batch), output_hidden_states=value)
        logits_NV = out.logits.flatten(0, 1).index_select(0, batch.predict_N).float()
        log_probs_NV = (logits_NV / temperature).log_softmax(-1)
        logps_N = log_probs_NV.gather(-1, batch.labels_N[:, None]).squeeze(-1)
        entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1).detach() if entropy else None
        hidden_ND = out.hidden_states[-1].flatten(0, 1).index_select(0, batch.predict_N) if value else logps_N
        return logps_N, entropy_N, hidden_ND, log_probs_NV.detach().__getitem__

    @contextlib.contextmanager
    def reference(self) -> Iterator["Policy"]:
        """Adapters off: exactly the model that they were added to. Without adapters the policy as it stands."""
        with self.hf.disable_adapter() if isinstance(self.hf, PeftModel) else contextlib.nullcontext():
            yield self


class Scorer(_Trunk):
    """A reward model: one number for a prompt with an answer. Also a critic, with `every`."""

    def __init__(self, hf: nn.Module, *, precision: str = "fp32") -> None:
        super().__init__(hf, precision)
        scale = getattr(self.plain.config, "alignflow_score", None) or {"mean": 0.0, "std": 1.0}
        self.mean, self.std = float(scale["mean"]), float(scale["std"])
        own = getattr(self.plain.config, "alignflow_score", None) is not None
        self.skipped: int | None = None if own else self.plain.config.get_text_config().pad_token_id
        """The padding of a model from outside, which its own code never reads a score at, be it an answer's end."""

    def read(self, prompt: Sequence[int], answer: Sequence[int]) -> Tree:
        """An ended answer behind its prompt, up to the token at which the model's own code reads the score.

        transformers reads at the last token that is not the padding. Where an answer's end is the padding too, that is
        the token before it; what comes behind has no effect on a causal model, so it is left out.
        """
        whole = (*prompt, *answer)
        last = next((i for i in reversed(range(len(whole))) if whole[i] != self.skipped), len(whole) - 1)
        length = max(last + 1, 2)
        begins = min(len(prompt), length - 1)  # an empty answer leaves the prompt's last token
        return Tree(whole[:begins], (whole[begins:length],))

    def forward(self, batch: Batch, *, every: bool = False) -> Tensor:
        """scores_A at each answer's last token, float32; with `every` instead values_N where each token is predicted.

        Shifted and scaled by the config's `alignflow_score` where it is there.
        """
        index = batch.predict_N if every else batch.last_A
        with self.autocast():
            hidden = self.hidden(batch).index_select(0, index)
        with torch.autocast(self.device.type, enabled=False):
            raw = self.plain.get_submodule("score")(hidden.float()).squeeze(-1)
        return (raw - self.mean) / self.std


ModelT = TypeVar("ModelT", Policy, Scorer)


def device() -> torch.device:
    """This process's accelerator where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def sums(values_N: Tensor, answer_N: Tensor, answers: int) -> Tensor:
    """Per-answer sums of per-token values, in answers' order."""
    return values_N.new_zeros(answers).index_add(0, answer_N, values_N)


def context_length(hf: nn.Module) -> int | None:
    """Positions the model was made for; None when it has no limit."""
    return getattr(hf.config, "max_position_embeddings", None)
