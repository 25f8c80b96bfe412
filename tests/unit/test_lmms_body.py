"""What the lmms-eval plug-in makes of a task's messages and settings (examples/lmms_eval_plugin), without lmms-eval."""

import base64
import io
import tomllib
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
from megatron_omni_lmms.asking import without_thought
from megatron_omni_lmms.body import THINKING, chat_messages, generation_fields, visual_part, wav_bytes
from PIL import Image

from megatron_omni.config.thinking import SYSTEM_TEMPLATES

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "lmms_eval_plugin"


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(";base64,")[2])


def test_parts_keep_their_order_and_media_lose_nothing(tmp_path: Path) -> None:
    noise = numpy.random.default_rng(0)
    pixels = noise.integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    wave = noise.uniform(-1, 1, 321).astype(numpy.float32)
    (tmp_path / "v.webm").write_bytes(b"clip")
    (tmp_path / "p.jpg").write_bytes(b"jpeg")
    parts = [
        {"type": "text", "text": "one"},
        {"type": "audio", "url": {"array": wave, "sampling_rate": 8000}},
        {"type": "image", "url": Image.fromarray(pixels)},
        {"type": "text", "text": "two"},
        {"type": "video", "url": str(tmp_path / "v.webm"), "start_time": None},
        {"type": "image", "url": str(tmp_path / "p.jpg")},
        {"type": "audio", "url": {"bytes": b"OggS", "path": "a.ogg"}},
    ]
    (message,) = chat_messages([{"role": "user", "content": parts}])
    assert message["role"] == "user"
    one, sound, picture, two, clip, file, ogg = message["content"]
    assert (one, two) == ({"type": "text", "text": "one"}, {"type": "text", "text": "two"})
    read, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])), dtype="float32")
    assert rate == 8000 and numpy.array_equal(read, wave) and sound["input_audio"]["format"] == "wav"
    assert picture["image_url"]["url"].startswith("data:image/png;")
    assert numpy.array_equal(numpy.asarray(Image.open(io.BytesIO(decoded(picture["image_url"]["url"])))), pixels)
    assert clip["video_url"]["url"].startswith("data:video/webm;") and decoded(clip["video_url"]["url"]) == b"clip"
    assert file["image_url"]["url"].startswith("data:image/jpeg;") and decoded(file["image_url"]["url"]) == b"jpeg"
    assert ogg["input_audio"] == {"data": base64.b64encode(b"OggS").decode(), "format": "ogg"}


@pytest.mark.parametrize("shape", [(400,), (400, 2), (2, 400)])
@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
def test_a_waveform_becomes_a_wav_file_that_others_read(shape: tuple[int, ...], dtype: str) -> None:
    noise = numpy.random.default_rng(1).uniform(-1, 1, shape)
    wave = (noise * 32767).astype("int16") if dtype == "int16" else noise.astype(dtype)
    read, rate = soundfile.read(io.BytesIO(wav_bytes(wave, 16_000)), dtype="int16" if dtype == "int16" else "float32")
    expected = wave.T if shape == (2, 400) else wave
    assert rate == 16_000 and numpy.array_equal(read, expected if dtype == "int16" else expected.astype("float32"))


def test_pictures_that_png_has_not_become_rgb() -> None:
    (message,) = chat_messages(
        [{"role": "user", "content": [{"type": "image", "url": Image.new("CMYK", (2, 2), (0, 255, 255, 0))}]}]
    )
    picture = Image.open(io.BytesIO(decoded(message["content"][0]["image_url"]["url"])))
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 0, 0)


def test_the_system_prompt_stands_before_the_tasks() -> None:
    task = [{"role": "system", "content": [{"type": "text", "text": "be short"}]}, {"role": "user", "content": "hi"}]
    system, user = chat_messages(task, system_prompt=THINKING)
    assert system == {"role": "system", "content": f"{THINKING}\nbe short"}
    assert user == {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    assert SYSTEM_TEMPLATES["thinking"] == THINKING, "a thought is asked for in the same words on both ways"
    assert chat_messages(task)[0] == {"role": "system", "content": "be short"}
    assert [m["role"] for m in chat_messages(task[1:], system_prompt="s")] == ["system", "user"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "depth", "url": "x"}, "type 'depth'"),
        ({"type": "video", "url": "x.mp4", "end_time": 3.0}, "end_time of a video"),
        ({"type": "video", "url": 7}, "medium of type int"),
        ({"type": "audio", "url": {"array": numpy.zeros((2, 2, 2)), "sampling_rate": 1}}, r"shape \(2, 2, 2\)"),
    ],
)
def test_what_cannot_be_sent_is_named(part: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chat_messages([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, {"temperature": 0.0}),
        # as lmms-eval hands it over for most tasks
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]},
         {"temperature": 0.0, "max_completion_tokens": 16}),
        ({"until": ["\n\n", "Q:", ""]}, {"temperature": 0.0, "stop": ["Q:"]}),
        ({"until": "Q:"}, {"temperature": 0.0, "stop": ["Q:"]}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.5}, {"temperature": 0.7, "top_p": 0.5}),
        ({"temperature": 0.2}, {"temperature": 0.2}),
        ({"temperature": 0, "top_p": 0}, {"temperature": 0.0}),
        ({"top_p": None, "num_beams": None, "image_aspect_ratio": "original"}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.2, "top_k": 5}, {"temperature": 0.0, "extra_body": {"repetition_penalty": 1.2, "top_k": 5}}),
    ],
)  # fmt: skip
def test_generation_settings(given: dict[str, Any], fields: dict[str, Any]) -> None:
    before = dict(given)
    assert generation_fields(given) == fields
    assert given == before


def test_a_limit_of_the_model_stands_above_the_tasks() -> None:
    assert generation_fields({"max_new_tokens": 16}, max_new_tokens=4096)["max_completion_tokens"] == 4096


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 3}, "num_beams is 3"),
        ({"visual_cot": True}, r"visual_cot \(true\)"),
        ({"tempreature": 0}, "tempreature"),
    ],
)
def test_settings_that_the_server_has_not_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generation_fields(given)


def test_the_package_needs_openai_alone() -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert [name.partition(">")[0] for name in project["dependencies"]] == ["openai"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["megatron_omni"].partition(":")
    assert f"def {function}(" in (PLUGIN / f"{module.replace('.', '/')}.py").read_text()


def test_a_thought_is_none_of_the_answer() -> None:
    assert without_thought("<think>\nred or blue?</think>\n\nred\n") == "red\n"
    assert without_thought(" red ") == " red "


def test_visuals_of_tasks_without_messages() -> None:
    picture, wave = Image.new("RGB", (2, 2)), {"array": numpy.zeros(4), "sampling_rate": 8000}
    assert [visual_part(value)["type"] for value in (picture, wave, "clip.mp4")] == ["image", "audio", "video"]
    assert visual_part(wave)["url"] is wave
