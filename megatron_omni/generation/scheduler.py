"""Which tokens of which answers the next step computes, and where their keys and values lie. Pure Python, no torch.

An answer knows ``known`` tokens, its prompt and what it has said, and has keys and values of the first ``computed`` of
them. Every step takes more of the known tokens of some answers, at most ``max_batch_tokens`` in all; where that reaches
the last known one, its logits choose another. So decoding, a part of a prompt and computing again after a set-back are
one thing: a :class:`Chunk`.

* Answers with one token left (they decode) come first: each gets it in every step. The rest of the step goes to longer
  ones: half of it to the oldest, so that none starves, then to the shortest, so that a short prompt need not wait for a
  long one.
* An answer is admitted, in the order of arrival, when an extent for all that it knows is free (extents.py), and grows
  as it speaks. Where nothing is left for one that grows, first kept prefixes are given up, then the youngest answer is
  set back: it loses its extent, waits again and is computed again. The oldest is never set back, so all end.
* An answer that is paused gets no turn. It keeps its place while nobody needs it, and is the first to be set back.
* The first tokens of a prompt may see each other (``whole`` of them): these are one chunk, or a part of one. The oldest
  such answer finds room for it in every step, since :meth:`Scheduler.largest_whole` is left beside what decodes.
* A prompt that begins like an earlier one copies its keys and values. A :class:`Prefix` is named by its tokens, their
  positions and media (prefix.py), so that equal names mean equal keys and values.
* Of a group, the answers to one prompt, one computes the prompt. Its last logits choose the first token of all that wait
  with nothing said, place or not; they begin with a copy of the whole prompt and that token.

Whoever uses this keeps the order ``plan -> (compute) -> advance -> add_tokens | finish``; copies of a plan are made in
their order, before anything is computed.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from megatron_omni.generation.extents import Extent, ExtentPool, extent_size


class Prefix(NamedTuple):
    """The first ``num_tokens`` of an answer's tokens."""

    name: bytes
    num_tokens: int


@dataclass(eq=False, slots=True)
class Answer:
    """One answer in the making, as far as its place is concerned."""

    number: int
    """Order of arrival; what it is called in plans."""
    known: int
    """Tokens of the prompt and of the answer so far."""
    prefixes: Sequence[Prefix] = ()
    """Beginnings of the prompt that may be shared, the shortest first; all the same or none in answers of a group."""
    keep: bool = False
    """Leave the keys and values to prompts that come later."""
    group: int | None = None
    """Answers to one prompt: while one of them computes it, the others wait."""
    whole: int = 0
    """First tokens of the prompt that all see each other: computed in one step, or copied together."""
    computed: int = 0
    extent: Extent | None = None
    cached: int = 0
    """Tokens that it did not compute when it was last admitted, or got its first token from another's logits."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + length`` of an answer, computed in one step."""

    answer: int
    start: int
    length: int
    extent: Extent
    ends: bool
    """Its last token is the last known one: the logits there choose the next."""
    whole: int = 0
    """First tokens of the chunk that all see each other, and the answer begins with; the others are causal."""
    others: int = 0
    """So many answers numbered behind it have the same tokens and no place: they choose from the same logits."""

    @property
    def choosing(self) -> range:
        """Answers whose next token its logits choose."""
        return range(self.answer, self.answer + 1 + self.others) if self.ends else range(0)


NOTHING = -1


@dataclass(frozen=True, slots=True)
class Copy:
    """Move ``length`` positions of the cache; the two places do not overlap."""

    source: int
    """NOTHING: zeros."""
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does: ``copies`` in their order, then one forward of ``chunks``."""

    chunks: tuple[Chunk, ...] = ()
    copies: tuple[Copy, ...] = ()
    admitted: tuple[int, ...] = ()
    """Answers that got a place in this step."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(eq=False, slots=True)
class _Kept:
    """An extent whose answer has gone."""

    extent: Extent
    prefixes: Sequence[Prefix]


@dataclass(slots=True)
class _Step:
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)


class Scheduler:
    """Places and turns of all answers of one model replica."""

    def __init__(self, *, budget_tokens: int, max_running: int, max_batch_tokens: int) -> None:
        """``budget_tokens`` positions of the cache; at most ``max_running`` answers together and ``max_batch_tokens``
        tokens a step. ValueError for limits that do not go together."""
        if max_running < 1 or max_batch_tokens < 2 * max_running:
            raise ValueError(
                f"max_batch_tokens is {max_batch_tokens} and max_running {max_running}; a step must hold at least two "
                "tokens for each running answer, so that prompts advance beside answers"
            )
        self.pool = ExtentPool(budget_tokens)
        self.max_running, self.max_batch_tokens = max_running, max_batch_tokens
        self.waiting: OrderedDict[int, Answer] = OrderedDict()
        """By number, in the order of arrival; those that were set back among them."""
        self.running: OrderedDict[int, Answer] = OrderedDict()
        """By number, in the order of arrival."""
        self.num_set_back = 0
        self._paused: set[int] = set()
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        """By offset, the one longest unused first."""
        self._holders: dict[bytes, dict[Answer | _Kept, None]] = {}
        """Prefix -> whose extents hold it."""
        self._computing: dict[int, Answer] = {}
        """Group -> who computes its prompt."""
        self._spoilt: list[Copy] = []

    @property
    def busy(self) -> bool:
        """Whether there is an answer to compute: one that has not finished, nor is paused."""
        return len(self.waiting) + len(self.running) > len(self._paused)

    @property
    def kept_tokens(self) -> int:
        """Positions of extents that are kept."""
        return sum(kept.extent.size for kept in self._kept.values())

    @property
    def largest_whole(self) -> int:
        """Most tokens of a prompt that can see each other: a step's, but one for each other running answer."""
        return self.max_batch_tokens - self.max_running + 1

    def fits(self, num_tokens: int) -> bool:
        """Whether an answer of so many tokens can be computed at all."""
        return extent_size(num_tokens) <= self.pool.largest

    def add(self, answer: Answer) -> None:
        """A new answer, younger than all before it, whose longest form :meth:`fits`."""
        assert not self.waiting or answer.number > next(reversed(self.waiting)), "numbers are the order of arrival"
        self.waiting[answer.number] = answer

    def plan(self) -> StepPlan:
        """The next step; empty where there is nothing to compute."""
        step = _Step(copies=self._spoilt)
        self._spoilt = []
        self._grow(step)
        self._admit(step)
        self._share_out(step)
        return StepPlan(tuple(step.chunks), tuple(step.copies), tuple(step.admitted))

    def advance(self, plan: StepPlan) -> None:
        """The chunks of ``plan`` have been computed."""
        for chunk in plan.chunks:
            answer = self.running[chunk.answer]
            answer.computed += chunk.length
            if answer.prefixes and chunk.start < answer.prefixes[-1].num_tokens:
                self._hold(answer)

    def add_tokens(self, number: int, count: int = 1) -> None:
        """An answer knows ``count`` more tokens."""
        answer = self.running.get(number) or self.waiting[number]
        assert answer.extent is None or answer.computed == answer.known, "a token follows from the last known one"
        answer.known += count

    def place(self, number: int) -> tuple[Extent, int]:
        """Where an answer's keys and values lie, and of how many tokens: its own, or those of its prompt where another
        answer of its group has just computed that."""
        answer = self.running.get(number)
        if answer is not None and answer.extent is not None:
            return answer.extent, answer.computed
        prompt = self.waiting[number].prefixes[-1]
        extent = next(iter(self._holders[prompt.name])).extent
        assert extent is not None
        return extent, prompt.num_tokens

    def pause(self, number: int) -> None:
        """Give an answer that has not finished no turns from here on."""
        self._paused.add(number)

    def resume(self, number: int) -> None:
        """Give it turns again."""
        self._paused.discard(number)

    def finish(self, number: int, prefixes: Sequence[Prefix] | None = None, *, spoilt: bool = False) -> None:
        """An answer leaves, wherever it is. ``prefixes`` of all that it said, in place of its prompt's, if it is kept.

        ``spoilt``: its keys and values may not be finite. Nobody may find them, and the next plan overwrites them.
        """
        self._paused.discard(number)
        if self.waiting.pop(number, None) is not None:
            return
        answer = self.running.pop(number)
        extent = self._let_go(answer)
        if spoilt:
            self._spoilt.append(Copy(NOTHING, extent.offset, extent.size))
            self.pool.free(extent)
            return
        held = [p for p in prefixes or answer.prefixes if p.num_tokens <= answer.computed]
        if answer.keep and held and not any(isinstance(h, _Kept) for h in self._holders.get(held[-1].name, ())):
            kept = self._kept[extent.offset] = _Kept(extent, held)
            for prefix in held:
                self._holders.setdefault(prefix.name, {})[kept] = None
        else:
            self.pool.free(extent)

    def forget_kept(self) -> None:
        """Give up all that is kept."""
        while self._kept:
            self._give_up_oldest()

    # ------------------------------------------------------------------------------------------------ a plan's parts

    def _grow(self, step: _Step) -> None:
        """Room for the known tokens of every running answer, the oldest first."""
        for answer in list(self.running.values()):
            if answer.number in self._paused:
                continue
            while answer.extent is not None and answer.known > answer.extent.size:
                old = answer.extent
                new = self._make_room(partial(self.pool.grown, old), for_whom=answer)
                if new is None:
                    self._set_back(answer)
                    break
                if new.offset != old.offset:
                    step.copies.append(Copy(old.offset, new.offset, answer.computed))
                answer.extent = new

    def _admit(self, step: _Step) -> None:
        """Answers that wait, in order, as far as there are places."""
        for answer in list(self.waiting.values()):
            if answer.number in self._paused:
                continue
            if self._prompt_is_coming(answer):
                continue
            if len(self.running) == self.max_running and not self._set_back_paused():
                break
            holder, num_cached = self._longest_prefix(answer)
            take = partial(self.pool.take, extent_size(answer.known))
            extent = self._make_room(take, spared=holder)
            if extent is None and (isinstance(holder, _Kept) or (holder is not None and holder.number in self._paused)):
                # The very extent to copy from is in the way.
                holder, num_cached = None, 0
                extent = self._make_room(take)
            if extent is None:
                break
            del self.waiting[answer.number]
            self.running[answer.number] = answer
            answer.extent, answer.computed, answer.cached = extent, num_cached, num_cached
            if holder is not None and holder.extent is not None:
                step.copies.append(Copy(holder.extent.offset, extent.offset, num_cached))
                self._hold(answer)
            if answer.group is not None and answer.prefixes and num_cached < answer.prefixes[-1].num_tokens:
                self._computing[answer.group] = answer
            step.admitted.append(answer.number)
        if step.admitted:
            self.running = OrderedDict(sorted(self.running.items()))

    def _prompt_is_coming(self, answer: Answer) -> bool:
        """Whether another of its group computes the prompt."""
        other = None if answer.group is None else self._computing.get(answer.group)
        if other is None or other.number in self._paused:
            return False
        assert answer.group is not None
        if other.number in self.running and other.computed < other.prefixes[-1].num_tokens:
            return True
        del self._computing[answer.group]
        return False

    def _share_out(self, step: _Step) -> None:
        """Chunks: a token for whoever has one left, what must be whole, half of the rest to the oldest, then to the
        shortest."""
        lengths: dict[int, int] = {}
        longer, whole = list[Answer](), list[Answer]()
        for answer in self.running.values():
            if answer.known > answer.computed and answer.number not in self._paused:
                if answer.computed < answer.whole:
                    whole.append(answer)
                    continue
                lengths[answer.number] = 1  # all advance
                if answer.known - answer.computed > 1:
                    longer.append(answer)
        spare = self.max_batch_tokens - len(lengths)
        for answer in whole:
            if answer.whole <= spare:
                lengths[answer.number] = answer.whole
                spare -= answer.whole
                longer.append(answer)
        turns = [(answer, (spare + 1) // 2) for answer in longer[:1]]
        turns += [(answer, spare) for answer in sorted(longer, key=lambda a: (a.known - a.computed, a.number))]
        for answer, at_most in turns:
            more = min(answer.known - answer.computed - lengths[answer.number], at_most, spare)
            lengths[answer.number] += more
            spare -= more
        for number, length in lengths.items():
            answer = self.running[number]
            assert answer.extent is not None
            ends = answer.computed + length == answer.known
            first = answer.whole if answer.computed < answer.whole else 0
            others = self._same_as(answer) if ends else 0
            step.chunks.append(Chunk(number, answer.computed, length, answer.extent, ends, first, others))

    def _same_as(self, answer: Answer) -> int:
        """How many of its group, next in number, wait with the same tokens: those of the prompt."""
        number = answer.number + 1
        if answer.group is None or not answer.prefixes or answer.known != answer.prefixes[-1].num_tokens:
            return 0
        while number not in self._paused and (other := self.waiting.get(number)) is not None:
            if other.group != answer.group or other.known != answer.known:
                break
            other.cached = other.known
            number += 1
        return number - answer.number - 1

    # ------------------------------------------------------------------------------------------------ room and prefixes

    def _make_room(
        self,
        attempt: Callable[[], Extent | None],
        *,
        for_whom: Answer | None = None,
        spared: Answer | _Kept | None = None,
    ) -> Extent | None:
        """What ``attempt`` gives once enough is given up: kept extents, then those of paused answers, but ``spared``, then
        answers that are younger than ``for_whom``."""
        while (extent := attempt()) is None:
            if any(kept is not spared for kept in self._kept.values()):
                self._give_up_oldest(spared)
                continue
            if self._set_back_paused(spared):
                continue
            youngest = next(reversed(self.running.values())) if self.running else None
            if for_whom is None or youngest is None or youngest.number <= for_whom.number:
                return None
            self._set_back(youngest)
        return extent

    def _set_back_paused(self, spared: Answer | _Kept | None = None) -> bool:
        """Set back the youngest paused answer but ``spared``; whether there is one."""
        paused = (a for a in reversed(self.running.values()) if a.number in self._paused and a is not spared)
        if (answer := next(paused, None)) is None:
            return False
        self._set_back(answer)
        return True

    def _set_back(self, answer: Answer) -> None:
        self.num_set_back += 1
        del self.running[answer.number]
        self.pool.free(self._let_go(answer))
        answer.computed = 0
        self.waiting[answer.number] = answer
        self.waiting = OrderedDict(sorted(self.waiting.items()))

    def _give_up_oldest(self, spared: Answer | _Kept | None = None) -> None:
        offset, kept = next((o, k) for o, k in self._kept.items() if k is not spared)
        del self._kept[offset]
        self._release(kept)
        self.pool.free(kept.extent)

    def _let_go(self, answer: Answer) -> Extent:
        """The extent of an answer, which holds nothing any more."""
        self._release(answer)
        extent, answer.extent = answer.extent, None
        assert extent is not None
        return extent

    def _hold(self, answer: Answer) -> None:
        for prefix in answer.prefixes:
            if prefix.num_tokens <= answer.computed:
                self._holders.setdefault(prefix.name, {})[answer] = None

    def _release(self, holder: Answer | _Kept) -> None:
        for prefix in holder.prefixes:
            holders = self._holders.get(prefix.name, {})
            holders.pop(holder, None)
            if not holders:
                self._holders.pop(prefix.name, None)

    def _longest_prefix(self, answer: Answer) -> tuple[Answer | _Kept | None, int]:
        """Who holds the longest beginning of an answer, and its tokens; the last known token is always computed, and what
        must be whole is never copied in part."""
        for prefix in reversed(answer.prefixes):
            if prefix.name in self._holders and (length := min(prefix.num_tokens, answer.known - 1)):
                if length < answer.whole:
                    break
                holder = next(iter(self._holders[prefix.name]))
                if isinstance(holder, _Kept):
                    self._kept.move_to_end(holder.extent.offset)
                return holder, length
        return None, 0
