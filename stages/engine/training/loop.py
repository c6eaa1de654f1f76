"""The training loop, the only one: optimizer step, clipping, logging, checkpoint, resume. It knows no method.

Order and randomness are functions of (seed, step), so an interrupted run resumes as if it had not been interrupted.
"""

import contextlib
import itertools
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

from schemas.config.training import Training
from schemas.errors import StageError, refuse
from stages.engine.distributed import processes, rank
from stages.engine.models import sharding
from stages.engine.training import checkpoint, shards
from stages.engine.training.method import Method, Metrics, PublishedMethod
from stages.engine.training.offload import to_host
from stages.engine.training.optimizers import optimizer_for
from stages.runtime.context import StageContext
from stages.runtime.workspace import remove

TOLD = {
    "train/score": "reward",
    "train/kl_to_reference": "KL",
    "train/accuracy": "accuracy",
    "train/margin": "margin",
}
"""Metrics that say how a training does, and how they are called where its progress is shown. One that has none of them
shows its loss."""


def learning_rate(training: Training, at: int, end: int, size: int = 1) -> float:
    """Linear warm-up from 0, then constant, or linear or half a cosine down to 0. A pure function of the progress.

    at, end, size: steps done, in all, and in this step; or tokens, where they end the training. The warm-up counts what
    this step adds, so that the first one is not lost.
    """
    warmup = math.ceil(training.warmup * end)
    if at < warmup:
        return training.learning_rate * min(1.0, (at + size) / (warmup + size))
    done = (at - warmup) / max(1, end - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return training.learning_rate * factor[training.schedule]


def together(name: str, values: Tensor) -> Tensor:
    """A metric's values of several micro-batches or ranks as one."""
    return values.max() if name.endswith("_max") else values.sum()


def grad_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """The 2-norm of all their gradients together, before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(sharding.plain(torch.nn.utils.get_total_norm(gradients)))


@contextlib.contextmanager
def _catch_sigterm() -> Iterator[list[int]]:
    """Collect SIGTERMs in a list, so that the step in progress can end."""
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGTERM, before)


def make_deterministic() -> None:
    """On a GPU, choose algorithms that give the same bits every time, as a CPU does; PyTorch warns where it has none.

    cuBLAS needs CUBLAS_WORKSPACE_CONFIG as well, set before it starts: stages/__main__.py does.
    """
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs: none is read


class Loop:
    """One training run of a method. `train` below is the way to call it."""

    def __init__(self, method: Method[Any], context: StageContext) -> None:
        self.method, self.training, self.context = method, method.training, context
        ddp = DistributedDataParallelKwargs(
            broadcast_buffers=False,  # ranks may make different numbers of forwards
            gradient_as_bucket_view=True,  # else every gradient is in memory twice
        )
        processes()
        make_deterministic()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.accelerator = Accelerator(kwargs_handlers=[ddp])
        self.parts = method.groups()
        self.adamw = optimizer_for(self.parts, self.training)
        self.sharded = sharding.is_sharded(method.model)
        if self.sharded:
            self.optimizer = self.accelerator.prepare(self.adamw)
        else:
            method.model, self.optimizer = self.accelerator.prepare(method.model, self.adamw)
        method.model.train()
        self.raw = self.accelerator.unwrap_model(method.model)
        self.folder = context.work / "checkpoints"
        self.step = 0
        self.compute: dict[str, float] = {"compute/seconds": 0.0}
        self.last: dict[str, float] = {}
        self.shown: dict[str, str] = {}
        self.saved_at = time.monotonic()
        self.writer = checkpoint.Writer()
        if self.sharded:
            sharding.side_group("checkpoints")  # made by all ranks together, not when a side thread needs it

    # --- how far it is: a function of what a checkpoint holds ---

    @property
    def progress(self) -> tuple[int, int, str]:
        """What is done, of how much, in what: tokens where they end the training, else steps."""
        if self.training.train_tokens is None:
            return self.step, self.method.total_steps, "steps"
        seen = self.compute["compute/train_tokens"] if self.step else 0
        return min(int(seen), self.training.train_tokens), self.training.train_tokens, "tokens"

    @property
    def ended(self) -> bool:
        """Whether all is done."""
        done, end, _ = self.progress
        return done >= end

    # --- one optimizer step ---

    def reduce(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of all ranks together, in one message: sums, and maxima where the name ends in `_max`."""
        if not values or self.accelerator.num_processes == 1:
            return values
        names = sorted(values)
        stacked = torch.stack([values[n].detach().float().to(self.accelerator.device) for n in names])
        every = self.accelerator.gather(stacked[None])
        assert isinstance(every, Tensor)
        return {name: together(name, every[:, place]) for place, name in enumerate(names)}

    def backward(self, micros: list[Any]) -> Metrics:
        """Gradient of the whole step: the micro-batches' summands, added up here and over the ranks."""
        if not micros:
            message = "a device got no rows in this step"
            fix = f"set it to at least the number of devices ({self.accelerator.num_processes})"
            raise refuse("batch_size", self.training.batch_size, message, fix, kind="input")
        own = self.method.prepare(micros)
        if self.sharded:
            sharding.in_step("the step's totals")
        totals = self.reduce(own)
        summed: Metrics = {}
        passes = self.in_step(micros)
        for i, (micro, counts) in enumerate(passes):
            last = i == len(passes) - 1
            # Of sharded weights the sum of a rank's gradients would be a whole copy.
            at_once = self.sharded or last
            with contextlib.nullcontext() if at_once else self.accelerator.no_sync(self.method.model):
                with to_host(self.method.model) if self.training.offload_activations else contextlib.nullcontext():
                    summand, metrics = self.method.loss(micro, totals)
                if self.sharded:
                    sharding.in_step("a backward pass")
                # DDP and FSDP average over the ranks; the summands' denominators are global already.
                self.accelerator.backward(summand * self.accelerator.num_processes * counts)
            if not counts:
                continue
            for name, value in {"train/loss": summand, **metrics}.items():
                value = value.detach().float().cpu()
                summed[name] = together(name, torch.stack([summed[name], value])) if name in summed else value
        return summed

    def in_step(self, micros: list[Any]) -> list[tuple[Any, bool]]:
        """The micro-batches, and whether each counts: those do not that keep ranks with fewer of them in step.

        Those of a part of the model (PPO's) stay together.
        """
        if not self.sharded:
            return [(micro, True) for micro in micros]
        passes: list[tuple[Any, bool]] = []
        for _, some in itertools.groupby(micros, lambda micro: getattr(micro, "part", None)):
            own = list(some)
            added = sharding.missing(self.method.model, len(own))
            passes += [(micro, True) for micro in own] + [(own[-1], False)] * added
        return passes

    def one_step(self, micros: list[Any]) -> dict[str, float]:
        """Update the model once; returns the step's metrics. Raises StageError when anything is not finite."""
        seed = hash((self.context.request.seed, self.step, self.accelerator.process_index)) % 2**63
        torch.manual_seed(seed)  # dropout draws from it
        random.seed(seed)
        metrics = {name: float(v) for name, v in self.reduce(self.backward(micros)).items()}
        size = 1 if self.training.train_tokens is None else int(metrics["compute/train_tokens"])
        rate = learning_rate(self.training, *self.progress[:2], size)
        factors = self.method.rate_factors(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * factors[group["part"]]
        if len(self.parts) > 1:
            metrics |= {f"train/{part}_grad_norm": grad_norm(every) for part, every in self.parts.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.method.model.parameters(), self.training.max_grad_norm)
        metrics |= {"train/grad_norm": float(sharding.plain(norm)), "train/learning_rate": rate}
        self.check_finite(metrics)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics | self.method.after_step(metrics)

    def check_finite(self, metrics: dict[str, float]) -> None:
        """Stop before a non-finite loss or gradient reaches the weights; the tracker shows the value as it is."""
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(metrics[name]):
                self.context.metrics(metrics, step=self.step + 1)  # steps that are done are counted from 1
                message = f"{name} is {metrics[name]} at step {self.step + 1}"
                fix = "lower the learning rate, or look for odd rows in the data; the last checkpoint is kept"
                raise refuse(
                    "learning_rate", self.training.learning_rate, message, fix, kind="diverged", status="diverged"
                )

    # --- checkpoints ---

    def save(self) -> None:
        """Copy everything that decides the future; a side thread writes it while training continues.

        What cannot be written whole leaves nothing, and stops training at the next step.
        """
        self.writer.wait()
        step, draft = self.step, self.folder / f".draft-{self.step}"
        with self.or_nothing(draft):
            self.write_own_part(draft)
            loop = checkpoint.snapshot({"step": step, "compute": self.compute, "last": self.last})
            if self.sharded:
                mine = checkpoint.snapshot(shards.own_state(self.raw, self.adamw))
                self.writer.start(lambda: self.seal_together(draft, step, mine, loop))
            elif self.accelerator.is_main_process:
                model = checkpoint.snapshot(checkpoint.model_state(self.raw, self.adamw))
                self.writer.start(lambda: self.seal(draft, step, {"model": model, "loop": loop}))
        self.saved_at = time.monotonic()

    def write_own_part(self, draft: Path) -> None:
        """Every rank's own part: small, and there before the first rank seals the whole."""
        if self.accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        own = {"method": self.method.state_dict(), "rng": checkpoint.rng_state()}
        checkpoint.write(draft, f"rank-{self.accelerator.process_index}", checkpoint.snapshot(own))
        self.accelerator.wait_for_everyone()

    def seal_together(self, draft: Path, step: int, mine: checkpoint.Snapshot, loop: checkpoint.Snapshot) -> None:
        """Every rank writes its shard; once all are there the first one seals the whole. Runs in the side threads."""
        with self.or_nothing(draft):
            known = shards.write_together(draft, mine)
            if self.accelerator.is_main_process:
                self.seal(draft, step, {"loop": loop}, known)

    def seal(
        self, draft: Path, step: int, parts: dict[str, checkpoint.Snapshot], known: shards.Digests | None = None
    ) -> None:
        """Write the parts that the ranks share, and make the draft a checkpoint. Runs in the side thread."""
        with self.or_nothing(draft):
            for name, taken in parts.items():
                checkpoint.write(draft, name, taken)
            checkpoint.seal(draft, self.folder / f"step-{step}", key=self.context.key, step=step, known=known)

    @contextlib.contextmanager
    def or_nothing(self, draft: Path) -> Iterator[None]:
        """Remove a draft that cannot be finished: it takes room that the next try needs."""
        try:
            yield
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def resume(self) -> None:
        """Resume from the newest checkpoint that verifies, if there is one."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".draft-*"):
                remove(leftover)
        self.accelerator.wait_for_everyone()
        newest = checkpoint.newest(
            self.folder, self.context.key, shards.is_mine, self.first_fault, moves=self.accelerator.is_main_process
        )
        if newest is None:
            return
        if self.sharded or not (newest / "model.json").is_file():
            shards.load(self.raw, self.adamw, newest)
        else:
            checkpoint.load_model_state(self.raw, self.adamw, checkpoint.read_state(newest, "model"))
        # Written by another number of ranks, it is what all have in common that counts (a rollout, a coefficient).
        own = checkpoint.read_state(newest, f"rank-{self.accelerator.process_index % shards.saved_ranks(newest)}")
        self.method.load_state_dict(own["method"])
        checkpoint.load_rng_state(own["rng"])
        state = checkpoint.read_state(newest, "loop")
        self.step, self.compute, self.last = state["step"], state["compute"], state["last"]

    @staticmethod
    def first_fault(reason: str | None) -> str | None:
        """What is wrong with a checkpoint by the first rank that finds fault with it."""
        return next((one for one in gather_object([reason]) if one is not None), None)

    def due(self) -> bool:
        """Whether a checkpoint is due by steps or by minutes."""
        if self.training.checkpoint_steps and self.step % self.training.checkpoint_steps == 0:
            return True
        return time.monotonic() - self.saved_at > 60 * self.training.checkpoint_minutes

    def agree(self, *flags: bool) -> list[bool]:
        """True where it is true on any rank: ranks must stop and save together."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        reduced = self.accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device))
        assert isinstance(reduced, Tensor)
        return [bool(v) for v in reduced]

    # --- the run ---

    def note(self, metrics: dict[str, float]) -> None:
        """Count compute, log the step, show progress."""
        for name in [n for n in metrics if n.startswith("compute/")]:
            self.compute[name] = self.compute.get(name, 0.0) + metrics.pop(name)
        self.last = metrics
        if self.step % self.training.log_every == 0 or self.ended:
            self.context.metrics(metrics, step=self.step)
        self.shown |= {word: f"{metrics[name]:.2f}" for name, word in TOLD.items() if name in metrics}
        told = self.shown or {"loss": f"{metrics['train/loss']:.4f}"}
        done, end, unit = self.progress
        self.context.progress(done, end, f"{unit}  {'  '.join(map(' '.join, told.items()))}")

    def measure(self) -> None:
        """Log what the method measures on held-out rows. It draws nothing, so that training goes on as without."""
        wrapped, self.method.model = self.method.model, self.raw
        if self.sharded or self.accelerator.is_main_process:
            self.context.metrics(self.method.held_out_metrics(), step=self.step)
        self.method.model = wrapped

    def __call__(self) -> dict[str, float]:
        self.resume()
        with _catch_sigterm() as stopped, self.writer:
            batches = self.method.batches(self.step)
            while not self.ended:
                began = time.monotonic()
                metrics = self.one_step(next(batches))
                self.step += 1
                self.compute["compute/seconds"] += time.monotonic() - began
                self.note(metrics)
                stop, due = self.agree(bool(stopped), self.due())
                if stop or due or self.ended:
                    self.save()
                self.writer.check()
                if stop and not self.ended:
                    self.writer.wait()
                    done, end, unit = self.progress
                    at = f"step {done} of {end}" if unit == "steps" else f"{done} of {end} {unit}"
                    message, fix = f"stopped after {at}, saved", "run it again: it resumes"
                    raise StageError(message, status="preempted", kind="preempted", fix=fix)
                if self.training.measure_every and self.step % self.training.measure_every == 0 and not self.ended:
                    self.measure()
        self.method.model = self.raw
        return {**self.last, **self.compute}


def train(method: Method[Any], context: StageContext) -> dict[str, float]:
    """Train `method.model` in place for `method.total_steps` optimizer steps, or until `train_tokens` are seen.

    Returns the last step's metrics and the cost.
    Resumes from `context.work/checkpoints`. Raises StageError with status `diverged` when loss or gradient is not
    finite, and `preempted` after a SIGTERM, once the step in progress is done and saved.
    """
    return Loop(method, context)()


def train_and_publish(method: PublishedMethod[Any], context: StageContext) -> dict[str, float]:
    """Train, measure what the method measures at its end, and publish the model; returns all metrics."""
    loop = Loop(method, context)
    metrics = loop()
    folder, everywhere = context.work / "model", sharding.is_sharded(method.model)
    if rank() == 0 or everywhere:
        ended = method.finish(folder)
        metrics |= ended
        if method.training.measure_every:  # the last points of the curves
            context.metrics({name: value for name, value in ended.items() if name.startswith("eval/")}, step=loop.step)
    if rank() == 0:
        context.publish("model", folder, model=True)
    return metrics
