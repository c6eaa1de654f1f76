"""Log-probabilities of answers under the reference model, computed once per sequence and kept on disk.

The key is what decides the number: the reference's weights, the precision, the engine's version and the token ids. So
methods, epochs and sweeps over a method's settings share the numbers. Batches differ between runs, and with them the
last bits.

Each number carries a digest, so that a flipped bit trains no other model: what does not fit is computed again. A file
that SQLite cannot read is moved aside, and a new one begun.
"""

import contextlib
import hashlib
import logging
import math
import os
import re
import sqlite3
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from schemas.errors import StageError, refuse
from schemas.stage import ENGINE_VERSION
from stages.engine.data.trees import Layout, Tree
from stages.engine.distributed import processes, rank, share, world
from stages.engine.models.policy import Policy, sums
from stages.engine.scoring.batched import over_trees
from stages.runtime import databases
from stages.runtime.workspace import home, lock

log = logging.getLogger("alignflow")

Key = bytes
T = TypeVar("T")
HOST_LACKS = r"locked|busy|full|I/O|readonly|memory"
"""What SQLite says where the machine is at fault; all else that it says of our statements is the file's fault."""
_LOOK_UP = 500  # keys in one query
_ROUND = 256  # trees of each rank, after which what all have computed is written
_WAIT_SECONDS = 120


class ReferenceCache:
    """Sums of log-probabilities by prompt and answer, in one SQLite file that processes may share."""

    def __init__(self, weights_sha256: str, dtype: str, path: Path | None = None) -> None:
        """`weights_sha256` names the reference model, `dtype` its `numbers`; `path` defaults to the home's cache."""
        self.prefix = hashlib.sha256(f"{weights_sha256}/{dtype}/{ENGINE_VERSION}/".encode())
        self.path = path or home() / "cache" / "reference.sqlite"

    def logps(
        self,
        policy: Policy,
        trees: Sequence[Tree],
        layout: Layout,
        budget: int,
        pad_id: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """log pi_ref(answer | prompt), a list per tree, a number per answer (nats).

        policy: in reference mode (`with policy.reference()`). Only what is missing is computed, in batches of `budget`
        tokens, and kept batch by batch. progress: called with (sequences computed, sequences to compute).

        All ranks call it with the same trees. Each computes its share; the first one alone reads and writes the file.
        """
        keys = [[self._key(tree.prompt, answer) for answer in tree.answers] for tree in trees]
        known = _from_first(lambda: self._whole(lambda database: _read(database, [key for row in keys for key in row])))
        missing = _missing(trees, keys, known)
        total, before = sum(len(wanted) for _, wanted in missing), len(known)
        for fresh in _computed(policy, missing, layout, budget, pad_id):
            if rank() == 0:
                self._whole(lambda database, fresh=fresh: _write(database, fresh))
            known |= fresh
            if progress is not None:
                progress(len(known) - before, total)
        return [[known[key] for key in row] for row in keys]

    def _whole(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """What a call on the cache returns; on a new cache, where this one is damaged or is something else."""
        try:
            with self._open() as database:
                return call(database)
        except (StageError, sqlite3.OperationalError, IsADirectoryError) as error:
            if isinstance(error, sqlite3.OperationalError) and re.search(HOST_LACKS, str(error)):
                raise
            with lock(self.path.with_suffix(".lock")):
                if self.path.exists() and not self._usable():  # else another process was quicker
                    aside = databases.put_aside(self.path)
                    log.warning("%s: moved to %s, its numbers are computed again", error, aside.name)
        with self._open() as database:
            return call(database)

    def _usable(self) -> bool:
        """Whether the file is whole, with our tables."""
        try:
            with databases.opened(self.path) as database:
                database.execute("SELECT key, value, digest FROM logps JOIN digests USING (key) LIMIT 1")
                return database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        except (StageError, sqlite3.OperationalError, IsADirectoryError):
            return False

    def _key(self, prompt: Sequence[int], answer: Sequence[int]) -> Key:
        digest = self.prefix.copy()
        digest.update(array("q", [len(prompt), *prompt, *answer]).tobytes())
        return digest.digest()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit; other processes' writes are waited for. Raises StageError on a damaged file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with databases.opened(self.path, seconds=_WAIT_SECONDS) as database:
            with lock(self.path.with_suffix(".lock")):  # one at a time: what has to be alone does not wait for others
                _leave_wal(database)
                database.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value REAL) WITHOUT ROWID")
                # Beside the numbers, not among them: an alignflow without digests goes on using their table.
                database.execute("CREATE TABLE IF NOT EXISTS digests (key BLOB PRIMARY KEY, digest BLOB) WITHOUT ROWID")
            database.execute("PRAGMA synchronous=NORMAL")
            with contextlib.suppress(
                FileNotFoundError
            ):  # removed at this moment: what is open goes on, and is not kept
                os.utime(self.path)  # `alignflow clean` removes caches that were not used for long, and reading is use
            yield database


Missing = list[tuple[Tree, list[Key]]]
"""Trees of the answers to compute, with the answers' keys."""


def _from_first(call: Callable[[], dict[Key, float]]) -> dict[Key, float]:
    """What a call returns on the first rank, on all of them."""
    if world() == 1:
        return call()
    processes()
    return broadcast_object_list([call() if rank() == 0 else None])[0]  # type: ignore[return-value]


def _computed(policy: Policy, missing: Missing, layout: Layout, budget: int, pad_id: int) -> Iterator[dict[Key, float]]:
    """The numbers that are missing: batch by batch, with several ranks round by round, those of all ranks on each.

    Raises:
        StageError: one is not finite.
    """
    together = world() > 1
    each = _ROUND * world() if together else max(1, len(missing))
    for start in range(0, len(missing), each):
        mine, own = share(missing[start : start + each], rank(), world()), dict[Key, float]()
        for batch in over_trees(
            policy,
            lambda batch: sums(policy(batch).logps_N, batch.answer_N, batch.answers),
            [tree for tree, _ in mine],
            layout,
            budget,
            pad_id,
        ):
            fresh = {key: value for i in batch for key, value in zip(mine[i][1], batch[i], strict=True)}
            if not together:
                yield _finite(fresh)
            own |= fresh
        if together:
            yield _finite({key: value for one in gather_object([own]) for key, value in one.items()})


def _finite(numbers: dict[Key, float]) -> dict[Key, float]:
    """The numbers, which all have to be finite; of all ranks, so that the first, which tells people, refuses too."""
    if not all(map(math.isfinite, numbers.values())):
        message = "it gives log-probabilities that are not finite"
        fix = "train it again with a lower learning rate"
        raise refuse("model", "the reference", message, fix, kind="model")
    return numbers


def _leave_wal(database: sqlite3.Connection) -> None:
    """Older versions used a write-ahead log, which SQLite forbids on network disks: a home may be on one."""
    if database.execute("PRAGMA journal_mode").fetchone() == ("wal",):
        with contextlib.suppress(sqlite3.OperationalError):  # another process has it open: the next one then
            database.execute("PRAGMA busy_timeout=0")
            database.execute("PRAGMA journal_mode=DELETE")
        database.execute(f"PRAGMA busy_timeout={1000 * _WAIT_SECONDS}")


def _read(database: sqlite3.Connection, keys: Sequence[Key]) -> dict[Key, float]:
    """The numbers of these keys that are there and whole."""
    known: dict[Key, float] = {}
    altered = 0
    unique = list(dict.fromkeys(keys))
    for start in range(0, len(unique), _LOOK_UP):
        some = unique[start : start + _LOOK_UP]
        marks = ",".join("?" * len(some))
        rows = database.execute(
            f"SELECT key, value, digest FROM logps JOIN digests USING (key) WHERE key IN ({marks})", some
        )
        for key, value, digest in rows:
            if isinstance(value, float) and digest == _digest(key, value):
                known[key] = value
            else:
                altered += 1
    if altered:
        log.warning("%d cached log-probabilities of the reference were altered: they are computed again", altered)
    return known


def _write(database: sqlite3.Connection, values: dict[Key, float]) -> None:
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", values.items())
    digests = ((key, _digest(key, value)) for key, value in values.items())
    database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?)", digests)
    database.execute("COMMIT")


def _digest(key: Key, value: float) -> bytes:
    """128 bits over a row."""
    return hashlib.sha256(key + struct.pack("<d", value)).digest()[:16]


def _missing(trees: Sequence[Tree], keys: Sequence[Sequence[Key]], known: dict[Key, float]) -> Missing:
    """Each unknown sequence once, beside the others of its tree."""
    planned: set[Key] = set(known)
    missing: Missing = []
    for tree, row in zip(trees, keys, strict=True):
        wanted = {key: answer for key, answer in zip(row, tree.answers, strict=True) if key not in planned}
        if wanted:
            planned |= wanted.keys()
            missing.append((Tree(tree.prompt, tuple(wanted.values())), list(wanted)))
    return missing
