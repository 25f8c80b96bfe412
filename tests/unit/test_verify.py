"""The verifier: which responses are preferred to which, each rule alone, and what a thought concludes."""

from dataclasses import replace

import pytest

from megatron_omni.chain.config import PairsConfig
from megatron_omni.chain.verify import Response, choose, fault, is_positive, is_right
from megatron_omni.rewards.consistency import consistency

CONFIG = PairsConfig(rollouts="6_gspo")
GOOD = Response(
    name="1.0", text="good", tokens=20, right=True, well_formed=True, repetition=0.0, whole=True, consistent=True
)
WRONG = replace(GOOD, name="1.1", text="wrong", right=False, consistent=None)
ASTRAY = replace(GOOD, name="1.2", text="astray", consistent=False)
AGAIN = replace(GOOD, name="1.3", text="again", repetition=0.2)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"right": False}, "wrong"),
        ({"right": None}, None),
        ({"consistent": False}, "inconsistent"),
        ({"consistent": None}, None),
        ({"well_formed": False}, None),
        ({"repetition": 0.2}, "repetitive"),
        ({"whole": False}, None),
        ({"right": False, "well_formed": False}, None),
        ({"right": False, "well_formed": False, "repetition": 0.5}, "repetitive"),
        ({"right": False, "repetition": 0.5}, "wrong"),
        ({"whole": False, "repetition": 0.5}, None),
    ],
)
def test_what_is_no_positive_and_which_negative_it_is(change: dict[str, object], kind: str | None) -> None:
    assert is_positive(GOOD, CONFIG) and fault(GOOD, CONFIG) is None
    changed = replace(GOOD, **change)  # type: ignore[arg-type]
    assert not is_positive(changed, CONFIG) and fault(changed, CONFIG) == kind


def chosen(*responses: Response, demonstration: Response | None = None, config: PairsConfig = CONFIG) -> object:
    pairs, why = choose(responses, demonstration, config)
    assert (why is None) == bool(pairs)
    return [(pair.chosen.name, pair.rejected.name, pair.kind) for pair in pairs] or why


def test_negatives_come_in_order_and_the_longest_positive_first() -> None:
    longer = replace(GOOD, name="1.4", text="longer", tokens=25)
    expected = [("1.4", "1.2", "inconsistent"), ("1.0", "1.1", "wrong")]
    assert chosen(GOOD, WRONG, AGAIN, ASTRAY, longer) == expected
    assert chosen(GOOD, AGAIN, WRONG) == [("1.0", "1.1", "wrong"), ("1.0", "1.3", "repetitive")]
    one = replace(CONFIG, pairs_per_prompt=1)
    assert chosen(GOOD, WRONG, AGAIN, ASTRAY, longer, config=one) == expected[:1]


def test_lengths_of_a_pair_are_within_the_factor() -> None:
    for tokens, fits in ((60, True), (61, False), (7, True), (6, False)):
        found = chosen(GOOD, replace(WRONG, tokens=tokens))
        assert found == ([("1.0", "1.1", "wrong")] if fits else "lengths"), tokens
    # The longest positive that fits, not the longest of all.
    longest = replace(GOOD, name="1.5", text="longest", tokens=70)
    assert chosen(longest, GOOD, WRONG) == [("1.0", "1.1", "wrong")]


def test_nothing_is_preferred_to_itself_and_the_same_words_are_rejected_once() -> None:
    same = replace(ASTRAY, text=GOOD.text)
    assert chosen(GOOD, same) == "lengths"
    assert chosen(GOOD, WRONG, replace(WRONG, name="1.6")) == [("1.0", "1.1", "wrong")]


def test_prompts_without_a_pair_say_why() -> None:
    assert chosen(GOOD, GOOD) == "no_negative"
    assert chosen(ASTRAY, WRONG) == "no_positive", "it was solved, so no teacher is asked"
    assert chosen(WRONG, WRONG) == "never_solved"
    assert chosen(replace(WRONG, right=None)) == "no_positive", "no reward says that it was not solved"


def test_a_teacher_answers_what_was_never_solved() -> None:
    taught = replace(GOOD, name="demonstration", text="so it is")
    assert chosen(WRONG, demonstration=taught) == [("demonstration", "1.1", "wrong")]
    assert chosen(GOOD, WRONG, demonstration=taught) == [("1.0", "1.1", "wrong")]
    for change in (
        {"right": False},
        {"consistent": False},
        {"well_formed": False},
        {"repetition": 0.3},
        {"whole": False},
    ):
        assert chosen(WRONG, demonstration=replace(taught, **change)) == "bad_demonstration"  # type: ignore[arg-type]
    assert chosen(WRONG, demonstration=replace(taught, tokens=70)) == "lengths"


def test_right_is_what_all_rewards_that_say_something_say() -> None:
    names = ["accuracy", "choice"]
    assert is_right({"accuracy": 1.0, "choice": None, "think_format": 0.0}, names, CONFIG) is True
    assert is_right({"accuracy": 1.0, "choice": 0.0}, names, CONFIG) is False
    assert is_right({"accuracy": None, "think_format": 1.0}, names, CONFIG) is None
    assert is_right({"accuracy": 0.9}, names, replace(CONFIG, correct_at=0.8)) is True


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>3 and 5, so 8</think>\n\n8", 1.0),
        ("<think>3 and 5, so 8</think>\n\n9", 0.0),
        ("<think>it is 8\nno: 18</think>8", 0.0),
        ("<think>it is 8\nno: 18.</think>18", 1.0),
        ("<think>so 8.5</think>8", 0.0),
        ("<think>so -8</think>8", 0.0),
        ("<think>so it must be B.</think>The answer is \\boxed{B}", 1.0),
        ("<think>so it must be C.</think><answer>B</answer>", 0.0),
        ("<think>the Bed</think>b", 0.0),
        ("<think>it turns Up Left</think> up  left.", 1.0),
        ("<think>所以是猫在上边</think>猫", 1.0),
        ("<think>all in all 12 of them</think>We counted apples and pears; together they are 12.", 1.0),
        ("<think>all in all 11 of them</think>We counted apples and pears; together they are 12.", 0.0),
        ("<think>a long story</think>We counted apples and pears until it became dark outside.", None),
        ("no thought at all", None),
        ("<think>never closed 8", None),
        ("<think>so 8</think>", None),
    ],
)
def test_what_a_thought_concludes(completion: str, value: float | None) -> None:
    assert consistency(completions=[completion]) == [value]
