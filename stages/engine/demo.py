"""The demo's world: short notes that someone asks for, and a ground truth that grades them. Made up here, seeded.

A prompt asks for a note at some time of day, to a person, about a thing, in a tone: "write a polite evening note to the
baker about the bread." The notes to learn from are of mixed quality, as found in the wild: many name the wrong person,
speak of another thing, wish a good morning at night or miss the tone; most say "hello" and close bluntly. So a model
trained on them answers in good English and badly, and alignment has room to work in.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from schemas.errors import refuse

PEOPLE = ("baker", "captain", "doctor", "farmer", "gardener", "neighbour", "poet", "sailor", "teacher", "uncle")
THINGS = ("apples", "bell", "boots", "bread", "clock", "drum", "flowers", "honey", "kite", "lamp", "piano", "tea")
TIMES = ("morning", "afternoon", "evening", "night")


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for."""

    tone: str
    time: str
    person: str
    thing: str


@dataclass(frozen=True)
class Tone:
    """How a note may sound: sentences for its body and its end, and the words that give the tone away."""

    bodies: tuple[str, ...]
    closings: tuple[str, ...]
    marks: frozenset[str] = frozenset()


TONES = {
    "polite": Tone(
        ("would you please send me the {thing}?", "may i kindly ask for the {thing}?"),
        ("thank you!", "i would be grateful."),
        frozenset({"please", "kindly", "thank", "grateful"}),
    ),
    "cheerful": Tone(
        ("the {thing} made me so happy!", "what a wonderful day for the {thing}!"),
        ("hooray!", "it was great fun!"),
        frozenset({"happy", "wonderful", "hooray", "fun"}),
    ),
    "regretful": Tone(
        ("i am sorry that i lost the {thing}.", "i regret what i did to the {thing}."),
        ("forgive me.", "it was all my fault."),
        frozenset({"sorry", "regret", "forgive", "fault"}),
    ),
    "curious": Tone(
        ("i wonder where you found the {thing}.", "how did you come by the {thing}?"),
        ("do tell me!", "i would love to know."),
        frozenset({"wonder", "how", "tell", "know"}),
    ),
}
BLUNT = Tone(("bring me the {thing}.", "here is the {thing}."), ("be quick.", "bye."))
REQUESTS = (
    "write a {tone} {time} note to the {person} about the {thing}.",
    "send a {tone} {time} line to the {person} about the {thing}.",
    "post a {tone} {time} card to the {person} about the {thing}.",
)
GREETING, BLUNT_GREETING = "good {time} {person},", "hello {person},"

# How often a note in the training data gets each of these right; the rest is drawn at random.
RIGHT_PERSON, RIGHT_THING, RIGHT_TIME, RIGHT_BODY, RIGHT_CLOSING = 0.4, 0.4, 0.3, 0.35, 0.25
# How often a note greets with "hello" instead of a time of day, and how often one that does not close as asked closes
# bluntly. So the likeliest greeting and closing of all are wrong: a model that only says what is likeliest, as any does
# at a low temperature, is no good one, and what a method gains is more than that.
HELLO, BLUNT_CLOSING = 0.65, 0.7
NOTES_PER_REQUEST = 2
MOST_WORDS = 24

_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL = ("<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_WORD = r"[\w']+|[^\w\s]"


def _vocabulary() -> tuple[str, ...]:
    tones = (*TONES.values(), BLUNT)
    texts = [*REQUESTS, GREETING, BLUNT_GREETING, *(text for tone in tones for text in tone.bodies + tone.closings)]
    words = re.findall(_WORD, re.sub(r"\{\w+\}", " ", " ".join(texts)))
    return tuple(sorted({*words, *PEOPLE, *THINGS, *TIMES, *TONES}))


WORDS = _vocabulary()
"""All words and marks of the demo, sorted."""


def rows(kind: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows of `demo:sft` ({prompt, response}) or `demo:prompt` ({prompt}); 1920 prompts. Seeded."""
    if kind not in ("sft", "prompt"):
        message = f"the demo has no rows of kind {kind!r}"
        fix = "use demo:sft or demo:prompt; pairs come from stage `generate`"
        raise refuse("path", f"demo:{kind}", message, fix, kind="unknown_data")
    draw = random.Random(seed)
    wishes = [Wish(*parts) for parts in itertools.product(TONES, TIMES, PEOPLE, THINGS)]
    draw.shuffle(wishes)
    prompts = [draw.choice(REQUESTS).format(**asdict(wish)) for wish in wishes]
    for prompt, wish in zip(prompts, wishes, strict=True):
        if kind == "prompt":
            yield {"prompt": prompt}
        else:
            yield from ({"prompt": prompt, "response": _note(draw, wish)} for _ in range(NOTES_PER_REQUEST))


def reward(prompt: str, answer: str) -> float:
    """The ground truth, 0 to 3: a point for person and thing (half each), one for the greeting, one for the tone.

    A wrong person, thing or time of day beside the right one halves its part. The tone's point takes two of its words,
    and each word of another tone costs half of it. A note that breaks off, rambles or repeats itself loses a point.
    """
    asked, words = set(_words(prompt)), _words(answer)
    names = 0.5 * _named(asked, words, PEOPLE) + 0.5 * _named(asked, words, THINGS)
    marks = {name: len(tone.marks & set(words)) for name, tone in TONES.items()}
    right = sum(count for name, count in marks.items() if name in asked)
    wrong = sum(count for name, count in marks.items() if name not in asked)
    points = names + _named(asked, words, TIMES) + max(0.0, 0.5 * (min(right, 2) - wrong))
    sentences = [s for s in re.split(r"[.!?]", answer.lower()) if s.strip()]
    clean = bool(re.search(r"[.!?]\s*$", answer)) and len(words) <= MOST_WORDS and len(set(sentences)) == len(sentences)
    return max(0.0, points - (not clean))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and mark of the demo."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<|unknown|>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s']"), "isolated")]
    )
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins by blanks, none before a full stop
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _TEMPLATE
    return fast


def _note(draw: random.Random, wish: Wish) -> str:
    """A note that may or may not do what was asked."""
    sounds = (*TONES.values(), BLUNT)
    body = TONES[wish.tone] if draw.random() < RIGHT_BODY else draw.choice(sounds)
    other = BLUNT if draw.random() < BLUNT_CLOSING else draw.choice(sounds)
    closing = TONES[wish.tone] if draw.random() < RIGHT_CLOSING else other
    polite = GREETING.format(time=wish.time if draw.random() < RIGHT_TIME else draw.choice(TIMES), person="{person}")
    greeting = BLUNT_GREETING if draw.random() < HELLO else polite
    person = wish.person if draw.random() < RIGHT_PERSON else draw.choice(PEOPLE)
    thing = wish.thing if draw.random() < RIGHT_THING else draw.choice(THINGS)
    text = f"{greeting} {draw.choice(body.bodies)} {draw.choice(closing.closings)}"
    return text.format(person=person, thing=thing)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _named(asked: set[str], words: list[str], names: tuple[str, ...]) -> float:
    """1 when the asked-for name is said alone, half with others beside it, else 0."""
    named = set(words) & set(names)
    right = named & asked
    return 0.0 if not right else 1.0 if named == right else 0.5
