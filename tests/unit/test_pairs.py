"""Preference pairs from records: what is compared to what, sizes before anything is decoded, and what is refused."""

from dataclasses import replace

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.data.collate import collate
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.pairs import PairBuilder, sides
from megatron_omni.data.record import RecordError, parse_record
from megatron_omni.data.responses import responses_of
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sources import JsonlSource, parse_line
from tests.unit.tiny_data import row, tiny_recipe, write_clip, write_image, write_sound, write_source

WHERE = "f.jsonl:4"


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "a.png", level=10)
    write_image(tmp_path / "b.png", level=200, size=(56, 28))
    write_sound(tmp_path / "s.wav", 1.2)
    write_clip(tmp_path / "v.mp4", [64, 128], sound=True)
    return tmp_path


def recipe_of(folder, sources=(), *, share_prompt=True, **data):
    recipe = tiny_recipe(folder, list(sources), **data)
    return replace(recipe, task="preference", preference=replace(recipe.preference, share_prompt=share_prompt))


def pair(question="<image> what?", chosen="a cat", rejected="a dog and a violin", **extra):
    return row(question, chosen, rejected_response=rejected, **extra)


def turns(question, answer, *earlier):
    return [*earlier, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def record_of(folder, content):
    import json

    return parse_line(json.dumps(content).encode(), where=WHERE, source="s", root=folder)


ROWS = [
    pair(images=["a.png"]),
    pair("<video> and <audio>?", videos=["v.mp4"], audios=["s.wav"]),
    pair("what?"),
    row("<image> what?", "a cat", images=["a.png"], rejected_messages=turns("<image> what?", "a violin")),
    row("<image> what?", "a cat", images=["a.png"], rejected_images=["b.png"],
        rejected_messages=turns("<image> what?", "a cat")),
    row("<image> <audio> what?", "a cat", images=["a.png"], audios=["s.wav"], rejected_images=["b.png"],
        rejected_messages=turns("<audio> or <image>, what?", "a dog", {"role": "user", "content": "hear?"},
                                {"role": "assistant", "content": "a banana"})),
]  # fmt: skip
SAME = [True, True, True, True, False, False]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_pair_holds_both_conversations_and_learns_both_answers(folder, number, share):
    builder, record = PairBuilder(recipe_of(folder, share_prompt=share)), record_of(folder, ROWS[number])
    plain, tokenizer = SampleBuilder(recipe_of(folder)), builder.tokenizer
    found = sides(record)
    assert found.same_prompt == SAME[number]
    sample = builder.build_sample(record)
    batch = collate([sample], pad_id=0, rule=builder.rule)
    responses = responses_of(batch)
    end = tokenizer.special("<|im_end|>")
    told = [[*tokenizer.encode(side.answer), end] for side in found[:2]]
    assert [of[valid].tolist() for of, valid in zip(responses.of(batch.labels), responses.valid)] == told
    assert int((sample.labels != IGNORE_LABEL).sum()) == sum(map(len, told))
    # Each side is the conversation that supervised training would read, up to its last answer's last token.
    alone = [plain.build_sample(replace(side, rejected=None)) for side in found[:2]]
    tiles = [x.tiles for x in alone if x.tiles is not None]
    if SAME[number] and share:
        assert sample.length == alone[0].length - len(told[0]) + sum(map(len, told)) - 1 - len(tokenizer.encode("\n"))
        expected = tiles[:1]
    else:
        ends = [a.length - 1 - len(tokenizer.encode("\n")) for a in alone]
        assert sample.length == sum(ends)
        for name in ("input_ids", "position_ids", "modality"):
            both = torch.cat([getattr(a, name)[..., :end] for a, end in zip(alone, ends)], dim=-1)
            assert getattr(sample, name).equal(both), name
        expected = tiles
    assert (sample.tiles is None) == (not expected) and (not expected or sample.tiles.equal(torch.cat(expected)))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_the_size_is_known_before_anything_is_decoded(folder, number, share):
    builder, record = PairBuilder(recipe_of(folder, share_prompt=share)), record_of(folder, ROWS[number])
    size, sample = builder.size(record), builder.build_sample(record)
    counts = [int((sample.modality == kind).sum()) for kind in Modality]
    assert [*size[:4]] == counts and size.tokens == sample.length
    assert size.tiles == (0 if sample.tiles is None else len(sample.tiles))
    assert size.chunks == (0 if sample.chunks is None else len(sample.chunks))


BAD = [
    (row("what?", "a cat"), "rejected_response .*is missing"),
    (pair("what?", rejected="a cat"), "is the chosen answer; drop the row"),
    (row("what?", "a cat", rejected_messages=turns("what?", "a cat")), "is the chosen answer"),
    (row("what?", "a cat", rejected_messages=turns("who?", "a dog")), "asks something else than messages"),
    (row("<image> what?", "a cat", images=["a.png"], rejected_messages=turns("what?", "a dog")), "asks something else"),
    (row("<image>?", "a cat", images=["a.png"], rejected_images=["a.png"], rejected_messages=turns("<image>?", "a cat")),
     "is the chosen answer"),
    ({"messages": turns("what?", "a cat")[:1], "rejected_response": "x"}, "is preferred to no answer"),
    ({"messages": turns("what?", "a cat")[:1], "rejected_messages": turns("what?", "x")}, "messages .*does not end with"),
    (row("what?", "a cat", rejected_messages=turns("what?", "x")[:1]), "rejected_messages .*does not end with"),
    (pair("what?", rejected_messages=turns("what?", "x")), "give one of the two"),
    (pair("<image>?", images=["a.png"], rejected_images=["b.png"]), "give one of the two"),
    (pair("what?", rejected="  "), "rejected_response.content .*empty answer"),
    (pair("what?", rejected=["x"]), "rejected_response.content .*list of content parts"),
    (row("<image>?", "a", images=["a.png"], rejected_images=["a.png", "b.png"], rejected_messages=turns("<image>?", "b")),
     r"rejected_images .*2 file\(s\) for 1 <image>"),
    (row("<image>?", "a", images=["a.png"], rejected_images=["../b.png"], rejected_messages=turns("<image>?", "b")),
     "climbs out"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_what_is_no_pair_is_refused(folder, content, said):
    with pytest.raises(RecordError, match=said) as caught:
        sides(record_of(folder, content))
    assert str(caught.value).startswith(WHERE)


def test_a_supervised_task_reads_the_chosen_answer_of_the_same_row(folder):
    record = record_of(folder, ROWS[0])
    chosen = parse_record(row("<image> what?", "a cat", images=[str(folder / "a.png")]))
    plain = SampleBuilder(tiny_recipe(folder, []))
    assert plain.build_sample(record).labels.equal(plain.build_sample(chosen).labels)
    assert not record.extra


def test_the_loader_reads_pairs_and_passes_over_bad_ones(folder):
    """A step of four pairs; sizes are the pairs' also where the source has an index, which knows the chosen side."""
    from megatron_omni.data.prepare import index_files

    bad = pair("what?", rejected="a cat")
    source = write_source(folder, "pairs", [*ROWS, bad, pair("is it?"), pair("how?")], epochs=None)
    recipe = recipe_of(folder, [source], global_batch_size=4, micro_batch_size=2)
    plain = StepLoader(recipe, data_rank=0, data_size=1)
    steps = [plain.next_step() for _ in range(3)]
    assert all(batch.num_samples == 2 for step in steps for batch in step)
    assert all(
        len(responses_of(batch).valid) == 4 and responses_of(batch).lengths.min() > 0 for b in steps for batch in b
    )
    assert plain.report() == {"bad_pair": 1} or plain.report() == {"bad_pair": 2}
    index_files([folder / "pairs.jsonl"], recipe.data.tokenizer)
    indexed = StepLoader(recipe, data_rank=0, data_size=1)
    for step in steps:
        for mine, theirs in zip(step, indexed.next_step(), strict=True):
            assert mine.input_ids.equal(theirs.input_ids) and mine.attention == theirs.attention
    assert isinstance(indexed.sources[0], JsonlSource) and indexed.sources[0].index is not None
