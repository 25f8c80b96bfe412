"""The speech generator's sequence against lists written out by hand from the released layout (8 codes instead of 4096)."""

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.config.generators import SpeechIds
from megatron_omni.data.speech_sequence import sequence_length, speech_sample
from megatron_omni.segments import AttentionSegments

IDS = SpeechIds(8)
"""Codes 0..7, text_start 8, codes_start 9, codes_end 10, padding 11, prompt 12 13, prefix 14 15, text_end 16, text 17+."""
NONE = IGNORE_LABEL


def seen(sample) -> list[list[int]]:
    """[L, L] who sees whom, from the segments."""
    matrix = [[0] * sample.length for _ in range(sample.length)]
    for segment in AttentionSegments(sample.attention, sample.length).segments:
        keys = [key for part in segment.keys for key in part]
        for number, query in enumerate(segment.queries):
            last = len(keys) - len(segment.queries) + number + 1 if segment.causal else len(keys)
            for key in keys[:last]:
                matrix[query][key] = 1
    return matrix


def test_released_ids():
    ids = SpeechIds(4096)
    marks = (ids.text_start, ids.codes_start, ids.codes_end, ids.padding, *ids.prompt, *ids.prefix, ids.text_end)
    assert marks == (4096, 4097, 4098, 4099, 4100, 4101, 4102, 4103, 4104)
    assert (ids.num_outputs, ids.of_text(0)) == (4105, 4105)


def test_golden_with_a_prefix():
    sample = speech_sample(IDS, prompt=[3, 0], prefix=[7, 1], text=[0, 2, 5], codes=[6, 0, 6])
    assert sample.input_ids.tolist() == [12, 20, 17, 13, 14, 7, 1, 15, 8, 17, 19, 22, 16, 9, 6, 0, 6]
    assert sample.labels.tolist() == [NONE] * 13 + [6, 0, 6, 10]
    assert sample.position_ids.tolist() == [list(range(17))] * 3
    assert sample.next_position == 17 and sample.modality.tolist() == [0] * 17
    assert sequence_length(prompt=2, prefix=2, text=3, codes=3) == 17


def test_golden_without_a_prefix_and_who_sees_whom():
    sample = speech_sample(IDS, prompt=[1], prefix=[], text=[4], codes=[2, 3])
    assert sample.input_ids.tolist() == [12, 18, 13, 8, 21, 16, 9, 2, 3]
    assert sample.labels.tolist() == [NONE] * 6 + [2, 3, 10]
    condition = [1, 1, 1, 1, 1, 1, 0, 0, 0]
    causal = [[1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert seen(sample) == [condition] * 6 + causal
    assert sequence_length(prompt=1, prefix=0, text=1, codes=2) == 9


def test_a_prompt_of_generation_is_the_beginning_of_the_training_sample():
    whole = speech_sample(IDS, prompt=[1, 2], prefix=[5], text=[4, 4], codes=[2, 3, 1])
    prompt = speech_sample(IDS, prompt=[1, 2], prefix=[5], text=[4, 4], codes=None)
    assert torch.equal(prompt.input_ids, whole.input_ids[:-3]) and prompt.input_ids[-1] == IDS.codes_start
    assert (prompt.labels == IGNORE_LABEL).all()
    assert seen(prompt) == [row[:-3] for row in seen(whole)[:-3]]


@pytest.mark.parametrize("bad", [8, 10, -1])
def test_codes_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=rf"codes of speech holds {bad}.*0 \.\. 7"):
        speech_sample(IDS, prompt=[1], prefix=[], text=[4], codes=[2, bad])
    with pytest.raises(ValueError, match=rf"prefix of speech holds {bad}"):
        speech_sample(IDS, prompt=[1], prefix=[bad], text=[4], codes=[2])
    with pytest.raises(ValueError, match="without any code"):
        speech_sample(IDS, prompt=[1], prefix=[], text=[4], codes=[])
