"""What only a GPU can show: equal numbers there, how fast, and whether the estimate of memory holds. In ten minutes.

    bash tests/bench/gpu.sh [WHEELS] [--model 1b | tiny] [--only dpo,ppo] [--rounds 3]

Runs where there are torch (with CUDA), transformers, peft, accelerate and safetensors, and no registry: what is needed
beside them is carried as wheels (`python -m tests.bench.wheels`). Models have random weights. First the checks, each a
number beside its bound; then one table: samples and tokens per second, the share of the largest rate at which this card
multiplies matrices, and peak memory beside the estimate and beside TRL's, where TRL is there too. Exit code 1 where a
check fails. `--model tiny` runs all of it on a CPU, where times and shares say nothing.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flows.planning.memory import folder_sizes, readable, training_bytes
from stages.engine.data.trees import Batch, Tree, collate
from stages.engine.models.layouts import TOLERANCE, kernels_differ
from stages.engine.models.loading import load_policy
from stages.engine.models.logprobs import linear_logps
from stages.engine.models.policy import Policy
from tests.bench import work
from tests.bench.ours import config_for
from tests.bench.sides import QUIET, ROOT
from tests.bench.turns import Worker
from tests.support.architectures import random_trees

METHODS = ("sft", "reward", "dpo", "kto", "ppo")
SHAPES: dict[str, dict[str, Any]] = {
    # 1.2 billion numbers, tied, in the shape that models of this size have.
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
GRADIENTS = 3e-6
"""Relative difference of gradients between layouts in float32, as between processes."""
console = Console(width=120)


class Check(NamedTuple):
    """One number that has to stay within its bound."""

    name: str
    found: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.found <= self.bound


# --- numbers that have to agree ---------------------------------------------------------------------------------------


def checks(folder: Path, device: str) -> list[Check]:
    """On the model of a folder, in float32: layouts, both kernels of attention, the chunked head, equal passes."""
    policy = load_policy(folder).to(device)
    trees = random_trees(24, seed=1, prompt=(20, 200), answer=(5, 120), k=4)
    found = _layouts(policy, trees)
    batch = collate(trees, "shared", 2).to(device)
    if device == "cuda":
        differences = kernels_differ(policy, batch)  # raises where FlexAttention does not compile
        found.append(Check("FlexAttention, values and gradients, against groups", differences, TOLERANCE))
    found.append(_head(policy, batch))
    with torch.no_grad():
        one, other = policy(batch).logps_N, policy(batch).logps_N
    found.append(
        Check("PPO's ratio at a rollout's first update, less 1", float(((one - other).exp() - 1).abs().max()), 0.0)
    )
    gradients = [_gradient(policy, batch)[1] for _ in range(2)]
    found.append(Check("the same backward pass twice", float((gradients[0] - gradients[1]).abs().max()), 0.0))
    return found


def _layouts(policy: Policy, trees: Sequence[Tree]) -> list[Check]:
    logps, gradients = {}, {}
    for layout in ("padded", "packed", "shared"):
        logps[layout], gradients[layout] = _gradient(policy, collate(trees, layout, 2).to(policy.device))
    found = []
    for layout in ("packed", "shared"):
        difference = ((logps[layout] - logps["padded"]).abs() / logps["padded"].abs().clamp(min=1)).max()
        found.append(Check(f"{layout} layout against padded, log-probs", float(difference), TOLERANCE))
        difference = (gradients[layout] - gradients["padded"]).norm() / gradients["padded"].norm()
        found.append(Check(f"{layout} layout against padded, gradient", float(difference), GRADIENTS))
    return found


def _gradient(policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of a weighted sum of them as one vector."""
    policy.zero_grad()
    logps_N = policy(batch).logps_N
    (logps_N * torch.linspace(-1, 2, len(logps_N), device=logps_N.device)).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return logps_N.detach(), gradient


def _head(policy: Policy, batch: Batch) -> Check:
    """Log-probs of the head in chunks, against the softmax over all logits at once, in float64."""
    weight_VD = policy.plain.get_parameter("lm_head.weight").detach()
    draw = torch.Generator(batch.device).manual_seed(0)
    hidden_ND = torch.randn(len(batch.labels_N), weight_VD.shape[1], generator=draw, device=batch.device)
    found_N, _ = linear_logps(hidden_ND, weight_VD, None, batch.labels_N)
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    right_N = logits_NV.log_softmax(-1).gather(-1, batch.labels_N[:, None]).squeeze(-1)
    return Check("head in chunks against float64", float((found_N - right_N).abs().max()), TOLERANCE)


# --- speed and memory -------------------------------------------------------------------------------------------------


def random_model(shape: dict[str, Any], folder: Path) -> Path:
    """A Llama with random weights, and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=True)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def matmul_peak(size: int, rounds: int = 20) -> float:
    """Floating-point operations per second of bf16 products of square matrices: what this card can do at most."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        _wait()
        began = time.perf_counter()
        torch.mm(one, other)
        _wait()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(plan: work.Work, module: str, rounds: int) -> tuple[float, float | None]:
    """(median seconds of a step, peak bytes on the card) of one side, in a process of its own; one step warms up."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    home = {"ALIGNFLOW_HOME": f"{plan.folder}/home", "HF_HOME": f"{plan.folder}/hf", "PYTHONPATH": path}
    log = Path(plan.folder) / f"{module.rsplit('.')[-1]}.log"
    worker = Worker([sys.executable, "-m", module, plan.folder], QUIET | home, log)
    try:
        turns = [worker.turn() for _ in range(rounds + 2)]  # the set-up, one that warms up, and those that count
    finally:
        worker.end()
    return median(turn["seconds"] for turn in turns[2:]), turns[-1].get("device_memory")


def tokens_of(plan: work.Work) -> int:
    """Tokens of a step, a prompt once for all its answers, on average over the steps."""
    rows = json.loads((Path(plan.folder) / "rows.json").read_text())
    ids = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
    total = sum(len(row[name]) for row in rows for name in ids if name in row)
    if plan.method == "ppo":
        total += plan.answer_length * len(rows)
    return total * plan.batch_size // len(rows)


def line(plan: work.Work, rounds: int, peak: float) -> list[str]:
    """One method's row of the table."""
    sizes, config = folder_sizes(Path(plan.model)), config_for(plan)
    estimate = training_bytes(sizes, config)
    seconds, memory = measure(plan, "tests.bench.ours", rounds)
    tokens = tokens_of(plan)
    # Forward 2, backward 4 operations for each number and token; PPO's rollouts, read by four models, are beside that.
    share = 6 * sizes.parameters * tokens / seconds / peak
    row = [plan.method, f"{plan.batch_size / seconds:.2f}", f"{tokens / seconds:,.0f}"]
    row += ["" if plan.method == "ppo" else f"{share:.0%}"]
    row += ["" if memory is None else readable(int(memory)), readable(estimate)]
    if importlib.util.find_spec("trl") is None or (plan.method == "ppo" and not os.environ.get("BENCH_TRL_PPO")):
        return [*row, "", "", ""]
    others, theirs = measure(plan, "tests.bench.peer", rounds)
    return [
        *row,
        f"{plan.batch_size / others:.2f}",
        f"{others / seconds:.1f}",
        "" if theirs is None else readable(int(theirs)),
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash tests/bench/gpu.sh [WHEELS]", description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="1b")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas between them")
    parser.add_argument("--rounds", type=int, default=3, help="steps that count; one more warms up")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.model != "tiny":
        parser.error("there is no GPU here. Fix: run it where torch.cuda.is_available(), or add --model tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    small = options.model == "tiny"
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=options.out) as name:
        folder = Path(name)
        found = checks(random_model(SHAPES["tiny"], folder / "tiny"), device)
        for check in found:
            bound = "0" if check.bound == 0 else f"{check.bound:.0e}"
            console.print(
                f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.found:.1e}, at most {bound}",
                highlight=False,
            )
        torch.cuda.empty_cache()
        peak = matmul_peak(512 if small else 8192)
        model = random_model(SHAPES[options.model], folder / "model")
        reward = work.with_score_head(model, folder / "reward")
        lines = work.made_up_pairs(folder / "pairs.jsonl", 200 if small else 2000).read_text().splitlines()
        pairs = [json.loads(text) for text in lines]
        rows = [
            {"row": number, "prompt_id": str(number), **pair, "prompt": [{"role": "user", "content": pair["prompt"]}]}
            for number, pair in enumerate(pairs)
        ]
        card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        title = (
            f"{card}, torch {torch.__version__}: {options.model}, bf16, {peak / 1e12:.1f} Tflop/s of matrix products"
        )
        columns = ("", "samples/s", "tokens/s", "of peak", "memory", "estimate", "TRL's samples/s", "ratio", "memory")
        table = Table(*columns, title=title)
        for method in options.only.split(","):
            plan = work.Work(
                method=method,
                folder=str(folder / method),
                model=str(model),
                reward=str(reward),
                batch_size=2 if small else 16,
                steps=options.rounds + 3,
                learning_rate=1e-6,
                precision="bf16",
                max_length=1600,
                tokens=4096,
                answer_length=8 if small else 128,
                ppo_epochs=1,
                threads=1 if small else 8,
            )
            work.lay_out(plan, rows)
            table.add_row(*line(plan, options.rounds, peak))
        console.print(table)
    return 0 if all(check.passed for check in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
