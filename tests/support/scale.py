"""The tables of deploy/SCALE.md, by the formulas of `--dry-run` and by arithmetic; a test compares them with the page.

python -m tests.support.scale
"""

from collections.abc import Iterator
from typing import Any

from flows.planning.memory import Sizes, training_bytes
from schemas.config import RewardConfig
from schemas.config.methods import DPO, PPO
from schemas.config.training import Training

SHAPES = {
    # hidden, intermediate, layers, heads, key heads, size of a head, vocabulary, head tied to the embedding
    "1.2B": (2048, 8192, 16, 32, 8, 64, 128_256, True),
    "8B": (4096, 14_336, 32, 32, 8, 128, 128_256, False),
    "33B": (5120, 27_648, 64, 40, 8, 128, 152_064, False),
    "71B": (8192, 28_672, 80, 64, 8, 128, 128_256, False),
}
GPUS = (1, 8, 64)
CARD = 80e9
MICRO = 8192
"""Tokens of a micro-batch."""
PEAK, REACHED = 989e12, 0.4
"""Floating-point operations per second of an H100 in bf16 (its data sheet), and the share that is assumed."""
IN_NODE, BETWEEN = 450e9, 50e9
"""Bytes per second and GPU, one way: NVLink of an H100, and a port of 400 Gbit/s."""


def sizes(name: str) -> Sizes:
    """A Llama of that shape."""
    hidden, intermediate, layers, heads, key_heads, head, vocabulary, tied = SHAPES[name]
    products = [(hidden, heads * head), (hidden, key_heads * head), (hidden, key_heads * head), (heads * head, hidden)]
    products += [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    matrices = layers * sum(a * b for a, b in products)
    vectors = hidden * (2 * layers + 1)
    return Sizes(
        parameters=matrices + vectors + vocabulary * hidden * (1 if tied else 2),
        linear=layers * sum(a + b for a, b in products),
        matrices=matrices,
        vectors=vectors,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        in_bf16=True,
    )


def ways(gpus: int) -> dict[str, Training | None]:
    """Column -> the training; None where it cannot be had."""
    shared: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True, "tokens_per_micro_batch": MICRO}
    shared |= {"sharding": "full"} if gpus > 1 else {}
    least = {"optimizer": "adamw8bit", **({"gather": "bf16"} if gpus > 1 else {})}
    bf16, nf4 = {"lora": {"base": "bf16"}}, {"lora": {"base": "nf4"}}
    return {
        "DPO": DPO.model_validate(shared),
        "DPO, 8 bits": DPO.model_validate(shared | least),
        "DPO, LoRA": DPO.model_validate(shared | bf16),
        "DPO, QLoRA": DPO.model_validate(shared | nf4) if gpus == 1 else None,
        "reward": RewardConfig.model_validate(shared),
        "reward, LoRA": RewardConfig.model_validate(shared | bf16),
        "PPO, 8 bits": PPO.model_validate(shared | least),
        "PPO, LoRA": PPO.model_validate(shared | bf16),
    }


def memory_table() -> Iterator[str]:
    """GB per GPU; in brackets what an 80 GB card does not hold."""
    yield f"| model | GPUs | {' | '.join(ways(1))} |"
    yield "|---|---|" + "---|" * len(ways(1))
    for name in SHAPES:
        for gpus in GPUS:
            cells = []
            for training in ways(gpus).values():
                taken = None if training is None else training_bytes(sizes(name), training, shares=gpus)
                number = "-" if taken is None else f"{taken / 1e9:.0f}"
                cells.append(number if taken is None or taken <= CARD else f"({number})")
            yield f"| {name} | {gpus} | {' | '.join(cells)} |"


def step(name: str, gpus: int, shards: int, tokens: int) -> tuple[float, float]:
    """(seconds of computing, seconds of network) of one step of `tokens` in all, weights gathered in bf16.

    Computing: 8 operations for each number and token, forward, backward, and forward again for what is not kept.
    Network: for each micro-batch weights are gathered twice, 2 bytes a number, and gradients are given back once, 4
    bytes, among the GPUs that share them; at the step's end each GPU's share of the gradient goes twice through the
    network between replicas. Nothing is taken off for what is computed meanwhile.
    """
    parameters, micro_batches = sizes(name).parameters, max(1, tokens // gpus // MICRO)
    computing = 8 * parameters * tokens / gpus / (PEAK * REACHED)
    among = micro_batches * (shards - 1) / shards * 8 * parameters / (IN_NODE if shards <= 8 else BETWEEN)
    replicas = gpus // shards
    between = 2 * (replicas - 1) / replicas * 4 * parameters / shards / BETWEEN
    return computing, among + between


def network_table() -> Iterator[str]:
    yield "| model | GPUs | GPUs that share weights | tokens per GPU | computing, s | network, s |"
    yield "|---|---|---|---|---|---|"
    for name, shards in (("8B", 8), ("71B", 64)):
        for gpus in (64, 128, 1024):
            for tokens in (2**20, 2**23):
                computing, network = step(name, gpus, shards, tokens)
                yield (f"| {name} | {gpus:,} | {shards} | {tokens // gpus:,} | {computing:.1f} | {network:.1f} |")


if __name__ == "__main__":
    print("\n".join([*memory_table(), "", *network_table()]))
