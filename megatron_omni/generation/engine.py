"""The engine: many requests of any length at once, on every layout (docs/generation.md).

    with Engine(model, tokenizer=tokenizer, pg=pg) as engine:      # all ranks
        if not engine.leads:
            engine.follow()                                        # until the leader leaves
        else:
            engine.submit(request)
            while engine.busy:
                for event in engine.step(): ...

The first rank of every model replica leads it: it holds the scheduler, tells events, and sends each step's plan to the
replica's other ranks (replica.py). A step computes a token for every answer that decodes and parts of prompts that wait.

Replicas are independent, each with the requests of its own leader. With expert parallelism they meet in every MoE layer:
then they step together, one without work computes padding, and all are ``busy`` until the last has finished.

A leader that fails between two messages says so in the next one, so no rank waits for it: where the context is left with
an error, ``follow()`` raises PeerFailed on its ranks, and so does the next ``step()`` of leaders that it would have met.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.batch import SampleRows
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.generation.blocks import as_bytes
from megatron_omni.generation.fixed_steps import check_decoding
from megatron_omni.generation.limits import EngineLimits as EngineLimits
from megatron_omni.generation.limits import agreed, cache_tokens
from megatron_omni.generation.orders import FAILED, NOTHING_TO_DO, STEP, STOP, Orders, Scored
from megatron_omni.generation.prefix import media_digests, prefixes, whole_prompt, whole_tokens
from megatron_omni.generation.replica import Replica, media_places, unwrapped
from megatron_omni.generation.request import (
    EngineState,
    Event,
    FinishReason,
    Request,
    StepFacts,
    check_ids,
)
from megatron_omni.generation.sampling import INVALID_TOKEN
from megatron_omni.generation.scheduler import Answer, Prefix, Scheduler, StepPlan
from megatron_omni.generation.text import Piece, TextStream
from megatron_omni.generation.told import Told
from megatron_omni.parallel.groups import drop_buffers, replica
from megatron_omni.parallel.sharing import PeerFailed
from megatron_omni.platform.device import device

IDLE_SECONDS = 5.0
"""Ranks that wait hear from the leader at least so often, as far as it is called."""
_IDLE, _BUSY, _FAILED = range(3)
"""What leaders say to each other before a step."""
NOT_FINITE = "the model's logits are not finite: the checkpoint is damaged or training diverged"


class Engine:
    """One model replica's engine; its ranks make it together. A context: the model evaluates inside."""

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Tokenizer,
        pg: ProcessGroupCollection,
        limits: EngineLimits | None = None,
        keep_rows: dict[str, SampleRows] | None = None,
    ) -> None:
        """``keep_rows`` is filled, on ranks that encode, with what frozen encoders made of each request's media."""
        self.limits = limits = limits or EngineLimits()
        check_decoding(limits.decoding, deterministic=limits.deterministic, pg=pg)
        self.tokenizer, self.pg = tokenizer, pg
        self.leads = replica(pg).rank() == 0
        tokens = agreed(cache_tokens(model, limits, pg), pg)
        self._scheduler = Scheduler(
            budget_tokens=tokens, max_running=limits.max_running, max_batch_tokens=limits.max_batch_tokens
        )
        self._replica = Replica(
            model,
            pg=pg,
            cache_tokens=tokens,
            eos_ids=[i for i in tokenizer.eos_ids if i < unwrapped(model).language.model_config.vocab_size],
            deterministic=limits.deterministic,
            decoding=limits.decoding,
            keep_rows=keep_rows,
        )
        self._told: dict[int, Told] = {}
        self._open: dict[int, list[int]] = {}
        """Request number -> its answers that have not finished."""
        self._numbers: dict[str, int] = {}
        self._unsent: dict[int, Request] = {}
        """Requests that the replica has not got."""
        self._answers_gone: list[int] = []
        self._requests_gone: list[int] = []
        self._events: list[Event] = []
        self.last_step = StepFacts()
        """Of the last call of :meth:`step`."""
        self._admitted: tuple[str, ...] = ()
        self._next_answer = self._next_request = 0
        self._others_busy = self._closed = self._released = False
        self.broken = False
        """A message between ranks is under way, or failed: nothing more can be said to them."""
        self._leaders_meet = True
        """With expert parallelism: the other leaders' next message is that of a step."""
        self._last_word = time.monotonic()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self.step_seconds = 0.0
        """Wall time inside :meth:`step` since the start."""
        self._modes = [(module, module.training) for module in self._replica.omni.modules()]
        self._replica.omni.eval()

    # ------------------------------------------------------------------------------------------- what a caller uses

    def submit(self, request: Request) -> None:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        assert self.leads, "requests go to the leader of a replica"
        self._check(request)
        number, self._next_request = self._next_request, self._next_request + 1
        self._numbers[request.name], self._unsent[number], self._open[number] = number, request, []
        shared = self._prefixes_of(request, number)
        for sample in range(request.n):
            answer = Answer(
                number=self._next_answer,
                known=request.prompt.length + len(request.begins),
                prefixes=shared,
                keep=self._keeps(request),
                whole=whole_tokens(request.prompt),
                group=number if request.n > 1 else None,
            )
            self._next_answer += 1
            stream = None
            if request.has_text:
                stream = TextStream(self.tokenizer, stop=request.stop, reasoning=request.reasoning)
            self._told[answer.number] = Told(answer, request, number, sample, stream)
            self._open[number].append(answer.number)
            self._scheduler.add(answer)

    def cancel(self, name: str) -> None:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        for answer in list(self._open.get(self._numbers.get(name, -1), ())):
            self._finish(answer, "cancelled")

    def pause(self, name: str) -> None:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        for answer in self._open.get(self._numbers.get(name, -1), ()):
            self._scheduler.pause(answer)

    def resume(self, name: str) -> None:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        for answer in self._open.get(self._numbers.get(name, -1), ()):
            self._scheduler.resume(answer)

    def step(self) -> list[Event]:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        assert self.leads and not self._closed
        start = time.perf_counter()
        busy, self.last_step = self._scheduler.busy, StepFacts()
        if self.pg.ep.size() > 1:
            self._others_busy = busy = self._leaders_meet = self._meet(_BUSY if busy else _IDLE) == _BUSY
        if busy:
            plan = self._scheduler.plan()
            tokens, of_prompts = self._order(STEP, plan)
            self._scheduler.advance(plan)
            self._count(plan)
            encoded, routing = self._replica.observed()
            self.last_step = StepFacts(
                tokens=plan.num_tokens, admitted=self._admitted, encoded=encoded, routing=routing
            )
            for shown, vision in self._replica.shown():
                told = self._told[shown.answer]
                self._events.append(told.block_event(shown.number, as_bytes(shown.hidden), as_bytes(vision)))
            for scored in of_prompts:
                self._told[scored.answer].of_prompt.append((scored.logprob or 0.0, scored.top))
            for scored in tokens:
                self._take(scored)
        elif self._answers_gone or self._requests_gone or time.monotonic() - self._last_word > IDLE_SECONDS:
            self._order(NOTHING_TO_DO, StepPlan())
        events, self._events = self._events, []
        self.step_seconds += time.perf_counter() - start
        return events

    @property
    def busy(self) -> bool:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        return self._scheduler.busy or self._others_busy or bool(self._events)

    def state(self) -> EngineState:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        scheduler = self._scheduler
        return EngineState(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            cache_tokens=scheduler.pool.taken - scheduler.kept_tokens,
            prefix_tokens=scheduler.kept_tokens,
            budget_tokens=scheduler.pool.budget,
            set_back=scheduler.num_set_back,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    @property
    def largest_whole(self) -> int:
        """Most tokens at the beginning of a prompt that can see each other."""
        return self._scheduler.largest_whole

    def weights_changed(self) -> None:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        assert not self._told, "answers that have not finished have keys and values of the old weights"
        self._scheduler.forget_kept()

    def follow(self, moved: Callable[[], None] = lambda: None) -> None:
        """Compute what the leader plans, until it closes the engine; the other ranks of a replica call this. PeerFailed
        where it cannot go on. ``moved`` is called after every order of the leader."""
        assert not self.leads
        self.broken = True
        try:
            self._replica.follow(moved)
        except PeerFailed:
            self.broken = False
            raise
        self.broken = False

    def release(self) -> None:
        """Let the other ranks return from :meth:`follow`; they may follow again."""
        self._order(STOP, StepPlan())
        self._released = True

    @contextmanager
    def leading(self) -> Iterator[None]:
        """For work that comes more than once: inside, the other ranks are in :meth:`follow`, and return at the end."""
        self._released, self._leaders_meet = False, True
        try:
            yield
        except BaseException:
            self.give_up()
            raise
        self.release()

    def give_up(self) -> None:
        """The leader cannot go on: the ranks that wait for it fail, too, unless a message to them is what failed."""
        if self.broken:
            return
        if not self._released:
            self._released = self.broken = True
            self._replica.lead(Orders(op=FAILED))
            self.broken = False
        if self.pg.ep.size() > 1 and self._leaders_meet:
            self._leaders_meet = False
            self._exchange(_FAILED)

    def close(self) -> None:
        """See :class:`~megatron_omni.generation.request.RequestEngine`."""
        if self._closed:
            return
        self._closed = True
        if self.leads and not self._released and not self.broken:
            self.release()
        del self._replica.cache
        drop_buffers()
        for module, mode in self._modes:
            module.training = mode

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.leads:
            self.give_up()
        self.close()

    # ------------------------------------------------------------------------------------------------ requests

    def _check(self, request: Request) -> None:
        prompt, model = request.prompt, self._replica.omni.language.model_config
        if request.name in self._numbers:
            raise ValueError(f"name is {request.name!r}, which a request that has not finished has")
        ids = prompt.input_ids.numpy()
        check_ids((int(ids.min()), int(ids.max())), self._replica.omni.num_input_ids, "prompt")
        check_ids(request.stop_ids, model.vocab_size, "stop_ids")
        check_ids(request.banned_ids, model.vocab_size, "banned_ids")
        self._check_block(request)
        if len({*request.banned_ids, *request.stop_ids, *self.tokenizer.eos_ids}) >= model.vocab_size:
            raise ValueError(
                f"banned_ids has {len(request.banned_ids)} tokens and leaves none to choose; leave some out"
            )
        self._check_whole(request)
        if request.routes and model.moe is None:
            raise ValueError("routes is True, but model.moe is null: there are none to tell; set it to False")
        wanted = f"prompt has {prompt.length} tokens and max_new_tokens is {request.max_new_tokens}, together "
        if not self._scheduler.fits(request.num_tokens):
            raise ValueError(
                f"{wanted}{request.num_tokens}; an answer can have {self._scheduler.pool.largest} positions of the cache: "
                "shorten either, or raise cache_tokens"
            )
        pictures, sound = media_places(prompt.modality.numpy())
        for config, places, inputs, rows in (
            ("model.vision", pictures, prompt.tiles, model.vision.pooled_side**2 if model.vision else 0),
            ("model.audio", sound, prompt.chunks, model.audio.num_query_tokens if model.audio else 0),
        ):
            given = 0 if inputs is None else len(inputs)
            if len(places) != given * rows or (given and not rows):
                raise ValueError(
                    f"prompt has {len(places)} placeholders for {given} encoder inputs of {config}, which gives {rows} "
                    "rows for each; build it with the model's own recipe"
                )

    def _check_block(self, request: Request) -> None:
        """Of one whose answer may have pictures."""
        block, model = request.block, self._replica.omni.language.model_config
        if block is None:
            return
        check_ids(block.ids, model.vocab_size, "block.ids")
        if request.routes:
            raise ValueError("routes is True and block names a picture's tokens: leave one of them out")
        places, _ = media_places(request.prompt.modality.numpy())
        if block.vision is not None and not 0 <= block.vision[0] < block.vision[1] <= len(places):
            raise ValueError(
                f"block.vision is {block.vision}; the prompt has {len(places)} rows of pictures: name some of them"
            )

    def _check_whole(self, request: Request) -> None:
        """Of a prompt that begins with tokens that see each other."""
        whole, largest = whole_tokens(request.prompt), self._scheduler.largest_whole
        if whole > largest:
            raise ValueError(
                f"prompt begins with {whole} tokens that see each other, which one step must hold; beside a token for each "
                f"other answer it holds {largest}: shorten them, raise max_batch_tokens ({self.limits.max_batch_tokens}) or "
                f"lower max_running ({self.limits.max_running})"
            )
        if whole and request.prompt_logprobs is not None:
            raise ValueError(
                f"prompt_logprobs is {request.prompt_logprobs}, but the first {whole} tokens of the prompt see those behind "
                "them: they have none; leave it out"
            )

    def _prefixes_of(self, request: Request, number: int) -> list[Prefix]:
        """Beginnings of the prompt that may be shared; none where the logits of all of its tokens are wanted, and of other
        requests' none where routes are, which are not kept, nor where tokens see those behind them, which no name tells."""
        if request.prompt_logprobs is not None:
            return []
        sample, blocks = request.prompt, []
        if self._keeps(request) and not request.routes:
            ids, positions = sample.input_ids.numpy(), sample.position_ids.numpy()
            blocks = prefixes(ids, positions, media_digests(sample), salt=request.salt)
        return whole_prompt(blocks, request=number, num_tokens=sample.length) if request.n > 1 else blocks

    def _keeps(self, request: Request) -> bool:
        """Whether keys and values of a request may be those of another one."""
        rows_wanted = (
            request.block is not None and request.block.vision is not None
        )  # they are computed, whatever is cached
        return (
            self.limits.prefix_cache and request.reuse_prefix and not whole_tokens(request.prompt) and not rows_wanted
        )

    # ------------------------------------------------------------------------------------------------ steps and events

    def _order(self, op: int, plan: StepPlan) -> tuple[list[Scored], list[Scored]]:
        """Have the replica carry out ``plan``, with word of who is new and who has gone."""
        numbers = dict.fromkeys((*plan.admitted, *(n for chunk in plan.chunks for n in chunk.choosing)))
        new = [told for told in map(self._told.__getitem__, numbers) if not told.joined]
        for told in new:
            told.joined, told.cached = True, told.answer.cached
            self._cached_tokens += told.cached
        sent = {told.number: self._unsent.pop(told.number) for told in new if told.number in self._unsent}
        self._admitted = tuple(request.name for request in sent.values())
        orders = Orders(
            op=op,
            chunks=plan.chunks,
            copies=plan.copies,
            requests=tuple(sent),
            joined=tuple((told.answer.number, told.number, told.sample) for told in new),
            answers_gone=tuple(self._answers_gone),
            requests_gone=tuple(self._requests_gone),
        )
        self._answers_gone, self._requests_gone = [], []
        self._last_word, self._released = time.monotonic(), False
        self.broken = replica(self.pg).size() > 1 or self.pg.ep.size() > 1
        results = self._replica.lead(orders, list(sent.values()))
        self.broken = False
        return results

    def _meet(self, word: int) -> int:
        """The highest word of all leaders; PeerFailed where that is :data:`_FAILED`."""
        said = self._exchange(word)
        if said == _FAILED:
            self._leaders_meet = False
            raise PeerFailed("the leader of another replica failed")
        return said

    def _exchange(self, word: int) -> int:
        self.broken = True
        box = torch.tensor([word], dtype=torch.int32, device=device())
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.pg.dp)
        said = int(box)
        self.broken = False
        return said

    def _count(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            length = self._told[chunk.answer].request.prompt.length
            self._prompt_tokens += max(0, min(chunk.start + chunk.length, length) - chunk.start)

    def _take(self, scored: Scored) -> None:
        """One more token of an answer, and whatever follows from it."""
        told = self._told[scored.answer]
        request = told.request
        if not told.chosen and told.sample == 0 and request.prompt_logprobs is not None:
            self._events.append(told.prompt_event())
        if scored.token == INVALID_TOKEN:
            self._finish(scored.answer, "error", message=NOT_FINITE)
            return
        self._generated_tokens += 1
        if told.chosen == request.max_new_tokens:  # a block stood in the place of the end: so much was to follow
            self._finish(scored.answer, "length")
            return
        told.chosen += 1
        made = scored.made or (scored.token,)
        told.ids += made
        is_end = made == (scored.token,) and (
            scored.token in request.stop_ids or (scored.token in self.tokenizer.eos_ids and not request.ignore_eos)
        )
        if made[0] == scored.token:  # else a block stands in the place of an end
            piece = Piece() if is_end or told.stream is None else told.stream.add(scored.token)
            self._events.append(told.token_event(scored, piece, is_end=is_end))
            if piece.stop is not None:
                self._finish(scored.answer, "stop", stop=piece.stop)
                return
        if is_end:
            self._finish(scored.answer, "stop", stop=scored.token)
        elif told.chosen == request.max_new_tokens and len(made) == 1:
            self._finish(scored.answer, "length")
        else:
            self._scheduler.add_tokens(scored.answer, len(made))

    def _finish(
        self, number: int, reason: FinishReason, *, stop: int | str | None = None, message: str | None = None
    ) -> None:
        told = self._told.pop(number)
        request, routes = told.request, None
        if request.routes and reason in ("stop", "length"):
            routes = self._replica.cache.routes(*self._scheduler.place(number)).numpy()
        self._scheduler.finish(number, told.all_prefixes(), spoilt=reason in ("error", "cancelled"))
        if told.joined:
            self._answers_gone.append(number)
        self._open[told.number].remove(number)
        if not self._open[told.number]:
            del self._open[told.number], self._numbers[request.name]
            if self._unsent.pop(told.number, None) is None:
                self._requests_gone.append(told.number)
        self._events.append(told.finished_event(reason, stop=stop, message=message, routes=routes))
