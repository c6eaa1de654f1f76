"""The faster products give what PyTorch's give, in every position of a model; freed memory stays with the process."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import pytorch_utils

from schemas.config.training import LoRA
from stages.engine.data.trees import collate
from stages.engine.models import cpu
from stages.engine.models.loading import load_policy
from stages.engine.models.logprobs import linear_logps
from stages.engine.training.loop import train
from tests.stages.align.test_golden import CONFIGS, GOLDEN, inputs_for, losses
from tests.support.architectures import KINDS, random_trees, save_tiny
from tests.support.context import MemoryContext
from tests.support.killable_training import CLASSES

needs_onednn = pytest.mark.skipif(not cpu._ONEDNN, reason="without AVX-512 or oneDNN, PyTorch's own product is used")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let small matrices be multiplied as large ones are; the shapes of oneDNN's products, as they come."""
    shapes: list[torch.Size] = []
    inner = cpu._onednn

    def onednn(left_NI: torch.Tensor, right_OI: torch.Tensor) -> torch.Tensor:
        out_NO = inner(left_NI, right_OI)
        shapes.append(out_NO.shape)
        return out_NO

    monkeypatch.setattr(cpu, "_onednn", onednn)
    monkeypatch.setattr(cpu, "LARGE_MATRIX", 1)
    return shapes


def fast(layer: nn.Linear) -> nn.Linear:
    """The layer, made ready."""
    cpu.get_ready(layer)
    return layer


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (2, 1, 7, 24)])
def test_a_layer_and_its_gradient_are_those_of_float64(
    products: list[torch.Size], bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = fast(nn.Linear(24, 17, bias=bias))
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    rows = math.prod(shape[:-1])
    assert products == [(rows, 17), (rows, 24), (17, 24)]

    x64, weight64, upstream64 = (t.detach().double() for t in (x, layer.weight, upstream))
    rows64, flat64 = x64.reshape(-1, 24), upstream64.reshape(-1, 17)
    expected = rows64 @ weight64.T + (layer.bias.detach().double() if bias else 0)
    torch.testing.assert_close(out.double(), expected.reshape(*shape[:-1], 17), atol=1e-5, rtol=1e-5)
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), (flat64 @ weight64).reshape(shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), flat64.T @ rows64, atol=1e-5, rtol=1e-5)
    if bias:
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad.double(), flat64.sum(0), atol=1e-5, rtol=1e-5)


@needs_onednn
def test_which_product_is_a_matter_of_the_weight_alone() -> None:
    small, large = torch.zeros(64, 64), torch.zeros(256, 256)
    assert cpu.product_for(small) is cpu._matmul
    assert cpu.product_for(large) is cpu._onednn
    assert cpu.product_for(large.bfloat16()) is cpu._matmul
    assert cpu.product_for(large.double()) is cpu._matmul


@needs_onednn
def test_a_frozen_weight_costs_no_product_and_keeps_no_input(products: list[torch.Size]) -> None:
    torch.manual_seed(0)
    layer = fast(nn.Linear(24, 17)).requires_grad_(False)
    x = torch.randn(24, 9, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(x.T)
    assert kept == [(17, 24)]
    out.sum().backward()  # the gradient of a sum is one number, spread out without being copied
    assert products == [(9, 17), (9, 24)]
    assert x.grad is not None and layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0)[:, None].expand(24, 9))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda wide: wide[:, :5].T,
    "a slice": lambda wide: wide[:5, 3:27],
    "spread out": lambda wide: wide[0, :24].expand(5, 24),
}


@needs_onednn
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_that_lie_oddly_in_memory(products: list[torch.Size], view: str) -> None:
    torch.manual_seed(0)
    layer = fast(nn.Linear(24, 17))
    x = VIEWS[view](torch.randn(24, 40))
    layer(x).square().sum().backward()
    weight64 = layer.weight.detach().double().requires_grad_()
    (x.double() @ weight64.T + layer.bias.detach().double()).square().sum().backward()
    assert products == [(5, 17), (17, 24)]
    assert layer.weight.grad is not None and weight64.grad is not None
    torch.testing.assert_close(layer.weight.grad.double(), weight64.grad, atol=1e-4, rtol=1e-5)


def test_an_empty_input_and_autocast_are_left_to_pytorch(products: list[torch.Size]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 17)
    layer = nn.Linear(24, 17)
    layer.load_state_dict(plain.state_dict())
    fast(layer)
    assert layer(torch.zeros(0, 24)).shape == (0, 17)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), plain(x), atol=0, rtol=0)
    assert products == []


@needs_onednn
@pytest.mark.parametrize("kind", KINDS)
def test_a_models_loss_and_gradient_stay_what_they_were(
    kind: str, tmp_path: Path, products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(save_tiny(tmp_path, kind))
    layers = [module for module in policy.modules() if isinstance(module, nn.Linear | pytorch_utils.Conv1D)]
    batch = collate(random_trees(5), "shared", 2)

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        logps_N = policy(batch).logps_N
        logps_N.mean().backward()
        return logps_N.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    logps_N, gradient = found()
    assert len(products) == 3 * len(layers)  # the head's logits come twice, its weight's gradient is summed in place
    monkeypatch.setattr(cpu, "LARGE_MATRIX", 2**16)
    products.clear()
    expected, expected_gradient = found()
    assert products == []
    torch.testing.assert_close(logps_N, expected, atol=1e-5, rtol=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@needs_onednn
@pytest.mark.parametrize("name", GOLDEN)
def test_every_method_has_its_golden_losses(name: str, tmp_path: Path, home: Path, products: list[torch.Size]) -> None:
    assert losses(name, tmp_path) == pytest.approx(GOLDEN[name][1], abs=1e-4)
    assert products


@needs_onednn
@pytest.mark.parametrize("name", ["sft, LoRA with dropout", "ppo"])
def test_a_run_goes_on_bit_for_bit(name: str, tmp_path: Path, home: Path, products: list[torch.Size]) -> None:
    steady: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "gradient_checkpointing": True}
    config = {
        "sft, LoRA with dropout": CONFIGS["sft"].model_copy(update={**steady, "lora": LoRA(rank=4, dropout=0.1)}),
        "ppo": CONFIGS["ppo"].model_copy(update=steady),
    }[name]
    inputs = inputs_for(tmp_path)
    ends = []
    for folder, parts in {"at once": [5], "in parts": [3, 5]}.items():
        methods = [CLASSES[type(config)](config, MemoryContext(tmp_path / folder, config, inputs)) for _ in parts]
        for method, steps in zip(methods, parts, strict=True):
            method.total_steps = steps
            train(method, method.context)
        ends.append(torch.cat([p.detach().flatten() for p in methods[-1].model.parameters()]))
    assert torch.equal(*ends) and products


OUTPUT = """
import sys, torch
from torch import nn
from stages.engine.models import cpu
torch.manual_seed(0)
layer = nn.Linear(300, 260)
cpu.get_ready(layer)
torch.set_num_threads(2)
for rows in map(int, sys.argv[1:]):
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows), requires_grad=True)
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
print(*(t.detach().numpy().tobytes().hex() for t in (out, x.grad, layer.weight.grad)))
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_bits_do_not_depend_on_what_was_multiplied_before() -> None:
    """A run that goes on from a checkpoint starts with other shapes than the run that made it."""
    assert python(OUTPUT, "37") == python(OUTPUT, "211", "37", "36", "37")


def test_the_head_of_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(6, 32), torch.randn(4096, 32) * 0.3
    labels_N = torch.randint(4096, (6,))
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    linear_logps(hidden_ND, weight_VD, None, labels_N)[0].sum().backward()
    hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden_ND, weight_VD))
    (hidden64 @ weight64.T).log_softmax(-1).gather(-1, labels_N[:, None]).sum().backward()
    for tensor, expected in ((hidden_ND, hidden64), (weight_VD, weight64)):
        assert tensor.grad is not None and expected.grad is not None
        torch.testing.assert_close(tensor.grad.double(), expected.grad, atol=1e-5, rtol=1e-5)


FAULTS = """
import resource, sys, torch
from stages.engine.models import cpu
from tests.support.context import MemoryContext
if sys.argv[1] == "kept":
    cpu.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(20)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked")
def test_freed_memory_comes_back_without_page_faults() -> None:
    kept, given_back = (json.loads(python(FAULTS, how))[-10:] for how in ("kept", "given back"))
    assert max(kept) < 0.1 * min(given_back)
