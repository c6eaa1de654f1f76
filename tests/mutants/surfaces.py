"""One-line mistakes in what people and other programs meet: first configs, ranking, MLflow's models; as in `listed`."""

FLAVOUR, DATABASE = "tests/tracking/test_flavour.py", "tests/tracking/test_database.py"
PLAN, VALIDATE = "tests/flows/planning/test_plan.py", "tests/stages/validate/test_validate.py"
PUSH, EXPORT = "tests/flows/results/test_push.py", "tests/flows/results/test_export.py"
SMOKE, REGISTRY = "tests/flows/gate/test_smoke.py", "tests/flows/results/test_registry.py"
GROUP, MODEL_METRICS = "tests/flows/results/test_group.py", "tests/tracking/test_model_metrics.py"
INIT, AGREEMENT, RANK = (
    "tests/flows/test_init.py",
    "tests/stages/rank/test_agreement.py",
    "tests/stages/rank/test_rank.py",
)

BY_FILE: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {
    ("stages/tracking/flavour.py", (FLAVOUR,)): [
        ('"model_binary": "."', '"model_binary": "model"'),
        ('("model_uuid", "utc_time_created")', '("utc_time_created",)'),
        ('"inference_task": "llm/v1/chat"', '"inference_task": "text-generation"'),
        ('or not (folder / "tokenizer_config.json").exists()', ""),
    ],
    ("stages/engine/scoring/served_reward.py", (FLAVOUR,)): [
        ('return (raw - self.scale["mean"]) / self.scale["std"]', 'return raw - self.scale["mean"]'),
        ('+ self.around.get("end", self.tokenizer.eos_token or "")', ""),
    ],
    ("flows/results/export/__init__.py", (FLAVOUR,)): [
        ("if inner.parts[0] in left:", "if inner.name in left:"),
    ],
    ("flows/results/export/hub.py", (PUSH,)): [
        ("return Door(name, not public, api)", "return Door(name, public, api)"),
        ("if not public and not existing.private:", "if not existing.private and public:"),
        ("if odd and chosen.request is None:", "if odd and chosen.request is not None:"),
    ],
    ("flows/results/export/card.py", (EXPORT,)): [
        ("if math.isfinite(value)}", "}"),
        ('return f"{100 * value:.1f}" if share', 'return f"{value:.1f}" if share'),
    ],
    ("flows/results/export/origins.py", (EXPORT,)): [
        ('NOT_LEARNED_FROM = {"evaluation", "baseline"}', 'NOT_LEARNED_FROM = {"baseline"}'),
    ],
    ("flows/gate/smoke.py", (SMOKE,)): [
        ("if not (config.smoke and decision.promote):", "if not config.smoke:"),
        ("if asked and ended else 0.0", "if asked else 0.0"),
    ],
    ("flows/results/registry.py", (REGISTRY,)): [
        ("if not promote and aliases(model).get(CHAMPION) != candidate_version.number:", "if not promote:"),
        ("if name.startswith(LAST)}", "if not name}"),
    ],
    ("flows/results/announce.py", (GROUP,)): [
        ("if result.run_id and not result.reused:", "if result.run_id:"),
        ('if not name.startswith("eval/"):', "if name:"),
    ],
    ("stages/tracking/run.py", (MODEL_METRICS,)): [
        ('request.params.get("part", "eval") == "eval"', "True"),
        ("if name not in on_model})", "if name})"),
    ],
    ("stages/tracking/database.py", (DATABASE,)): [
        ("return any((here / Path(uri).relative_to(place)).exists() for (uri,) in runs)", "return any(runs)"),
        (', "logged_models": "artifact_location"}', "}"),
        ("WHERE key = 'home' AND value = ?", "WHERE key = 'host' AND value = ?"),
    ],
    ("stages/validate/verdict.py", (VALIDATE,)): [
        ('params.few_prompts == "warn" and held_out > 0', 'params.few_prompts == "warn"'),
    ],
    ("schemas/stage.py", (PLAN,)): [
        ('"max_kl_iterations", "few_prompts"}', '"max_kl_iterations"}'),
    ],
    ("flows/planning/plan.py", (PLAN,)): [
        ('"refuse" if self.config.promote is not None else', '"warn" if self.config.promote is not None else'),
    ],
    ("flows/planning/dry_run.py", (PLAN,)): [
        ('{"eval": data.eval_fraction, "gold"', '{"gold"'),
        ("if held_out >= least:", "if held_out > least:"),
    ],
    ("flows/cli/init.py", (INIT,)): [
        ("share = min(0.5, max(0.1,", "share = min(0.9, max(0.1,"),
        ("math.ceil(120 * ENOUGH_PROMPTS", "math.ceil(100 * ENOUGH_PROMPTS"),
        ("if parameters is None or parameters >= 300e6:", "if parameters is not None and parameters >= 300e6:"),
        ("revision: {json.dumps(revision)}", "revision: {revision}"),
        ("if out.exists():", "if out.is_dir():"),
    ],
    ("stages/commands/rank/agreement.py", (AGREEMENT,)): [
        ("+= 1 / (len(values) - 1)", "+= 1"),
        ("middle[value] = below + margins[value] / 2", "middle[value] = below"),
        ("1 - (below - 1) * observed", "1 - below * observed"),
    ],
    ("stages/commands/rank/rows.py", (RANK,)): [
        ('net = told.count("up") - told.count("down")', 'net = told.count("up")'),
        ("None if level[a] == level[b] else min(a, b", "None if level[a] == level[b] else max(a, b"),
    ],
}
"""File and tests -> lines with their mistakes."""
