"""Three questions that need a thought: what is seen or heard, the letters of its names, and what follows from them.

    picture    <image> what is in the picture? which word is longer?    cat3 left of elephant8           -> right
    speech     <audio> write down the words. which word is longer?      cat3 elephant8                   -> 2
    clip       <video><audio> what moves where, and what is said? where to?
                                                                        cat3 left said: elephant8        -> right

Of a picture the place of the longer word is asked, of two spoken words its number (``same`` and ``0`` where both are
equally long); what moves in a clip turns back where the word that is said is longer than its own. A thought names what
is there with the letters of each; ``conclusion`` draws from it what follows, whatever the media show. Questions have 5, 3
and 4 answers, all equally frequent (``wanted``), so who guesses is right that often. No torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.quickstart import compose, media
from examples.quickstart.assets import Assets
from examples.quickstart.compose import OPPOSITE, PROMPTS, Sample
from megatron_omni.generation.text import THINK, THINK_END

SOURCES = ("picture", "speech", "clip")
QUESTIONS = {
    "picture": f"{PROMPTS['image_two'][0]} which word is longer?",
    "speech": f"{PROMPTS['speech'][0]} which word is longer?",
    "clip": f"{PROMPTS['video'][0]} where to?",
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "picture": ("left", "right", "above", "below", "same"),
    "speech": ("1", "2", "0"),
    "clip": tuple(media.DIRECTIONS),
}
CHANCE = {source: 1 / len(answers) for source, answers in ANSWERS.items()}
SYSTEM = "think"
"""System turn of a prompt that is to be thought about; one that is to be answered at once has none."""
_BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}
_THOUGHT = re.compile(r"[a-z]+(\d)(?: (left of|above)|| (left|right|up|down) said:) [a-z]+(\d)")


@dataclass(frozen=True)
class Question:
    """A sample of the quickstart's media with its thought; ``sample.answer`` is the answer alone."""

    sample: Sample
    thought: str


def conclusion(thought: str) -> str | None:
    """What follows from a thought; None where it cannot be read."""
    found = _THOUGHT.fullmatch(thought.strip())
    if found is None:
        return None
    first, relation, direction, second = int(found[1]), (found[2] or "").split(" ")[0], found[3], int(found[4])
    if direction is not None:
        return _BACK[direction] if second > first else direction
    if first == second:
        return "same" if relation else "0"
    if not relation:
        return "1" if first > second else "2"
    return relation if first > second else OPPOSITE[relation]


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


def with_thought(thought: str, answer: str) -> str:
    """What an assistant says that thinks."""
    return f"{THINK}{thought}{THINK_END}{answer}"


def compose_question(assets: Assets, rng: np.random.Generator, source: str, split: str, wanted: str) -> Question:
    """A question of a source whose answer is ``wanted``, on the split's side of the quickstart's rule."""
    while True:
        first, second = compose.draw_pair(rng, split)
        relation = ("left", "above")[int(rng.integers(2))]
        direction = ANSWERS["clip"][int(rng.integers(4))]
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
    one, other = (f"{assets.english[concept]}{len(assets.english[concept])}" for concept in (first, second))
    if source == "picture":
        return f"{one} {compose.ENGLISH_RELATIONS[relation]} {other}"
    return f"{one} {other}" if source == "speech" else f"{one} {direction} said: {other}"


def wanted(source: str, index: int) -> str:
    """The answer of question ``index``: all in turn."""
    answers: Sequence[str] = ANSWERS[source]
    return answers[index % len(answers)]
