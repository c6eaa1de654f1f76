"""What a person sees of a run: MLflow's pages in a real browser, and the ways there from Prefect. One small sweep."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.servers import mlflow_prefect, supervisor
from stages import tracking
from stages.engine import demo
from tests.support import forked_servers, homes
from tests.support.commands import alignflow

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 120_000  # milliseconds, for a page on a busy machine

TRAINING = {"batch_size": 4, "max_length": 64, "learning_rate": 1e-3}
CONFIG: dict[str, Any] = {
    "name": "seen",
    "model": {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "max_length": 64}},
    "data": {"preference": {"path": "pairs.jsonl", "kind": "preference", "eval_fraction": 0.4, "max_length": 64}},
    "sft": None,
    "reward": None,
    "align": {"dpo": {**TRAINING, "max_steps": 3}, "kto": {**TRAINING, "max_steps": 3}},
    "evaluate": {"judge": "rule", "max_new_tokens": 6, "min_prompts": 5, "bootstrap": 100},
    "parallel": 2,
}
VARIANTS = ["dpo-0.1-s0", "kto-0.1-s0"]
MODELS = {"sft", *VARIANTS}


@dataclass(frozen=True)
class Sweep:
    """A sweep that has run against two real servers: what it said, and where the servers are."""

    said: str
    mlflow: str
    prefect: str

    def link(self, what: str) -> str:
        """The address that the run has logged."""
        found = re.search(rf"{what} side by side in MLflow: (\S+)", self.said)
        assert found is not None and "workflowType=machine_learning" in found[1], self.said
        return found[1]


def write_pairs(file: Path) -> None:
    """Of each of 40 prompts its best and its worst note."""
    by_prompt = itertools.groupby(demo.rows("sft"), key=lambda row: row["prompt"])
    with file.open("w") as lines:
        for prompt, group in itertools.islice(by_prompt, 40):
            notes = sorted((row["response"] for row in group), key=lambda note: demo.reward(prompt, note))
            lines.write(json.dumps({"prompt": prompt, "chosen": notes[-1], "rejected": notes[0]}) + "\n")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Iterator[Sweep]:
    folder = homes.furnish(tmp_path_factory.mktemp("ui"), ready)
    write_pairs(folder / "pairs.jsonl")
    (folder / "seen.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(folder))
        mlflow = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
        prefect = mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"))
        with forked_servers.running(mlflow, prefect):
            patch.setenv("ALIGNFLOW_HOME", str(folder / "worker"))
            patch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
            options = ["--methods", "dpo,kto", "--beta", "0.1", "--seeds", "0"]
            patch.chdir(folder)
            answer = alignflow("sweep", "seen.yaml", *options, PREFECT_API_URL=f"{prefect.url}/api")
            assert answer.returncode == 0, answer.stderr
            yield Sweep(answer.stdout, mlflow.url, prefect.url)


def runs(stage: str) -> list[Any]:
    experiment = tracking.client().get_experiment_by_name("seen")
    assert experiment is not None
    return list(tracking.client().search_runs([experiment.experiment_id], f"tags.stage = '{stage}'"))


def test_runs_with_tags_and_equal_tokens_below_one_for_the_whole(swept: Sweep) -> None:
    aligned, evaluated = runs("align"), runs("evaluate")
    assert {run.info.run_name for run in aligned} == set(VARIANTS)
    assert {run.info.run_name for run in evaluated} == {f"eval {name}" for name in MODELS}
    for run in [*aligned, *evaluated]:
        assert run.data.tags.keys() >= {"pipeline.run", "stage", "method", "data.version", "sweep"}
    assert len({run.data.tags["pipeline.run"] for run in [*aligned, *evaluated]}) == 1
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in [*aligned, *evaluated]}
    assert str(tracking.client().get_run(parent).info.run_name).startswith("pipeline seen")
    # how right the judge is, is measured once: on the SFT model's evaluation
    measured = [{n for n in run.data.metrics if not n.startswith("judge/accuracy")} for run in evaluated]
    assert all(names == measured[0] for names in measured), "the same metrics for all"

    (limit,) = {int(run.data.params["train_tokens"]) for run in aligned}
    for run in aligned:
        # The last step is the one that reaches the limit; it has at most 4 rows of at most 64 tokens a sequence.
        assert limit <= run.data.metrics["usage/train_tokens"] < limit + 4 * 2 * 64
    assert "training tokens of the 2 variants" in swept.said
    everything = tracking.client().search_runs([aligned[0].info.experiment_id])
    groups = {name.partition("/")[0] for run in everything for name in run.data.metrics}
    assert min(groups) == "eval" and {"input", "usage"} <= groups, "MLflow lists charts by their groups' names"


def test_the_frontier_is_in_the_comparison(swept: Sweep, tmp_path: Path) -> None:
    (run,) = runs("compare")
    file = tracking.client().download_artifacts(run.info.run_id, "frontier.json", str(tmp_path))
    points = json.loads(Path(file).read_text())
    assert [(point["method"], point["beta"], point["seeds"]) for point in points] == [
        ("dpo", 0.1, [0]),
        ("kto", 0.1, [0]),
    ]


def test_prefect_shows_the_table_and_the_ways_to_mlflow(swept: Sweep) -> None:
    with temporary_settings({PREFECT_API_URL: f"{swept.prefect}/api"}), get_client(sync_client=True) as client:
        found = {artifact.key: str(artifact.data) for artifact in client.read_artifacts()}
        (run,) = client.read_flow_runs()
    assert run.state is not None and run.state.is_completed()
    assert swept.link("metrics") in found["metrics-in-mlflow"] and swept.link("answers") in found["answers-in-mlflow"]
    assert all(name in found["comparison"] for name in MODELS)


@contextmanager
def browsing(folder: Path, address: str) -> Iterator[Any]:
    """The page in a browser of its own. What it looked like in the end is in `page.png`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="looks at pages with the package playwright")
    if CHROMIUM is None:
        pytest.skip("looks at pages with chromium, which is not on this machine")
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            folder / "profile", executable_path=CHROMIUM, args=ARGUMENTS, viewport={"width": 2400, "height": 1300}
        )
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.goto(address)
        try:
            yield page
        finally:
            page.screenshot(path=folder / "page.png")
            context.close()


def test_mlflow_draws_every_models_metrics_as_bars(swept: Sweep, tmp_path: Path) -> None:
    with browsing(tmp_path, swept.link("metrics")) as page:
        for model in MODELS:
            page.get_by_role("link", name=f"eval {model}", exact=True).first.wait_for()
        charts = page.get_by_placeholder("Search metric charts")
        for metric in ("eval/judge_score", "eval/win_rate_vs_sft", "eval/kl_to_reference"):
            charts.fill(f"{metric}$")  # the search takes regular expressions
            card = page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=metric)
            # While the search takes effect other cards are there, and the chart is drawn in steps.
            expect = pytest.importorskip("playwright.sync_api").expect
            expect(card).to_have_count(1, timeout=WAIT)
            expect(card.locator(".barlayer .point")).to_have_count(len(MODELS), timeout=WAIT)


def test_mlflow_shows_the_answers_side_by_side(swept: Sweep, tmp_path: Path) -> None:
    with browsing(tmp_path, swept.link("answers")) as page:
        page.get_by_text("eval/samples.json").wait_for()
        for run in runs("evaluate"):
            page.get_by_role("link", name=run.info.run_name, exact=True).nth(1).wait_for()  # in the list, and a column
            folder = tmp_path / run.info.run_id
            folder.mkdir()
            file = tracking.client().download_artifacts(run.info.run_id, "eval/samples.json", str(folder))
            table = json.loads(Path(file).read_text())
            first = dict(zip(table["columns"], table["data"][0], strict=True))
            page.get_by_text(first["prompt"], exact=True).first.wait_for()
            page.get_by_text(first["answer"], exact=True).first.wait_for()


def test_prefects_page_of_the_run_leads_to_the_comparison(swept: Sweep, tmp_path: Path) -> None:
    with temporary_settings({PREFECT_API_URL: f"{swept.prefect}/api"}), get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs()
    with browsing(tmp_path, f"{swept.prefect}/runs/flow-run/{run.id}") as page:
        page.get_by_text("Artifacts", exact=True).click()
        page.get_by_text("comparison", exact=True).click()
        page.get_by_role("link", name="metrics side by side in MLflow").wait_for()
        shown = page.get_by_role("link", name="metrics side by side in MLflow").get_attribute("href")
        assert shown == swept.link("metrics")
        for model in VARIANTS:  # the table comes after the links
            page.get_by_text(model).first.wait_for(state="attached")
