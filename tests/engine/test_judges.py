"""Judges: the rule, the lexicon, a reward model against plain transformers, an endpoint against a local server."""

import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from schemas import config as settings
from schemas.errors import StageError
from stages.engine import demo
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_scorer
from stages.engine.models.saving import save_scorer
from stages.engine.scoring import endpoint, judges
from stages.engine.scoring.endpoint import EndpointJudge, read_verdict
from tests.support.context import MemoryContext
from tests.support.models import model_folder

KEY = "sk-secret-0123456789"
Body = dict[str, Any]
Reply = tuple[int, str]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def completion(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def answers_in(body: Body) -> tuple[str, str]:
    """The two answers that a question shows, first and second."""
    text = body["messages"][-1]["content"]
    first, second = (text.split(f"<answer_{name}>\n")[1].split(f"\n</answer_{name}>")[0] for name in "AB")
    return first, second


def longer_wins(body: Body) -> Reply:
    first, second = map(len, answers_in(body))
    return completion(f"Let me see.\n[[{'A' if first > second else 'B' if second > first else 'TIE'}]]")


class Server:
    """An endpoint on 127.0.0.1 that answers by a function of the question; it keeps what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[Body], Reply] = longer_wins
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, str], Body]] = []
        self.running = self.most = 0
        outer, guard = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with guard:
                    outer.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    outer.running += 1
                    outer.most = max(outer.most, outer.running)
                status, text = outer.reply(body)
                with guard:
                    outer.running -= 1
                try:
                    self.send_response(status)
                    for name, value in outer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except ConnectionError:
                    pass  # the client has given up waiting, as a test wants it

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def judge(self, **changes: Any) -> EndpointJudge:
        config = settings.EndpointJudge(url=self.url, model="m", **changes)
        return EndpointJudge(config, "evaluate.judge", pause=0.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server()
    yield found
    found.close()


# --- rule and lexicon ---


def test_rule_is_the_demos_ground_truth() -> None:
    prompt = "write a polite evening note to the baker about the bread."
    answers = ["good evening baker, would you please send me the bread? thank you!", "bye."]
    scores = judges.RuleJudge().score([user(prompt)] * 2, answers)
    assert scores == [demo.reward(prompt, answer) for answer in answers]
    assert scores[0] == 3 > scores[1]


def test_sentiment_ranks_by_tone_and_an_empty_answer_is_neutral() -> None:
    good, neutral, bad = judges.SentimentJudge().score([user("?")] * 3, ["What a lovely day!", "", "This is awful."])
    assert -1 <= bad < neutral == 0 < good <= 1


def test_sentiment_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(StageError) as error:
        judges.SentimentJudge("evaluate.judge")
    assert error.value.problem.field == "evaluate.judge"
    assert "pip install" in str(error.value)


def test_a_scoring_judge_wins_by_score() -> None:
    won = judges.SentimentJudge().wins([user("?")] * 3, ["good", "bad", "so"], ["bad", "good", "so"])
    assert won == [1.0, 0.0, 0.5]


# --- reward model ---


@pytest.fixture
def reward_folder(tmp_path: Path) -> Path:
    source = model_folder(tmp_path / "policy")
    folder = tmp_path / "reward"
    save_scorer(load_scorer(source, seed=3), Codec.load(source), folder, mean=0.25, std=2.0)
    return folder


@torch.no_grad()
def test_reward_judge_scores_answers_at_their_last_token(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [user(text) for text in ("a b c", "d", "e f", "red blue green yes")]
    answers = ["yes good one", "no", "", "two three bad bad bad"]
    codec = Codec.load(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float64)
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids_BT = torch.tensor([codec.prompt(prompt) + codec.answer(answer)])
        hidden_D = model.base_model(ids_BT).last_hidden_state[0, -1]
        expected.append((float(hidden_D @ model.score.weight[0]) - 0.25) / 2.0)

    monkeypatch.setattr(judges, "TOKENS_PER_BATCH", 12)  # more than one batch
    assert judges.RewardJudge(reward_folder).score(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 4


def test_a_reward_model_without_its_head_is_refused_before_anything_is_sampled(reward_folder: Path) -> None:
    """The weights are read when it is first asked, which is after all answers are made."""
    file = reward_folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "score.weight"}, file)
    with pytest.raises(StageError, match=r"hold no score\.weight"):
        judges.RewardJudge(reward_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_whoever_asked(
    reward_folder: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judges.RewardJudge(reward_folder, field="evaluate.judge.model")
    monkeypatch.setattr(judges, "over_trees", lambda *args: [{0: [0.5], 1: [value]}])
    with pytest.raises(StageError, match="1 of 2 answers no finite score") as error:
        judge.score([user("a b c"), user("d")], ["yes", "no"])
    assert error.value.problem.field == "evaluate.judge.model"


def test_reward_judge_reads_the_stages_input(reward_folder: Path, tmp_path: Path) -> None:
    config = settings.RewardJudge()
    run = MemoryContext(work=tmp_path / "w", params=config, inputs={"judge": reward_folder}, stage="evaluate")
    assert isinstance(judges.judge_for(config, run), judges.RewardJudge)
    without = MemoryContext(work=tmp_path / "w", params=config, inputs={}, stage="generate")
    with pytest.raises(StageError) as error:
        judges.judge_for(config, without)
    assert error.value.problem.field == "generate.judge.model"


# --- endpoint ---


def test_every_comparison_is_asked_in_both_orders(server: Server) -> None:
    judge = server.judge()
    assert judge.wins([user("one"), user("two")], ["long answer", "x"], ["short", "yy"]) == [1.0, 0.0]
    shown = sorted(answers_in(body) for _, _, body in server.asked)
    assert shown == sorted([("long answer", "short"), ("short", "long answer"), ("x", "yy"), ("yy", "x")])
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "m" and body["temperature"] == 0
    assert "authorization" not in headers
    assert judge.compare(user("one"), "ab", "a") == 1.0


def test_an_answer_that_wins_in_one_order_only_ties(server: Server) -> None:
    server.reply = lambda body: completion("[[A]]")
    judge = server.judge()
    assert judge.compare(user("?"), "x", "y") == 0.5
    assert judge.inconsistent == 1


def test_equal_answers_tie_without_a_question(server: Server) -> None:
    assert server.judge().compare(user("?"), "same", "same") == 0.5
    assert server.asked == []


def test_scores_are_the_share_of_wins_against_the_other_answers_to_the_prompt(server: Server) -> None:
    prompts = [user("p"), user("p"), user("q"), user("p")]
    # Of p's answers, "aaa" beats two, "aa" one of two, "a" none; q's answer stands alone.
    assert server.judge().score(prompts, ["a", "aa", "alone", "aaa"]) == [0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    def reply(body: Body) -> Reply:
        return longer_wins(body) if len(server.asked) > 2 else (status, "busy")

    server.reply = reply
    assert server.judge(concurrency=1).compare(user("?"), "xx", "y") == 1.0
    assert len(server.asked) == 4  # two refused, then one per order


def test_retry_after_is_read_and_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    server.headers = {"Retry-After": "7200"}
    server.reply = lambda body: longer_wins(body) if len(server.asked) > 1 else (429, "slowly")
    assert server.judge(concurrency=1).compare(user("?"), "xx", "y") == 1.0
    assert waits == [endpoint.LONGEST_PAUSE]


def test_a_reply_that_takes_too_long_is_asked_for_again(server: Server) -> None:
    def reply(body: Body) -> Reply:
        if len(server.asked) == 1:
            time.sleep(1.0)
        return longer_wins(body)

    server.reply = reply
    assert server.judge(timeout=0.3, concurrency=1).compare(user("?"), "xx", "y") == 1.0
    assert len(server.asked) == 3


def test_an_unreachable_server_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config = settings.EndpointJudge(url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", model="m")
        with pytest.raises(StageError) as error:
            EndpointJudge(config, "evaluate.judge", pause=0.0).compare(user("?"), "x", "y")
    problem = error.value.problem
    assert problem.field == "evaluate.judge.url" and problem.value == config.url
    assert f"after {endpoint.TRIES} tries" in problem.message and problem.fix


def test_a_refused_key_is_an_error_at_once_and_stays_secret(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.reply = lambda body: (401, f"wrong key {KEY}")
    with pytest.raises(StageError) as error:
        server.judge(api_key_env="JUDGE_KEY", concurrency=1).compare(user("?"), "x", "y")
    assert error.value.problem.field == "evaluate.judge.api_key_env"
    assert error.value.problem.value == "JUDGE_KEY"
    assert len(server.asked) == 1 and server.asked[0][1]["authorization"] == f"Bearer {KEY}"
    server.reply = lambda body: (400, f"bad request with {KEY}")
    with pytest.raises(StageError, match=r"HTTP 400.*\[key\]") as other:
        server.judge(api_key_env="JUDGE_KEY", concurrency=1).compare(user("?"), "x", "y")
    assert KEY not in caplog.text + str(error.value) + str(other.value)


def test_a_missing_key_is_named_before_anything_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(StageError, match="JUDGE_KEY"):
        server.judge(api_key_env="JUDGE_KEY")
    assert server.asked == []


@pytest.mark.parametrize("text", ["<html>not json</html>", '{"choices": []}', '{"error": "no"}', "[1]", "null"])
def test_a_reply_that_is_no_completion_is_an_error(server: Server, text: str) -> None:
    server.reply = lambda body: (200, text)
    with pytest.raises(StageError, match="no chat completion"):
        server.judge(concurrency=1).compare(user("?"), "x", "y")
    assert len(server.asked) == endpoint.TRIES


def test_a_few_replies_without_verdict_are_ties_and_many_are_an_error(server: Server) -> None:
    def reply(body: Body) -> Reply:
        return completion("I would rather not say.") if answers_in(body)[0] == "quiet" else longer_wins(body)

    server.reply = reply
    judge = server.judge()
    assert judge.wins([user("?")] * 3, ["quiet", "xx", "xx"], ["q", "y", "y"]) == [0.5, 1.0, 1.0]
    assert (judge.unreadable, judge.inconsistent) == (1, 1)
    server.reply = lambda body: completion("Both have merits.")
    with pytest.raises(StageError, match=r"no verdict.*Both have merits"):
        server.judge().wins([user("?")] * 8, ["x"] * 8, ["y"] * 8)
    assert len(server.asked) < 22  # given up long before all were asked


def test_questions_run_side_by_side_within_the_bound(server: Server) -> None:
    def reply(body: Body) -> Reply:
        time.sleep(0.05)
        return longer_wins(body)

    server.reply = reply
    seen: list[tuple[int, int]] = []
    judge = server.judge(concurrency=3)
    judge.progress = lambda done, total: seen.append((done, total))
    won = judge.wins([user("?")] * 9, ["xx", "x", "x"] * 3, ["y", "yy", "y"] * 3)
    assert won == [1.0, 0.0, 0.5] * 3
    assert 1 < server.most <= 3
    assert seen == [(i, 9) for i in range(1, 10)]


def said(content: Any, finish: str = "stop", **message: Any) -> Reply:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return 200, json.dumps({"choices": [choice]})


def better(body: Body) -> str:
    first, second = map(len, answers_in(body))
    return "[[A]]" if first > second else "[[B]]"


@pytest.mark.parametrize(
    "reply",
    [
        lambda verdict: said(f"<think>[[TIE]] or [[A]]? No, [[B]].</think>\n{verdict}"),
        lambda verdict: said(f"Is it [[TIE]]? Hm.\n</think>\n\n{verdict}"),  # opened by the server's template
        lambda verdict: said(f"{verdict}\n<think>or rather [[TIE]]"),
        lambda verdict: said(f"[THINK]It is [[TIE]].[/THINK]{verdict}"),
        lambda verdict: said(verdict, reasoning_content="At first sight a [[TIE]]."),
        lambda verdict: said([{"type": "text", "text": "So:\n"}, {"type": "text", "text": verdict}]),
        lambda verdict: said([{"type": "thinking", "thinking": "[[TIE]]"}, {"type": "text", "text": verdict}]),
    ],
)
def test_a_verdict_is_what_stands_outside_of_thoughts(server: Server, reply: Callable[[str], Reply]) -> None:
    server.reply = lambda body: reply(better(body))
    judge = server.judge()
    assert judge.wins([user("?")] * 2, ["xx", "x"], ["y", "yy"]) == [1.0, 0.0]
    assert judge.unreadable == 0


@pytest.mark.parametrize(
    "reply",
    [
        said("<think>It has to be [[A]]. Let me", "length"),
        said("Answer A is good: [[A]]. Answer B", "length"),
        said("<think>[[A]], I would say"),
        said(None, "length", reasoning_content="Well, [[A]]"),
        said(None, reasoning_content="Well, [[A]]"),
        said(None, refusal="I cannot judge this."),
    ],
)
def test_a_reply_that_was_cut_or_only_thought_holds_no_verdict(server: Server, reply: Reply) -> None:
    server.reply = lambda body: reply
    judge = server.judge(concurrency=1)
    assert judge.compare(user("?"), "xx", "y") == 0.5
    assert judge.unreadable == 2 and len(server.asked) == 2
    with pytest.raises(StageError, match="hold no verdict"):
        server.judge().wins([user("?")] * 8, ["x"] * 8, ["y"] * 8)


def test_the_fix_of_cut_replies_names_their_length_which_is_sent(server: Server) -> None:
    server.reply = lambda body: said("<think>Let me see", "length")
    with pytest.raises(StageError, match=r"was cut.*Let me see.*Fix: raise judge.max_tokens \(it is 77\)"):
        server.judge(max_tokens=77).wins([user("?")] * 8, ["x"] * 8, ["y"] * 8)
    assert {body["max_tokens"] for _, _, body in server.asked} == {77}


def test_a_model_that_refuses_max_tokens_and_temperature_is_asked_in_its_words(server: Server) -> None:
    def reply(body: Body) -> Reply:
        if "max_tokens" in body:
            fault = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        elif "temperature" in body:
            fault = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is."
        else:
            return longer_wins(body)
        return 400, json.dumps({"error": {"message": fault}})

    server.reply = reply
    judge = server.judge(concurrency=1)
    assert judge.wins([user("?")] * 3, ["xx", "x", "xx"], ["y", "yy", "y"]) == [1.0, 0.0, 1.0]
    assert len(server.asked) == 2 + 6  # refused twice in all, then one per order
    assert server.asked[-1][2]["max_completion_tokens"] == endpoint.THINKING_TOKENS


def test_a_model_that_refuses_max_tokens_alone_keeps_its_temperature(server: Server) -> None:
    fault = (400, "max_tokens is not supported, use max_completion_tokens")
    server.reply = lambda body: fault if "max_tokens" in body else longer_wins(body)
    assert server.judge(concurrency=1, max_tokens=9000).compare(user("?"), "xx", "y") == 1.0
    assert server.asked[-1][2]["temperature"] == 0 and server.asked[-1][2]["max_completion_tokens"] == 9000


@pytest.mark.parametrize("status", [402, 429])
def test_an_empty_quota_is_told_in_the_servers_words_at_once(server: Server, status: int) -> None:
    fault = {"message": "You exceeded your current quota, please check your plan.", "code": "insufficient_quota"}
    server.reply = lambda body: (status, json.dumps({"error": fault}))
    with pytest.raises(StageError, match=r"exceeded your current quota.*Fix: raise the quota"):
        server.judge(concurrency=1).compare(user("?"), "x", "y")
    assert len(server.asked) == 1


def test_a_busy_servers_words_are_told(server: Server) -> None:
    server.reply = lambda body: (429, "Rate limit reached for requests per day")
    with pytest.raises(StageError, match="HTTP 429: 'Rate limit reached"):
        server.judge(concurrency=1).compare(user("?"), "x", "y")
    assert len(server.asked) == endpoint.TRIES


@pytest.mark.parametrize("url", ["ftp://h/v1", "localhost:8000", "http://me:secret@h/v1", "http://", "http://h /v1"])
def test_an_address_that_is_none_or_holds_a_key_is_refused(url: str) -> None:
    with pytest.raises(StageError) as error:
        EndpointJudge(settings.EndpointJudge(url=url, model="m"), "evaluate.judge")
    assert error.value.problem.field == "evaluate.judge.url"
    assert "secret" not in str(error.value)


def test_verdicts_are_read_from_the_last_mark_or_a_bare_word() -> None:
    replies = {
        "[[A]]": 1.0,
        "A is [[A]]? No.\n[[B]]": 0.0,
        "[[tie]]": 0.5,
        "[[C]]": 0.5,
        " B. ": 0.0,
        "**A**": 1.0,
        "": None,
        "A great question": None,
        "[[D]]": None,
    }
    assert {reply: read_verdict(reply) for reply in replies} == replies


# --- judges against people's labels ---


class Length(judges.Scoring):
    """Prefers the longer answer: what a judge must beat."""

    def score(self, prompts: Any, answers: Any) -> list[float]:
        return [float(len(answer)) for answer in answers]


def test_agreement_is_with_the_chosen_and_a_tie_is_half() -> None:
    prompt = [{"role": "user", "content": "?"}]
    pairs = [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in (("xx", "y"), ("y", "xx"), ("x", "y"))]
    assert judges.agreement(Length(), pairs) == [1.0, 0.0, 0.5]


def test_sentiment_and_length_against_labelled_pairs(shared: Path) -> None:
    with gzip.open(shared / "data" / "judge_pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        labelled = [json.loads(line) for line in file]
    pairs = []
    for row in labelled:
        chosen, rejected = (row["a"], row["b"]) if row["label"] == "a" else (row["b"], row["a"])
        prompt = [{"role": "user", "content": row["prompt"]}]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": row["source"]})
    flipped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    for judge in (judges.SentimentJudge(), Length()):
        found = {
            source: fmean(judges.agreement(judge, [pair for pair in pairs if pair["source"].startswith(source)]))
            for source in ("llmbar", "hhh")
        }
        print(type(judge).__name__, {name: round(value, 3) for name, value in found.items()})
        # Neither knows what the prompt asks for, and in most of LLMBar's pairs the longer answer is the wrong one.
        assert all(0.2 < value < 0.7 for value in found.values())
        both = [fmean(judges.agreement(judge, some)) for some in (pairs, flipped)]
        assert sum(both) == pytest.approx(1.0)


@pytest.mark.parametrize("end", ["/v1?x=", "/v1#x", "?x=/v1", "#", "/v1 ", "\\\\evil.example/v1", "/v1\n"])
def test_nothing_of_an_address_swallows_its_end(end: str) -> None:
    """`/chat/completions` is put behind it: an address that hides that asks whatever it likes."""
    with pytest.raises(StageError, match="not a plain http"):
        EndpointJudge(settings.EndpointJudge(url=f"http://127.0.0.1:1{end}", model="m"), "evaluate.judge")
