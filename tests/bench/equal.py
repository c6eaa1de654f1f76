"""Equal work: from the same weights, on the same tokens in the same order, both sides have the same losses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from tests.bench import work
from tests.bench.sides import ours, peer
from tests.bench.work import Work

STEPS = 20
HALF_STEPS = 6  # in bf16, which the peer's head is slow in on a CPU
MAX_LENGTH = 160
RATE = 1e-3  # large enough for a small random model's losses to move
TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-3


def losses(plan: Work, side: Any, steps: int) -> list[float]:
    """One side's losses, by itself."""
    worker = side(plan)
    try:
        worker.turn()  # set-up
        return [worker.turn()["loss"] for _ in range(steps)]
    finally:
        worker.end()


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def curves(plan: Work, turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The losses of the timed steps, and how far they lie apart; nothing for PPO, whose answers are sampled."""
    if plan.method == "ppo":
        return {}
    found = {name: [turn["loss"] for turn in of] for name, of in turns.items()}
    return found | {"apart": apart(found["ours"], found["peer"])}


def check(
    plan: Work, pairs: Sequence[dict[str, Any]], methods: Sequence[str], console: Console
) -> list[dict[str, Any]]:
    """Both sides' curves over 20 steps on a small model, in fp32 and bf16; for PPO the gradient of the first update."""
    lines: list[dict[str, Any]] = []
    for method in methods:
        folder = Path(plan.folder).parent / f"equal-{method}"
        own = {"method": method, "folder": str(folder), "steps": STEPS + 1, "max_length": MAX_LENGTH}
        small = replace(plan, **own, learning_rate=RATE, answer_length=16, ppo_epochs=1)
        work.lay_out(small, pairs)
        lines += first_update(small) if method == "ppo" else curve(small)
    table = Table("equal work", "what", "apart", "at most", "")
    for found in lines:
        bound, said = f"{found['bound']:.1e}", "" if found["passed"] else "DIFFERS"
        table.add_row(found["name"], found["what"], f"{found['apart']:.1e}", bound, said)
    console.print(table)
    return lines


def curve(plan: Work) -> list[dict[str, Any]]:
    """fp32: the curves are one. bf16: ours is as near to fp32 as TRL's own."""
    full = {side.__name__: losses(plan, side, STEPS) for side in (ours, peer)}
    plan = replace(plan, precision="bf16")
    plan.write()
    half = {side.__name__: losses(plan, side, HALF_STEPS) for side in (ours, peer)}
    drift = {name: apart(half[name], full[name][:HALF_STEPS]) for name in full}
    span = max(full["ours"]) - min(full["ours"])
    return [
        line(plan.method, f"loss over {STEPS} steps, fp32 (it moves by {span:.3f})", apart(*full.values()), TOLERANCE),
        line(
            plan.method,
            f"distance of our bf16 loss from our fp32 (TRL's from its own: {drift['peer']:.1e})",
            drift["ours"],
            max(drift["peer"], TOLERANCE),
        ),
    ]


def line(name: str, what: str, apart: float, bound: float) -> dict[str, Any]:
    return {"name": name, "what": what, "apart": apart, "bound": bound, "passed": apart <= bound}


def first_update(plan: Work) -> list[dict[str, Any]]:
    """PPO on the same answers: KL, value loss and gradient of the first update.

    TRL whitens advantages by the unbiased variance, we by the biased one: its policy gradient is sqrt((n - 1) / n) of
    ours for n tokens.
    """
    generator = torch.Generator().manual_seed(0)
    answers_BT = torch.randint(1000, 2000, (plan.batch_size, plan.answer_length), generator=generator)
    save_file({"answers_BT": answers_BT}, Path(plan.folder) / "answers.safetensors")
    for side in (ours, peer):
        worker = side(plan, "--first")
        code = worker.process.wait()
        if code:
            raise RuntimeError(
                f"a worker died with exit code {code}; {worker.log} says:\n{worker.log.read_text()[-3000:]}"
            )
    own, other = (load_file(Path(plan.folder) / f"gradient-{name}.safetensors") for name in ("ours", "peer"))
    tokens = answers_BT.numel()
    bessel = ((tokens - 1) / tokens) ** 0.5
    pairs = {
        "policy": (end_to_end(own, "policy.hf.") * bessel, end_to_end(other, "policy.")),
        "value model": (end_to_end(own, "critic.hf."), end_to_end(other, "value_model.")),
    }
    lines = [
        line(
            "ppo",
            f"gradient of the first update, {name}, relative",
            float((a - b).norm() / b.norm()),
            GRADIENT_TOLERANCE,
        )
        for name, (a, b) in pairs.items()
    ]
    stats = {"train/score": "objective/scores", "train/value_loss": "loss/value_avg"}
    return lines + [
        line("ppo", f"{mine} of the first rollout", abs(float(own[mine] - other[theirs])), TOLERANCE)
        for mine, theirs in stats.items()
    ]


def end_to_end(tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """All gradients under a prefix, by name."""
    names = sorted(name for name in tensors if name.startswith(prefix))
    return torch.cat([tensors[name].flatten() for name in names])
