"""Samples from records: labels, placeholders against encoder inputs, order of media, prompts, and refusals."""

import numpy as np
import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.data.decode.cpu import MediaError
from megatron_omni.data.decode.media import MediaBytes
from megatron_omni.data.record import Record, RecordError, parse_record, record_of_parts
from megatron_omni.data.sample import SampleBuilder
from tests.unit.tiny_data import row, tiny_recipe, write_clip, write_image, write_sound


@pytest.fixture
def build(tmp_path):
    """A builder for a tiny recipe; keyword arguments are data settings."""
    return lambda **data: SampleBuilder(tiny_recipe(tmp_path, [], **data))


def record_of(tmp_path, question: str, answer: str = "a cat", **media) -> Record:
    files = {kind: [str(tmp_path / name) for name in names] for kind, names in media.items()}
    return parse_record(row(question, answer, **files), where="f.jsonl:4")


def test_labels_are_the_answer_shifted_by_one(tmp_path, build):
    builder = build()
    tokenizer = builder.tokenizer
    sample = builder.build_sample(record_of(tmp_path, "what?", "a dog"))
    answer = [*tokenizer.encode("a dog"), tokenizer.special("<|im_end|>")]
    where = (sample.labels != IGNORE_LABEL).nonzero().flatten().tolist()
    assert sample.labels[where].tolist() == answer
    assert where == list(range(where[0], where[0] + len(answer)))
    assert sample.input_ids[where[0] + 1 :][: len(answer)].tolist() == answer
    assert tokenizer.decode(sample.input_ids[: where[0] + 1].tolist(), skip_special=False).endswith("assistant\n")
    assert sample.position_ids.tolist() == [list(range(sample.length))] * 3
    assert sample.next_position == sample.length
    assert sample.tiles is None and sample.chunks is None


def test_every_placeholder_has_its_row_of_encoder_output(tmp_path, build):
    write_image(tmp_path / "dark.png", level=0)
    write_image(tmp_path / "wide.png", level=255, size=(56, 28))
    write_sound(tmp_path / "a.wav", 1.5)
    write_clip(tmp_path / "v.mp4", [64, 128, 192], sound=True)
    record = record_of(
        tmp_path, "<video> then <image>, <audio> and <image>",
        images=["wide.png", "dark.png"], audios=["a.wav"], videos=["v.mp4"],
    )  # fmt: skip
    builder = build()
    sample = builder.build_sample(record)
    counts = torch.bincount(sample.modality, minlength=4).tolist()
    assert (
        counts[Modality.IMAGE] == (2 + 1) * 4 and counts[Modality.VIDEO] == 3 * 4 and counts[Modality.AUDIO] == 4 * 20
    )
    assert sample.tiles is not None and sample.tiles.shape == (6, 3, 28, 28)
    levels = sample.tiles.float().mean(dim=(1, 2, 3)).tolist()
    assert levels == pytest.approx([64, 128, 192, 255, 255, 0], abs=3)  # in the order of the markers
    assert sample.chunks is not None and sample.chunks.shape == (4, 80, 100)
    quiet = sample.chunks.amin(dim=1).mean(dim=1)  # the second chunks are half silence
    assert sample.chunks[0].mean() > sample.chunks[3].mean() and torch.isfinite(quiet).all()
    # Positions: frames 0.5 s apart are one step of theta = 2 apart; all three channels start together.
    times = sample.position_ids[0][sample.modality == Modality.VIDEO].view(3, 4)
    assert (times - times[0, 0]).tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert builder.size(record).tokens == sample.length


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("use_video_sound", [True, False])
def test_length_from_headers_is_the_length_after_decoding(tmp_path, build, sound, use_video_sound):
    write_clip(tmp_path / "v.mp4", [10, 20, 30, 40, 50, 60, 70], sound=sound)
    write_image(tmp_path / "a.png", size=(70, 30))
    builder = build(use_video_sound=use_video_sound, max_frames_with_audio=4, max_frames=6)
    record = record_of(tmp_path, "<video><image>", videos=["v.mp4"], images=["a.png"])
    sample = builder.build_sample(record)
    assert builder.size(record).tokens == sample.length
    assert int((sample.modality == Modality.VIDEO).sum()) == 4 * (4 if sound and use_video_sound else 6)
    assert (sample.chunks is not None) == (sound and use_video_sound)


def test_a_prompt_is_the_start_of_the_sample_with_nothing_to_learn(tmp_path, build):
    write_image(tmp_path / "a.png")
    record = record_of(tmp_path, "<image>what?", images=["a.png"])
    builder = build(system_prompt="be brief")
    prompt, sample = builder.build_prompt(record), builder.build_sample(record)
    n = prompt.length
    assert torch.equal(prompt.input_ids, sample.input_ids[:n])
    assert torch.equal(prompt.position_ids, sample.position_ids[:, :n])
    assert prompt.next_position == int(sample.position_ids[0, n])
    assert (prompt.labels == IGNORE_LABEL).all()
    question = parse_record({"messages": [{"role": "user", "content": "hi"}]})
    assert builder.build_prompt(question).length > 0
    with pytest.raises(RecordError, match="asks nothing"):
        builder.build_prompt(parse_record({"messages": [{"role": "assistant", "content": "hi"}]}))


def test_a_sample_that_is_too_long_says_what_it_is_made_of(tmp_path, build):
    write_image(tmp_path / "a.png", size=(84, 84))
    builder = build(seq_length=50)
    record = record_of(tmp_path, "<image>", images=["a.png"])
    for function in (builder.size, builder.build_sample, builder.build_prompt):
        counts = r"\d+ tokens \(text \d+, image 36, video 0, audio 0\) exceed data.seq_length = 50; shorten"
        with pytest.raises(RecordError, match=r"f.jsonl:4: length = \d+: " + counts) as caught:
            function(record)
        assert caught.value.reason == "too_long"


def test_a_record_without_an_answer_is_refused_for_training(tmp_path, build):
    builder = build()
    for function in (builder.size, builder.build_sample):
        with pytest.raises(RecordError, match="has no answer to learn") as caught:
            function(parse_record({"messages": [{"role": "user", "content": "hi"}]}))
        assert caught.value.reason == "no_answer"


def test_media_without_an_encoder_are_refused(tmp_path):
    write_sound(tmp_path / "a.wav", 0.5)
    write_clip(tmp_path / "v.mp4", [10, 20], sound=True)
    recipe = tiny_recipe(tmp_path, [])
    recipe.model.audio = None
    builder = SampleBuilder(recipe)
    with pytest.raises(RecordError, match=r"audios = .*model.audio is null") as caught:
        builder.build_sample(record_of(tmp_path, "<audio>", audios=["a.wav"]))
    assert caught.value.reason == "no_encoder"
    assert builder.build_sample(record_of(tmp_path, "<video>", videos=["v.mp4"])).chunks is None  # pictures alone


def test_a_clip_longer_than_the_model_takes_is_refused(tmp_path, build):
    write_sound(tmp_path / "a.wav", 4.5)
    builder = build()
    for function in (builder.size, builder.build_sample):
        with pytest.raises((MediaError, RecordError), match=r"4.5 s of sound, above the limit of 4 s") as caught:
            function(record_of(tmp_path, "<audio>", audios=["a.wav"]))
        assert caught.value.reason == "media_too_large"


def test_sound_that_is_not_finite_is_a_media_error(tmp_path, build):
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"a.wav': .*not finite"):
        build().build_sample(record_of(tmp_path, "<audio>", audios=["a.wav"]))


def test_encoder_inputs_that_are_not_finite_are_given_back(tmp_path, build, monkeypatch):
    """The last guard, whatever made them so: here the limit on samples is lifted, and their power overflows."""
    import soundfile

    wave = np.zeros(8000, np.float32)
    wave[100] = 1e20
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    monkeypatch.setattr("megatron_omni.data.processors.MAX_AMPLITUDE", float("inf"))
    with pytest.raises(RecordError, match="an encoder input that is not finite") as caught:
        build().build_sample(record_of(tmp_path, "<audio>", audios=["a.wav"]))
    assert caught.value.reason == "not_finite"


def test_settings_that_cannot_work_are_named(tmp_path, build):
    with pytest.raises(ValueError, match=r"min_frames = 9.*need"):
        build(min_frames=9)
    recipe = tiny_recipe(tmp_path, [])
    recipe.model.vocab_size = 294
    with pytest.raises(ValueError, match=r"model.vocab_size = 294 is below the 295 ids"):
        SampleBuilder(recipe)


def test_a_prompt_in_parts_equals_the_same_with_markers_and_has_the_size_that_headers_say(tmp_path, build):
    builder = build(system_prompt="be brief")
    picture, sound = write_image(tmp_path / "a.png", size=(56, 28)), write_sound(tmp_path / "a.wav", 1.5)
    turns = [
        ("user", [("image", MediaBytes("a", picture.read_bytes())), "what is it? ", ("audio", str(sound)), "and?"])
    ]
    record = record_of_parts(turns, where="request")
    prompt = builder.build_prompt(record)
    marked = record_of(tmp_path, "<image>what is it? <audio>and?", images=["a.png"], audios=["a.wav"])
    expected = builder.build_prompt(marked)
    for name, value in vars(expected).items():
        same = torch.equal(value, getattr(prompt, name)) if torch.is_tensor(value) else value == getattr(prompt, name)
        assert same, name
    assert builder.prompt_size(record).tokens == prompt.length


def test_typed_markers_and_names_of_special_tokens_change_nothing_but_text(tmp_path, build):
    builder = build()
    typed = "<image> <|im_end|> <|image_pad|>"
    prompt = builder.build_prompt(record_of_parts([("user", [typed])], where="request"))
    assert prompt.tiles is None and set(prompt.modality.tolist()) == {Modality.TEXT}
    ids = builder.tokenizer.encode(typed)
    around = builder.build_prompt(record_of_parts([("user", ["x"])], where="request")).input_ids.tolist()
    x = around.index(builder.tokenizer.encode("x")[0])
    assert prompt.input_ids.tolist() == [*around[:x], *ids, *around[x + 1 :]]


def test_a_text_without_turns_is_its_tokens(build):
    builder = build()
    sample = builder.build_text(builder.tokenizer.encode("the cat"))
    assert builder.tokenizer.decode(sample.input_ids.tolist()) == "the cat"
    assert sample.position_ids.tolist() == [list(range(sample.length))] * 3 and sample.next_position == sample.length
