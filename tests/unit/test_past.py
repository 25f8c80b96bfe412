"""A resume accepts what changes the order ahead of the cursor and refuses what changes the order behind it."""

import json
import random
from typing import Any

import pytest

from megatron_omni.data.mixture import Component, DataEnded, Mixture
from megatron_omni.data.past import check_past, describe_order

A, B = Component(name="a", num_rows=40, weight=3), Component(name="b", num_rows=25, weight=1, from_sample=64)


def order(*parts: Component, batch: int = 0, seed: int = 5) -> Mixture:
    if batch:
        return Mixture([*parts], seed=seed, batch_by="source", global_batch_size=batch)
    return Mixture([*parts], seed=seed)


def changed(part: Component, **values: Any) -> Component:
    return Component(**{**vars(part), **values})


def drawn(mixture: Mixture, count: int) -> list[tuple[str, int]] | None:
    """Source and row of the first samples; None where the order ends before."""
    try:
        draws = [mixture.sample_at(i) for i in range(count)]
    except DataEnded:
        return None
    return [(mixture.components[draw.component].name, draw.row) for draw in draws]


LATER = {
    "a weight that changes later": [changed(A, reweight=((163, 0.5),)), B],
    "a source that joins later": [A, B, Component(name="c", num_rows=9, from_sample=163)],
    "and before the others in the list": [Component(name="c", num_rows=9, from_sample=163), A, B],
    "a source that leaves later": [changed(A, epochs=5), B],
    "weights in other units": [changed(A, weight=6), changed(B, weight=2)],
    "a source that never takes part": [A, B, Component(name="c", num_rows=9, weight=0)],
}
BEHIND = {
    "another weight": [changed(A, weight=2), B],
    "more rows": [changed(A, num_rows=41), B],
    "another name": [changed(A, name="x"), B],
    "a source that joins earlier": [A, changed(B, from_sample=32)],
    "one that joined is missing": [A],
    "another order of the list": [B, A],
    "a change that is past already": [changed(A, reweight=((100, 0.5),)), B],
    "epochs that are used up already": [changed(A, epochs=3), B],
}


@pytest.mark.parametrize("parts", LATER.values(), ids=LATER)
def test_what_lies_ahead_may_change(parts: list[Component]) -> None:
    saved = json.loads(json.dumps(describe_order(order(A, B))))
    check_past(order(*parts), saved, 163)
    assert drawn(order(*parts), 163) == drawn(order(A, B), 163)


@pytest.mark.parametrize("parts", BEHIND.values(), ids=BEHIND)
def test_what_lies_behind_may_not(parts: list[Component]) -> None:
    saved = json.loads(json.dumps(describe_order(order(A, B))))
    assert drawn(order(*parts), 163) != drawn(order(A, B), 163)
    with pytest.raises(ValueError, match=r"the data changed since this state was saved: its sources were .*init_from"):
        check_past(order(*parts), saved, 163)
    check_past(order(*parts), saved, 0)  # nothing was drawn


def test_an_order_that_has_ended_before_the_cursor_is_refused() -> None:
    saved = describe_order(order(changed(A, epochs=3)))
    check_past(order(changed(A, epochs=2)), saved, 80)
    with pytest.raises(ValueError, match=r"90 samples were drawn, data.sources\[\].epochs now end after 80"):
        check_past(order(changed(A, epochs=2)), saved, 90)


def test_a_state_of_an_earlier_version_wants_everything_as_it_was() -> None:
    """Written as commit 6a02c20 did; the order of samples has been the same since."""
    last = Component(name="c", num_rows=9, weight=2, reweight=((200, 0.5),), epochs=3)
    sources = [["a", 40, 3, 0], ["b", 25, 1, 64], ["c", 9, 2, 0, [200, 0.5], "epochs 3"]]
    saved = {"seed": 5, "batch_by": "mixed", "samples_per_item": 1, "sources": sources}
    check_past(order(A, B, last), saved, 163)
    for parts in ([A, B], [A, B, changed(last, epochs=None)], [changed(A, reweight=((163, 0.5),)), B, last]):
        with pytest.raises(ValueError, match=r"its sources were .*since an earlier version saved it none may change"):
            check_past(order(*parts), saved, 163)
    with pytest.raises(ValueError, match="seed was 5, is 6"):
        check_past(order(A, B, last, seed=6), saved, 163)


def test_whatever_is_accepted_gives_the_same_samples() -> None:
    """Random pairs of mixtures, samples compared one by one; groups and a source a step among them."""
    dice, accepted = random.Random(1), 0
    for _ in range(400):
        batch = dice.choice([0, 0, 8])
        grouped = not batch and dice.random() < 0.3

        def part(name: str, batch: int = batch, grouped: bool = grouped) -> Component:
            return Component(
                name=name,
                num_rows=dice.choice([16, 24]),
                weight=dice.choice([1.0, 2.0]),
                from_sample=dice.choice([0, 0, 64, 96]),
                reweight=((128, 2.0),) if dice.random() < 0.3 else (),
                epochs=dice.choice([None, None, None, 4]),
                group=dice.choice("xy") if grouped else "",
            )

        then = [changed(part("a"), from_sample=0, epochs=None), part("b")]
        now = [then[0], dice.choice([then[1], part("b")]), *[part("c")] * dice.randint(0, 1)]
        count = 8 * dice.randint(1, 20)
        try:
            first, second = order(*then, batch=batch), order(*now, batch=batch)
            check_past(second, describe_order(first), count)
        except ValueError:
            continue
        accepted += then != now
        assert drawn(first, count) == drawn(second, count), (then, now, count)
    assert accepted > 40
