"""`alignflow label`: what goes to Label Studio, and what comes back from it, from Argilla and from MLflow.

recorded/ holds what the tools themselves have written: Label Studio 1.23.2 after clicks on its pages
(tests/support/label_studio.py), Argilla 2.8 by its client's writer, MLflow 3.17 by its client.
"""

import copy
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from schemas.commands import LabelCommand
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from stages.commands.label import __main__ as label
from stages.commands.label import label_studio
from stages.validate import check
from stages.validate.context import Context
from tests.support import ranking

RECORDED = Path(__file__).parent / "recorded"


def command(file: Path, **values: Any) -> LabelCommand:
    return LabelCommand.model_validate({"action": "import", "file": file, **values})


def rows(tmp_path: Path, recorded: Any, source: str, **values: Any) -> list[dict[str, Any]]:
    """What is made of a recorded export, or of records."""
    file = RECORDED / recorded if isinstance(recorded, str) else tmp_path / "export.json"
    if not isinstance(recorded, str):
        file.write_text(json.dumps(recorded))
    out = tmp_path / "rows.jsonl"
    out.unlink(missing_ok=True)
    lines = label.received(command(file, source=source, out=out, **values))
    assert lines[-1].startswith("next      alignflow validate ")
    return [json.loads(line) for line in out.read_text().splitlines()]


def recorded(name: str) -> list[Any]:
    return json.loads((RECORDED / name).read_text())


# --- to Label Studio ---


def test_tasks_are_blind_and_shuffled_and_fit_their_configuration(tmp_path: Path) -> None:
    answers = [{"text": f"answer {i}", "model": "secret-dpo"} for i in range(3)]
    many = [{"prompt": f"Say {i}.", "responses": answers, "order": [0, 1, 2]} for i in range(30)]
    file = ranking.write(tmp_path / "to_rank.jsonl", many)
    out = tmp_path / "out"
    label.sent(command(file, action="export", out=out))
    tasks = json.loads((out / "tasks.json").read_text())
    assert len(tasks) == 30
    firsts = {task["data"]["answers"][0]["body"] for task in tasks}
    assert firsts == {"answer 0", "answer 1", "answer 2"}  # any answer may stand first
    assert "secret-dpo" not in json.dumps([task["data"] for task in tasks])
    assert [one["id"] for one in tasks[0]["data"]["answers"]] == ["1", "2", "3"]  # places, not the answers' numbers
    for form, needed in (("ranking", {"prompt", "answers"}), ("pairs", {"prompt", "answer_1", "answer_2"})):
        values = [node.get("value", "") for node in ElementTree.fromstring(label_studio.CONFIGS[form]).iter()]
        assert {value[1:] for value in values if value.startswith("$")} == needed
    label.sent(command(file, action="export", out=tmp_path / "pairs", form="pairs"))
    pairs = json.loads((tmp_path / "pairs" / "tasks.json").read_text())
    assert len(pairs) == 90 and {"prompt", "answer_1", "answer_2"} <= set(pairs[0]["data"])
    with pytest.raises(StageError, match="already exists"):
        label.sent(command(file, action="export", out=out))


def test_what_was_judged_on_label_studios_pages_becomes_rows(tmp_path: Path) -> None:
    """The last answer was dragged to the top of the first task: shown were bread, apple, pear."""
    fruit, tree = rows(tmp_path, "label-studio-ranking.json", "label-studio")
    assert fruit["order"] == [2, 1, 0] and fruit["responses"] == ["An apple.", "Bread.", "A pear."]
    assert fruit["source"] == 7 and fruit["prompt"] == [{"role": "user", "content": "Name a fruit."}]
    assert tree["order"] == [1, 0] and tree["responses"][1] == "<b>I will not.</b>"


def test_a_click_a_tie_and_nothing_on_label_studios_pages(tmp_path: Path) -> None:
    """First the right answer was clicked, then a tie, then nothing, which is a skip; then the left one."""
    for task in recorded("label-studio-pairs.json"):
        assert len(task["annotations"]) == 1
    fruit, tree = rows(tmp_path, "label-studio-pairs.json", "label-studio")
    shown = recorded("label-studio-pairs.json")[0]["meta"]["alignflow"]["shown"]
    assert fruit["comparisons"] == [{"a": 0, "b": 1, "winner": shown[1]}, {"a": 0, "b": 2, "winner": None}]
    assert tree["order"][0] == recorded("label-studio-pairs.json")[3]["meta"]["alignflow"]["shown"][0]


def test_rows_made_elsewhere_pass_validate(tmp_path: Path) -> None:
    made = rows(tmp_path, "label-studio-ranking.json", "label-studio")
    made += [json.loads(json.dumps(made[0]).replace("fruit", f"fruit {i}")) for i in range(30)]
    file = ranking.write(tmp_path / "many.jsonl", made)
    (tmp_path / "checked").mkdir()
    check(Context(ValidateParams(path=str(file), kind="ranking"), None, None), tmp_path / "checked")
    assert json.loads((tmp_path / "checked" / "report.json").read_text())["quarantined"] == 0


def test_several_people_become_one_row_and_a_cancelled_task_is_skipped(tmp_path: Path) -> None:
    task = copy.deepcopy(recorded("label-studio-ranking.json")[0])
    ben = copy.deepcopy(task["annotations"][0]) | {"completed_by": {"email": "ben@example.com"}}
    ben["result"][0]["value"]["ranker"]["rank"] = ["2", "3", "1"]  # apple, pear, bread
    gone = ben | {"completed_by": 9, "was_cancelled": True}
    task["annotations"] += [ben, gone]
    (row,) = rows(tmp_path, [task], "label-studio")
    assert "order" not in row and len(row["comparisons"]) == 6
    assert sorted(one["winner"] for one in row["comparisons"] if {one["a"], one["b"]} == {0, 2}) == [0, 2]


def test_tasks_that_were_not_made_here_are_read_too(tmp_path: Path) -> None:
    task = copy.deepcopy(recorded("label-studio-ranking.json")[0])
    task["meta"] = {}
    (row,) = rows(tmp_path, [task], "label-studio")
    assert [row["responses"][place] for place in row["order"]] == ["A pear.", "Bread.", "An apple."]


def spoil(change: str) -> list[Any]:
    """A recorded ranking with one mistake."""
    tasks = recorded("label-studio-ranking.json")
    ranker = tasks[1]["annotations"][0]["result"][0]["value"]["ranker"]
    if change == "no annotations":
        del tasks[1]["annotations"]
    elif change == "unknown answer":
        ranker["rank"] = ["1", "3"]
    elif change == "twice":
        ranker["rank"] = ["1", "1"]
    elif change == "meta":
        tasks[1]["meta"]["alignflow"]["shown"] = [0, 7]
    elif change == "list":
        tasks[1] = []
    return tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no annotations", "task 1: it has no `annotations`: export as JSON, not as JSON-MIN"),
        ("unknown answer", "task 1: a ranking does not name the task's answers"),
        ("twice", "task 1: the ranking names 2 answers once or twice, of 2"),
        ("meta", "task 1: `meta.alignflow` was changed"),
        ("list", "task 1: it is not an object"),
    ],
)
def test_a_task_that_is_none_is_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(StageError) as error:
        rows(tmp_path, spoil(change), "label-studio")
    assert message in str(error.value) and "Fix:" in str(error.value)


# --- from Argilla ---


def test_argillas_rankings_become_rows(tmp_path: Path) -> None:
    """Two people on the first record, one on the second, nobody on the third."""
    fruit, tree = rows(tmp_path, "argilla-ranking.json", "argilla")
    wins = {
        (a, b): sorted(c["winner"] for c in fruit["comparisons"] if (c["a"], c["b"]) == (a, b))
        for a, b in ((0, 1), (0, 2), (1, 2))
    }
    assert wins == {(0, 1): [0, 0], (0, 2): [0, 2], (1, 2): [2, 2]}
    assert tree["order"] == [0, 1] and tree["metadata_source"] == 1


def test_argillas_labels_and_ties_become_rows(tmp_path: Path) -> None:
    tree, sea = rows(tmp_path, "argilla-label.json", "argilla")
    assert [one["winner"] for one in tree["comparisons"]] == [0, 0] and sea["order"] == [[0, 1]]


def test_ranks_of_argilla_1_keep_their_ties(tmp_path: Path) -> None:
    record = recorded("argilla-ranking.json")[0]
    value = [{"value": "answer-2", "rank": 1}, {"value": "answer-1", "rank": 2}, {"value": "answer-3", "rank": 2}]
    record["responses"] = {"ranking": [{"value": value, "user_id": "u", "status": "submitted"}]}
    (row,) = rows(tmp_path, [record], "argilla")
    assert row["order"] == [1, [0, 2]]
    record["responses"]["ranking"][0]["status"] = "discarded"
    (tmp_path / "export.json").write_text(json.dumps([record]))
    lines = label.received(command(tmp_path / "export.json", source="argilla", out=tmp_path / "none.jsonl"))
    assert lines[-1] == "nothing was judged yet, so that no rows were written"
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {"text": "x"}}, "record 0: `fields` has none of prompt, instruction, question"),
        ({"responses": {"r": [{"value": "other", "user_id": "u"}]}}, "the label 'other' is none of the two answers'"),
        ({"responses": {"r": [{"value": ["answer-1"], "user_id": "u"}]}}, "names 1 answers once or twice, of 3"),
        ({"responses": {"r": [{"value": ["x"], "user_id": "u"}]}}, "the ranking names 'x', which is no field"),
        ({"responses": {"a": [{}], "b": [{}]}}, "several questions were answered: a, b"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError) as error:
        rows(tmp_path, [recorded("argilla-ranking.json")[0] | change], "argilla")
    assert message in str(error.value)


# --- from MLflow ---


def test_peoples_assessments_in_mlflow_become_thumbs(tmp_path: Path) -> None:
    """Anna and Ben say yes to the first, a model says no to it; of the second Ben has changed his yes to a no."""
    apple, bread = rows(tmp_path, "mlflow-traces.json", "mlflow")
    assert apple == {
        "prompt": [{"role": "user", "content": "Name a fruit."}],
        "completion": "An apple.",
        "label": True,
    }
    assert bread["label"] is False and bread["completion"] == "Bread."
    assert [turn["role"] for turn in bread["prompt"]] == ["system", "user"]


def test_a_verdict_that_was_replaced_and_a_models_do_not_count(tmp_path: Path) -> None:
    """Whatever the order in which MLflow lists them."""
    trace = recorded("mlflow-traces.json")[1]
    ben = [one for one in trace["info"]["assessments"] if one["source"]["source_id"] == "ben"]
    judge = recorded("mlflow-traces.json")[0]["info"]["assessments"][2]
    assert [one["valid"] for one in ben] == [False, True] and judge["source"]["source_type"] == "LLM_JUDGE"
    trace["info"]["assessments"] = [*reversed(ben), judge | {"feedback": {"value": True}}]
    (row,) = rows(tmp_path, [trace], "mlflow")
    assert row["label"] is False


def test_one_trace_a_line_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in recorded("mlflow-traces.json")))
    lines = label.received(command(file, source="mlflow", out=tmp_path / "rows.jsonl"))
    assert f"wrote     2 rows to {tmp_path / 'rows.jsonl'}" in lines and "--kind feedback" in lines[-1]
    assert not any(line.startswith("unused") for line in lines)
    trace = recorded("mlflow-traces.json")[0]
    trace["data"]["spans"][0]["attributes"]["mlflow.spanInputs"] = '{"docs": ["An apple."], "question": "Q?", "k": 3}'
    file.write_text(json.dumps(trace))
    lines = label.received(command(file, source="mlflow", out=tmp_path / "more.jsonl"))
    assert "unused    inputs of the traces that no row has: docs, k" in lines


def test_of_several_assessments_one_is_named(tmp_path: Path) -> None:
    traces = recorded("mlflow-traces.json")
    more = copy.deepcopy(traces[0]["info"]["assessments"][0])
    traces[0]["info"]["assessments"].append(more | {"assessment_name": "polite", "feedback": {"value": "fine"}})
    with pytest.raises(StageError, match="several assessments: helpful, polite; name one with --name"):
        rows(tmp_path, traces, "mlflow")
    assert len(rows(tmp_path, traces, "mlflow", name="helpful")) == 2
    with pytest.raises(StageError, match="trace 0: the assessment polite is 'fine', neither yes nor no"):
        rows(tmp_path, traces, "mlflow", name="polite")


# --- all of them ---


def test_rankings_that_argilla_has_lost_are_not_read_as_the_order_of_its_options(tmp_path: Path) -> None:
    """Its pages keep ranks, and its JSON the values in the order of the options, whatever people have chosen."""
    record = recorded("argilla-ranking.json")[0]
    first = {"value": ["answer-1", "answer-2", "answer-3"], "user_id": "ada"}
    alike = copy.deepcopy(record) | {"responses": {"ranking": [first, first | {"user_id": "ben"}]}}
    with pytest.raises(StageError, match="loses the ranks that people gave"):
        rows(tmp_path, [alike], "argilla")
    ranked = [{"value": name, "rank": rank} for name, rank in (("answer-1", 3), ("answer-2", 1), ("answer-3", 2))]
    with_ranks = alike | {"responses": {"ranking": [first | {"value": ranked}]}}
    (row,) = rows(tmp_path, [with_ranks], "argilla")
    assert row["order"] == [1, 2, 0]
    draft = {"value": "answer-1", "user_id": "eve", "status": "draft"}
    two = copy.deepcopy(recorded("argilla-label.json")[0])
    two["responses"] = {name: [draft] for name in two["responses"]}
    lines = label.received(command(written(tmp_path, [two]), source="argilla", out=tmp_path / "draft.jsonl"))
    assert lines[-1].startswith("nothing was judged yet")


def written(tmp_path: Path, records: list[Any]) -> Path:
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    return file


def pair(*results: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A task made elsewhere with two answers, and one annotation."""
    data = {"prompt": "Say it.", "answers": [{"id": "2", "body": "A"}, {"id": "1", "body": "B"}]}
    return {"data": data, "annotations": [{"id": 5, "completed_by": 1, "result": list(results)} | more]}


LEFT = {"type": "pairwise", "value": {"selected": "left"}}
EQUAL = {"type": "choices", "value": {"choices": [label_studio.TIE]}}


def test_ids_of_answers_and_not_their_places_are_what_a_ranking_names(tmp_path: Path) -> None:
    ranked = {"type": "ranker", "value": {"ranker": {"rank": ["2", "1"]}}}
    (row,) = rows(tmp_path, [pair(ranked)], "label-studio")
    assert (row["responses"], row["order"]) == (["A", "B"], [0, 1])


def test_an_annotation_that_says_two_things_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="task 0: an annotation both prefers an answer and says 'Equally good'"):
        rows(tmp_path, [pair(LEFT, EQUAL)], "label-studio")


def test_the_latest_verdict_of_a_person_counts_and_strangers_are_apart(tmp_path: Path) -> None:
    late, early = (
        pair(LEFT, created_at="2026-01-02T00:00:00Z"),
        pair(created_at="2026-01-01T00:00:00Z", was_cancelled=True),
    )
    both = late | {"annotations": [*late["annotations"], *early["annotations"]]}
    (row,) = rows(tmp_path, [both], "label-studio")
    assert row["order"] == [0, 1]
    strangers = [pair(LEFT, completed_by=None, id=number)["annotations"][0] for number in (1, 2)]
    lines = label.received(
        command(written(tmp_path, [late | {"annotations": strangers}]), source="label-studio", out=tmp_path / "s.jsonl")
    )
    assert [line.partition(":")[0] for line in lines[:2]] == ["unknown 1", "unknown 2"]


@pytest.mark.parametrize("source", ["label-studio", "argilla", "mlflow"])
@pytest.mark.parametrize("text", ["", "no json", "[]", "[1]", '[{"data": 3}]', '{"a": ' * 3000])
def test_what_is_no_export_is_refused(tmp_path: Path, source: str, text: str) -> None:
    file = tmp_path / "export.json"
    file.write_text(text)
    with pytest.raises(StageError, match=r"Fix: "):
        label.received(command(file, source=source, out=tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists()


def test_nothing_is_overwritten_and_rows_are_json_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine")
    for out, message in (("rows.jsonl", "already exists"), ("rows.csv", r"a file that ends in \.jsonl")):
        with pytest.raises(StageError, match=message):
            label.received(command(RECORDED / "argilla-label.json", source="argilla", out=tmp_path / out))
    assert (tmp_path / "rows.jsonl").read_text() == "mine"
