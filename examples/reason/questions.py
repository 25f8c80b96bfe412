"""Three questions that need a thought: what is seen or heard, the letters of its names, and a sum to work out.

    picture    <image> how many letters in all?      cat left of elephant:3+8          -> 11
    speech     <audio> how many letters more?        cat elephant:8-3                  -> 5
    clip       <video><audio> where does it turn?    cat left said: tiger:left+5       -> up

A clip turns to the right once for each letter of the word that is said. What stands behind the last colon of a thought is
its conclusion; ``conclusion`` works it out, whatever the picture shows. Questions have 6, 5 and 4 answers, all equally
frequent (``wanted``), so who guesses is right that often. No torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.quickstart import compose
from examples.quickstart.assets import Assets
from examples.quickstart.compose import Sample
from megatron_omni.generation.text import THINK, THINK_END

SOURCES = ("picture", "speech", "clip")
QUESTIONS = {
    "picture": "<image> how many letters in all?",
    "speech": "<audio> how many letters more?",
    "clip": "<video><audio> where does it turn?",
}
CLOCKWISE = ("up", "right", "down", "left")
ANSWERS: dict[str, tuple[str, ...]] = {
    "picture": tuple(str(n) for n in range(8, 14)),
    "speech": tuple(str(n) for n in range(5)),
    "clip": CLOCKWISE,
}
CHANCE = {source: 1 / len(answers) for source, answers in ANSWERS.items()}
SYSTEM = "think"
"""System turn of a prompt that is to be thought about; one that is to be answered at once has none."""
_SUM = re.compile(rf"(\d|{'|'.join(CLOCKWISE)})([+-])(\d)")


@dataclass(frozen=True)
class Question:
    """A sample of the quickstart's media with its thought; ``sample.answer`` is the answer alone."""

    sample: Sample
    thought: str


def conclusion(thought: str) -> str | None:
    """What a thought comes to: the value of the sum behind its last colon; None where no sum can be read."""
    found = _SUM.fullmatch(thought.rpartition(":")[2].strip())
    if found is None:
        return None
    first, sign, second = found[1], found[2], int(found[3])
    if first in CLOCKWISE:
        return CLOCKWISE[(CLOCKWISE.index(first) + second) % 4] if sign == "+" else None
    return str(int(first) + second if sign == "+" else int(first) - second)


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


def answered(completion: str) -> str:
    """The thought and answer of a demonstration or the answer alone, as one text."""
    return split(completion)[1]


def with_thought(thought: str, answer: str) -> str:
    """What an assistant says that thinks."""
    return f"{THINK}{thought}{THINK_END}{answer}"


def compose_question(assets: Assets, rng: np.random.Generator, source: str, split: str, wanted: str) -> Question:
    """A question of a source whose answer is ``wanted``, on the split's side of the quickstart's rule."""
    relation = ("left", "above")[int(rng.integers(2))]
    direction = CLOCKWISE[int(rng.integers(4))]
    while True:
        first, second = compose.draw_pair(rng, split)
        thought = think(assets, source, first, second, relation=relation, direction=direction)
        if conclusion(thought) == wanted:
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
    lengths = [len(assets.english[concept]) for concept in (first, second)]
    if source == "picture":
        return f"{compose.english_caption(assets, first, relation, second)}:{lengths[0]}+{lengths[1]}"
    if source == "speech":
        return f"{assets.english[first]} {assets.english[second]}:{max(lengths)}-{min(lengths)}"
    return f"{compose.clip_caption(assets, first, direction, second)}:{direction}+{lengths[1]}"


def wanted(source: str, index: int) -> str:
    """The answer of question ``index``: all in turn."""
    answers: Sequence[str] = ANSWERS[source]
    return answers[index % len(answers)]
