"""Drawing that needs a thought: clues and sums, with the thought that says what is meant.

    "draw what says meow"             <think>cat</think>
    "draw two more than one star"     <think>three stars</think>
    "draw one less than five dogs"    <think>four dogs</think>

Held out is a fifth by rule: of clues the pairs (object, phrasing), so that every clue is known in other phrasings; of sums
the pairs (object, 6 * number + result), so that every object and every sum is known, but not together. No torch.
"""

from dataclasses import dataclass

import numpy as np

from examples.draw.scenes import NUM_OBJECTS, NUMBERS, Scene, plural
from examples.quickstart.assets import load_assets
from examples.quickstart.compose import is_held_out

CLUES = {
    "cat": "says meow", "dog": "says woof", "horse": "says neigh", "cow": "gives milk", "pig": "says oink",
    "monkey": "climbs trees", "lion": "rules the animals", "tiger": "has stripes", "rabbit": "has long ears",
    "elephant": "has a trunk", "bear": "sleeps in winter", "panda": "eats bamboo", "frog": "says ribbit",
    "duck": "says quack", "chicken": "lays eggs", "penguin": "walks on ice", "fish": "has fins",
    "whale": "is largest in the sea", "snail": "carries its home", "snake": "has no legs", "bus": "carries many people",
    "taxi": "drives for a fare", "train": "runs on rails", "rocket": "flies to the moon", "bicycle": "has two pedals",
    "ship": "sails the sea", "airplane": "has wings and engines", "tractor": "pulls a plough", "house": "has rooms",
    "church": "has a steeple", "mountain": "is climbed", "sun": "shines by day", "cloud": "brings showers",
    "rainbow": "has seven colours", "umbrella": "keeps us dry", "star": "shines at night", "banana": "is long and yellow",
    "lemon": "is sour", "pineapple": "is sweet with spikes", "cherries": "grow in pairs", "tomato": "makes ketchup",
    "carrot": "grows under the ground", "pizza": "comes from Naples", "hamburger": "is meat in a bun",
    "cookie": "is baked with sugar", "bread": "is sliced for toast", "egg": "has a yolk", "cheese": "is liked by mice",
    "guitar": "has six strings", "violin": "is played with a bow", "trumpet": "is brass and loud",
    "drum": "is beaten with sticks", "piano": "has black and white keys", "key": "opens a lock", "bell": "rings",
    "candle": "has a wick", "hammer": "drives nails", "book": "is read", "scissors": "cut paper",
    "crown": "sits on a king", "camera": "takes photographs", "clock": "tells the time", "balloon": "floats on a string",
    "rose": "has thorns",
}  # fmt: skip
PHRASINGS = ("draw what {}", "what {}? draw it", "show me what {}", "please draw what {}", "a picture of what {}")
KINDS = ("clue", "sum")


@dataclass(frozen=True)
class Riddle:
    """What is asked, and the scene that is meant, whose caption is the thought."""

    kind: str
    prompt: str
    scene: Scene


def draw_riddle(rng: np.random.Generator, kind: str, *, held_out: bool) -> Riddle:
    """A riddle on a side of the rule."""
    while True:
        concept = int(rng.integers(NUM_OBJECTS))
        if kind == "clue":
            phrasing = int(rng.integers(len(PHRASINGS)))
            if is_held_out(concept, phrasing) == held_out:
                return clue(concept, phrasing)
        else:
            number, result = (int(one) for one in rng.integers(1, 6, size=2))
            if number != result and is_held_out(concept, 6 * number + result) == held_out:
                return count(concept, number, result)


def clue(concept: int, phrasing: int) -> Riddle:
    """What the words of ``CLUES`` mean."""
    words = CLUES[load_assets().english[concept]]
    return Riddle("clue", PHRASINGS[phrasing].format(words), Scene("one", (concept,)))


def count(concept: int, number: int, result: int) -> Riddle:
    """More or less than a number of objects."""
    name = load_assets().english[concept]
    how = f"{NUMBERS[abs(result - number)]} {'more' if result > number else 'less'} than {NUMBERS[number]}"
    scene = Scene("one", (concept,)) if result == 1 else Scene("many", (concept,), count=result)
    return Riddle("sum", f"draw {how} {name if number == 1 else plural(name)}", scene)
