"""Rows of a prompt and its responses: tokens, labels, positions and who sees whom, against rows written one by one."""

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.data.collate import collate
from megatron_omni.data.record import parse_record
from megatron_omni.data.responses import Group, group_sample, group_samples, responses_of, separate_samples
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.segments import AttentionSegments
from tests.attention import visible
from tests.unit.tiny_data import row, tiny_recipe, write_clip, write_image, write_sound

RESPONSES = [[7, 8, 9], [5], [11, 12, 13, 14, 15]]


@pytest.fixture
def builder(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", level=9)
    write_sound(tmp_path / "s.wav", 1.2)
    write_clip(tmp_path / "v.mp4", [64, 128], sound=True)
    return SampleBuilder(tiny_recipe(tmp_path, []))


def prompt_of(builder: SampleBuilder, tmp_path, question: str, **media) -> Sample:
    files = {kind: [str(tmp_path / name) for name in names] for kind, names in media.items()}
    return builder.build_prompt(parse_record(row(question, **files)))


@pytest.fixture
def prompts(builder, tmp_path) -> list[Sample]:
    """With two pictures, a clip with its sound, a sound, and none."""
    return [
        prompt_of(builder, tmp_path, "<image> or <image>?", images=["a.png", "b.png"]),
        prompt_of(builder, tmp_path, "<video> what?", videos=["v.mp4"]),
        prompt_of(builder, tmp_path, "say <audio>", audios=["s.wav"]),
        prompt_of(builder, tmp_path, "what?"),
    ]


def chain(sample: Sample, span: range, prompt_length: int) -> list[int]:
    """Places of the row that a response's last token sees, itself included."""
    segments = AttentionSegments(sample.attention, sample.length)
    return visible(segments, sample.length)[span[-1]].nonzero().flatten().tolist()


def test_each_branch_is_the_sequence_that_was_written(prompts):
    """Ids, labels and positions along what a branch sees: the prompt, then the response but its last token."""
    for prompt in prompts:
        shared = group_sample(prompt, RESPONSES)
        assert [len(span) for span in shared.spans] == [3, 1, 5] and shared.sample.length == prompt.length - 1 + 9
        for response, span in zip(RESPONSES, shared.spans, strict=True):
            places = chain(shared.sample, span, prompt.length)
            ids = [*prompt.input_ids.tolist(), *response]
            assert shared.sample.input_ids[places].tolist() == ids[:-1]
            assert shared.sample.labels[list(span)].tolist() == response
            written = torch.arange(prompt.next_position, prompt.next_position + len(response) - 1).expand(3, -1)
            assert shared.sample.position_ids[:, places].equal(torch.cat([prompt.position_ids, written], dim=1))
            assert shared.sample.modality[places[: prompt.length]].equal(prompt.modality)
        assert shared.sample.labels[: prompt.length - 1].eq(IGNORE_LABEL).all()
        assert shared.sample.tiles is prompt.tiles and shared.sample.chunks is prompt.chunks


def test_a_token_sees_its_prompt_and_its_own_response_alone(prompts):
    shared = group_sample(prompts[0], RESPONSES)
    n = prompts[0].length - 1
    mask = visible(AttentionSegments(shared.sample.attention, shared.sample.length), shared.sample.length)
    for i in range(shared.sample.length):
        own = next((span for span in shared.spans if i in span), range(0))
        right = {*range(min(i + 1, n)), *range(own.start, i + 1 if own else 0)}
        assert set(mask[i].nonzero().flatten().tolist()) == right


def test_separate_samples_are_the_conversation_as_it_would_be_trained(builder, prompts):
    for prompt in prompts:
        for group, response in zip(separate_samples(prompt, RESPONSES), RESPONSES, strict=True):
            sample = group.sample
            assert sample.input_ids.tolist() == [*prompt.input_ids.tolist(), *response][:-1]
            assert sample.labels.tolist() == [IGNORE_LABEL] * (prompt.length - 1) + response
            mask = visible(AttentionSegments(sample.attention, sample.length), sample.length)
            assert mask.equal(torch.ones_like(mask).tril())
    answer = [*builder.tokenizer.encode("a cat"), builder.tokenizer.special("<|im_end|>")]
    trained = builder.build_sample(parse_record(row("what?", "a cat")))
    sample = separate_samples(prompts[3], [answer])[0].sample
    for name in ("input_ids", "labels", "position_ids", "modality"):
        assert getattr(sample, name).equal(getattr(trained, name)[..., : sample.length]), name


def collated(groups: list[Group], row_of: list[int], **options):
    return collate([g.sample for g in groups], pad_id=0, row_of=row_of, **options)


def test_responses_are_found_in_a_packed_and_padded_batch(prompts):
    groups = [group_sample(prompts[3], [[7, 8], [9]]), *separate_samples(prompts[0], [[5, 6, 4, 3]]),
              group_sample(prompts[2], [[1], [2, 3, 4]])]  # fmt: skip
    batch = collated(groups, [0, 0, 1], sample_ids=[40, 41, 42], source_ids=[2, 0, 1], multiple_of=16)
    found = responses_of(batch)
    assert found.lengths.tolist() == [2, 1, 4, 1, 3]
    assert found.of(batch.labels).tolist() == [[7, 8, 0, 0], [9, 0, 0, 0], [5, 6, 4, 3], [1, 0, 0, 0], [2, 3, 4, 0]]
    assert found.facts(batch.sample_ids).tolist() == [40, 40, 41, 42, 42]
    assert found.facts(batch.source_ids).tolist() == [2, 2, 0, 1, 1]
    kinds = [1 << Modality.TEXT] * 2 + [1 << Modality.IMAGE] + [1 << Modality.AUDIO] * 2
    assert found.facts(batch.sample_modalities).tolist() == kinds
    assert batch.num_samples == 3 and int(found.valid.sum()) == batch.num_label_tokens
    length = batch.input_ids.shape[1]
    for row_number, start, group in ((0, 0, groups[0]), (0, groups[0].sample.length, groups[1]), (1, 0, groups[2])):
        for span in group.spans:
            there = slice(start + span.start, start + span.stop)
            assert batch.labels[row_number, there].equal(group.sample.labels[list(span)])
    assert length % 16 == 0


def test_positions_in_the_sample_continue_from_the_prompt(prompts):
    prompt = prompts[3]
    batch = collated([*separate_samples(prompt, [[3]]), group_sample(prompt, RESPONSES)], [0, 0], multiple_of=8)
    n = prompt.length
    expected = [*range(n), *range(n - 1), *range(n - 1, n + 2), n - 1, *range(n - 1, n + 4)]
    assert batch.sample_positions[0].tolist() == expected + [0] * (batch.input_ids.shape[1] - len(expected))


def test_gradients_of_gathered_values_go_to_their_own_places(prompts):
    batch = collated([group_sample(prompts[3], RESPONSES), group_sample(prompts[0], [[4]])], [0, 1])
    found = responses_of(batch)
    values = torch.randn(batch.labels.shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(found.valid.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found.of(values) * weight).sum(), values)
    expected = torch.zeros_like(gradient).flatten()
    expected[found.places[found.valid]] = weight[found.valid]
    assert gradient.flatten().equal(expected)


def test_what_only_fills_a_step_has_no_tokens(prompts):
    groups = [group_sample(prompts[3], [[7, 8], [9]]), group_sample(prompts[3], [[7], [9]])]
    batch = collate([groups[0].sample, groups[1].sample.without_labels()], pad_id=0)
    assert responses_of(batch).lengths.tolist() == [2, 1, 0, 0]


def test_a_placeholders_id_in_a_response_stays_text(builder, prompts):
    pad = builder.tokenizer.special("<|image_pad|>")
    prompt = prompts[0]
    shared = group_sample(prompt, [[pad, 5, pad, 6], [pad]])
    batch = collated([shared], [0], rule=builder.rule)
    assert len(batch.picture_places) == int((prompt.modality == Modality.IMAGE).sum())
    assert batch.picture_places.max() < prompt.length - 1
    assert (shared.sample.modality[prompt.length - 1 :] == Modality.TEXT).all()


def test_a_row_that_would_grow_too_long_goes_on_in_another_with_the_prompt_again(prompts):
    prompt = prompts[0]
    room = prompt.length - 1 + 6
    parts = group_samples(prompt, RESPONSES, capacity=room)
    assert [[len(span) for span in part.spans] for part in parts] == [[3, 1], [5]]
    assert [part.sample.length for part in parts] == [prompt.length + 3, prompt.length + 4]
    for part in parts:
        assert part.sample.input_ids[: prompt.length].equal(prompt.input_ids) and part.sample.tiles is prompt.tiles
    whole = group_samples(prompt, RESPONSES, capacity=room + 3)
    assert len(whole) == 1 and whole[0].sample.input_ids.equal(group_sample(prompt, RESPONSES).sample.input_ids)
    with pytest.raises(ValueError, match=rf"a response of 5: longer than data\.seq_length = {room - 2}"):
        group_samples(prompt, RESPONSES, capacity=room - 2)


@pytest.mark.parametrize("responses", [[], [[4], []]])
def test_a_group_needs_responses(prompts, responses):
    with pytest.raises(ValueError, match="one or more of each response"):
        group_sample(prompts[3], responses)


def test_a_prompt_of_one_token_is_refused(builder):
    with pytest.raises(ValueError, match="two tokens or more"):
        group_sample(builder.build_text([3]), [[4]])
