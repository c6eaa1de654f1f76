"""One-line mistakes in what is concluded from numbers: comparisons, the gate, splits, seeds; as in `listed`."""

H2H, CURVE, FRONTIER = (f"tests/stages/test_{name}.py" for name in ("head_to_head", "curve", "frontier"))
PROMOTE, EVALUATE = "tests/stages/test_promote.py", "tests/stages/test_evaluate.py"
SPLIT = "tests/stages/validate/test_split.py"
MIXTURES, MIXED = "tests/schemas/test_mixtures.py", "tests/stages/validate/test_mixtures.py"
BY_SOURCE = "tests/stages/test_by_source.py"
PLAN, SWEEP = "tests/flows/planning/test_plan.py", "tests/flows/planning/test_sweep.py"
INTERVALS, RETRAIN = "tests/engine/test_intervals.py", "tests/flows/test_retrain.py"

BY_FILE: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {
    ("stages/compare/head_to_head.py", (H2H,)): [
        ("else 1 - self.win_rate,", "else self.win_rate,"),
        ("low=1 - self.rate.high, high=1 - self.rate.low", "low=1 - self.rate.low, high=1 - self.rate.high"),
        ("if duel.gap is None else duel.gap.low > 0", "if duel.gap is None else duel.gap.high > 0"),
        ("leads = [win - 0.5 for win in won]", "leads = [win for win in won]"),
        ("p_values, holm(p_values), strict=True)", "p_values, p_values, strict=True)"),
        ("return [1 - sample.win for sample in other]", "return [sample.win for sample in other]"),
        ("drawn = first.resampling", 'drawn = first.resampling | {"seed": 0}'),
        ("score[duel.model] - score[duel.other]", "score[duel.other] - score[duel.model]"),
        ("(-place[name], -scores[name], name)", "(-scores[name], -place[name], name)"),
        ("if len(aligned) > ASKED:", "if len(aligned) >= ASKED:"),
        ("duel = duel if duel.win_rate > 0.5 else duel.turned()", "duel = duel if duel.clear else duel.turned()"),
        (
            'top = max(rewarded, key=lambda row: row["reward_score"])',
            'top = max(rewarded, key=lambda row: row["judge_score"])',
        ),
        (
            "clusters = [sample.cluster for sample in next(iter(samples.values()))]",
            "clusters = [str(i) for i, _ in enumerate(next(iter(samples.values())))]",
        ),
    ],
    ("stages/compare/curve.py", (CURVE,)): [
        ("return self.interval.low > 0", "return self.interval.high > 0"),
        ("point) >= _slope(corners[-2], corners[-1])", "point) <= _slope(corners[-2], corners[-1])"),
        ("point.height <= corners[-1].height:", "point.kl < corners[-1].kl:"),
        ("[(1 - share, near), (share, far)]", "[(share, near), (1 - share, far)]"),
        ("return [(1.0, corners[-1])]", "return [(1.0, corners[0])]"),
        ("shares = at(corners, kl)", "shares = at(corners, 0.0)"),
        (".reshape(-1, draws).mean(1)", ".reshape(-1, draws)[:, 0]"),
        ("[sample.score if scores_alone(judge) else sample.win for", "[sample.score for"),
    ],
    ("stages/compare/findings.py", (H2H, CURVE)): [
        ("[duel for duel in measured if duel.beats]", "[duel for duel in measured if duel.clear]"),
        ("[duel for duel in measured if not duel.clear]", "[duel for duel in measured if not duel.beats]"),
        ("and not comparison.gains[name].clear]", "and comparison.gains[name].gain <= 0]"),
        ('for row in rows if verdict(row) == "better"]', "for row in rows if verdict(row)]"),
        ('if duels[name, "sft"].beats]', 'if duels[name, "sft"].clear]'),
        ("if len(measured) < len(duels):", "if not measured:"),
    ],
    ("stages/compare/frontier.py", (FRONTIER,)): [
        ("return gain >= 0 and spared <= 0 and", "return gain >= 0 and spared >= 0 and"),
        ("error if len(rows) > 1 else None}", "error}"),
        ('score_std if first["method"] == "ppo" else 1.0', 'score_std if first["method"] != "ppo" else 1.0'),
        (
            'mean = (1 - share) * near["judge_score"] + share * far',
            'mean = share * near["judge_score"] + (1 - share) * far',
        ),
        ("math.hypot((1 - share) * errors[0], share * errors[1])", "sum(errors) / 2"),
        ('and point["gain_low"] <= 0]', 'and point["gain"] <= 0]'),
        ('point["win_rate_vs_sft_low"] > 0.5]', 'point["win_rate_vs_sft"] > 0.5]'),
        ("answers[best], answers[i], len(made)),", "answers[best], answers[i], 2),"),
        ("if min(len(best), len(other)) < 2:", "if len(best) < 2:"),
        ("(mean_and_error(values)[1] ** 2, len(values) - 1)", "(mean_and_error(values)[1], len(values) - 1)"),
        (
            "parts.append((clustered_error(difference_N, scores[2]) ** 2, len(set(scores[2])) - 1))",
            "pass",
        ),
    ],
    ("stages/engine/scoring/intervals.py", (INTERVALS, H2H, FRONTIER)): [
        ("np.sqrt(count / (count - 1) * np.sum(residual_C**2))", "np.sqrt(np.sum(residual_C**2))"),
        ("[(1 - level) / 2, (1 + level) / 2], axis=0)", "[1 - level, level], axis=0)"),
        ("found_R[np.isfinite(found_R)], [(1 - level) / 2, (1 + level) / 2])", "found_R, [1 - level, level])"),
        ("value_SN.mean(1).std(ddof=1)) / math.sqrt(seeds)", "value_SN.mean(1).std()) / math.sqrt(seeds)"),
        ("stdtrit(size - 1, (1 + level) / 2)", "stdtrit(size, (1 + level) / 2)"),
        ("return two_sided(min(up, down), up + down)", "return two_sided(min(up, down), up)"),
        ("(len(order) - rank) * p_values[place]", "len(order) * p_values[place]"),
        ("highest = max(highest, min(1.0,", "highest = max(0.0, min(1.0,"),
        ("* math.sqrt(total / 2)", "* math.sqrt(total)"),
        (
            "freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)",
            "freedom = sum(degrees for _, degrees in parts)",
        ),
    ],
    ("stages/engine/scoring/metrics.py", (EVALUATE, FRONTIER)): [
        ("> SHIFT_MAX * spread:", "> 2 * SHIFT_MAX * spread:"),
        ("np.tanh(difference_N / spread)", "np.tanh(difference_N)"),
        ("np.array([RIDGE, LENGTH_PRIOR**-2])", "np.array([LENGTH_PRIOR**-2, RIDGE])"),
        ('re.findall(r"\\w+", answer.casefold())', 're.findall(r"\\w+", answer)'),
        ("value.std(ddof=1) / np.sqrt(len(value))", "value.std() / np.sqrt(len(value))"),
        (
            "-float(np.sum(reference_logps)) / int(np.sum(tokens))",
            "-float(np.mean(np.divide(reference_logps, tokens)))",
        ),
    ],
    ("stages/engine/scoring/paired.py", (H2H, PROMOTE)): [
        (
            "metrics.wins([s.score for s in samples], [s.score for s in others])",
            "metrics.wins([s.score for s in others], [s.score for s in samples])",
        ),
        ('return judge["judge"] != "endpoint"', "return True"),
        ("for sample in samples], answers, other_answers)", "for sample in samples], other_answers, answers)"),
    ],
    ("stages/engine/scoring/gate_evidence.py", ("tests/engine/test_gate_evidence.py",)): [
        ("own - sum(rest) / len(rest) if rest", "sum(rest) / len(rest) - own if rest"),
        ("if target >= entropy(", "if target <= entropy("),
        ("budget, pad_id) < target:", "budget, pad_id) > target:"),
        ("places[(number[cluster] + shift) % len(places)]", "places[shift % len(places)]"),
        ("return total / sum(len(answer) for tree in trees for answer in tree.answers)", "return total / len(trees)"),
    ],
    ("stages/promote.py", (PROMOTE,)): [
        ("length.high, gate.length_ratio_max", "length.low, gate.length_ratio_max"),
        ("nll.low, gate.reference_nll_min", "nll.high, gate.reference_nll_min"),
        ("nll.high, gate.reference_nll_max", "nll.low, gate.reference_nll_max"),
        ("cut.high, gate.unended_more_max", "cut.low, gate.unended_more_max"),
        ("tied_to.low, gate.relevance_min", "tied_to.high, gate.relevance_min"),
        (
            "[[value(s) for s in one.first] for one in (candidate, other)]",
            "[[value(s) for s in one.first] for one in (other, candidate)]",
        ),
        (
            "not theirs else own / theirs",
            "not theirs else theirs / own",
        ),
        ('*bounds(candidate, sft, gate, "", "sft\'s")', '*bounds(candidate, rival, gate, "", "sft\'s")'),
        ('*(bounds(candidate, champion, gate, "_champion"', '*(bounds(candidate, sft, gate, "_champion"'),
        ('1.0 if BETTER[name] == "lower" else -1.0', '-1.0 if BETTER[name] == "lower" else 1.0'),
        ("worse = found.high if sign > 0 else -found.low", "worse = found.high if sign > 0 else -found.high"),
        ("else kl + Z * error", "else kl - Z * error"),
        ("intervals.signs([win - 0.5 for win in won], clusters)", "intervals.signs(won, clusters)"),
        ("if gate.relevance_min > 0:", "if gate.relevance_min > 1:"),
        ("bool(sharp) and len(sharp) == len(candidate.first)", "bool(sharp)"),
        ("rival = sft if champion is None else champion", "rival = sft"),
        ("ratio(surprise, lambda s: float(s.length + s.ended))", "ratio(surprise)"),
    ],
    ("schemas/promotion/exact.py", ("tests/schemas/test_exact.py",)): [
        ("for k in range(successes, trials + 1)", "for k in range(successes + 1, trials + 1)"),
        ("(0 if minimum == 0.5 else tied)", "tied"),
        ("(0 if minimum == 0.5 else tied)", "0"),
        ("if upper_tail(middle, trials, minimum) <= alpha:", "if upper_tail(middle, trials, 0.5) <= alpha:"),
        (
            "wins_needed(trials, alpha, minimum), trials, truth)",
            "wins_needed(trials, alpha, minimum), trials, minimum)",
        ),
        ("if power(trials, middle / 1000, alpha, minimum) >= chance:", "if middle / 1000 > minimum:"),
    ],
    ("flows/gate/looks.py", ("tests/flows/gate/test_looks.py",)): [
        ("sum(look.alpha for look in recent) + gate.alpha", "sum(look.alpha for look in recent)"),
        ("if look.time > now - YEAR), key=lambda look", "if look.time > now - KEPT), key=lambda look"),
        ("{model}/{look.number}/{look.candidate}", "{model}/{look.candidate}"),
        ("if one.key == key and one.time > now - YEAR]", "if one.key == key]"),
        ("1 + max((look.number for look in known), default=0)", "1 + len(known)"),
        ("        check_budget(model, known, gate, now)\n", ""),
        ("spent, opening = spent - look.alpha,", "spent, opening = spent - gate.alpha,"),
    ],
    ("flows/retrain.py", (RETRAIN,)): [
        ("{name: file.sha256 for name, file", "{name: file.uri for name, file"),
        ("made_from.tags().items() <= champion.tags.items()", "champion.tags"),
        (
            "return _digest([asked, given, None if champion is None else champion.artifact.sha256])",
            "return _digest([asked, given])",
        ),
        (
            "promotion(planned, champion is not None, looks.seed(registered, look))",
            "promotion(planned, champion is not None)",
        ),
        ('"promoted" if decision.promote else "rejected"', '"promoted"'),
    ],
    ("stages/baselines.py", ("tests/stages/test_baselines.py",)): [
        ("return math.log(n) - (n - 1) / n", "return math.log(n)"),
        ("max(range(start, start + n), key", "max(range(start, start + drawn), key"),
        ("evaluator.distances(asked, answers, temperature)", "evaluator.distances(asked, answers)"),
        ("evaluator.answer(prompts, temperature, draws)", "evaluator.answer(prompts, 1.0, draws)"),
        ("places = [i * self.drawn + k for", "places = [i * draws + k for"),
    ],
    ("stages/engine/evaluator.py", (EVALUATE,)): [
        (
            'seed_of("evaluate", self.context.request.seed, i, k)',
            'seed_of("evaluate", self.context.request.seed, i, 0)',
        ),
        (
            "            temperature=temperature,\n            seeds=[",
            "            temperature=1.0,\n            seeds=[",
        ),
    ],
    ("stages/evaluate.py", (EVALUATE,)): [
        ("longer = [row.length - row.sft_length for", "longer = [row.length for"),
        (
            "clusters, drawn = [row.cluster for row in samples],",
            "clusters, drawn = [str(i) for i, _ in enumerate(samples)],",
        ),
        ("clustered_error(distances, clusters)", "metrics.mean_and_error(distances)[1]"),
        ("[(win, 1 - win, win) for win in won]", "[(win, win, win) for win in won]"),
        ("evaluator.answer(distinct, matched, policy=evaluator.reference)", "evaluator.answer(distinct, matched)"),
        ("evaluator.answer(distinct, matched, policy", "evaluator.answer(distinct, temperature, policy"),
    ],
    ("schemas/rows/__init__.py", ("tests/schemas/test_rows.py",)): [
        ('roles.index("user") + 1]', 'roles.index("user")]'),
        ("by_user.list.arg_max() + 1)", "by_user.list.arg_max())"),
        ("later = whole != first", "later = whole != whole"),
        ('r"\\W+", " ", text.casefold())', 'r"\\W+", " ", text)'),
    ],
    ("stages/engine/tables/__init__.py", ("tests/engine/test_derive.py", "tests/stages/validate/test_tools.py")): [
        ("return found if found.height else None", "return found"),
        ("source, pl.read_parquet(file, glob=False))[kind]", "kind, pl.read_parquet(file, glob=False))[kind]"),
    ],
    (
        "stages/engine/tables/derive.py",
        (
            "tests/engine/test_derive.py",
            "tests/stages/validate/test_together.py",
            "tests/stages/validate/test_tools.py",
        ),
    ): [
        ('ranked = frame.filter(pl.col("winners").list.len() > 0)', "ranked = frame"),
        ('makes["preference"] = lambda: without_weights(frame)', 'makes["preference"] = lambda: frame'),
        ('pl.col("net") <= 0)', 'pl.col("net") < 0)'),
        ('filter(pl.col("net") != 0)', 'filter(pl.col("net") >= 0)'),
        ("descending=[False, True, False]", "descending=[False, True, True]"),
    ],
    ("stages/validate/parts.py", (SPLIT,)): [
        (".when(draw >= 1 - test)", ".when(draw < held + test)"),
        ('draw = pl.col("cluster")', 'draw = pl.col("prompt_id")'),
        ("(draw < below) | (draw", "(draw < below) & (draw"),
        ("draw - below < gold * (above - below)", "draw - below < gold"),
    ],
    ("stages/validate/checks/table_checks.py", (SPLIT,)): [
        ('for name in ("eval", "test")]', 'for name in ("eval",)]'),
        ('side.is_in(["train", "gold"])', 'side.is_in(["train"])'),
        ('& pl.col("cluster").is_in(clusters', '& pl.col("prompt_id").is_in(clusters'),
    ],
    ("stages/validate/verdict.py", (SPLIT,)): [
        ('"test": params.min_test_prompts}', '"test": params.min_eval_prompts}'),
    ],
    ("schemas/config/data.py", (MIXTURES,)): [
        ("floor(min(reach))", "floor(max(reach))"),
        ("floor(exact[name]) - exact[name])", "exact[name] - floor(exact[name]))"),
        ("n * times[name] + Fraction(1, 2)", "n * times[name]"),
    ],
    ("stages/validate/mixtures/__init__.py", (MIXED,)): [
        ("_replace(row=finding.row - source.start)", "_replace(row=finding.row)"),
        ('if part == "train":\n                    wanted', "if True:\n                    wanted"),
    ],
    ("stages/validate/mixtures/drawing.py", (MIXED,)): [
        ('f"draw/{seed}/{name}"', 'f"draw/{name}"'),
        ('every.gather(rows["row"])', "every.gather(pl.Series(range(len(rows))))"),
    ],
    ("stages/engine/training/offline.py", (BY_SOURCE,)): [
        ("by_source(self.test_rows, changes)", "by_source(self.test_rows[::-1], changes)"),
    ],
    ("flows/planning/plan.py", (PLAN, SWEEP)): [
        ('config.seed if name == "reward" else config.seed + 1', "config.seed"),
        ("params_of(method), inputs, method.seed or 0)", "params_of(method), inputs, self.config.seed)"),
        ('params["eval_fraction"] = 1.0 - source.test_fraction', 'params["eval_fraction"] = 1.0'),
        ("return self.config.sweep is not None and source.test_fraction > 0", "return source.test_fraction > 0"),
        ("max((getattr(source, share) for source in sources)", "min((getattr(source, share) for source in sources)"),
    ],
    ("flows/planning/plan.py", (RETRAIN,)): [
        ("inputs=inputs, seed=seed, model=model", "inputs=inputs, model=model"),
        ('"samples_per_prompt": promote.samples_per_prompt,', ""),
    ],
    ("flows/planning/nodes.py", (SWEEP,)): [
        ('exclude={"seed"} | unset)', "exclude=unset)"),
    ],
    ("flows/planning/plan_checks.py", (PLAN,)): [
        ("seeded_name(str(named), config.seeds[0])", "seeded_name(str(named), config.seeds[-1])"),
    ],
    ("flows/planning/sweep.py", (SWEEP,)): [
        (
            'return max(points, key=lambda point: point["judge_score"])',
            'return min(points, key=lambda point: point["judge_score"])',
        ),
    ],
    ("stages/reward.py", ("tests/stages/test_reward.py",)): [
        ("    return MARGIN_MAX / largest\n", "    return largest / MARGIN_MAX\n"),
        ("if largest <= MARGIN_MAX:", "if largest <= 0:"),
        ("new_tensor([self.margin_scale * m for m in margins])", "new_tensor(margins)"),
    ],
}
"""File and tests -> lines with their mistakes."""
