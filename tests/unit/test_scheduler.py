"""Places and turns of answers, for any order of arrivals, ends and cancellations: nothing leaks, nobody starves, the
budget holds, and what a chunk reads is what was written there for the same tokens.
"""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from megatron_omni.generation.extents import SMALLEST, Extent, ExtentPool, extent_size
from megatron_omni.generation.scheduler import NOTHING, Answer, Copy, Prefix, Scheduler, StepPlan


def positions(extents: Iterable[Extent]) -> list[int]:
    return [p for e in extents for p in range(e.offset, e.offset + e.size)]


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from("tgf"), st.integers(0, 9)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_extents_never_overlap_and_all_free_makes_the_pool_whole_again(units: int, operations: list) -> None:
    pool = ExtentPool(units * SMALLEST)
    taken: list[Extent] = []
    for what, number in operations:
        if what == "t":
            extent = pool.take(SMALLEST << number % 4)
            taken += [extent] if extent else []
        elif taken:
            extent = taken[number % len(taken)]
            if what == "f":
                pool.free(extent)
                taken.remove(extent)
            elif (grown := pool.grown(extent)) is not None:
                taken[taken.index(extent)] = grown
                assert grown.size == 2 * extent.size
        used = positions(taken)
        assert len(used) == len(set(used)) == pool.taken
        assert all(0 <= p < pool.budget for p in used)
        assert all(extent.offset % extent.size == 0 for extent in taken)
    for extent in taken:
        pool.free(extent)
    assert pool.taken == 0 and pool.take(pool.largest) == Extent(0, pool.largest)


def test_an_extent_grows_in_place_where_its_other_half_is_free() -> None:
    pool = ExtentPool(8 * SMALLEST)
    first, second = pool.take(SMALLEST), pool.take(SMALLEST)
    assert first is not None and second is not None
    moved = pool.grown(first)
    assert moved == Extent(2 * SMALLEST, 2 * SMALLEST)
    assert pool.grown(second) == Extent(0, 2 * SMALLEST), "the half before it was given back"


def test_a_pool_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {SMALLEST}"):
        ExtentPool(SMALLEST - 1)


# ---------------------------------------------------------------------------------------------------- one case each


class Told:
    """A scheduler and a cache of the tokens that were written: position -> (token of the text, place in the text)."""

    def __init__(self, *, budget: int = 512, running: int = 4, batch: int = 16) -> None:
        self.scheduler = Scheduler(budget_tokens=budget, max_running=running, max_batch_tokens=batch)
        self.cache: dict[int, tuple[str, int]] = {}
        self.texts: dict[int, str] = {}
        self.answers: dict[int, Answer] = {}
        self.number = 0

    def add(
        self, prompt: str, *, block: int = 8, keep: bool = False, copies: int = 1, share: bool = True, whole: int = 0
    ) -> list[int]:
        share = share and not whole
        prefixes = [Prefix(prompt[:n].encode(), n) for n in range(block, len(prompt) + 1, block)] if share else []
        group = None
        if copies > 1:
            group = self.number
            prefixes.append(Prefix(f"{group} {prompt}".encode(), len(prompt)))
        numbers = []
        for _ in range(copies):
            answer = Answer(
                number=self.number, known=len(prompt), prefixes=prefixes, keep=keep, group=group, whole=whole
            )
            self.texts[self.number], self.answers[self.number] = prompt, answer
            self.scheduler.add(answer)
            numbers.append(self.number)
            self.number += 1
        return numbers

    def step(self) -> StepPlan:
        """Plan, check that every chunk sees its own text, compute, and let all that can choose say one letter."""
        plan = self.scheduler.plan()
        assert plan.num_tokens <= self.scheduler.max_batch_tokens
        for copy in plan.copies:
            for i in range(copy.length):
                self.cache[copy.target + i] = self.cache[copy.source + i]
        for chunk in plan.chunks:
            text, base = self.texts[chunk.answer], chunk.extent.offset
            assert chunk.start + chunk.length <= chunk.extent.size
            seen = [self.cache[base + i] for i in range(chunk.start)]
            assert seen == [(text[: i + 1], i) for i in range(chunk.start)], "keys of another text"
            for i in range(chunk.start, chunk.start + chunk.length):
                self.cache[base + i] = (text[: i + 1], i)
            assert chunk.ends == (chunk.start + chunk.length == len(text))
            whole = self.answers[chunk.answer].whole
            assert chunk.whole == (0 if chunk.start else whole) and (chunk.start or chunk.length) >= whole
            group = {(self.answers[number].group, self.texts[number]) for number in chunk.choosing}
            assert group == ({(self.answers[chunk.answer].group, text)} if chunk.ends else set()), (
                "logits of another text"
            )
        self.scheduler.advance(plan)
        chosen = [number for chunk in plan.chunks for number in chunk.choosing]
        assert len(chosen) == len(set(chosen))
        for number in chosen:
            extent, length = self.scheduler.place(number)
            assert [self.cache[extent.offset + i][0] for i in range(length)][-1] == self.texts[number]
            self.texts[number] += "abcdefgh"[(number + len(self.texts[number])) % 8]
            self.scheduler.add_tokens(number)
        return plan

    def finish(self, number: int) -> None:
        text = self.texts[number]
        self.scheduler.finish(number, [Prefix(text[:n].encode(), n) for n in range(8, len(text), 8)])
        del self.texts[number], self.answers[number]


def test_answers_decode_in_every_step_beside_a_long_prompt() -> None:
    told = Told()
    (short,) = told.add("ab")
    told.step()
    (long,) = told.add("x" * 100, share=False)
    for _ in range(6):
        lengths = {chunk.answer: chunk.length for chunk in told.step().chunks}
        assert lengths == {short: 1, long: 15}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    told = Told()
    (long,) = told.add("x" * 200, share=False)
    told.step()
    (short,) = told.add("abcdef")
    plan = told.step()
    assert [(chunk.answer, chunk.length, chunk.ends) for chunk in plan.chunks] == [(long, 10, False), (short, 6, True)]


def test_samples_of_a_request_share_the_whole_prompt() -> None:
    told = Told()
    first, *others = told.add("abcdefghijk", copies=4)
    (chunk,) = told.step().chunks
    assert list(chunk.choosing) == [first, *others], "one row of logits for all first tokens"
    assert len({told.texts[number] for number in (first, *others)}) == 4
    assert [told.answers[number].cached for number in (first, *others)] == [0, 11, 11, 11]
    plan = told.step()
    assert len(plan.copies) == 3 and {copy.length for copy in plan.copies} == {11}
    assert {chunk.answer: chunk.length for chunk in plan.chunks} == {first: 1, **dict.fromkeys(others, 1)}


def test_samples_without_a_place_have_their_first_token_with_the_others() -> None:
    told = Told(running=1)
    first, second, third = told.add("abcdefghijk", copies=3)
    assert list(told.step().chunks[0].choosing) == [first, second, third]
    told.finish(second)  # its first token was its last
    told.finish(first)  # and what it computed is gone
    plan = told.step()
    assert [(c.answer, c.start, c.length, list(c.choosing)) for c in plan.chunks] == [(third, 0, 12, [third])]


def test_a_sample_that_is_paused_chooses_for_itself_later() -> None:
    told = Told()
    first, second, third = told.add("abcdefghijk", copies=3)
    told.scheduler.pause(second)
    assert list(told.step().chunks[0].choosing) == [first]
    told.scheduler.resume(second)
    plan = told.step()
    assert [copy.length for copy in plan.copies] == [10]
    assert [list(chunk.choosing) for chunk in plan.chunks] == [[first], [second, third]]


def test_samples_of_a_prompt_that_begins_like_an_earlier_one_compute_the_rest_once() -> None:
    told = Told(batch=64)
    (kept,) = told.add("a" * 16 + "b" * 5, keep=True)
    told.step()
    told.finish(kept)
    numbers = told.add("a" * 16 + "c" * 9, copies=3, keep=True)
    (chunk,) = told.step().chunks
    assert (chunk.start, chunk.length, list(chunk.choosing)) == (16, 9, numbers)
    assert [told.answers[number].cached for number in numbers] == [16, 25, 25]


def test_what_must_be_whole_is_one_chunk_and_the_oldest_finds_room_for_it() -> None:
    told = Told(batch=16)  # of four answers: 13 tokens for one
    assert told.scheduler.largest_whole == 13
    short, first, second = (told.add(text, whole=whole)[0] for text, whole in (("ab", 0), ("c" * 14, 13), ("d" * 9, 8)))
    chunks = [(c.answer, c.length, c.whole, c.ends) for c in told.step().chunks]
    assert chunks == [(short, 2, 0, True), (first, 14, 13, True)]
    assert {c.answer: c.length for c in told.step().chunks} == {short: 1, first: 1, second: 9}


def test_samples_share_what_is_whole_and_never_a_part_of_it() -> None:
    for whole, paused, copied in ((9, False, 10), (10, False, 10), (9, True, 9), (10, True, 0)):
        told = Told(batch=64)
        _, *others = told.add("abcdefghij", copies=2, whole=whole)
        for number in others * paused:  # it says its first token by itself: with the other nine, that one must be whole
            told.scheduler.pause(number)
        told.step()
        for number in others * paused:
            told.scheduler.resume(number)
        plan = told.step()
        assert {copy.length for copy in plan.copies} == ({copied} if copied else set())
        while any(answer.computed < 10 for answer in told.answers.values()):
            told.step()


def test_a_prompt_that_begins_alike_copies_and_other_text_does_not() -> None:
    told = Told(batch=64)
    (first,) = told.add("a" * 16 + "b" * 5, keep=True)
    told.step()
    told.finish(first)
    assert told.scheduler.kept_tokens == SMALLEST
    alike, other = told.add("a" * 16 + "c" * 9)[0], told.add("b" + "a" * 20)[0]
    plan = told.step()
    assert [copy.length for copy in plan.copies] == [16]
    assert told.answers[alike].cached == 16 and told.answers[other].cached == 0
    told.scheduler.finish(alike)
    told.scheduler.finish(other)
    told.scheduler.forget_kept()
    assert told.scheduler.pool.taken == 0
    assert told.scheduler._holders == {}


def test_kept_prefixes_are_given_up_before_anyone_is_set_back() -> None:
    told = Told(budget=4 * SMALLEST, batch=128)
    (first,) = told.add("a" * 40, keep=True)
    told.step()
    told.finish(first)
    assert told.scheduler.kept_tokens == 2 * SMALLEST
    told.add("b" * 100)
    plan = told.step()
    assert len(plan.admitted) == 1 and told.scheduler.kept_tokens == 0 and told.scheduler.num_set_back == 0


def test_the_youngest_is_set_back_and_computed_again() -> None:
    told = Told(budget=4 * SMALLEST, batch=200)
    old, young = told.add("a" * 31)[0], told.add("b" * 62)[0]
    told.step()
    while told.scheduler.num_set_back == 0:
        told.step()
    assert list(told.scheduler.waiting) == [young] and list(told.scheduler.running) == [old]
    said = told.texts[young]
    told.finish(old)
    plan = told.step()
    assert plan.admitted == (young,) and plan.num_tokens == len(said)


def test_a_paused_answer_keeps_its_place_until_somebody_needs_it() -> None:
    told = Told(budget=4 * SMALLEST, running=2, batch=200)
    paused, other = told.add("a" * 20)[0], told.add("b" * 20)[0]
    told.step()
    told.scheduler.pause(paused)
    for _ in range(3):
        assert [chunk.answer for chunk in told.step().chunks] == [other]
    assert list(told.scheduler.running) == [paused, other] and told.scheduler.num_set_back == 0
    told.scheduler.resume(paused)
    assert [chunk.start for chunk in told.step().chunks] == [20, 23], "its keys and values were there"
    told.scheduler.pause(paused)
    (third,) = told.add("c" * 20)  # all places are taken
    plan = told.step()
    assert plan.admitted == (third,) and list(told.scheduler.waiting) == [paused] and told.scheduler.num_set_back == 1
    told.finish(other)
    told.finish(third)
    assert not told.scheduler.busy
    told.scheduler.resume(paused)
    assert told.scheduler.busy and [chunk.length for chunk in told.step().chunks] == [22]


def test_what_a_spoilt_answer_leaves_is_overwritten_before_anyone_reads_there() -> None:
    told = Told()
    (spoilt,) = told.add("a" * 20, keep=True)
    told.step()
    told.scheduler.finish(spoilt, spoilt=True)
    assert told.scheduler.kept_tokens == 0
    told.add("a" * 20)
    plan = told.scheduler.plan()
    assert plan.copies == (Copy(NOTHING, 0, SMALLEST),)
    assert [chunk.start for chunk in plan.chunks] == [0]


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens is 7 and max_running 4"):
        Scheduler(budget_tokens=512, max_running=4, max_batch_tokens=7)


# ------------------------------------------------------------------------------------------------- any order of events


class AnyOrder(RuleBasedStateMachine):
    """Arrivals, steps, ends and cancellations in any order, in a cache for a few answers."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told(budget=8 * SMALLEST, running=3, batch=12)
        self.longest = {}
        self.paused: set[int] = set()
        self.ever_paused = False

    @rule(
        beginning=st.sampled_from(["", "a" * 8, "a" * 16, "b" * 24]),
        end=st.text("xyz", min_size=1, max_size=40),
        more=st.integers(1, 60),
        copies=st.sampled_from([1, 1, 3]),
        keep=st.booleans(),
        whole=st.sampled_from([0, 0, 1, 7, 10]),
    )
    def arrive(self, beginning: str, end: str, more: int, copies: int, keep: bool, whole: int) -> None:
        assert self.told.scheduler.fits(len(beginning + end) + more) and self.told.scheduler.largest_whole == 10
        whole = min(whole, len(beginning + end))
        for number in self.told.add(beginning + end, copies=copies, keep=keep and not whole, whole=whole):
            self.longest[number] = len(beginning + end) + more

    @precondition(lambda self: self.longest.keys() - self.paused)
    @rule()
    def step(self) -> None:
        before = {number: answer.computed for number, answer in self.told.scheduler.running.items()}
        plan = self.told.step()
        assert plan.chunks, "there is always something to compute"
        for number in set(before) & set(self.told.scheduler.running) - set(plan.admitted):  # not set back on the way
            advanced = self.told.answers[number].computed > before[number]
            if before[number] < self.told.answers[number].whole:  # may wait for room
                assert advanced in (False, number not in self.paused)
                continue
            assert advanced != (number in self.paused), "a running answer stands still, or a paused one does not"
        # One that was paused may have lost its place; the oldest of those that have one then goes on.
        oldest = min(set(self.told.scheduler.running) - self.paused if self.ever_paused else self.longest)
        assert any(chunk.answer == oldest for chunk in plan.chunks), "the oldest waits"
        for number in [n for n, longest in self.longest.items() if len(self.told.texts[n]) >= longest]:
            self.end(number)

    def end(self, number: int) -> None:
        del self.longest[number]
        self.paused.discard(number)
        self.told.finish(number)

    @precondition(lambda self: self.longest)
    @rule(which=st.integers(0, 99))
    def pause_or_resume(self, which: int) -> None:
        number = sorted(self.longest)[which % len(self.longest)]
        if number in self.paused:
            self.told.scheduler.resume(number)
        else:
            self.told.scheduler.pause(number)
        self.paused ^= {number}
        self.ever_paused = True

    @precondition(lambda self: self.longest)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        self.end(sorted(self.longest)[which % len(self.longest)])

    @rule()
    def new_weights(self) -> None:
        if not self.longest:
            self.told.scheduler.forget_kept()
            assert self.told.scheduler.pool.taken == 0 and not self.told.scheduler._holders

    @invariant()
    def nothing_leaks(self) -> None:
        scheduler = self.told.scheduler
        extents = [answer.extent for answer in scheduler.running.values()]
        extents += [kept.extent for kept in scheduler._kept.values()]
        used = positions(extents)
        assert len(used) == len(set(used)) == scheduler.pool.taken <= scheduler.pool.budget
        assert all(answer.extent is None for answer in scheduler.waiting.values())
        assert len(scheduler.running) <= scheduler.max_running
        assert scheduler.running.keys() | scheduler.waiting.keys() == self.told.texts.keys()
        assert scheduler.busy == bool(self.longest.keys() - self.paused)
        assert list(scheduler.running) == sorted(scheduler.running)
        assert list(scheduler.waiting) == sorted(scheduler.waiting)

    def teardown(self) -> None:
        """All that is left ends within as many steps as it has tokens to say, one answer after the other; where one was
        paused, one that went on meanwhile may have to begin again."""
        for number in self.paused:
            self.told.scheduler.resume(number)
        self.paused.clear()
        for _ in range((2 if self.ever_paused else 1) * sum(self.longest.values()) + 1):
            if not self.longest:
                break
            self.step()
            self.nothing_leaks()
        assert not self.longest and not self.told.scheduler.busy
        self.told.scheduler.forget_kept()
        assert self.told.scheduler.pool.taken == 0 and not self.told.scheduler._holders


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_sizes_of_extents() -> None:
    assert [extent_size(n) for n in (1, SMALLEST, SMALLEST + 1, 100)] == [SMALLEST, SMALLEST, 2 * SMALLEST, 128]
