"""Pairs for learning from preferences: a record's answer and the one that was rejected, as one sample.

    {"messages": [.., {"role": "assistant", "content": chosen}], "rejected_response": rejected}
    {"messages": [.., chosen turn], "rejected_messages": [.., rejected turn], "rejected_images": [..]}

The last answer of each conversation is compared; earlier turns belong to the prompt. Where both conversations ask the
same, with the same media, the pair is one prompt with two responses (responses.py): media are decoded and encoded once.
Media of its own allow the rejected conversation another prompt; the sample then holds one conversation behind the other.
Either way the chosen response comes first and a pair is one sample: it never leaves its rank nor its micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_omni.config.run import Recipe
from megatron_omni.data.record import KINDS, Message, Record, RecordError
from megatron_omni.data.responses import group_sample, joined
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import SampleSize
from megatron_omni.data.template import answer_ids
from megatron_omni.data.tokenizer import IM_END, Tokenizer


class Sides(NamedTuple):
    """The two conversations of a record."""

    chosen: Record
    rejected: Record
    same_prompt: bool


def sides(record: Record) -> Sides:
    """What a record prefers to what; RecordError where there is no such thing."""

    def refuse(field: str, problem: str, fix: str) -> RecordError:
        roles = [message.role for message in record.messages]
        return RecordError(record.where, field=field, value=roles, problem=problem, fix=fix, reason="bad_pair")

    rejected = record.rejected
    if rejected is None:
        raise refuse(
            "rejected_response", "is missing: there is nothing to prefer the answer to", "add it, or rejected_messages"
        )
    has_own = any(rejected.media(kind) for kind in KINDS)
    rejected = replace(
        rejected,
        images=rejected.images or record.images,
        audios=rejected.audios or record.audios,
        videos=rejected.videos or record.videos,
    )
    for name, side in (("messages", record), ("rejected_messages", rejected)):
        if side.messages[-1].role != "assistant":
            raise refuse(name, "does not end with an answer", "add an assistant turn")
    same_media = all(record.media(kind) == rejected.media(kind) for kind in KINDS)
    same_prompt = same_media and _asked(record) == _asked(rejected)
    if not same_prompt and not has_own:
        raise refuse(
            "rejected_messages",
            "asks something else than messages",
            "compare answers to one prompt, or give it media of its own",
        )
    if same_prompt and _said(record.messages[-1]) == _said(rejected.messages[-1]):
        raise refuse("rejected_response", "is the chosen answer", "drop the row")
    return Sides(record, rejected, same_prompt)


def _asked(record: Record) -> list[tuple[object, ...]]:
    """The turns before the last."""
    return [(message.role, message.pieces(), *_said(message)) for message in record.messages[:-1]]


def _said(message: Message) -> tuple[str, ...]:
    """What a turn says, and how where it is spoken: what the model reads or writes of it."""
    speech = message.speech
    return (message.content,) if speech is None else (message.content, speech.prompt, speech.spoken)


class PairBuilder(SampleBuilder):
    """Turns records into pairs as a recipe says; prompts of generation are built as ever."""

    indexed = False

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(recipe, tokenizer)
        self.share_prompt = recipe.preference.share_prompt

    def size(self, record: Record) -> SampleSize:
        """Size of the pair, from media headers; RecordError or MediaError for what cannot be used."""
        pair = sides(record)
        shares = pair.same_prompt and self.share_prompt
        prompts = [self._prompt_size(side) for side in ((pair.chosen,) if shares else pair[:2])]
        total = SampleSize(*map(sum, zip(*prompts)))
        responses = sum(len(self._response(side)) for side in pair[:2])
        size = total._replace(text=total.text - len(prompts) + responses)
        self.sizes.check_length(size[:4], where=record.where)
        return size

    def build_sample(self, record: Record) -> Sample:
        """The pair; RecordError or MediaError for what cannot be used."""
        pair = sides(record)
        chosen, rejected = (self._response(side) for side in pair[:2])
        prompt = self.build_prompt(pair.chosen)
        if pair.same_prompt and self.share_prompt:
            sample = group_sample(prompt, [chosen, rejected]).sample
        else:
            other = prompt if pair.same_prompt else self.build_prompt(pair.rejected)
            sample = joined([group_sample(prompt, [chosen]), group_sample(other, [rejected])]).sample
        counts = [int((sample.modality == kind).sum()) for kind in range(4)]
        self.sizes.check_length((counts[0], counts[1], counts[2], counts[3]), where=record.where)
        return sample

    def _prompt_size(self, side: Record) -> SampleSize:
        return self.prompt_size(replace(side, messages=side.messages[:-1]))

    def _response(self, side: Record) -> Sequence[int]:
        """Ids of its answer, the end token included."""
        return [*answer_ids(side.messages[-1], self.tokenizer, self.sizes.block), self.tokenizer.special(IM_END)]
