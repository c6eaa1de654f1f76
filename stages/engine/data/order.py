"""The order of rows: a function of seed and step only."""

import functools
import random


@functools.lru_cache(maxsize=4)  # a step asks for its epoch's order again
def order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(n): a function of its arguments only."""
    rows = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(rows)
    return tuple(rows)


def step_rows(n: int, step: int, batch_size: int, seed: int) -> list[int]:
    """The rows of one optimizer step: the epochs' permutations end to end, cut into batches."""
    start = step * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    line = [row for epoch in epochs for row in order(n, seed, epoch)]
    offset = start - epochs[0] * n
    return line[offset : offset + batch_size]
