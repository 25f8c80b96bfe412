"""Records with spoken answers as samples of the speech generator: sequence, prefix, sizes from the index, refusals."""

import json
from pathlib import Path

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.config.data import DataConfig, SourceConfig
from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.builders import prompt_builder, sample_builder, size_rule
from megatron_omni.data.codes import write_codes
from megatron_omni.data.errors import RecipeError
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.preflight import inspect
from megatron_omni.data.preflight_page import page
from megatron_omni.data.prepare import index_files
from megatron_omni.data.record import RecordError, parse_record
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sources import open_sources
from megatron_omni.data.speech_pieces import ended
from megatron_omni.data.speech_sample import SpeechSampleBuilder
from megatron_omni.data.speech_sequence import speech_sample
from megatron_omni.data.summary import summarise
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.segments import prefix as prefix_segments
from tests.unit.tiny_data import CORPUS, write_source

JENNY = {"speaker": "Jenny", "language": "English"}
PROMPT = "Language: English; Speaker: Jenny;"
RECORDINGS = [list(range(100)), [7] * 60, [3] * 1000]
FINGERPRINT = "f" * 64


def turns(speech: dict | None, text: str = "the cat is left of the dog", **fields) -> dict:
    answer = {"role": "assistant", "content": text} | ({} if speech is None else {"speech": {**JENNY, **speech}})
    return {"messages": [{"role": "user", "content": "say it"}, answer], **fields}


@pytest.fixture
def recipe(tmp_path):
    tokenizer = tmp_path / "t.model"
    train_sentencepiece(CORPUS, tokenizer, vocab_size=256 + 1 + len(ALL_SPECIALS) + 25, specials=ALL_SPECIALS)
    write_codes(
        tmp_path / "r.codes.safetensors", RECORDINGS, fingerprint=FINGERPRINT, num_codes=128, codes_per_second=40
    )
    speech = SpeechConfig(
        num_codes=128, text_vocab_size=512, prefix_codes=8, least_prefix_codes=3, max_codes=200,
        least_codes_per_token=1.5, most_codes_per_token=40,
    )  # fmt: skip
    model = ModelConfig(vocab_size=speech.ids.num_outputs, vision=None, audio=None, speech=speech)
    data = DataConfig(tokenizer=str(tokenizer), seq_length=400, micro_batch_size=1, global_batch_size=4, sources=[])
    return Recipe(seed=5, model=model, data=data)


@pytest.fixture
def builder(recipe):
    return SpeechSampleBuilder(recipe)


def record_of(tmp_path: Path, speech: dict | None, text: str = "the cat is left of the dog"):
    speech = speech and {**speech, "codes": speech["codes"].replace("r.", f"{tmp_path}/r.")} if speech else speech
    return parse_record(turns(speech, text), where="f.jsonl:4")


def expected(builder, *, text: str, prefix, codes, end: bool = True):
    encode = builder.tokenizer.encode
    said = ended(encode(text), builder.tokenizer) if end else encode(text)
    return speech_sample(builder.speech.ids, prompt=encode(PROMPT), prefix=prefix, text=said, codes=codes)


def same(one, other) -> bool:
    return torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels) and (
        one.attention == other.attention
    )  # fmt: skip


def test_the_whole_recording(tmp_path, builder):
    sample = builder.build_sample(record_of(tmp_path, {"codes": "r.codes.safetensors#0"}))
    assert same(sample, expected(builder, text="the cat is left of the dog", prefix=[], codes=range(100)))
    learned = (sample.labels != IGNORE_LABEL).sum()
    assert learned == 101 and sample.attention == prefix_segments(sample.length - 101, 101)


def test_a_piece_has_the_codes_before_it_as_prefix(tmp_path, builder):
    middle = {"codes": "r.codes.safetensors#0", "start": 40, "stop": 90}
    record = record_of(tmp_path, middle, " the cat is left of")
    sample = builder.build_sample(record)
    found = [n for n in range(3, 9) if same(sample, expected(
        builder, text="the cat is left of", prefix=range(40 - n, 40), codes=range(40, 90), end=False))]  # fmt: skip
    assert len(found) == 1
    assert builder.build_sample(record_of(tmp_path, {**middle, "start": 2, "stop": 60}, "x" * 16)).input_ids.tolist().count(
        builder.speech.ids.prefix[0]
    ) == 1  # fmt: skip
    prompt = builder.build_prompt(record)
    assert same(prompt, expected(builder, text="the cat is left of", prefix=range(32, 40), codes=None, end=False))
    assert builder.prompt_size(record).tokens == prompt.length


def test_prefix_lengths_are_drawn_for_each_sample_and_seed(tmp_path, recipe):
    def lengths(seed):
        recipe.seed = seed
        builder = SpeechSampleBuilder(recipe)
        pieces = [{"codes": "r.codes.safetensors#2", "start": 10 + i, "stop": 70 + i} for i in range(60)]
        samples = [builder.build_sample(record_of(tmp_path, piece)) for piece in pieces]
        opened, closed = builder.speech.ids.prefix
        return [s.input_ids.tolist().index(closed) - s.input_ids.tolist().index(opened) - 1 for s in samples]

    drawn = lengths(1)
    assert set(drawn) == {3, 4, 5, 6, 7, 8} and drawn == lengths(1) != lengths(2)
    recipe.model.speech.prefix_codes = 0
    assert SpeechSampleBuilder(recipe).build_sample(
        record_of(tmp_path, {"codes": "r.codes.safetensors#0", "start": 40})
    ).input_ids.tolist().count(recipe.model.speech.ids.prefix[0]) == 0  # fmt: skip


REFUSED = [
    (None, "the cat", "no_speech"),
    ({"codes": "r.codes.safetensors#9"}, "the cat", "no_codes"),
    ({"codes": "gone.codes.safetensors#0"}, "the cat", "no_codes"),
    ({"codes": "r.codes.safetensors#0", "stop": 101}, "the cat", "no_codes"),
    ({"codes": "r.codes.safetensors#2"}, "the cat is left of the dog", "too_long"),
    ({"codes": "r.codes.safetensors#0", "stop": 12}, "the cat is left of the dog", "misaligned"),
    ({"codes": "r.codes.safetensors#2", "stop": 101}, "a", "misaligned"),
    ({"codes": "r.codes.safetensors#0", "stop": 80}, "cat" * 200, "misaligned"),
]


@pytest.mark.parametrize("speech, text, reason", REFUSED)
def test_what_cannot_be_learned(tmp_path, builder, speech, text, reason):
    record = record_of(tmp_path, speech, text)
    for read in (builder.size, builder.build_sample):
        with pytest.raises(RecordError, match=r"f\.jsonl:4") as error:
            read(record)
        assert error.value.reason == reason


def test_the_bounds_of_codes_for_each_token(tmp_path, builder):
    """``least`` 1.5 x 2/3 = 1 and ``most`` 40 x 3/4 = 30 and 40 codes a token."""
    tokens = len(builder.tokenizer.encode("aa."))
    bounds = (tokens, 30 * tokens + 40)
    for codes, fits in ((bounds[0] - 1, False), (bounds[0], True), (bounds[1], True), (bounds[1] + 1, False)):
        record = record_of(tmp_path, {"codes": "r.codes.safetensors#2", "stop": codes}, "aa.")
        assert bool(builder.sizes.speech.max_codes >= bounds[1] + 1)
        if fits:
            assert builder.build_sample(record).length
        else:
            with pytest.raises(RecordError, match="text and sound do not fit"):
                builder.size(record)


def test_codes_that_the_codebook_lacks(tmp_path, recipe, builder):
    listed = parse_record(turns({"codes": [1, 2, 128] * 10}), where="f.jsonl:4")
    with pytest.raises(RecordError, match=r"holds 128, and codes are 0 \.\. 127"):
        builder.build_sample(listed)
    recipe.model.speech.num_codes = 129
    with pytest.raises(RecipeError, match="num_codes = 128 of its codec"):
        SpeechSampleBuilder(recipe).build_sample(record_of(tmp_path, {"codes": "r.codes.safetensors#0"}))


def rows() -> list[dict]:
    pieces = [{"codes": "r.codes.safetensors#0", "start": i, "stop": 60 + i} for i in range(12)]
    bad = [turns(speech, text) for speech, text, _ in REFUSED]
    return [*map(turns, pieces), *bad, turns({"codes": [5] * 30})]


def sources(tmp_path) -> list[SourceConfig]:
    return [write_source(tmp_path, "spoken", rows())]


@pytest.mark.parametrize("indexed", [False, True])
def test_sizes_are_those_of_the_samples(tmp_path, recipe, builder, indexed, monkeypatch):
    configs = sources(tmp_path)
    if indexed:
        index_files([Path(configs[0].path)], recipe.data.tokenizer)
    (source,) = open_sources(configs, tokenizer=builder.tokenizer)
    if indexed:
        (tmp_path / "r.codes.safetensors").rename(tmp_path / "away")
    sizes: list[int | str] = []
    for row in range(len(source)):
        try:
            sizes.append(builder.row_size(source, row).tokens)
        except RecordError as error:
            sizes.append(error.reason)
    if indexed:
        (tmp_path / "away").rename(tmp_path / "r.codes.safetensors")
    for row, size in enumerate(sizes):
        if isinstance(size, int):
            assert builder.build_sample(source[row]).length == size
    assert sizes[12:-1] == [reason for _, _, reason in REFUSED]


def test_the_loader_trains_on_them(tmp_path, recipe):
    recipe.data.sources = sources(tmp_path)
    recipe.data.max_bad_fraction, recipe.data.packing, recipe.data.micro_batch_size = 1.0, True, 2
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    batches = [batch for _ in range(4) for batch in loader.next_step()]
    ids = recipe.model.speech.ids
    assert {int(i) for batch in batches for i in batch.input_ids[batch.segment_ids < 0]} == {ids.padding}
    assert all((batch.input_ids == ids.codes_start).sum() == batch.num_samples for batch in batches)
    assert all((batch.labels == ids.codes_end).sum() == batch.num_samples for batch in batches)
    assert any(batch.num_samples > 2 for batch in batches)
    reasons = {reason for _, _, reason in REFUSED}
    assert reasons >= set(loader.report()) and loader.num_skipped
    loader.close()


def test_codes_of_another_codec_end_the_run(tmp_path, recipe):
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec/codec.json").write_text(json.dumps({"fingerprint": "e" * 64}))
    recipe.model.speech.codec = str(tmp_path / "codec")
    recipe.data.sources = sources(tmp_path)
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    with pytest.raises(RecipeError, match=r"ffffffffffff.*eeeeeeeeeeee"):
        loader.next_step()
    loader.close()


def test_the_summary_counts_in_codes(tmp_path, recipe, builder):
    configs = sources(tmp_path)
    index_files([Path(configs[0].path)], recipe.data.tokenizer)
    (source,) = open_sources(configs, tokenizer=builder.tokenizer)
    summary = summarise(source, size_rule(recipe, builder.tokenizer))
    assert summary["usable"] == 13 and summary["rejected"] == {
        "no_codes": 3, "misaligned": 3, "no_speech": 1, "too_long": 1,
    }  # fmt: skip
    assert summary["tokens"]["all"] == sum(builder.row_size(source, row).tokens for row in [*range(12), 20])


def test_the_model_says_which_builder(recipe, tmp_path):
    assert type(sample_builder(recipe)) is type(prompt_builder(recipe)) is SpeechSampleBuilder
    recipe.model.speech, recipe.model.vocab_size = None, 512
    assert type(sample_builder(recipe)) is type(prompt_builder(recipe)) is SampleBuilder
    assert (
        type(SampleBuilder(recipe).build_sample(record_of(tmp_path, {"codes": "gone.codes.safetensors#0"}))) is not None
    )


def test_a_tokenizer_larger_than_the_table_is_refused(recipe):
    recipe.model.speech.text_vocab_size = 200
    with pytest.raises(ValueError, match=r"text_vocab_size = 200 is below the \d+ ids of data.tokenizer"):
        SpeechSampleBuilder(recipe)


def test_preflight_shows_the_sequence_and_counts_digits_and_signs(tmp_path, recipe):
    said = ["the cat is left of the dog", "80 cats and 3 dogs", "a cat @ home, 50% of it"]
    made = [turns({"codes": "r.codes.safetensors#0", "start": 20}, text) for text in said]
    recipe.data.sources = [write_source(tmp_path, "spoken", made)]
    recipe.train_iters = 2
    seen = inspect(recipe, num_samples=3, num_steps=2, encoder_rows=lambda sample: (0, 0))
    (source,) = seen.sources
    assert (source.texts_with_digits, source.texts_with_signs) == (2, 1)
    assert any("of 3 texts 2 hold digits and 1 signs" in problem for problem in seen.problems)
    pieces = source.examples[0].pieces
    shown = "".join(piece.text for piece in pieces)
    assert (
        f"<prompt>{PROMPT}</prompt><prefix>" in shown
        and "</prefix><text>the cat is left of the dog.</text><codes>" in shown
    )
    assert pieces[-1].text == "80 codes: 20 21 22 23 24 25 26 27 28 29 30 31 .." and pieces[-1].learned
    assert [piece.learned for piece in pieces[:-1]] == [False] * (len(pieces) - 1)
    assert all(piece.special == (piece.text[0] == "<") for piece in pieces)
    assert "80 codes: 20 21" in page(seen, title="t")
