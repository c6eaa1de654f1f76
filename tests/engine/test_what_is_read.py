"""Template and length are checked of what a model is given, before anything long starts."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from schemas.commands import ChatCommand, GenerateCommand
from schemas.config.methods import PPO
from schemas.errors import StageError
from stages.align.ppo import RewardModel
from stages.commands import chat
from stages.commands import generate as generate_command
from stages.engine.data.codec import Codec
from stages.engine.scoring.judges import RewardJudge
from tests.support.families import FAMILIES, TURNS, Family, save_language_model, save_reward_model

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)
HELLO = {"role": "user", "content": "hello"}


def strict(template: str) -> Family:
    """Gemma's family with a template that refuses something."""

    def tokenizer() -> Any:
        fast = FAMILIES["gemma"].tokenizer()
        fast.chat_template = template
        return fast

    return Family("gemma", tokenizer, "<end_of_turn>")


def generate(model: Path, tmp_path: Path, prompts: list[Any], **options: Any) -> dict[str, float]:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    given = {"model": model, "prompts": str(tmp_path / "prompts.jsonl"), "out": tmp_path / "out.jsonl", "answers": 2}
    return generate_command.alone(GenerateCommand.model_validate({**given, "max_new_tokens": 4, **options}))


@pytest.mark.parametrize(
    ("template", "bad", "why"),
    [
        (
            NO_SYSTEM,
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the bird"}],
            "System role",
        ),
        (ALTERNATE, [HELLO, {"role": "user", "content": "the bird"}], "must alternate"),
    ],
)
def test_generate_names_the_prompt_that_a_template_refuses(
    template: str, bad: list[dict[str, str]], why: str, tmp_path: Path
) -> None:
    model = save_language_model(tmp_path / "model", strict(template))
    with pytest.raises(StageError, match=rf"prompt 2 of 2 \('the bird'\), with the roles .*{why}.* Fix: "):
        generate(model, tmp_path, ["hello", bad], judge="none")
    assert not (tmp_path / "out.jsonl").exists()
    judge = save_reward_model(tmp_path / "judge", strict(template))
    model = save_language_model(tmp_path / "other", FAMILIES["qwen2"])
    with pytest.raises(StageError, match=rf"--judge.*template of the judging reward model refuses prompt 2.*{why}"):
        generate(model, tmp_path, ["hello", bad], judge=str(judge))


def test_a_judge_with_too_few_positions_is_told_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_language_model(tmp_path / "model", FAMILIES["qwen2"])
    judge = save_reward_model(tmp_path / "judge", FAMILIES["gpt2"], n_positions=24)
    monkeypatch.setattr("stages.generate.sample", lambda *given, **named: pytest.fail("sampled"))
    taken = len(Codec.load(judge).prompt([HELLO]))
    fix = rf"Fix: set max_new_tokens to at most {24 - taken}, or"
    with pytest.raises(StageError, match=rf"has 24 positions, and prompt 1 of 1 \('hello'\) takes {taken}.*{fix}"):
        generate(model, tmp_path, ["hello"], judge=str(judge), max_new_tokens=40)
    monkeypatch.undo()
    assert generate(model, tmp_path, ["hello"], judge=str(judge), max_new_tokens=24 - taken)["generate/answers"] == 2


def test_an_answer_longer_than_the_judge_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """A judge with another tokenizer may need more tokens than were sampled."""
    judge = RewardJudge(save_reward_model(tmp_path / "judge", FAMILIES["gpt2"], n_positions=24))
    codec = judge.codec
    answer = "the blue bird sat in a tree. No, it flew away! " * 3
    before, after = codec.ended([HELLO], answer)
    assert len(before) + len(after) == 24 and after == [*codec.answer(answer)[: 23 - len(before)], codec.end_id]
    assert len(judge.score([[HELLO]], [answer])) == 1
    with pytest.raises(StageError, match=r"24 positions, and a prompt alone has \d+ tokens"):
        judge.score([[{"role": "user", "content": answer}]], ["hello"])


def test_ppo_s_reward_model_reads_another_tokenizers_answers_within_its_positions(tmp_path: Path) -> None:
    policy = save_language_model(tmp_path / "policy", FAMILIES["qwen2"])
    reward = save_reward_model(tmp_path / "reward", FAMILIES["gpt2"], n_positions=24)
    model, codec = RewardModel(reward, policy, PPO(), None), Codec.load(policy)
    assert not model.same_tokens
    answer = codec.answer("the blue bird sat in a tree. No, it flew away! " * 2)
    tree = model.tree({"prompt": [HELLO]}, codec.prompt([HELLO]), answer)
    assert len(tree.prompt) + len(tree.answers[0]) <= 24
    assert len(model([tree])) == 1


# --- chat ---


def test_chat_refuses_a_system_message_that_the_template_refuses(tmp_path: Path) -> None:
    model = save_language_model(tmp_path / "model", strict(NO_SYSTEM))
    with pytest.raises(StageError, match=r"--system = Be kind\..*System role not supported.*Fix: leave it out"):
        chat.load(str(model), "Be kind.")
    assert chat.load(str(model), None).answer("hello", 0, ChatCommand(model=str(model), max_new_tokens=2)) is not None


def test_chat_refuses_a_system_message_that_the_template_leaves_out(tmp_path: Path) -> None:
    template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
    model = save_language_model(tmp_path / "model", strict(template))
    with pytest.raises(StageError, match=r"--system = hello: the chat template of .* leaves it out"):
        chat.load(str(model), "hello")
    assert chat.load(str(model), None)


def test_a_message_that_the_template_refuses_is_taken_back(tmp_path: Path) -> None:
    talker = chat.load(str(save_language_model(tmp_path / "model", strict(ALTERNATE))), None)
    talker.messages = [HELLO]  # as if an answer were missing
    with pytest.raises(StageError, match=r"must alternate.*Fix: /reset"):
        talker.answer("hello", 0, ChatCommand(model="m"))
    assert talker.messages == [HELLO]


def test_bytes_that_are_not_utf8_are_refused_by_the_line(tmp_path: Path) -> None:
    model = str(save_language_model(tmp_path / "model", FAMILIES["qwen2"]))
    out = io.StringIO()
    talker = chat.load(model, None)
    chat.converse([talker], io.StringIO("caf\udce9\nhello\n"), out, ChatCommand(model=model, max_new_tokens=2))
    assert out.getvalue().startswith("(this line is not UTF-8") and len(talker.messages) == 2
    command = tmp_path / "chat.json"
    command.write_text(ChatCommand(model=model, max_new_tokens=2).model_dump_json())
    run = subprocess.run(
        [sys.executable, "-P", "-m", "stages.commands.chat", str(command)],
        input=b"caf\xe9\n/quit\n",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "ALIGNFLOW_HOME": str(tmp_path / "home")},
        check=False,
    )
    assert run.returncode == 0 and b"not UTF-8" in run.stdout and b"Traceback" not in run.stderr
