"""What MLflow's page of a registered version tells people: what was decided and why, and from which data it came."""

from collections.abc import Mapping

from flows.results import lookup
from schemas.promotion import Check, Decision
from schemas.stage import SOURCE, Result
from schemas.text import one_line
from stages import tracking


def described(decision: Decision, against: str, results: Mapping[str, Result], candidate: str) -> str:
    """Markdown: the verdict, a table of the checks, the data, and the way to the run and its report.

    results: of all nodes by name, as `retrain.decide` has them.
    """
    verdict = "Passed the gate" if decision.promote else "Failed the gate"
    lines = [f"{verdict}, judged against {against}. Candidate: {candidate}.", ""]  # plain: a list shows it as it is
    if decision.reasons:
        lines += [f"Failed: {', '.join(check.metric for check in decision.reasons)}.", ""]
    lines += ["| check | measured | bound | passed | meaning |", "|---|---|---|---|---|"]
    lines += [_row(check) for check in decision.checks]
    lines += ["", *(f"- data `{name}`: {text}" for name, text in _data(results)), *_links(results, candidate)]
    return "\n".join(lines)


def _row(check: Check) -> str:
    measured = "missing" if check.value is None else f"{check.value:.4g}"
    passed = "yes" if check.passed else "**no**"
    meaning = one_line(check.meaning, 300).replace("|", "\\|")
    return f"| {check.metric} | {measured} | {check.relation} {check.bound:.4g} | {passed} | {meaning} |"


def _data(results: Mapping[str, Result]) -> list[tuple[str, str]]:
    """Of each data stage its name, and the rows' file with the beginning of its digest."""
    told = []
    for name, result in results.items():
        if not name.startswith("data ") or result.run_id is None:
            continue
        request = lookup.request_of(result.run_id)
        digest = request.inputs[SOURCE].sha256[:12] if SOURCE in request.inputs else ""
        path = request.params.get("path") or "several sources, see the run"
        told.append(
            (name.removeprefix("data "), f"`{one_line(path, 200)}`" + (f" (sha256 {digest})" if digest else ""))
        )
    return told


def _links(results: Mapping[str, Result], candidate: str) -> list[str]:
    """The training run, the gate's and the comparison's report, on whichever server shows this."""
    pages = [("training run", candidate, ""), ("decision", "promote", "/artifacts/decision.json")]
    pages.append(("report", "compare", "/artifacts/comparison/report.html"))
    links = []
    for what, name, inner in pages:
        if name in results and (run_id := results[name].run_id):
            experiment = tracking.client().get_run(run_id).info.experiment_id
            links.append(f"- [{what}](#/experiments/{experiment}/runs/{run_id}{inner})")
    return links
