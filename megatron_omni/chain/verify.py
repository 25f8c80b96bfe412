"""The verifier (VerIPO): of the responses to one prompt, which are preferred to which. Pure rules, no files.

    positive   right, its thought leads to its answer, well formed, not repetitive; the longest first
    negative   in this order: right and its thought leads elsewhere; wrong with a well-formed thought; repetitive
    demonstration  of a teacher, checked like a response: the positive of a prompt that was never solved

Neither side was cut: a row of pairs says that both ended by themselves. The two differ, and neither has more than three times
the tokens of the other, or length would be what is learned. Each prompt gives one or two pairs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_omni.chain.config import PairsConfig, RolloutsConfig
from megatron_omni.config.run import Recipe
from megatron_omni.rewards.load import SHAPE

INCONSISTENT, WRONG, REPETITIVE = "inconsistent", "wrong", "repetitive"
KINDS = (INCONSISTENT, WRONG, REPETITIVE)
"""What is wrong with a pair's rejected side, in the order in which negatives are taken."""
DEMONSTRATION = "demonstration"
"""Name of a teacher's response."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response, verified."""

    name: str
    """``iteration.g``, or ``demonstration``."""
    text: str
    tokens: int
    right: bool | None
    """None: no reward says."""
    well_formed: bool
    repetition: float
    """Share of repeated trigrams of tokens."""
    whole: bool
    """Neither cut, nor other tokens than its text gives."""
    consistent: bool | None = None
    """None: nobody could say."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``chosen`` is preferred to ``rejected``, of which ``kind`` is wrong."""

    chosen: Response
    rejected: Response
    kind: str


def correct_rewards(config: RolloutsConfig, recipe: Recipe) -> list[str]:
    """Names of the rewards that say whether a response is right; ValueError for one that the recipe has not."""
    known = [reward.function.rpartition(":")[2] for reward in recipe.reinforce.rewards]
    if unknown := [name for name in config.correct if name not in known]:
        raise ValueError(f"correct: {unknown[0]!r} is no reward of {recipe.run_dir}; it has {', '.join(known)}")
    found = config.correct or [name for name in known if name not in {*SHAPE, "judge"}]
    if not found:
        raise ValueError(f"correct: no reward of {recipe.run_dir} says what is right ({', '.join(known)}); name one")
    return found


def is_right(rewards: Mapping[str, float | None], names: Sequence[str], config: RolloutsConfig) -> bool | None:
    """Whether the rewards of these names say that a response is right; None where none of them gave a value."""
    given = [value for name in names if (value := rewards.get(name)) is not None]
    return all(value >= config.correct_at for value in given) if given else None


def is_positive(response: Response, config: PairsConfig) -> bool:
    """Whether a response may be preferred."""
    return bool(
        response.whole
        and response.right
        and response.consistent
        and response.well_formed
        and response.repetition < config.repetition_below
    )


def fault(response: Response, config: PairsConfig) -> str | None:
    """What is wrong with a response that may be rejected; None for one that may not."""
    if not response.whole:
        return None
    if response.right and response.consistent is False:
        return INCONSISTENT
    if response.right is False and response.well_formed:
        return WRONG
    return REPETITIVE if response.repetition >= config.repetition_below else None


def choose(
    responses: Sequence[Response], demonstration: Response | None, config: PairsConfig
) -> tuple[list[Pair], str | None]:
    """Pairs of one prompt, and where there is none, why: a word for the counts.

    ``demonstration`` is used where no response is right.
    """
    positives = sorted((r for r in responses if is_positive(r, config)), key=lambda r: -r.tokens)
    if not positives and all(r.right is False for r in responses):
        if demonstration is None:
            return [], "never_solved"
        if not is_positive(demonstration, config):
            return [], "bad_demonstration"
        positives = [demonstration]
    if not positives:
        return [], "no_positive"
    negatives = [(kind, r) for kind in KINDS for r in responses if fault(r, config) == kind]
    if not negatives:
        return [], "no_negative"
    pairs = list(_paired(positives, negatives, config))
    return pairs, None if pairs else "lengths"


def _paired(
    positives: Sequence[Response], negatives: Sequence[tuple[str, Response]], config: PairsConfig
) -> Iterator[Pair]:
    """The first negatives, each with the longest positive that fits; one that was not chosen yet goes before one that was."""
    used: Counter[str] = Counter()
    seen: set[str] = set()
    for kind, negative in negatives:
        if used.total() == config.pairs_per_prompt:
            return
        fitting = [p for p in positives if p.text != negative.text and _alike(p.tokens, negative.tokens, config)]
        if fitting and negative.text not in seen:  # the same words twice teach nothing more
            chosen = min(fitting, key=lambda p: used[p.name])
            used[chosen.name] += 1
            seen.add(negative.text)
            yield Pair(chosen=chosen, rejected=negative, kind=kind)


def _alike(one: int, other: int, config: PairsConfig) -> bool:
    return max(one, other) <= config.length_factor * min(one, other)
