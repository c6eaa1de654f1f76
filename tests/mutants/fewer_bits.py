"""One-line mistakes in weights and moments of few bits (listed.py says what that is)."""

_HELD, _OPTIMIZER = ("tests/engine/test_held.py",), ("tests/engine/test_optimizers.py",)

BY_FILE: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {
    ("stages/engine/blocks.py", _HELD): [
        ("even[..., ::2] << 4 | even[..., 1::2]", "even[..., 1::2] << 4 | even[..., ::2]"),
        ("F.pad(values, (0, -columns % block))", "F.pad(values, (0, columns % block))"),
    ],
    ("stages/engine/models/held.py", _HELD): [
        ("return super().forward(input).float()", "return super().forward(input)"),
        ("or not users[id(module.weight)] <= _KINDS.keys()", ""),
        ("and module is not head:", "and True:"),
    ],
    ("stages/engine/models/loading.py", _HELD): [
        ("(adapters.base if adapters else None) or held_type(", "held_type("),
        (
            "published_type(training.publish, parameters, half)",
            "published_type(training.publish, parameters, True)",
        ),
        ("held_type(asked, parameters, half)", "held_type(asked, parameters, True)"),
        ('model.held == "bf16" and not half', "False"),
        ('"bf16" if frozen == "bf16" else', '"bf16" if model.held == "bf16" else'),
    ],
    ("stages/engine/models/saving.py", _HELD): [
        ("lora.label(base, model.held, model.rounded)", "base"),
        ("cast.setdefault((value.data_ptr(), value.shape),", "cast.setdefault((id(value), value.shape),"),
        ("plain.config.dtype = dtype", "pass"),
    ],
    ("stages/engine/models/lora.py", _HELD): [
        ("module.whole(torch.float32) if isinstance(module, Nf4) else state[key]", "state[key]"),
    ],
    ("stages/engine/training/optimizers.py", _OPTIMIZER): [
        ("codes.clamp_(min=1).mul_(value > 0)", "pass"),
        ("part = slice(start, start + rows)", "part = slice(start, start + rows - 1)"),
        ('weight.mul_(1 - group["lr"] * group["weight_decay"])', "pass"),
    ],
    ("stages/evaluate.py", ("tests/stages/test_evaluate.py",)): [
        ("    evaluator.release()", "    pass"),
    ],
    ("stages/align/ppo.py", ("tests/stages/align/test_ppo.py",)): [
        ("self.reward_model.scorer if lora else None", "None"),
        (
            'label(context.request.inputs["model"].sha256, policy.held, policy.rounded)',
            'context.request.inputs["model"].sha256',
        ),
    ],
    ("flows/planning/memory.py", ("tests/flows/planning/test_memory.py",)): [
        ("_label(sizes, given) != _label(sizes, base_type(sizes, training))", "False"),
        ('and training.precision == "bf16" and training.gather', "and training.gather"),
    ],
}
"""File and tests -> lines with their mistakes."""
