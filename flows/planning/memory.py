"""How many optimizer steps and how much memory a run will take, for `alignflow run --dry-run`.

It reads headers and no weights. The formula, in bytes, with P parameters of the model, A of its adapters, T tokens of a
micro-batch, L layers, h hidden size, i intermediate size, V vocabulary, b bytes of a number (2 under bf16, else 4):

- a model in training: weights 4 P; gradients 4 and Adam's two moments 8 for each number that is trained, so 16 P in
  full, and 4 P + 16 A with LoRA, whose adapters bring their own weights;
- a model that is only read (reference, reward model): 4 P;
- activations kept for the backward pass: T L (8 h + 4 i) b, that is both norms' inputs and outputs, q, k, v, the
  attention's output, and four tensors of the MLP; with gradient checkpointing T L h b for the layers' inputs, and one
  layer in full;
- the head's logits, computed in chunks of at most 2^23 numbers, twice: 8 min(T V, 2^23).

DPO and KTO read the reference before training, from the policy itself, so they hold one model. PPO holds the policy, a
critic of its size that is trained too (unless the trunk is shared), the reference and the reward model. With LoRA the
reference is the policy itself with its adapters off, and the critic's adapters share weights that are loaded already:
the reward model's, or the SFT model's when the reward model too was trained with LoRA on it and brings adapters alone.

With `sharding: full` a device holds its share of the weights, gradients and moments, n devices for each of `replicas`:
1 / n of the above, where PPO's models have weights of their own under LoRA too. Beside the activations a pass gathers
the root (V h), two layers, in the bytes of `gather`, and has one unit's gradient whole (4 bytes a number); PPO gathers
the policy whole while it samples, 4 P.
What Python, torch and its allocator need comes on top, about 1 GB.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from flows.planning.requests import model_file
from schemas.config import ModelConfig, PipelineConfig, Scratch
from schemas.config.methods import PPO
from schemas.config.training import LoRA, Training, steps_for
from schemas.model_folder import stored

TORCH = 10**9
"""Bytes, about, that Python, torch and its allocator take."""
CHUNK = 2**23
"""Logits that the head computes at once."""
SCRATCH_VOCABULARY = 512
"""More than the demo's tokenizer has."""


@dataclass(frozen=True)
class Sizes:
    """What the estimate needs to know of a model."""

    parameters: int
    linear: int
    """Inputs plus outputs of all linear layers but the head: an adapter of rank r has r times as many parameters."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def model_sizes(model: ModelConfig) -> Sizes | None:
    """Sizes of the base model; None when it is not on this machine yet, or of a form unknown here."""
    if model.scratch is not None:
        return scratch_sizes(model.scratch)
    file = model_file(model.path or "")
    if file is None:
        return None
    if file.suffix == ".gguf":
        return gguf_sizes(file)
    return folder_sizes(file) if (file / "config.json").is_file() else None


def scratch_sizes(scratch: Scratch, vocabulary: int = SCRATCH_VOCABULARY) -> Sizes:
    """A Llama without grouped heads, its embedding tied to its head."""
    h, i = scratch.hidden_size, scratch.intermediate_size
    shapes = {"embed_tokens.weight": (vocabulary, h), "norm.weight": (h,)}
    for layer in range(scratch.layers):
        shapes |= {f"{layer}.{name}.weight": (h, h) for name in "qkvo"}
        shapes |= {f"{layer}.gate.weight": (i, h), f"{layer}.up.weight": (i, h), f"{layer}.down.weight": (h, i)}
        shapes |= {f"{layer}.{name}.weight": (h,) for name in ("norm1", "norm2")}
    return _sizes(shapes, scratch.layers, h, i, vocabulary)


def folder_sizes(folder: Path) -> Sizes:
    """From config.json and the headers of the safetensors files."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    hidden = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    intermediate = config.get("intermediate_size") or 4 * hidden
    shapes = {name: one.shape for name, one in stored(folder).items()}
    return _sizes(shapes, layers, hidden, intermediate, config["vocab_size"])


def gguf_sizes(file: Path) -> Sizes:
    """From the header of a GGUF file; weights count as what they become, float32."""
    # gguf is an extra, and only needed for such models.
    from gguf import GGUFReader

    reader = GGUFReader(file)
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    kind = reader.fields["general.architecture"].contents()

    def number(name: str) -> int:
        return int(reader.fields[f"{kind}.{name}"].contents())

    embedding = shapes["token_embd.weight"]
    return _sizes(
        shapes, number("block_count"), number("embedding_length"), number("feed_forward_length"), embedding[-1]
    )


def _sizes(shapes: dict[str, tuple[int, ...]], layers: int, hidden: int, intermediate: int, vocabulary: int) -> Sizes:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    # Embeddings and the head, by the names of transformers and of GGUF.
    vocabularies = re.compile(r"embed|embd|wte|wpe|lm_head|^output\.weight$")
    linear = sum(sum(shape) for name, shape in shapes.items() if len(shape) == 2 and not vocabularies.search(name))
    return Sizes(parameters, linear, layers, hidden, intermediate, vocabulary)


def trained_bytes(sizes: Sizes, training: Training) -> int:
    """Weights, gradients and Adam's moments of a model in training."""
    if training.lora is None:
        return 16 * sizes.parameters
    return 4 * sizes.parameters + adapter_bytes(sizes, training.lora)


def adapter_bytes(sizes: Sizes, lora: LoRA) -> int:
    """Adapters in training: weights, gradients and Adam's moments."""
    return 16 * lora.rank * sizes.linear


def activation_bytes(sizes: Sizes, training: Training) -> int:
    """What one micro-batch keeps for its backward pass, and the head's logits."""
    tokens = max(training.tokens_per_micro_batch, training.max_length)
    number = 2 if training.precision == "bf16" else 4
    layer = 8 * sizes.hidden + 4 * sizes.intermediate
    kept = sizes.layers * sizes.hidden + layer if training.gradient_checkpointing else sizes.layers * layer
    return tokens * kept * number + 8 * min(tokens * sizes.vocabulary, CHUNK)


def training_bytes(
    sizes: Sizes,
    training: Training,
    reward: Sizes | None = None,
    reward_lora: LoRA | None = None,
    shares: int = 1,
) -> int:
    """Memory of one device that trains: SFT, a reward model, or a method.

    `reward` is PPO's reward model, `reward_lora` its adapters where it was trained with them on the same SFT model.
    `shares`: among how many devices one copy of the weights is shared out where `sharding` is full.
    """
    sharded = training.sharding == "full" and shares > 1
    held, passing = trained_bytes(sizes, training), activation_bytes(sizes, training)
    if isinstance(training, PPO):
        held += _beside_the_policy(sizes, training, reward or sizes, reward_lora, copies=sharded)
    if not sharded:
        return held + passing
    passing += gathered_bytes(sizes, training)
    sampling = 4 * sizes.parameters if isinstance(training, PPO) else 0
    return -(-held // shares) + max(passing, sampling)


def _beside_the_policy(sizes: Sizes, training: PPO, reward: Sizes, reward_lora: LoRA | None, *, copies: bool) -> int:
    """PPO's critic, reference and reward model. `copies`: none uses the weights of another."""
    separate = training.value_trunk == "separate"
    if training.lora is None:
        critic = trained_bytes(sizes, training) if separate else 0
        return critic + 4 * sizes.parameters + 4 * reward.parameters
    critic = adapter_bytes(sizes, training.lora) if separate else 0
    if copies and separate:
        critic += 4 * sizes.parameters
    if reward_lora is None:
        return critic + 4 * reward.parameters
    given = 4 * reward_lora.rank * sizes.linear
    return critic + (given * 2 if separate else given) + (4 * sizes.parameters if copies else 0)


def gathered_bytes(sizes: Sizes, training: Training) -> int:
    """What a pass over sharded weights has whole at a time: the root, two layers, and the largest's gradient."""
    root = sizes.vocabulary * sizes.hidden
    layer = max(0, sizes.parameters - root) // max(1, sizes.layers)
    gradient = 4 * max(root, layer) if training.lora is None else 0
    return (2 if training.gather == "bf16" else 4) * (root + 2 * layer) + gradient


def scaled(sizes: Sizes, width: float) -> Sizes:
    """A model of the same shape so many times as wide, with the same vocabulary."""
    root = sizes.vocabulary * sizes.hidden
    body = max(0, sizes.parameters - root)
    return replace(
        sizes,
        parameters=int(body * width**2 + root * width),
        linear=int(sizes.linear * width),
        hidden=int(sizes.hidden * width),
        intermediate=int(sizes.intermediate * width),
    )


def largest(config: PipelineConfig, device: int) -> tuple[int, str] | None:
    """Parameters of the largest model of this shape whose stages all fit a device of so many bytes, and the stage that
    takes most then; None when the model's sizes are not known. In steps of a percent of its width.
    """
    if memory(config) is None:
        return None
    low, high = 0.0, 1e4
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        fits = max((memory(config, middle) or {"": 0}).values(), default=0) <= device
        low, high = (middle, high) if fits else (low, middle)
    stages, sizes = memory(config, low) or {}, model_sizes(config.model)
    if sizes is None or not stages:
        return None
    return scaled(sizes, low).parameters, max(stages, key=stages.__getitem__)


def memory(config: PipelineConfig, width: float = 1.0) -> dict[str, int] | None:
    """Bytes on each device per training stage, by the stage's name in the pipeline; None when the model's sizes are not
    known. `width`: of models so many times as wide.
    """
    sizes = model_sizes(config.model)
    if sizes is None:
        return None
    reward = folder_sizes(Path(config.reward_model).expanduser()) if config.reward_model else sizes
    sizes, reward, shares = (
        scaled(sizes, width),
        scaled(reward, width),
        config.nodes * config.devices // config.replicas,
    )
    stages: dict[str, Training | None] = {"sft": config.sft, "reward": config.reward, "gold": config.gold}
    stages |= config.trained
    own = None if config.reward_model or config.reward is None else config.reward.lora
    trained = {name: training for name, training in stages.items() if training is not None}
    return {name: training_bytes(sizes, training, reward, own, shares) for name, training in trained.items()}


def steps(training: Training, rows: int | None) -> int | None:
    """Optimizer steps over `rows` rows; None when that is not known yet. PPO needs no rows to know."""
    if training.train_tokens is not None:
        return None
    if isinstance(training, PPO):
        wanted = training.iterations * training.ppo_epochs * math.ceil(training.rollout_size / training.batch_size)
        return min(wanted, training.max_steps or wanted)
    if rows is None and training.epochs is not None:
        return None
    return steps_for(rows or 0, training)


def readable(number: int) -> str:
    """Bytes for people: 1.2 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.0f} kB"
