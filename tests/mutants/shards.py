"""One-line mistakes in sharded training (listed.py says what that is)."""

_SHARDING = ("tests/stages/align/test_sharding.py",)
_FOUR = ("tests/stages/align/test_four_ranks.py",)
_RANKS = ("tests/stages/align/test_accumulation.py",)

BY_FILE: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {
    ("stages/engine/models/sharding.py", _SHARDING): [
        ("mp_policy=policy, reshard_after_forward=True)", "mp_policy=policy, reshard_after_forward=False)"),
        ("each = -(-(end - begin) // of)", "each = (end - begin) // of"),
        ("- passes if is_sharded(model) else 0", "- passes if not is_sharded(model) else 0"),
        ("if len(set(doings)) > 1:", "if len(set(doings)) > 2:"),
        ('half if training.gather == "bf16" else MixedPrecisionPolicy()', "MixedPrecisionPolicy()"),
        ("put(parameter, sent)", "put(parameter, 0 * sent)"),
        ("return training is not None and training.sharding", "return training is None and training.sharding"),
    ],
    ("stages/engine/models/sharding.py", _FOUR): [
        ("mesh.get_local_rank(0), mesh.size(0))", "0, 1)"),
        ("mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))", "rank(), world())"),
        ("if world() % copies:", "if copies > world():"),
    ],
    ("stages/engine/training/shards.py", _FOUR): [
        ("for begin in sorted(pieces)]", "for begin in pieces]"),
    ],
    ("stages/engine/models/saving.py", _FOUR): [
        ("sorted(state, key=dot_natural_key)", "state"),
        ('of=lora.PART if in_pieces else "")', 'of="")'),
        ("if name not in dropped and", "if"),
    ],
    ("stages/engine/models/lora.py", ("tests/stages/align/test_ppo.py",)): [
        ("if copies:", "if False:"),
    ],
    ("stages/engine/models/loading.py", _SHARDING): [
        ("if pieces.stand_in_for_all(hf, folder, fresh) or rank() > 0:", "if False:"),
    ],
    ("stages/engine/models/layouts.py", _SHARDING): [
        ("broadcast_object_list(given)", "pass"),
        ('update={"gather": "fp32"}', "update={}"),
    ],
    ("stages/engine/models/policy.py", _SHARDING): [
        ("if log_probs and isinstance(self, FSDPModule)", "if log_probs and not isinstance(self, FSDPModule)"),
    ],
    ("stages/engine/training/shards.py", _SHARDING): [
        ("optimizer.state[parameter] = state", "optimizer.state[parameter] = {}"),
        ("part.file.get_slice(key)[begin - first : end - first]", "part.file.get_slice(key)[begin:end]"),
        ("return (int(part[1]) if part else 0) % world() == rank()", "return rank() == 0 and part is None"),
    ],
    ("stages/engine/training/loop.py", _SHARDING): [
        ("* self.accelerator.num_processes * counts)", "* self.accelerator.num_processes)"),
        ("(own[-1], False)", "(own[-1], True)"),
        ("self.accelerator.process_index % shards.saved_ranks(newest)", "self.accelerator.process_index"),
        ("if rank() == 0 or everywhere:", "if rank() == 0:"),
        ("shards.is_mine, self.first_fault,", "shards.is_mine, lambda reason: reason,"),
    ],
    ("stages/engine/training/loop.py", _RANKS): [
        ("gradient_as_bucket_view=True", "gradient_as_bucket_view=False"),
    ],
    ("stages/align/kto.py", _SHARDING): [
        ("if i >= len(micros):", "if i > len(micros):"),
    ],
    ("stages/engine/scoring/batched.py", _SHARDING): [
        ("for _ in range(missing(model, len(groups))):", "for _ in range(0):"),
    ],
    ("flows/planning/nodes.py", _SHARDING): [
        ("if getattr(training, name) == fields", "if getattr(training, name) != fields"),
    ],
    ("schemas/config/training.py", _SHARDING): [
        ('not (self.sharding == "full" and self.precision', 'not (self.sharding == "full" or self.precision'),
    ],
}
"""File and tests -> lines with their mistakes."""
