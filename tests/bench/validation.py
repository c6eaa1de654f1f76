"""How fast `alignflow validate` is and what memory it takes, by number of rows. `make bench-pipeline` calls this.

    python -m tests.bench.validation [--rows 200000,1000000,5000000] [--model FOLDER] [--tokenized 200000,1000000]

Rows are pairs of made-up text, about 335 bytes each. Seconds, rows per second, the process's peak memory, and the share
of the rows per second that the tokenizer reaches alone, on the same cores.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from schemas.commands import ValidateCommand
from tests.bench.work import WORDS

ROOT = Path(__file__).resolve().parents[2]


def write_pairs(path: Path, rows: int) -> None:
    """Pairs with prompts of their own."""
    draw = random.Random(0)
    words = WORDS.split()
    pieces = [" ".join(draw.choices(words, k=draw.randint(10, 40))) for _ in range(5000)]
    with path.open("w") as file:
        for row in range(rows):
            one, two, three = draw.choices(pieces, k=3)
            pair = {"prompt": f"{row} {one}", "chosen": two, "rejected": f"{three} {row % 7}"}
            file.write(json.dumps(pair) + "\n")


def measure(path: Path, rows: int, out: Path, model: Path | None) -> dict[str, float]:
    """One run of the command."""
    request = path.with_suffix(".request.json")
    request.write_text(ValidateCommand(path=str(path), kind="preference", out=out, model=model).model_dump_json())
    command = [sys.executable, "-m", "stages.commands.validate", str(request)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    wall = time.monotonic() - began
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "rows": rows,
        "seconds": wall,
        "cpu": cpu,
        "rows_per_second": rows / wall,
        "memory_mib": usage.ru_maxrss / 1024,
    }


def bare_seconds(path: Path, model: Path) -> float:
    """What the tokenizer alone takes for the prompts, as the template writes them, and the answers of all rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from stages.engine.data.codec import Codec  # takes seconds, and rows without a tokenizer do without

    codec, seconds = Codec.load(model), 0.0
    with path.open() as file:
        while lines := list(itertools.islice(file, 1000)):
            rows = [json.loads(line) for line in lines]
            prompts = codec.render_all([[{"role": "user", "content": row["prompt"]}] for row in rows])
            texts = [*map(str, prompts), *(row[column] for row in rows for column in ("chosen", "rejected"))]
            began = time.monotonic()
            codec.encode_all(texts)
            seconds += time.monotonic() - began
    return seconds


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.validation", description=__doc__)
    parser.add_argument("--rows", default="200000,1000000,5000000")
    parser.add_argument("--tokenized", default="200000,1000000")
    parser.add_argument("--model", type=Path, help="folder with the tokenizer; without it only the schema is checked")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    plain = [(int(rows), None) for rows in options.rows.split(",") if rows]
    tokenized = [(int(rows), options.model) for rows in options.tokenized.split(",") if rows and options.model]
    table = Table("rows", "checked", "seconds", "CPU seconds", "rows/s", "peak MiB", "of the bare tokenizer's rows/s")
    report = []
    for rows, model in [*plain, *tokenized]:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            path = Path(folder) / "pairs.jsonl"
            write_pairs(path, rows)
            bare = bare_seconds(path, model) if model else None
            found = measure(path, rows, Path(folder) / "out", model)
            share = {} if bare is None else {"share": bare / found["seconds"]}
        checked = "schema and tokens" if model else "schema"
        report.append({"checked": checked, **found, **share})
        numbers = (f"{found[name]:.0f}" for name in ("seconds", "cpu", "rows_per_second", "memory_mib"))
        table.add_row(f"{rows:,}", checked, *numbers, f"{share['share']:.2f}" if share else "")
    (options.out / "validation.json").write_text(json.dumps(report, indent=1))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
