"""The demo's world: its rows, its ground truth against hand-graded notes, and that no fixed answer gets far."""

import itertools
from statistics import fmean

import pytest

from schemas.errors import StageError
from stages.engine import demo
from stages.engine.data.codec import Codec

PROMPT = "write a polite evening note to the baker about the bread."
GOOD = "good evening baker, would you please send me the bread? thank you!"


def prompts() -> list[str]:
    return [row["prompt"] for row in demo.rows("prompt")]


def test_rows_are_a_function_of_kind_and_seed() -> None:
    assert list(demo.rows("sft", 3)) == list(demo.rows("sft", 3))
    assert list(demo.rows("sft", 3)) != list(demo.rows("sft", 4))


def test_every_prompt_is_new_and_both_kinds_have_the_same() -> None:
    seen = prompts()
    wishes = len(demo.TONES) * len(demo.TIMES) * len(demo.PEOPLE) * len(demo.THINGS)
    assert len(seen) == len(set(seen)) == wishes == 1920
    assert [row["prompt"] for row in demo.rows("sft")] == [p for p in seen for _ in range(demo.NOTES_PER_REQUEST)]


def test_other_kinds_are_refused() -> None:
    with pytest.raises(StageError, match="demo:sft"):
        next(demo.rows("preference"))


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        # person 1/2, thing 1/2, greeting 1, two words of the right tone 1
        (GOOD, 3.0),
        # one word of the tone: half of its point
        (GOOD.replace("thank you!", "bye."), 2.5),
        # a wrong tone's word takes back what a right one gave
        (GOOD.replace("thank you!", "hooray!"), 2.0),
        ("good evening baker, here is the bread. be quick.", 2.0),
        (GOOD.replace("evening", "morning"), 2.0),
        (GOOD.replace("good evening", "hello"), 2.0),
        (GOOD.replace("baker", "poet"), 2.5),
        (GOOD.replace("baker", "poet").replace("bread", "tea"), 2.0),
        # two persons named: half of the half
        (GOOD.replace("baker", "baker poet"), 2.75),
        # both times of day named: half
        (GOOD.replace("evening", "evening morning"), 2.5),
        # breaks off: one point off
        ("good evening baker, would you please send me the", 1.0),
        # the same sentence twice: one point off
        (GOOD + " thank you!", 2.0),
        ("evening baker bread", 1.0),
        ("", 0.0),
        ("good night poet, the tea made me so happy! hooray!", 0.0),
    ],
)
def test_the_ground_truth_by_hand(answer: str, points: float) -> None:
    assert demo.reward(PROMPT, answer) == points


def test_a_note_that_rambles_loses_a_point() -> None:
    assert demo.reward(PROMPT, GOOD.replace("bread", "bread " + "so " * 30)) == 2.0


def test_notes_are_of_mixed_quality_with_room_above() -> None:
    scores = [demo.reward(row["prompt"], row["response"]) for row in demo.rows("sft")]
    assert 0.8 < fmean(scores) < 1.4
    assert all(sum(low <= score < low + 1 for score in scores) > 100 for low in (0, 1, 2))


def test_no_fixed_answer_gets_far() -> None:
    """The best of the notes that the demo knows, said to all, is right for one person, thing, time and tone each."""
    bodies = [body.format(thing="bread") for tone in demo.TONES.values() for body in tone.bodies]
    closings = [closing for tone in demo.TONES.values() for closing in tone.closings]
    answers = [f"good evening baker, {body} {closing}" for body, closing in itertools.product(bodies, closings)]
    answers += [" ".join((*demo.PEOPLE, *demo.THINGS, *demo.TIMES)) + ".", "please, thank you."]
    share = 0.5 / len(demo.PEOPLE) + 0.5 / len(demo.THINGS) + 1 / len(demo.TIMES) + 1 / len(demo.TONES)
    assert max(fmean(demo.reward(p, answer) for p in prompts()) for answer in answers) <= share + 1e-9 < 0.6


def test_every_tone_has_its_own_words_and_says_them() -> None:
    for one, other in itertools.combinations(demo.TONES.values(), 2):
        assert not one.marks & other.marks
    for tone in demo.TONES.values():
        for text in tone.bodies + tone.closings:
            assert len(tone.marks & set(text.replace("!", " ").replace(".", " ").split())) == 1


def test_every_row_survives_the_tokenizer() -> None:
    codec = Codec(demo.tokenizer())
    unknown = codec.tokenizer.unk_token_id
    for row in itertools.islice(demo.rows("sft"), 500):
        ids = codec.answer(row["response"])
        assert codec.text(ids) == row["response"]
        assert unknown not in ids + codec.prompt([{"role": "user", "content": row["prompt"]}])
    assert len(codec.tokenizer) == len(demo.WORDS) + 6


def test_the_template_writes_turns_and_the_end() -> None:
    codec = Codec(demo.tokenizer())
    chat = [{"role": "system", "content": "be kind."}, {"role": "user", "content": PROMPT}]
    assert codec.render(chat) == f"<|system|>be kind.<|user|>{PROMPT}<|assistant|>"
    assert codec.end_id == codec.tokenizer.convert_tokens_to_ids("<|end|>") != codec.pad_id
