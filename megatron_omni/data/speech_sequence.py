"""The sequence of the speech generator: what it is told, then the codes of what it says.

    [prompt_open P prompt_close] [prefix_open E prefix_close]? [text_start T text_end] [codes_start y_1 .. y_n]

P are tokens of the prompt (a voice or a style), E the last codes of the piece before, T tokens of the text, y the codes
of one piece. The part without codes is the condition. Targets are y_1 .. y_n and ``codes_end`` at the last n + 1 places,
nothing else is learned. The condition sees all of itself; ``codes_start`` and the codes are causal and see it too
(``segments.prefix``). Positions count from 0 over the whole sequence, the same in all three channels. Ids are those of
``SpeechIds`` (config/generators.py): codes and marks as they are, tokens of the tokenizer behind them.

Training, evaluation and generation all make it here. Source: the released ``ar_decoder.py`` of Uni-MoE-2.0-Omni; unlike
it, lengths come from the data, so token 0 ("!" in Qwen's vocabulary) is a token like others.
"""

from collections.abc import Sequence

import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.config.generators import SpeechIds
from megatron_omni.data.sample import Sample
from megatron_omni.segments import prefix as prefix_segments


def condition_ids(ids: SpeechIds, *, prompt: Sequence[int], prefix: Sequence[int], text: Sequence[int]) -> list[int]:
    """What stands before ``codes_start``. ``prompt`` and ``text`` are ids of the tokenizer, ``prefix`` codes."""
    prompt_open, prompt_close = ids.prompt
    prefix_open, prefix_close = ids.prefix
    told = [prefix_open, *_checked(ids, prefix, "prefix"), prefix_close] if len(prefix) else []
    return [
        prompt_open, *map(ids.of_text, prompt), prompt_close,
        *told,
        ids.text_start, *map(ids.of_text, text), ids.text_end,
    ]  # fmt: skip


def sequence_length(*, prompt: int, prefix: int, text: int, codes: int) -> int:
    """Tokens of a sequence with so many of each."""
    return 2 + prompt + (2 + prefix if prefix else 0) + 2 + text + 1 + codes


def speech_sample(
    ids: SpeechIds, *, prompt: Sequence[int], prefix: Sequence[int], text: Sequence[int], codes: Sequence[int] | None
) -> Sample:
    """The sample of one piece of speech.

    ``prompt`` and ``text`` are ids of the tokenizer; ``prefix`` (may be empty) and ``codes`` are codes of the codec.
    ``codes`` None: a prompt of generation, which ends with ``codes_start`` and learns nothing. ValueError for a code
    that the codebook does not have, and for speech without any code.
    """
    if codes is not None and not len(codes):
        raise ValueError("speech without any code has nothing to learn; drop the record")
    condition = condition_ids(ids, prompt=prompt, prefix=prefix, text=text)
    said = _checked(ids, codes if codes is not None else (), "codes")
    input_ids = torch.tensor([*condition, ids.codes_start, *said], dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_LABEL)
    if codes is not None:
        labels[len(condition) :] = torch.tensor([*said, ids.codes_end])
    length = len(input_ids)
    return Sample(
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.arange(length).repeat(3, 1),
        next_position=length,
        modality=torch.full_like(input_ids, int(Modality.TEXT)),
        tiles=None,
        chunks=None,
        attention=prefix_segments(len(condition), length - len(condition)),
    )


def _checked(ids: SpeechIds, codes: Sequence[int], name: str) -> list[int]:
    """Codes as a list; ValueError for one outside of the codebook. Never taken modulo its size: that would hide marks."""
    values = list(map(int, codes))
    wrong = [code for code in values if not 0 <= code < ids.num_codes]
    if wrong:
        raise ValueError(
            f"{name} of speech holds {wrong[0]}, and codes are 0 .. {ids.num_codes - 1} (model.speech.num_codes = "
            f"{ids.num_codes}); extract them with the codec of this recipe"
        )
    return values
