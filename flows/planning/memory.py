"""How many optimizer steps and how much memory a run will take, for `alignflow run --dry-run`.

It reads headers and no weights. The formula, in bytes, with P parameters of the model, A of its adapters, T tokens of a
micro-batch, L layers, h hidden size, i intermediate size, V vocabulary:

- a model that is only read (reference, reward model, what is under adapters), F: 4 P; in bf16 2 P, its vectors 4 each;
  in nf4 0.53 for each weight of a linear layer below the head, the rest as in bf16;
- what is trained: weights 4 and gradients 4 for each number, and Adam's two moments 8, or with `adamw8bit` 2 and the
  scales; so 16 P in full, and F + 16 A with LoRA, whose adapters bring their own weights;
- activations kept for the backward pass: T L (44 h + 16 i), of which 11 tensors of size h are those around norms and
  attention, and 4 of size i the MLP's; under bf16 T L (44 h + 8 i), since norms and residuals stay float32, and 2 for
  each weight of a linear layer that is held in float32, whose cast copy is kept too, unless it is gathered in bf16;
  with gradient checkpointing 4 T L h for the layers' inputs, and one layer in full; with `offload_activations` one
  layer;
- the head's logits, computed in chunks of at most 2^23 numbers, twice: 8 min(T V, 2^23).

DPO and KTO read the reference before training, from the policy itself, so they hold one model. PPO holds the policy, a
critic of its size that is trained too (unless the trunk is shared), the reference and the reward model. With LoRA the
reference is the policy itself with its adapters off, and the critic's adapters share weights that are loaded already:
the reward model's, or the SFT model's when the reward model too was trained with LoRA on it and brings adapters alone
(when both had it in one type). A reward model, once trained, is held beside the SFT model, whose answers set its scale.

With `sharding: full` a device holds its share of the weights, gradients and moments, n devices for each of `replicas`:
1 / n of the above, where PPO's models have weights of their own under LoRA too. Beside the activations a pass gathers
the root (V h), two layers, in the bytes of `gather`, and has one unit's gradient whole (4 bytes a number); PPO gathers
the policy whole while it samples, F or 4 P.

Stages that train nothing run on one device. An evaluation holds the model and the reference, since their exact KL needs
both at each token, then who judges; `generate` and `baselines` hold one model at a time. Beside the weights a pass has
a layer's activations and the logits; the cache of keys and values while sampling is not counted.

What Python, torch and its allocator need comes on top, about 1 GB. Layers that a type of model has for itself (joined
experts, scaled embeddings) stay float32, which is not counted either.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from flows.planning.requests import model_file
from schemas.config import ModelConfig, PipelineConfig, RewardConfig, RewardJudge, Scratch
from schemas.config.methods import PPO
from schemas.config.training import Half, Held, LoRA, Training, held_type, steps_for
from schemas.model_folder import in_bf16, stored

TORCH = 10**9
"""Bytes, about, that Python, torch and its allocator take."""
CHUNK = 2**23
"""Logits that the head computes at once."""
READ_TOKENS = 8192
"""Of one pass that reads answers without training."""
NF4_BLOCK, MOMENTS_BLOCK = 64, 256
"""Numbers that share a scale (engine/models/held.py, engine/training/optimizers.py)."""
SMALL = 4096
"""Numbers of a matrix below which its moments stay float32."""
SCRATCH_VOCABULARY = 512
"""More than the demo's tokenizer has."""


@dataclass(frozen=True)
class Sizes:
    """What the estimate needs to know of a model."""

    parameters: int
    linear: int
    """Inputs plus outputs of all linear layers but the head: an adapter of rank r has r times as many parameters."""
    matrices: int
    """Weights of these layers."""
    vectors: int
    """Numbers of norms and biases."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    in_bf16: bool = False
    """Whether all weights are bfloat16 in their files."""


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
    found = _sizes(shapes, layers, hidden, intermediate, config["vocab_size"])
    return replace(found, in_bf16=in_bf16(folder))


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
    inner = [shape for name, shape in shapes.items() if len(shape) == 2 and not vocabularies.search(name)]
    return Sizes(
        parameters=parameters,
        linear=sum(map(sum, inner)),
        matrices=sum(map(math.prod, inner)),
        vectors=sum(shape[0] for shape in shapes.values() if len(shape) == 1),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
    )


def frozen_bytes(sizes: Sizes, held: Held) -> int:
    """Weights of a model that is only read."""
    if held == "fp32":
        return 4 * sizes.parameters
    low = sizes.matrices if held == "nf4" else 0
    return low // 2 + 2 * -(-low // NF4_BLOCK) + 2 * (sizes.parameters - low - sizes.vectors) + 4 * sizes.vectors


def base_type(sizes: Sizes, training: Training) -> Held:
    """How the weights under adapters are held."""
    return (training.lora.base if training.lora else None) or held_type(
        training.frozen, sizes.parameters, sizes.in_bf16
    )


def trained_bytes(sizes: Sizes, training: Training) -> int:
    """Weights, gradients and Adam's moments of a model in training."""
    if training.lora is not None:
        return frozen_bytes(sizes, base_type(sizes, training)) + adapter_bytes(sizes, training)
    moments = _moments(sizes.parameters - sizes.vectors, 8 / MOMENTS_BLOCK, training) + 8 * sizes.vectors
    return 8 * sizes.parameters + moments


def _moments(numbers: int, scales: float, training: Training) -> int:
    """Adam's two moments of matrices; `scales`: bytes of those for each number, in 8 bits."""
    return 8 * numbers if training.optimizer == "adamw" else 2 * numbers + round(scales * numbers)


def adapter_bytes(sizes: Sizes, training: Training) -> int:
    """Adapters in training: weights, gradients and Adam's moments."""
    assert training.lora is not None
    rank = training.lora.rank
    if rank * sizes.hidden < SMALL:
        return 16 * rank * sizes.linear
    # Of the two matrices one has long rows; a row of the other has as many numbers as the rank.
    scales = (8 / MOMENTS_BLOCK + 8 / min(rank, MOMENTS_BLOCK)) / 2
    return 8 * rank * sizes.linear + _moments(rank * sizes.linear, scales, training)


def layer_bytes(sizes: Sizes, precision: Half) -> int:
    """What a layer keeps of a token for its backward pass."""
    return 44 * sizes.hidden + (8 if precision == "bf16" else 16) * sizes.intermediate


def activation_bytes(sizes: Sizes, training: Training) -> int:
    """What one micro-batch keeps for its backward pass, and the head's logits."""
    tokens = max(training.tokens_per_micro_batch, training.max_length)
    layer, copies = layer_bytes(sizes, training.precision), 0
    kept = 4 * sizes.layers * sizes.hidden + layer if training.gradient_checkpointing else sizes.layers * layer
    if training.offload_activations and not training.gradient_checkpointing:
        kept = layer  # those before it are in the host's memory
    whole = training.lora is None or base_type(sizes, training) == "fp32"
    if whole and training.precision == "bf16" and training.gather == "fp32":
        copies = 2 * sizes.matrices // (max(1, sizes.layers) if training.gradient_checkpointing else 1)
    return tokens * kept + copies + 8 * min(tokens * sizes.vocabulary, CHUNK)


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
    read = frozen_bytes(sizes, held_type(training.frozen, sizes.parameters, sizes.in_bf16))
    if not sharded:
        return max(held + passing, held + read if isinstance(training, RewardConfig) and training.lora else 0)
    passing += gathered_bytes(sizes, training)
    sampling = 0
    if isinstance(training, PPO):
        sampling = frozen_bytes(sizes, base_type(sizes, training)) if training.lora else 4 * sizes.parameters
    if isinstance(training, RewardConfig):  # a share of the SFT model, and while it samples the whole
        sampling = -(-read // shares) + read
    return -(-held // shares) + max(passing, sampling)


def _beside_the_policy(sizes: Sizes, training: PPO, reward: Sizes, reward_lora: LoRA | None, *, copies: bool) -> int:
    """PPO's critic, reference and reward model. `copies`: none uses the weights of another."""
    separate = training.value_trunk == "separate"
    judge = frozen_bytes(reward, held_type(training.frozen, reward.parameters, reward.in_bf16))
    if training.lora is None:
        critic = trained_bytes(sizes, training) if separate else 0
        return critic + frozen_bytes(sizes, held_type(training.frozen, sizes.parameters, sizes.in_bf16)) + judge
    base = frozen_bytes(sizes, base_type(sizes, training))
    critic = adapter_bytes(sizes, training) if separate else 0
    if separate and copies:
        critic += base
    if reward_lora is None:
        return critic + judge
    given = reward_lora.base or held_type(None, sizes.parameters, sizes.in_bf16)
    if _label(sizes, given) != _label(sizes, base_type(sizes, training)):
        return critic + judge
    adapter = 4 * reward_lora.rank * sizes.linear
    return critic + (adapter * 2 if separate else adapter) + (base if copies else 0)


def _label(sizes: Sizes, held: Held) -> Held:
    """What tells whether two adapters have one base, as engine/models/lora.py does."""
    return held if held == "nf4" or not sizes.in_bf16 else "fp32"


def gathered_bytes(sizes: Sizes, training: Training) -> int:
    """What a pass over sharded weights has whole at a time: the root, two layers, and the largest's gradient."""
    root = sizes.vocabulary * sizes.hidden
    layer = max(0, sizes.parameters - root) // max(1, sizes.layers)
    gradient = 4 * max(root, layer) if training.lora is None else 0
    half = training.gather == "bf16" or (training.lora is not None and base_type(sizes, training) == "bf16")
    return (2 if half else 4) * (root + 2 * layer) + gradient


def reading_bytes(sizes: Sizes, models: int, frozen: Half | None, judge: Sizes | None) -> int:
    """Memory of a stage that trains nothing: so many models at once, later who judges."""
    kind = held_type(frozen, sizes.parameters, sizes.in_bf16)
    held = models * frozen_bytes(sizes, kind)
    multiplied = frozen or "fp32"  # by default no number changes with the type that is held
    if judge is not None:
        held = max(held, frozen_bytes(judge, held_type(frozen, judge.parameters, judge.in_bf16)))
    return held + READ_TOKENS * layer_bytes(sizes, multiplied) + 8 * min(READ_TOKENS * sizes.vocabulary, CHUNK)


def scaled(sizes: Sizes, width: float) -> Sizes:
    """A model of the same shape so many times as wide, with the same vocabulary."""
    root = sizes.vocabulary * sizes.hidden
    body = max(0, sizes.parameters - root)
    return replace(
        sizes,
        parameters=int(body * width**2 + root * width),
        linear=int(sizes.linear * width),
        matrices=int(sizes.matrices * width**2),
        vectors=int(sizes.vectors * width),
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
    """Bytes on each device per stage that needs one, by the stage's name in the pipeline; None when the model's sizes
    are not known. `width`: of models so many times as wide.
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
    every = {name: training_bytes(sizes, training, reward, own, shares) for name, training in trained.items()}
    evaluate = config.evaluate
    scorers = [judge_sizes(evaluate.judge, sizes, width), reward if config.reward_model or config.reward else None]
    scorer = max(filter(None, scorers), key=lambda one: one.parameters, default=None)  # one after the other
    for name in ("sft", *(() if config.sft is None else ("base",)), *config.trained):
        every[f"eval {name}"] = reading_bytes(sizes, 1 if name == "sft" else 2, evaluate.frozen, scorer)
    if evaluate.baselines is not None:
        every["baselines"] = reading_bytes(sizes, 1, evaluate.frozen, scorer)
    if config.generate is not None:
        judge = judge_sizes(config.generate.judge, sizes, width)
        every["generate"] = reading_bytes(sizes, 1, config.generate.frozen, judge)
    return every


def judge_sizes(judge: object, gold: Sizes, width: float) -> Sizes | None:
    """Of a reward model that judges: `gold`, which the pipeline trains, or one in a folder, so many times as wide; None
    of another judge.
    """
    if not isinstance(judge, RewardJudge):
        return None
    folder = Path(judge.model).expanduser()
    return gold if judge.model == "gold" or not folder.is_dir() else scaled(folder_sizes(folder), width)


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
