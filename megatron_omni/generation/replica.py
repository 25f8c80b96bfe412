"""Every rank's part of the engine: the same requests and answers on all ranks of a model replica, and a step's forward.

The first rank leads: :meth:`Replica.lead` sends :class:`Orders` as integers, the requests that are new as objects, and
all ranks carry them out. The others are in :meth:`Replica.follow`. An order is a plan (scheduler.py): copies in the
cache, then one forward of one row [1, T] that holds the chunks one behind the other. The last stage chooses the tokens,
one broadcast brings them to all ranks. Media are encoded by the first stage when their first placeholder is computed,
those of all prompts together, and their rows are dropped after the last.

T is a multiple of the tensor-parallel size and of :data:`ROWS`; padding costs no expert.

Shapes: T tokens of a step, R rows of logits, V vocabulary, H hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_omni.batch import Modality, SampleRows
from megatron_omni.generation.blocks import BlockRows, Blocks, Shown, parts_of
from megatron_omni.generation.cache import KVCache, in_step_order
from megatron_omni.generation.fixed_steps import Decoding, FixedSteps
from megatron_omni.generation.orders import FAILED, NOTHING_TO_DO, STEP, STOP, Orders, Scored
from megatron_omni.generation.request import Request, Sampling
from megatron_omni.generation.sampling import Choice, History, choose, derived_seed, token_log_probabilities
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.models.attention import kv_cache
from megatron_omni.models.encoders.weights import INPUTS_AT_ONCE, frozen_part
from megatron_omni.models.moe.balance import layer_use, moe_layer_numbers, reduce_stats
from megatron_omni.models.moe.context import RoutingStats, TokenContext
from megatron_omni.models.moe.routes import RouteRecord
from megatron_omni.models.omni import OmniModel
from megatron_omni.parallel.groups import place_in, replica
from megatron_omni.parallel.sharing import PeerFailed
from megatron_omni.platform.device import Stopwatch, device
from megatron_omni.segments import AttentionSegments

ROWS = 4
"""Rows of matrix products are a multiple of it: with two or three, some CPUs take another kernel, with other roundings,
and no less time. With one row they do, too, in much less time: so one row alone stays one, unless bits must be alike."""
ENCODERS = ("vision", "audio")
_FIRST_MESSAGE = 512
"""Integers of the first message of an order; what does not fit follows in a second one."""

ROUTING_STEPS = 64
"""Every so many steps counts what its tokens' routing was; more often it would cost time."""


class Prompt:
    """A request on a rank."""

    def __init__(self, request: Request, *, encodes: bool) -> None:
        sample = request.prompt
        self.request = request
        self.ids, self.positions = sample.input_ids.numpy(), sample.position_ids.numpy()
        self.length, self.next_position = sample.length, sample.next_position
        self.places = media_places(sample.modality.numpy())
        self.inputs = (sample.tiles, sample.chunks) if encodes else (None, None)
        self.rows: list[Tensor | None] = [None, None]
        """[n, H] for the placeholders of pictures and of sound, from the first that is computed to the last."""
        self.vision: Tensor | None = None
        """[n, H] of ``Block.vision``, once they have been computed."""


def media_places(modality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the placeholders of pictures and of sound stand in a prompt."""
    pictures = (modality == int(Modality.IMAGE)) | (modality == int(Modality.VIDEO))
    return np.flatnonzero(pictures), np.flatnonzero(modality == int(Modality.AUDIO))


@dataclass(eq=False)
class _Answer:
    """An answer on a rank."""

    prompt: Prompt
    sampling: Sampling
    """The request's, with this sample's seed."""
    history: History | None
    blocks: Blocks | None = None
    made: list[int] = field(default_factory=list)

    @property
    def begins_at(self) -> int:
        """Tokens before it."""
        return self.prompt.length


class Replica:
    """The ranks of one model replica, from the view of one of them."""

    def __init__(
        self,
        model: nn.Module,
        *,
        pg: ProcessGroupCollection,
        cache_tokens: int,
        eos_ids: Sequence[int],
        deterministic: bool,
        decoding: Decoding = "ragged",
        keep_rows: dict[str, SampleRows] | None = None,
    ) -> None:
        self.omni, self.pg = unwrapped(model), pg
        self._kept = keep_rows
        self.place = place_in(pg)
        self.cache = KVCache(cache_tokens, alike=deterministic)
        self._eos_ids, self._deterministic = tuple(eos_ids), deterministic
        self._fixed = None
        if decoding != "ragged":
            self._fixed = FixedSteps(self.omni.language, self.cache, facts=facts, captured=decoding == "captured")
        self._prompts: dict[int, Prompt] = {}
        self._answers: dict[int, _Answer] = {}
        self._block_rows = BlockRows(pg)
        self._shown: list[Shown] = []
        self._steps = 0
        self._encoded: list[tuple[Literal["image", "audio"], Stopwatch]] = []
        self._routing: tuple[tuple[float, float], ...] = ()

    def observed(self) -> tuple[tuple[tuple[Literal["image", "audio"], float], ...], tuple[tuple[float, float], ...]]:
        """For :class:`~megatron_omni.generation.request.StepFacts`: encoders and routing since the last call."""
        done = [(kind, watch.seconds()) for kind, watch in self._encoded]
        self._encoded = [item for item, (_, seconds) in zip(self._encoded, done) if seconds is None]
        routing, self._routing = self._routing, ()
        return tuple((kind, seconds) for kind, seconds in done if seconds is not None), routing

    def shown(self) -> list[tuple[Shown, Tensor | None]]:
        """The blocks that the last step finished, each with the rows of ``Block.vision``; on the leader."""
        return [(shown, self._answers[shown.answer].prompt.vision) for shown in self._shown]

    # ------------------------------------------------------------------------------------------------------- messages

    def lead(self, orders: Orders, requests: Sequence[Request] = ()) -> tuple[list[Scored], list[Scored]]:
        """Have all ranks carry out ``orders``; the chosen tokens and what was wanted of prompts' tokens, in the order of
        :func:`in_step_order`."""
        if replica(self.pg).size() > 1:
            numbers = orders.numbers()
            message = torch.zeros(_FIRST_MESSAGE, dtype=torch.int64)
            message[0] = len(numbers)
            first = numbers[: _FIRST_MESSAGE - 1]
            message[1 : 1 + len(first)] = torch.tensor(first)
            dist.broadcast(message.to(device()), group=replica(self.pg), group_src=0)
            if len(numbers) > len(first):
                dist.broadcast(torch.tensor(numbers[len(first) :]).to(device()), group=replica(self.pg), group_src=0)
            if requests:
                dist.broadcast_object_list(list(requests), group=replica(self.pg), group_src=0, device=device())
        return self._carry_out(orders, requests)

    def follow(self, moved: Callable[[], None] = lambda: None) -> None:
        """Carry out orders until the leader says stop, and call ``moved`` after each; PeerFailed where it says that it
        failed."""
        orders = Orders(op=NOTHING_TO_DO)
        while orders.op != STOP:
            message = torch.zeros(_FIRST_MESSAGE, dtype=torch.int64, device=device())
            dist.broadcast(message, group=replica(self.pg), group_src=0)
            length, *numbers = message.tolist()
            if length > len(numbers):
                rest = torch.zeros(length - len(numbers), dtype=torch.int64, device=device())
                dist.broadcast(rest, group=replica(self.pg), group_src=0)
                numbers += rest.tolist()
            orders = Orders.from_numbers(numbers[:length])
            if orders.op == FAILED:
                raise PeerFailed("the leader of the engine failed")
            requests: list[Request | None] = [None] * len(orders.requests)
            if requests:
                dist.broadcast_object_list(requests, group=replica(self.pg), group_src=0, device=device())
            self._carry_out(orders, cast(list[Request], requests))
            moved()

    @torch.inference_mode()
    def _carry_out(self, orders: Orders, requests: Sequence[Request]) -> tuple[list[Scored], list[Scored]]:
        self._shown = []
        for answer in orders.answers_gone:
            del self._answers[answer]
            self._block_rows.forget(answer)
        for number in orders.requests_gone:
            del self._prompts[number]
        for number, request in zip(orders.requests, requests, strict=True):
            self._prompts[number] = Prompt(request, encodes=self.place.is_first_stage)
        for answer, number, sample in orders.joined:
            self._answers[answer] = self._new_answer(self._prompts[number], sample)
        self.cache.move(orders.copies)
        if orders.op != STEP:
            return [], []
        return self._step(in_step_order(orders.chunks))

    def _new_answer(self, prompt: Prompt, sample: int) -> _Answer:
        sampling = prompt.request.sampling
        sampling = replace(sampling, seed=derived_seed(sampling.seed, sample))
        history = None
        if sampling.penalised and self.place.is_last_stage:
            vocabulary = self.omni.language.model_config.vocab_size
            history = History(prompt.request.prompt.input_ids, vocabulary, device())
        blocks = None if prompt.request.block is None else Blocks.of(prompt.request.block)
        return _Answer(prompt, sampling, history, blocks, [*prompt.request.begins])

    # --------------------------------------------------------------------------------------------------------- a step

    def _step(self, chunks: list[Chunk]) -> tuple[list[Scored], list[Scored]]:
        numbers, rows, scored = self._numbers(chunks)
        count = sum(chunk.length for chunk in chunks)
        record = RouteRecord() if any(self._answers[c.answer].prompt.request.routes for c in chunks) else None
        routes: Tensor | None = None
        moe = self.omni.language.model_config.moe
        stats = RoutingStats() if moe is not None and self._steps % ROUTING_STEPS == 0 else None
        self._steps += 1
        parts = parts_of(chunks, self._answers)
        if self._fixed is not None and stats is None and not parts and all(map(self._decodes, chunks)):
            logits: Tensor | None
            logits, routes = self._fixed.step(numbers, chunks, routes=record is not None)
        else:
            ctx = facts(count, numbers.shape[1], stats=stats, record=record)
            logits, read = self._forward(chunks, numbers, rows, ctx, [i for part in parts for i in part.places])
            width = self.omni.language.config.hidden_size
            self._shown = self._block_rows.take(parts, read, self._answers, hidden_size=width)
            routes = None if record is None else record.whole(self.omni.language.model_config, self.pg)
        # Who computed a prompt for others comes last: they may end with its keys, and routes, still in their place.
        chosen = [(answer, row) for row, c in enumerate(c for c in chunks if c.ends) for answer in reversed(c.choosing)]
        results = self._results(logits, chosen, scored)
        if stats is not None and moe is not None:
            layers = moe_layer_numbers(self.omni.language.model_config.num_layers)
            total = reduce_stats(stats, layers=layers, moe=moe, group=self.pg.tp, pp_group=self.pg.pp, device=device())
            self._routing = tuple(layer_use(total, layers=layers, moe=moe))
        tokens: list[Scored] = []
        for (answer, _), result in zip(chosen, results):
            tokens.append(self._chosen(_scored(answer, result)))
        if routes is not None and replica(self.pg).rank() == 0:  # the leader tells them
            self.cache.keep_routes(torch.from_numpy(numbers[4, :count]).to(device()), routes[:count])
        return tokens, [_scored(answer, row) for (answer, _), row in zip(scored, results[len(chosen) :])]

    def _chosen(self, scored: Scored) -> Scored:
        """A token that was chosen, with what it adds to its answer."""
        here = self._answers[scored.answer]
        made: tuple[int, ...] = (scored.token,)
        if here.blocks is not None and scored.token >= 0:
            request = here.prompt.request
            ends = scored.token in request.stop_ids or (scored.token in self._eos_ids and not request.ignore_eos)
            made = here.blocks.after(scored.token, at=len(here.made), is_end=ends, most=request.max_new_tokens)
            scored = scored._replace(made=made)
        here.made.extend(made)
        if here.history is not None and scored.token >= 0:
            for token in made:
                here.history.add(token)
        return scored

    def _decodes(self, chunk: Chunk) -> bool:
        """Whether a chunk is the newest token of an answer."""
        return chunk.length == 1 and chunk.ends and chunk.start >= self._answers[chunk.answer].prompt.length

    def _numbers(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, list[int], list[tuple[int, int]]]:
        """Of every token its id, three positions and place in the cache, [5, T] int64; the tokens whose logits are
        wanted; and (answer, id that followed) of those among them that are of a prompt."""
        count = sum(chunk.length for chunk in chunks)
        numbers = np.zeros((5, self._padded(count, self.place.tp_size)), dtype=np.int64)
        ends: list[int] = []
        of_prompts: list[int] = []
        scored: list[tuple[int, int]] = []
        first = 0
        for chunk in chunks:
            answer = self._answers[chunk.answer]
            prompt, end = answer.prompt, chunk.start + chunk.length
            given = max(0, min(end, prompt.length) - chunk.start)
            if given:
                source, target = slice(chunk.start, chunk.start + given), slice(first, first + given)
                numbers[0, target] = prompt.ids[source]
                numbers[1:4, target] = prompt.positions[:, source]
                if prompt.request.prompt_logprobs is not None:
                    known = min(end, prompt.length - 1)
                    of_prompts += range(first, first + known - chunk.start)
                    scored += [(chunk.answer, int(i)) for i in prompt.ids[chunk.start + 1 : known + 1]]
            if given < chunk.length:
                made, target = chunk.start + given - prompt.length, slice(first + given, first + chunk.length)
                numbers[0, target] = answer.made[made : made + chunk.length - given]
                at = prompt.next_position + made
                numbers[1:4, target] = at if chunk.length == 1 else np.arange(at, at + chunk.length - given)
            at = chunk.extent.offset + chunk.start
            numbers[4, first : first + chunk.length] = at if chunk.length == 1 else np.arange(at, at + chunk.length)
            first += chunk.length
            if chunk.ends:
                ends.append(first - 1)
        return numbers, ends + of_prompts, scored

    def _padded(self, count: int, tensor_size: int = 1) -> int:
        """Rows of a product for ``count`` tokens."""
        if count == tensor_size == 1 and not self._deterministic:
            return 1
        multiple = math.lcm(ROWS, tensor_size)
        return -(-max(count, 1) // multiple) * multiple

    def _forward(
        self,
        chunks: Sequence[Chunk],
        numbers: np.ndarray,
        rows: list[int],
        ctx: TokenContext,
        hidden_places: Sequence[int] = (),
    ) -> tuple[Tensor | None, Tensor | None]:
        """This stage's part: logits [R, V] float32 of ``rows`` and hidden states [n, H] at ``hidden_places``, where there are
        any; None before the last stage."""
        language, place = self.omni.language, self.place
        count, length = sum(chunk.length for chunk in chunks), numbers.shape[1]
        on_device = torch.from_numpy(numbers).to(device(), non_blocking=True)
        self.cache.begin(chunks, on_device[4, :count])
        hidden = None
        if place.is_first_stage:
            hidden = self.omni.embed_ids(on_device[:1])
            self._place_media(chunks, hidden)
        else:
            received = torch.empty(
                (length // place.tp_size, 1, language.config.hidden_size), dtype=_dtype(language), device=device()
            )
            dist.recv(received, group=self.pg.pp, group_src=place.pp_rank - 1)
            language.set_input_tensor(received)
        # As many rows as a product wants, some of them twice; a step that chooses nothing still has its output layer.
        wanted = rows + [rows[-1] if rows else 0] * (self._padded(len(rows)) - len(rows))
        with kv_cache(self.cache):
            output = language(
                input_ids=on_device[:1],
                position_ids=on_device[1:4].unsqueeze(1),
                attention=AttentionSegments((), length),  # the cache knows who sees whom
                ctx=ctx,
                decoder_input=hidden,
                logits_positions=torch.tensor([wanted], device=device()),
                hidden_places=torch.tensor(hidden_places, device=device()) if hidden_places else None,
            )
        if place.is_last_stage:
            logits, read = output if hidden_places else (output, None)
            return logits[0, : len(rows)].float(), read
        dist.send(output.contiguous(), group=self.pg.pp, group_dst=place.pp_rank + 1)
        return None, None

    def _results(
        self, logits: Tensor | None, chosen: Sequence[tuple[int, int]], scored: Sequence[tuple[int, int]]
    ) -> list[list[float]]:
        """Of every answer that chooses from a row of ``logits`` (``chosen``), and of the rows behind those, the token, its
        log-probability, whether it was drawn near an edge, and the most likely ids and their log-probabilities, on every
        rank."""
        if not chosen and not scored:
            return []
        asked = [self._answers[a].prompt.request.logprobs for a, _ in chosen]
        asked += [self._answers[a].prompt.request.prompt_logprobs for a, _ in scored]
        top = max((n for n in asked if n is not None), default=None)
        width = 1 if top is None else 3 + 2 * top
        if logits is None:
            results = torch.empty(len(asked), width, dtype=torch.float64, device=device())
        else:
            tokens = torch.tensor([i for _, i in scored], dtype=torch.int64, device=device())
            near_edge = torch.zeros(len(asked), dtype=torch.bool, device=device())
            if len(asked) > len(logits):  # some answers choose from one row
                rows = [row for _, row in chosen]
                logits = logits[[*rows, *range(len(logits) - len(scored), len(logits))]]
            if chosen:
                choices, near = [self._choice(a) for a, _ in chosen], near_edge[: len(chosen)]
                picked = choose(logits[: len(chosen)], choices, near_edge=None if top is None else near)
                tokens = torch.cat([picked, tokens])
            results = tokens.double().unsqueeze(1)
            if top is not None:
                logprob, ids, values = token_log_probabilities(logits, tokens, top=top)
                facts = torch.stack([logprob.double(), near_edge.double()], dim=1)
                results = torch.cat([results, facts, ids.double(), values.double()], dim=1)
        if self.place.pp_size > 1:
            dist.broadcast(results, group=self.pg.pp, group_src=self.place.pp_size - 1)
        if self.pg.tp_cp.size() > 1:
            dist.broadcast(results, group=self.pg.tp_cp, group_src=0)
        return [
            row if n is not None else row[:1]
            for n, row in zip(asked, results.tolist())  # the one wait for the device
        ]

    def _choice(self, number: int) -> Choice:
        answer = self._answers[number]
        request = answer.prompt.request
        forbidden = request.banned_ids if answer.blocks is None else (*request.banned_ids, *answer.blocks.forbidden())
        if len(answer.made) < request.min_new_tokens:
            forbidden = (*forbidden, *request.stop_ids, *(() if request.ignore_eos else self._eos_ids))
        return Choice(sampling=answer.sampling, step=len(answer.made), history=answer.history, forbidden=forbidden)

    # ---------------------------------------------------------------------------------------------------------- media

    def _place_media(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Put the encoders' rows in place of the placeholders of ``chunks`` in ``hidden`` [T, 1, H]."""
        uses = []
        first = 0
        for chunk in chunks:
            prompt = self._answers[chunk.answer].prompt
            if chunk.start < prompt.length:
                for kind, places in enumerate(prompt.places):
                    low, high = np.searchsorted(places, (chunk.start, chunk.start + chunk.length))
                    if low < high:
                        uses.append((prompt, kind, low, high, first - chunk.start))
            first += chunk.length
        for kind in (0, 1):
            without = {id(p): p for p, k, *_ in uses if k == kind and p.rows[kind] is None}
            self._encode(list(without.values()), kind)
        for prompt, kind, low, high, shift in uses:
            places, rows = prompt.places[kind], prompt.rows[kind]
            assert rows is not None
            where = torch.from_numpy(places[low:high] + shift).to(hidden.device)
            hidden[:, 0].index_copy_(0, where, rows[low:high].to(hidden.dtype))
        for prompt, kind, _, high, _ in uses:
            if high == len(prompt.places[kind]):
                prompt.rows[kind] = None

    def _encode(self, prompts: Sequence[Prompt], kind: int) -> None:
        """Rows of the pictures (kind 0) or sound (1) of several prompts, computed together; alone where they are kept, so
        that a run which goes on without them makes the same bits."""
        encoder = (self.omni.vision, self.omni.audio)[kind]
        prompts = [prompt for prompt in prompts if not self._recalled(prompt, kind)]
        alone = [[prompt] for prompt in prompts]
        together = [prompts] if prompts else []
        for group in alone if self._deterministic or self._kept is not None else together:
            inputs = torch.cat([cast(Tensor, prompt.inputs[kind]) for prompt in group])
            assert encoder is not None
            part = None if self._kept is None else frozen_part(encoder)
            watch, features, rows = Stopwatch(), list[Tensor](), list[Tensor]()
            for some in inputs.split(INPUTS_AT_ONCE):
                if part == "features":
                    features.append(encoder.features(some.to(device())))
                made = encoder.project(features[-1]) if features else encoder(some.to(device()))
                rows.append(made.flatten(0, 1))
            watch.stop()
            self._encoded.append(("audio" if kind else "image", watch))
            for prompt, own in zip(group, torch.cat(rows).split([len(prompt.places[kind]) for prompt in group])):
                prompt.rows[kind] = own
                if kind == 0 and prompt.request.block is not None and prompt.request.block.vision is not None:
                    prompt.vision = own[slice(*prompt.request.block.vision)].float().cpu()
                if self._kept is not None and part is not None:  # then it is alone
                    kept = self._kept.setdefault(prompt.request.name, {})
                    kept[ENCODERS[kind]] = torch.cat(features) if features else own

    def _recalled(self, prompt: Prompt, kind: int) -> bool:
        """Whether a prompt that is computed again has its rows from what was kept of it."""
        encoder = (self.omni.vision, self.omni.audio)[kind]
        known = None if self._kept is None else self._kept.get(prompt.request.name, {}).get(ENCODERS[kind])
        if known is None or encoder is None:
            return False
        prompt.rows[kind] = known if frozen_part(encoder) == "rows" else encoder.project(known).flatten(0, 1)
        return True


def facts(
    count: int, length: int, *, stats: RoutingStats | None = None, record: RouteRecord | None = None
) -> TokenContext:
    """What routers ask of the tokens of a step, of which ``count`` are none of padding; they draw nothing."""
    numbers = torch.zeros(length, dtype=torch.int64, device=device())
    padding = torch.arange(length, device=device()) >= count
    return TokenContext(
        sample_ids=numbers,
        sample_positions=numbers,
        modality=numbers,
        has_label=padding,
        padding=padding,
        seed=0,
        step=0,
        stochastic=False,
        aux_loss_scale=0.0,
        stats=stats,
        record=record,
    )


def _scored(answer: int, row: Sequence[float]) -> Scored:
    if len(row) == 1:
        return Scored(answer, int(row[0]))
    token, logprob, near_edge, *rest = row
    top = len(rest) // 2
    return Scored(answer, int(token), logprob, tuple(zip(map(int, rest[:top]), rest[top:])), bool(near_edge))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def unwrapped(model: nn.Module) -> OmniModel:
    """The OmniModel under data-parallel and precision wrappers."""
    while not isinstance(model, OmniModel):
        model = cast(nn.Module, model.module)
    return model
