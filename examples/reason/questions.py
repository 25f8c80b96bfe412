"""Three questions that need a thought: what is seen or heard, the letters of its words, and what follows from them.

    picture    how many letters in all? <image> what is in the picture?     cat left of horse:3+5       -> 8
    speech     which word is longer? <audio> write down the words.          cat horse:3,5               -> 2
    clip       where to? <video><audio> what moves where, and what is said?
                                                                            cat left said: horse:3,5<   -> right

Of two spoken words the number of the longer is asked, 0 where both are equally long; what moves in a clip turns back where
the word that is said is longer than its own. A thought names what is there and counts the letters; that of a clip compares
the counts, since comparing and turning back at once is not learned (docs/log.md). Its ``conclusion`` follows from what it
says behind its last colon, whatever the media show: the sum, the longer word, the direction by the sign. A sign that is not
that of its numbers comes to nothing. All words have 3 to 5 letters. The questions have 5, 3 and 4 answers, all equally
frequent (``wanted``), so who guesses is right that often. No torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.quickstart import compose, media
from examples.quickstart.assets import Assets
from examples.quickstart.compose import PROMPTS, Sample
from megatron_omni.generation.text import THINK, THINK_END

SOURCES = ("picture", "speech", "clip")
QUESTIONS = {
    "picture": f"how many letters in all? {PROMPTS['image_two'][0]}",
    "speech": f"which word is longer? {PROMPTS['speech'][0]}",
    "clip": f"where to? {PROMPTS['video'][0]}",
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "picture": ("6", "7", "8", "9", "10"),
    "speech": ("1", "2", "0"),
    "clip": tuple(media.DIRECTIONS),
}
CHANCE = {source: 1 / len(answers) for source, answers in ANSWERS.items()}
LETTERS = (3, 4, 5)
SYSTEM = "think"
"""System turn of a prompt that is to be thought about; one that is to be answered at once has none."""
_BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}
_CONCLUSIONS = {
    "picture": re.compile(r"[a-z]+ (?:left of|above) [a-z]+:(\d)\+(\d)"),
    "speech": re.compile(r"[a-z]+ [a-z]+:(\d),(\d)"),
    "clip": re.compile(rf"[a-z]+ ({'|'.join(_BACK)}) said: [a-z]+:(\d),(\d)([<=>])"),
}


@dataclass(frozen=True)
class Question:
    """A sample of the quickstart's media with its thought; ``sample.answer`` is the answer alone."""

    sample: Sample
    thought: str


def conclusion(thought: str) -> str | None:
    """What a thought comes to; None where it is no thought of these questions, or contradicts itself."""
    if found := _CONCLUSIONS["picture"].fullmatch(thought.strip()):
        return str(int(found[1]) + int(found[2]))
    if found := _CONCLUSIONS["speech"].fullmatch(thought.strip()):
        return {">": "1", "<": "2", "=": "0"}[sign(int(found[1]), int(found[2]))]
    if found := _CONCLUSIONS["clip"].fullmatch(thought.strip()):
        direction, first, second, written = found.groups()
        if written != sign(int(first), int(second)):
            return None
        return _BACK[direction] if written == "<" else direction
    return None


def sign(first: int, second: int) -> str:
    """How the first number compares."""
    return "=" if first == second else ">" if first > second else "<"


def split(completion: str) -> tuple[str | None, str]:
    """Thought and answer; the thought is None where there is not one, whole, at the start."""
    parts = re.fullmatch(f"{THINK}(.*?){THINK_END}(.*)", completion.strip(), re.DOTALL)
    if parts is None or THINK in parts[1] + parts[2] or THINK_END in parts[2]:
        return None, completion.rpartition(THINK_END)[2].strip()
    return parts[1].strip(), parts[2].strip()


def contradicts(completion: str) -> bool:
    """Whether the answer is not what the thought comes to; a thought that cannot be read contradicts every answer."""
    thought, answer = split(completion)
    return thought is None or conclusion(thought) != answer


def consistent(*, completions: Sequence[str], **_: Any) -> list[float]:
    """The verifier's rule for pairs: 1 where the answer is what the thought comes to."""
    return [float(not contradicts(said)) for said in completions]


def with_thought(thought: str, answer: str) -> str:
    """What an assistant says that thinks."""
    return f"{THINK}{thought}{THINK_END}{answer}"


def compose_question(assets: Assets, rng: np.random.Generator, source: str, split: str, wanted: str) -> Question:
    """A question of a source whose answer is ``wanted``, on the split's side of the quickstart's rule."""
    while True:
        first, second = compose.draw_pair(rng, split)
        relation = ("left", "above")[int(rng.integers(2))]
        direction = list(media.DIRECTIONS)[int(rng.integers(4))]
        lengths = [len(assets.english[concept]) for concept in (first, second)]
        thought = think(assets, source, first, second, relation=relation, direction=direction)
        if conclusion(thought) == wanted and all(one in LETTERS for one in lengths):
            break
    if source == "picture":
        suffix, data = ".png", compose.picture_of_two(assets, rng, split, first, relation, second)
    elif source == "speech":
        suffix, data = ".flac", compose.spoken_words(assets, rng, split, first, second)
    else:
        suffix, data = ".mp4", compose.clip(assets, rng, split, first, direction, second)
    return Question(Sample(QUESTIONS[source], wanted, suffix, data), thought)


def think(assets: Assets, source: str, first: int, second: int, *, relation: str, direction: str) -> str:
    """The thought that is demonstrated for two concepts."""
    one, other = assets.english[first], assets.english[second]
    if source == "picture":
        return f"{compose.english_caption(assets, first, relation, second)}:{len(one)}+{len(other)}"
    if source == "speech":
        return f"{one} {other}:{len(one)},{len(other)}"
    compared = f"{len(one)},{len(other)}{sign(len(one), len(other))}"
    return f"{compose.clip_caption(assets, first, direction, second)}:{compared}"


def wanted(source: str, index: int) -> str:
    """The answer of question ``index``: all in turn."""
    return ANSWERS[source][index % len(ANSWERS[source])]
