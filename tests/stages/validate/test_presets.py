"""Rows in the shapes of public data sets, through the whole check down to the ids that training sees."""

import json
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from schemas.config.data import Format, Kind, ValidateParams
from schemas.errors import StageError
from stages.engine.data.codec import Codec
from stages.validate import check
from stages.validate.context import Context
from stages.validate.forms.presets import PRESETS
from stages.validate.quarantine import Report
from tests.support import models
from tests.support.models import given

VOCABULARY = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", "\n", *models.WORDS])}
END = VOCABULARY["<end>"]

Rows = list[dict[str, Any]]


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def checked(rows: Rows, kind: Kind, folder: Path, codec: Codec | None = None, **more: Any) -> tuple[Report, Rows]:
    """The report, and the rows that were written."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(Context(ValidateParams(path=str(file), kind=kind, eval_fraction=0, **more), codec), folder / "out")
    return report, given(folder / "out", "train", kind).to_dicts()


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row["prompt"]]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(models.model_folder(tmp_path_factory.mktemp("model")))


NODES: Rows = [
    {"message_id": "q", "parent_id": None, "text": "red one", "role": "prompter", "rank": None, "lang": "en"},
    {"message_id": "a", "parent_id": "q", "text": "no bad", "role": "assistant", "rank": 1, "lang": "en"},
    {"message_id": "b", "parent_id": "q", "text": "yes good", "role": "assistant", "rank": 0, "lang": "en"},
]
STEERED = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
TALK = [{"role": "user", "content": "red one"}]
YES, NO = ([*TALK, {"role": "assistant", "content": text}] for text in ("yes good", "no bad"))
LONGER = [*YES, {"role": "user", "content": "blue two"}]

# Each names one pair: after "red one" the answer "yes good" is better than "no bad".
PAIRS: dict[str, tuple[str | None, Kind, Rows]] = {
    "pku": (
        "pku",
        "preference",
        [
            {"prompt": "red one", "response_0": "no bad", "response_1": "yes good"}
            | {"better_response_id": 1, "safer_response_id": 0, "is_response_0_safe": True}
        ],
    ),
    "shp": (
        "shp",
        "preference",
        [{"history": "red one", "human_ref_A": "no bad", "human_ref_B": "yes good", "labels": 0, "score_ratio": 2.0}],
    ),
    "webgpt": (
        "webgpt",
        "preference",
        [
            {"question": {"id": "1", "full_text": "red one"}, "answer_0": "yes good", "answer_1": "no bad"}
            | {"score_0": 0.25, "score_1": -0.25, "quotes_0": {"title": ["t"]}}
        ],
    ),
    "helpsteer 2, ratings": (
        "helpsteer",
        "ranking",
        [
            {"prompt": "red one", "response": "no bad", "helpfulness": 1, **STEERED},
            {"prompt": "red one", "response": "yes good", "helpfulness": 3, **STEERED},
        ],
    ),
    "helpsteer 2, ratings as pairs": (
        "helpsteer",
        "preference",
        [
            {"prompt": "red one", "response": "no bad", "helpfulness": 1, **STEERED},
            {"prompt": "red one", "response": "yes good", "helpfulness": 3, **STEERED},
        ],
    ),
    "helpsteer 2, preferences": (
        "helpsteer",
        "preference",
        [{"prompt": "red one", "response_1": "yes good", "response_2": "no bad", "preference_strength": -2}],
    ),
    "helpsteer 3": (
        "helpsteer",
        "preference",
        [{"context": TALK, "response1": "no bad", "response2": "yes good", "overall_preference": 1}],
    ),
    "nectar": (
        "nectar",
        "ranking",
        [
            {"prompt": "\n\nHuman: red one\n\nAssistant: ", "turns": 1, "num_responses": 2, "good_natured": True}
            | {"answers": [{"answer": "no bad", "model": "m", "rank": 2.0}, {"answer": "yes good", "rank": 1.0}]}
        ],
    ),
    "ultrafeedback": (
        "ultrafeedback",
        "ranking",
        [
            {"instruction": "red one", "source": "s", "models": ["m", "n"]}
            | {
                "completions": [
                    {"model": "m", "response": "no bad", "overall_score": 3.0, "critique": "short"},
                    {"model": "n", "response": "yes good", "overall_score": 8.5, "critique": "fine"},
                ]
            }
        ],
    ),
    "ultrafeedback, binarized": (
        "ultrafeedback",
        "preference",
        [
            {"prompt": "red one", "prompt_id": "1", "chosen": YES, "rejected": NO, "messages": YES}
            | {"score_chosen": 8.0, "score_rejected": 3.0}
        ],
    ),
    "oasst": ("oasst", "ranking", NODES),
    "oasst, as pairs": ("oasst", "preference", NODES),
    "oasst, trees": (
        "oasst",
        "ranking",
        [
            {"message_tree_id": "q", "tree_state": "ready"}
            | {"prompt": {"text": "red one", "role": "prompter", "replies": [{**node} for node in NODES[1:]]}}
        ],
    ),
    "arena": (
        "arena",
        "preference",
        [{"conversation_a": NO, "conversation_b": YES, "winner": "model_b", "model_a": "x", "model_b": "y"}],
    ),
    "arena, as columns of texts": (
        "arena",
        "preference",
        [{"id": 1, "prompt": "red one", "response_a": "no bad", "response_b": "yes good", "winner": "model_b"}],
    ),
    "arena, as columns of lists": (
        "arena",
        "preference",
        [
            {"id": 1, "model_a": "m", "model_b": "n", "prompt": '["red one"]'}
            | {"response_a": '["yes good"]', "response_b": '["no bad"]'}
            | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
        ],
    ),
    "orca pairs": (
        None,
        "preference",
        [{"system": "", "question": "red one", "chosen": "yes good", "rejected": "no bad"}],
    ),
    "alpaca": (
        "alpaca",
        "preference",
        [{"instruction": "red", "input": "one", "chosen": "yes good", "rejected": "no bad"}],
    ),
    "sharegpt": (
        "sharegpt",
        "preference",
        [
            {"conversations": [{"from": "human", "value": "red one"}]}
            | {"chosen": {"from": "gpt", "value": "yes good"}, "rejected": {"from": "gpt", "value": "no bad"}}
        ],
    ),
}


@pytest.mark.parametrize("named", [False, True], ids=["recognised", "named"])
@pytest.mark.parametrize("name", PAIRS)
def test_the_better_answer(name: str, named: bool, tmp_path: Path, codec: Codec) -> None:
    """The pair is the right way round in tokens, whether the format is named or recognised by itself."""
    preset, kind, rows = PAIRS[name]
    report, _ = checked(rows, kind, tmp_path, codec, **({"format": preset} if named else {}))
    assert (report.rows, report.kept) == (len(rows), len(rows))
    [pair] = given(tmp_path / "out", "train", "preference").to_dicts()
    assert codec.prompt(pair["prompt"]) == ids("red one")
    assert codec.answer(pair["chosen"]) == [*ids("yes good"), END]
    assert codec.answer(pair["rejected"]) == [*ids("no bad"), END]
    if preset not in (None, "alpaca", "sharegpt") and "binarized" not in name:
        assert report.read[0].startswith(f"{preset}: ")


def test_columns_of_an_arena(tmp_path: Path) -> None:
    """Lists hold the turns of a conversation; a text that begins with a bracket is one; ties give no pair."""
    verdict = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    talk = {"prompt": '["Why?", "And now?"]', "response_a": '["So.", "No."]', "response_b": '["So.", "Yes."]'}
    bracket = {"prompt": "[sic] What?", "response_a": "[1] This.", "response_b": "[2] That."}
    rows = [
        {**talk, **verdict},
        {**bracket, **verdict},
        {**talk, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        {**talk, "response_b": '["So."]', **verdict},
        {**talk, "response_b": '["So.", null]', **verdict},
        {**talk, "winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0},
    ]
    report, written = checked(rows, "preference", tmp_path, max_bad=0.7)
    assert [said(row) for row in written] == [
        [("user", "Why?"), ("assistant", "So."), ("user", "And now?")],
        [("user", "[sic] What?")],
    ]
    assert [(row["chosen"], row["rejected"]) for row in written] == [("Yes.", "No."), ("[2] That.", "[1] This.")]
    assert report.checks == {
        "label: tie": 1,
        "response_b: other_number_of_turns": 1,
        "response_b: missing": 1,
        "winner_model_a: not_a_label": 1,
    }


def test_summaries(tmp_path: Path) -> None:
    """The post with its title and subreddit is the prompt; an article is one by itself."""
    info = {"id": "1", "post": "My cat sleeps.", "title": "Cat", "subreddit": "pets", "article": None}
    texts = [{"text": "A cat.", "policy": "sup1"}, {"text": "It sleeps.", "policy": "ref"}]
    rows = [
        {"info": info, "summaries": texts, "choice": 1, "worker": "w", "split": "train"},
        {"info": {"id": "2", "article": "It rained."}, "summaries": texts, "choice": 0},
    ]
    _, written = checked(rows, "preference", tmp_path)
    assert said(written[0]) == [("user", "SUBREDDIT: pets\nTITLE: Cat\nPOST: My cat sleeps.\nTL;DR:")]
    assert said(written[1]) == [("user", "It rained.\nTL;DR:")]
    assert [row["chosen"] for row in written] == ["It sleeps.", "A cat."]
    choices = [{**rows[0], "choice": 2}, *rows]
    report, _ = checked(choices, "preference", tmp_path, max_bad=0.5)
    assert report.checks == {"choice: not_a_label": 1}


def test_ties_are_put_aside_and_are_not_bad(tmp_path: Path) -> None:
    """A third of the judgements being ties is nothing wrong with the file."""
    rows = [
        {"question": {"full_text": f"Why {i}?"}, "answer_0": "So.", "answer_1": "No.", "score_0": s, "score_1": -s}
        for i, s in enumerate([0.5, -0.5, 0.0] * 4)
    ]
    report, written = checked(rows, "preference", tmp_path)
    assert (report.kept, report.reasons) == (8, {"tie": 4})
    assert [row["chosen"] for row in written] == ["So.", "No."] * 4


def test_the_safer_answer_instead(tmp_path: Path) -> None:
    """`columns` goes before what a format reads by itself, as the line that is printed says."""
    [row] = PAIRS["pku"][2]
    for named in ("pku", None):
        columns = {"label": "safer_response_id"}
        report, [written] = checked([row], "preference", tmp_path, format=named, columns=columns)
        assert (written["chosen"], written["rejected"]) == ("no bad", "yes good")
        assert report.unused == {"better_response_id": "1", "is_response_0_safe": "True"}


def test_answers_of_one_prompt_are_ranked_together(tmp_path: Path) -> None:
    """Four rated answers give one ranking with the ratings' differences; one answer alone gives nothing."""
    rows = [
        {"prompt": "Why?", "response": f"r{score}", "helpfulness": score, "correctness": 1, "coherence": 1}
        for score in (2, 0, 4, 2)
    ]
    rows.append({"prompt": "Who?", "response": "r", "helpfulness": 4, "correctness": 1, "coherence": 1})
    report, [ranking] = checked(rows, "ranking", tmp_path)
    assert (report.rows, report.kept, report.reasons) == (5, 4, {"one_answer": 1})
    beats = {
        (ranking["responses"][w], ranking["responses"][x], m)
        for w, x, m in zip(ranking["winners"], ranking["losers"], ranking["margins"], strict=True)
    }
    assert beats == {("r2", "r0", 2.0), ("r4", "r2", 2.0), ("r4", "r0", 4.0)}


@pytest.mark.parametrize(("kind", "tied"), [("ranking", 0), ("preference", 2)])
def test_an_answer_that_cannot_be_ranked_is_put_aside_alone(kind: Kind, tied: int, tmp_path: Path) -> None:
    """One has no rating and one no text: the other two of the prompt are compared. A tie puts both its rows aside."""
    rows: Rows = [
        {"prompt": prompt, "response": response, "helpfulness": rating, "correctness": 1, "coherence": 1}
        for prompt, response, rating in [
            ("Why?", "unrated", None),
            ("Why?", "bad", 1),
            ("Why?", None, 3),
            ("Why?", "good", 4),
            ("Who?", "he", 2),
            ("Who?", "she", 2),
        ]
    ]
    report, written = checked(rows, kind, tmp_path, max_bad=0.5)
    assert report.reasons == {"not_a_number": 1, "missing": 1} | ({"tie": tied} if tied else {})
    assert report.kept == 4 - tied
    if kind == "preference":
        assert [(row["row"], row["chosen"], row["rejected"]) for row in written] == [(1, "good", "bad")]
    else:
        assert [(row["row"], row["responses"], row["winners"]) for row in written] == [(1, ["bad", "good"], [1])]


def test_helpsteer_prompts_of_several_turns(tmp_path: Path) -> None:
    prompt = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWho are you?"
    rows = [{"prompt": prompt, "response": f"r{i}", "helpfulness": i, "correctness": 1, "coherence": 1} for i in (0, 1)]
    for kind in ("ranking", "sft"):
        _, written = checked(rows, kind, tmp_path)
        assert said(written[0]) == [("user", "Hi"), ("assistant", "Hello."), ("user", "Who are you?")]


def test_a_tree_of_messages(tmp_path: Path) -> None:
    """Replies are ranked after the whole conversation before them; deleted ones and those without a rank are not."""
    more: Rows = [
        {"message_id": "r", "parent_id": "b", "text": "more", "role": "prompter", "rank": None},
        {"message_id": "c", "parent_id": "r", "text": "third", "role": "assistant", "rank": 2},
        {"message_id": "d", "parent_id": "r", "text": "first", "role": "assistant", "rank": 0},
        {"message_id": "e", "parent_id": "r", "text": "gone", "role": "assistant", "rank": 1, "deleted": True},
        {"message_id": "f", "parent_id": "r", "text": "unranked", "role": "assistant", "rank": None},
        {"message_id": "g", "parent_id": "lost", "text": "orphan", "role": "prompter", "rank": None},
    ]
    report, written = checked([*NODES, *more], "ranking", tmp_path, max_bad=0.5)
    assert report.checks == {"parent_id: missing_parent": 1}
    assert said(written[1]) == [("user", "red one"), ("assistant", "yes good"), ("user", "more")]
    assert written[1]["responses"] == ["third", "first"] and written[1]["winners"] == [1]
    _, written = checked([*NODES, *more], "sft", tmp_path, max_bad=0.5)
    assert [row["response"] for row in written] == ["yes good", "first"]
    round_ = [{**NODES[0], "parent_id": "a"}, *NODES[1:]]  # a message among its own parents
    with pytest.raises(StageError, match="too_deep"):
        checked(round_, "ranking", tmp_path, max_bad=0.5)


def test_messages_in_csv(tmp_path: Path) -> None:
    """There all cells are texts: what is not deleted is called False, and who has no rank has an empty cell."""
    more = {"message_id": "c", "parent_id": "q", "text": "unranked", "role": "assistant", "rank": None, "lang": "en"}
    gone = {**more, "message_id": "d", "text": "gone", "rank": 0}
    odd = {**more, "message_id": "e", "text": "odd", "rank": "high"}
    rows = [{**node, "deleted": node is gone} for node in (*NODES, more, gone, odd)]
    file = tmp_path / "rows.csv"
    pl.DataFrame(rows, schema_overrides={"rank": pl.String}, strict=False).write_csv(file)
    for kind in ("sft", "ranking"):
        params = ValidateParams(path=str(file), kind=kind, eval_fraction=0, max_bad=0.5)
        report = check(Context(params), tmp_path / "out")
        assert report.checks == {"rank: not_a_number": 1}
        [row] = given(tmp_path / "out", "train", kind).to_dicts()
        if kind == "sft":
            assert row["response"] == "yes good"
        else:
            assert (row["responses"], row["winners"]) == (["no bad", "yes good"], [1])


@pytest.mark.parametrize("replies", [3, "none", [3], {"text": "a"}])
def test_trees_whose_replies_are_no_messages(replies: Any, tmp_path: Path) -> None:
    tree = {"message_tree_id": "1", "prompt": {"text": "Why?", "role": "prompter", "replies": replies}}
    with pytest.raises(StageError, match="not_a_message"):
        checked([tree], "ranking", tmp_path)


def test_what_is_derived_of_pairs_that_stand_in_one_row(tmp_path: Path) -> None:
    """Net wins of the answers rated 3, 4 and 1 are 0, 2 and -2; two of their three pairs come of the first row."""
    rows: Rows = [
        {"prompt": "Why?", "response": f"r{score}", "helpfulness": score, "correctness": 1, "coherence": 1}
        for score in (3, 4, 1)
    ]
    report, written = checked(rows, "preference", tmp_path)
    assert [row["row"] for row in written] == [0, 0, 1]
    assert report.parts["train"] == {"prompt": 1, "preference": 3, "ranking": 3, "feedback": 2, "sft": 1}
    thumbs, imitated = (given(tmp_path / "out", "train", kind) for kind in ("feedback", "sft"))
    assert thumbs.select("completion", "label").rows() == [("r4", True), ("r1", False)]
    assert imitated["response"].to_list() == ["r4"]


def test_what_is_derived_of_rankings_that_stand_in_one_row(tmp_path: Path, codec: Codec) -> None:
    """A tree's two rankings, after prompts of different lengths, each keep their own answers and their own length."""
    later = {
        "text": "please say the word blue",
        "role": "prompter",
        "replies": [
            {"text": f"please say the word blue {text}", "role": "assistant", "rank": rank}
            for rank, text in ((1, "good"), (0, "red"))
        ],
    }
    tree = {
        "text": "please say the word red",
        "role": "prompter",
        "replies": [
            {"text": f"please say the word red {text}", "role": "assistant", "rank": rank, "replies": replies}
            for rank, text, replies in ((1, "no", []), (0, "yes", [later]), (2, "bad", []))
        ],
    }
    rows: Rows = [{"message_tree_id": "1", "prompt": tree}]
    report, written = checked(rows, "ranking", tmp_path)
    assert report.notes == {"repeated_prompt_cut": 1}
    assert [(row["row"], row["responses"]) for row in written] == [(0, ["no", "yes", "bad"]), (0, ["good", "red"])]
    thumbs, imitated = (given(tmp_path / "out", "train", kind) for kind in ("feedback", "sft"))
    expected = [("yes", True), ("bad", False), ("good", False), ("red", True)]
    assert thumbs.select("completion", "label").rows() == expected
    assert imitated["response"].to_list() == ["yes", "red"]
    short, long = (len(codec.prompt(row["prompt"])) for row in written)
    report, _ = checked(rows, "ranking", tmp_path, codec)
    assert report.lengths is not None  # each answer is one token and its end
    assert (report.lengths.median, report.lengths.longest) == (short + 2, long + 2)


def test_a_branch_without_a_verdict_costs_nothing_of_its_tree(tmp_path: Path) -> None:
    """Its replies are equally good, which is noted; a tree that has nothing else is put aside."""

    def said_by(role: str, text: str, rank: int | None = None, *replies: dict[str, Any]) -> dict[str, Any]:
        return {"text": text, "role": role, "rank": rank, "replies": list(replies)}

    tied = said_by("prompter", "more", None, said_by("assistant", "a", 0), said_by("assistant", "b", 0))
    best, worst = said_by("assistant", "good", 0, tied), said_by("assistant", "bad", 1)
    trees = [
        {"message_tree_id": name, "prompt": prompt}
        for name, prompt in (("1", said_by("prompter", "Why?", None, worst, best)), ("2", tied))
    ]
    report, [pair] = checked(trees, "preference", tmp_path, max_bad=0.5)
    assert (pair["row"], pair["chosen"], pair["rejected"]) == (0, "good", "bad")
    assert (report.kept, report.reasons, report.noted) == (1, {"tie": 1}, {"tie": [0]})


def test_conversations_beside_their_first_turn(tmp_path: Path) -> None:
    """Capybara: several turns in both answers, and `prompt` is one of them."""
    rows = [
        {"source": "s", "prompt": "blue two", "rating_chosen": 5.0}
        | {side: [*LONGER, {"role": "assistant", "content": f"{side} {i}"}] for side in ("chosen", "rejected")}
        for i in range(3)
    ]
    report, written = checked(rows, "preference", tmp_path)
    assert said(written[0]) == [(message["role"], message["content"]) for message in LONGER]
    assert (written[0]["chosen"], written[0]["rejected"]) == ("chosen 0", "rejected 0")
    assert report.unused == {"rating_chosen": "5.0", "source": "s"}


def test_thumbs_of_conversations(tmp_path: Path) -> None:
    """KTO-mix: prompt and completion as messages with a truth value; ShareGPT with `kto_tag`."""
    mixed = [
        {"prompt": TALK, "completion": [{"role": "assistant", "content": f"yes {i}"}], "label": i % 2 == 0}
        for i in range(4)
    ]
    tagged = [
        {"conversations": [{"from": "human", "value": "red one"}, {"from": "gpt", "value": f"yes {i}"}]}
        | {"kto_tag": i % 2 == 0}
        for i in range(4)
    ]
    for rows in (mixed, tagged):
        _, written = checked(rows, "feedback", tmp_path)
        assert [(row["completion"], row["label"]) for row in written] == [(f"yes {i}", i % 2 == 0) for i in range(4)]
        assert all(said(row) == [("user", "red one")] for row in written)


def test_two_answers_in_one_column(tmp_path: Path) -> None:
    """Alpaca's comparisons, the better answer first: read where the format is named, and never guessed."""
    rows = [
        {"instruction": "Double it.", "input": str(i), "output": [f"{2 * i}", "no"], "system": "Be exact."}
        for i in range(3)
    ]
    _, written = checked(rows, "preference", tmp_path, format="alpaca")
    assert said(written[2]) == [("system", "Be exact."), ("user", "Double it.\n2")]
    assert (written[2]["chosen"], written[2]["rejected"]) == ("4", "no")
    with pytest.raises(StageError, match="no column `chosen`"):
        checked(rows, "preference", tmp_path)
    with pytest.raises(StageError, match="not_two_answers"):
        checked([{**row, "output": ["x"]} for row in rows], "preference", tmp_path, format="alpaca")


def test_every_format_can_be_named() -> None:
    """The config's names and the registry's are the same, and the documentation has a line for each."""
    assert set(PRESETS) == set(get_args(Format))
    table = (Path(__file__).parents[3] / "schemas" / "README.md").read_text()
    assert all(f"\n| {name} |" in table for name in PRESETS)


def test_formats_that_do_not_fit(tmp_path: Path) -> None:
    """The columns that the format has, or the kinds that it gives, are named; and the kind named then works."""
    with pytest.raises(StageError, match=r"format = shp: .* has prompt, response; shp rows have history \+ human_ref"):
        checked([{"prompt": "p", "response": "r"}] * 2, "sft", tmp_path, format="shp")
    with pytest.raises(
        StageError, match=r"nectar rows of these columns cannot be read as preference.*use kind ranking"
    ):
        checked(PAIRS["nectar"][2], "preference", tmp_path, format="nectar")
    with pytest.raises(StageError, match="read it as kind ranking"):
        checked(PAIRS["nectar"][2], "preference", tmp_path)
    assert checked(PAIRS["nectar"][2], "ranking", tmp_path)[0].kept == 1
