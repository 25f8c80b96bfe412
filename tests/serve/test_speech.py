"""Sound from a real server with OpenAI's own client: texts out loud in every format, spoken answers, streams, refusals; and
what the page plays of it, in headless Chromium (skipped, with its reason, where there is none).

A model that has learned to write spoken turns, and a random speech generator (tests/serve/spoken.py). Its sound says nothing,
but the same prompt and text give the same codes, so an answer must sound as ``/v1/audio/speech`` makes it.
"""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import av
import numpy as np
import openai
import pytest

from tests.serve.harness import Running, serving
from tests.serve.listening import ask, choose, downloaded, is_silent, listened, live_samples
from tests.serve.spoken import VOICES, WORDS, Speaking, make_speaking
from tests.unit.in_browser import browser, keep, wait_for  # noqa: F401

RATE, HOP = 1600, 40
"""Of the codec."""
TEXT = "red green, blue red. green blue"


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Speaking:
    return make_speaking(tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def server(speaking: Speaking, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--speaker", str(speaking.speaker), "--codec", str(speaking.codec), "--builders", "1"]
    with serving(speaking.model, *words, log=log) as running:
        yield running
        assert all(rank.is_alive() for rank in running.ranks), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def alone(speaking: Speaking, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A speech generator and no model; its last test ends it."""
    log = tmp_path_factory.mktemp("alone") / "log"
    with serving(speaking.speaker, "--codec", str(speaking.codec), log=log) as running:
        yield running


def say(server: Running, text: str = TEXT, **settings: Any) -> bytes:
    wanted = {"model": "model", "voice": "Jenny", "input": text, "response_format": "wav"} | settings
    return server.client().audio.speech.create(**wanted).read()  # type: ignore[arg-type]


def chat(word: str = "red", voice: str = "Jenny", **settings: Any) -> dict[str, Any]:
    return {
        "model": "model", "messages": [{"role": "user", "content": f"say {word}"}], "temperature": 0,
        "modalities": ["text", "audio"], "audio": {"voice": voice, "format": "wav"}, "max_completion_tokens": 40,
    } | settings  # fmt: skip


def samples_of(sound: bytes) -> int:
    assert sound[:4] == b"RIFF" and int.from_bytes(sound[4:8], "little") == len(sound) - 8
    return int.from_bytes(sound[40:44], "little") // 2


def refused(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as error:
        call()
    return error.value


# ------------------------------------------------------------------------------------------------ texts


def test_a_text_in_every_format_is_as_long(server: Running) -> None:
    wave = say(server)
    samples = samples_of(wave)
    assert samples > 0 and samples % HOP == 0 and say(server) == wave and say(server, voice="Brian") != wave
    seconds = samples / RATE
    for form, slack in (("mp3", 0.4), ("opus", 0.1), ("aac", 0.4), ("flac", 1e-6)):
        with av.open(io.BytesIO(say(server, response_format=form))) as opened:
            rate = opened.streams.audio[0].rate
            length = sum(frame.samples for frame in opened.decode(audio=0)) / rate
        assert abs(length - seconds) <= slack, form
    assert len(say(server, response_format="pcm")) / 2 / 24_000 == pytest.approx(seconds, abs=0.01)


def test_a_stream_brings_the_same_sound_while_it_is_made(server: Running) -> None:
    wanted: dict[str, Any] = {"model": "speaker", "voice": "Jenny", "input": TEXT * 3, "response_format": "wav"}
    whole = say(server, TEXT * 3)
    create = server.client().audio.speech.with_streaming_response.create
    with create(**wanted, extra_body={"stream": True}) as response:
        assert response.headers["content-type"] == "audio/wav"
        parts = [part for part in response.iter_bytes() if part]
    assert len(parts) > 2 and b"".join(parts)[44:] == whole[44:]
    with create(**wanted, stream_format="sse", extra_body={"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    sound = b"".join(base64.b64decode(e["audio"]) for e in events if e["type"] == "speech.audio.delta")
    assert sound[44:] == whole[44:] and lines[-1] == "[DONE]" and events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] * HOP == samples_of(whole)


def test_voices_are_listed_and_others_refused_by_name(server: Running) -> None:
    listed = json.load(urlopen(f"{server.url}/v1/audio/voices"))
    assert [voice["id"] for voice in listed["data"]] == list(VOICES) and listed["sample_rate"] == RATE
    assert [(m.id, m.output_modalities) for m in server.client().models.list().data] == [  # type: ignore[attr-defined]
        ("model", ["text", "audio"]), ("speaker", ["audio"])
    ]  # fmt: skip
    error = refused(lambda: say(server, voice="Nobody"))
    assert (error.status_code, error.code, error.param) == (400, "unknown_voice", "voice")
    assert all(voice in error.message for voice in VOICES)


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"speed": 1.5}, "speed", "at speed 1 alone"),
        ({"input": " \n"}, "input", "white space"),
        ({"input": ".. !? "}, "input", "nothing can be said"),
        ({"input": "a" * 65_537}, "input", "65536"),
        ({"instructions": "slowly"}, "instructions", "one of the two"),
        ({"response_format": "ogg"}, "response_format", "'pcm'"),
        ({"voice": "a;b"}, "voice", "semicolon"),
    ],
)
def test_what_cannot_be_said_is_refused(server: Running, change: dict[str, Any], param: str, said: str) -> None:
    error = refused(lambda: say(server, **change))
    assert (error.status_code, error.param) == (400, param) and said in error.message


def test_a_description_takes_the_place_of_a_voice(server: Running) -> None:
    slow = say(server, voice="style", instructions="An old man speaks slowly.")
    assert samples_of(slow) and slow != say(server) and slow != say(server, voice="style", instructions="A girl.")


def test_a_listener_who_leaves_is_not_spoken_to(server: Running) -> None:
    body = {"model": "model", "voice": "Jenny", "input": f"{TEXT}. " * 1500, "response_format": "pcm", "stream": True}
    request = Request(f"{server.url}/v1/audio/speech", json.dumps(body).encode(), {"Content-Type": "application/json"})
    aborted = server.metrics()["omni:aborts_total"]
    with urlopen(request) as response:
        assert len(response.read(500)) == 500
    assert samples_of(say(server)) and server.metrics()["omni:aborts_total"] == aborted + 1


# ------------------------------------------------------------------------------------------------ answers


def test_an_answer_is_spoken_as_its_turn_says(server: Running) -> None:
    client = server.client()
    for word, voice in zip(WORDS, VOICES, strict=True):
        choice = client.chat.completions.create(**chat(word, voice)).choices[0]
        audio = choice.message.audio
        assert audio is not None and choice.message.content is None and choice.finish_reason == "stop"
        assert audio.transcript == word
        assert base64.b64decode(audio.data) == say(server, word, voice=voice)


def test_a_streamed_answer_brings_sound_and_transcript_in_parts(server: Running) -> None:
    whole = server.client().chat.completions.create(**chat()).choices[0].message.audio
    assert whole is not None
    settings: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(server.client().chat.completions.create(**chat(**settings)))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    said = [delta.model_dump(exclude_none=True) for delta in deltas]
    audio = [delta["audio"] for delta in said if "audio" in delta]
    assert "".join(part.get("transcript", "") for part in audio) == whole.transcript
    data = b"".join(base64.b64decode(part.get("data", "")) for part in audio)
    assert data[44:] == base64.b64decode(whole.data)[44:]
    assert len({part["id"] for part in audio}) == 1 and "expires_at" in audio[-1]
    assert all(not delta.content for delta in deltas)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens_details is not None
    assert chunks[-1].usage.completion_tokens_details.audio_tokens * HOP == samples_of(base64.b64decode(whole.data))


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"audio": {"voice": "Nobody", "format": "wav"}}, "audio.voice", "there are Jenny, Brian"),
        ({"audio": None}, "audio", "is missing"),
        ({"modalities": ["audio"]}, "modalities", '["text", "audio"]'),
        ({"modalities": ["text"]}, "audio", "means nothing"),
        ({"modalities": ["text", "image"], "audio": None}, "modalities", "'image' cannot be made"),
        ({"n": 2}, "n", "one answer is spoken"),
        ({"logprobs": True}, "logprobs", "those of text"),
    ],
)
def test_what_an_answer_cannot_sound_like(server: Running, change: dict[str, Any], param: str, said: str) -> None:
    wanted = {name: value for name, value in chat(**change).items() if value is not None}
    error = refused(lambda: server.client().chat.completions.create(**wanted))
    assert (error.status_code, error.param) == (400, param) and said in error.message


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (360, "dark")])
def test_the_page_plays_a_spoken_answer(browser: Any, server: Running, width: int, scheme: str) -> None:  # noqa: F811
    expected = np.frombuffer(say(server, WORDS[0], response_format="pcm"), "<i2")
    with listened(browser, server.url, width=width, scheme=scheme) as page:
        assert ask(page, f"say {WORDS[1]}").locator("audio, button:has-text('sound')").count() == 0
        assert page.evaluate("told.length") == 0
        choose(page, VOICES[0])
        page.get_by_role("button", name="New chat").click()
        answer = ask(page, f"say {WORDS[0]}")
        assert answer.locator(".body").inner_text() == WORDS[0]
        assert np.array_equal(live_samples(page), expected)
        player = answer.get_by_label("Spoken answer")
        assert np.array_equal(downloaded(page, player), expected)
        is_silent(page)
        assert answer.locator("button:has-text('sound')").count() == 0
        player.evaluate("a => a.play()")
        wait_for(page, "() => document.querySelector('.turn audio').ended")
        keep(page, f"spoken_{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box, body = player.bounding_box(), answer.bounding_box()
        assert box["x"] == body["x"] and box["x"] + box["width"] <= body["x"] + body["width"]


def test_the_page_of_a_speech_generator(browser: Any, server: Running, alone: Running) -> None:  # noqa: F811
    text = f"{TEXT}. " * 2
    expected = np.frombuffer(say(server, text, response_format="pcm"), "<i2")
    with listened(browser, alone.url) as page:
        keep(page, "speaker")
        assert page.locator("#attach, #record, #max_tokens").locator("visible=true").count() == 0
        answer = ask(page, text)
        player = answer.get_by_label("Spoken answer")
        keep(page, "speaking")
        answer.get_by_role("button", name="Stop the sound").click()
        assert answer.locator("button:has-text('sound')").count() == 0
        is_silent(page)
        assert page.evaluate("told.at(-1).context.currentTime < told.at(-1).when"), "not heard to its end"
        assert len(live_samples(page)) and np.array_equal(downloaded(page, player), expected)
        player.evaluate("a => a.play()")
        ask(page, "red")
        assert player.evaluate("a => a.paused"), "one sound at a time"
        answer.get_by_role("button", name="Copy as curl").click()
        assert text.strip() in page.evaluate("navigator.clipboard.readText()")

        page.route("**/v1/audio/speech", lambda route: None)
        page.get_by_label("Message").fill("green")
        page.get_by_label("Message").press("Enter")
        page.locator(".busy").wait_for()
        page.get_by_role("button", name="New chat").click()
        wait_for(page, "() => document.getElementById('send').textContent === 'Send'")
        is_silent(page)
        assert page.locator(".turn").count() == 0


# ------------------------------------------------------------------------------------------------ alone, and ends


def test_a_speech_generator_is_served_alone_and_the_end_of_its_process_ends_the_server(
    server: Running, alone: Running
) -> None:
    import psutil

    assert say(alone, model="speaker") == say(server)
    models = alone.client().models.list().data
    assert [(m.id, m.output_modalities) for m in models] == [("speaker", ["audio"])]  # type: ignore[attr-defined]
    error = refused(lambda: alone.client().chat.completions.create(**chat(model="speaker")))
    assert (error.status_code, error.code) == (501, "not_implemented") and "/v1/audio/speech" in error.message
    children = psutil.Process(alone.ranks[0].pid).children()
    next(p for p in children if "megatron_omni.serve.speaker_process" in p.cmdline()).kill()
    assert alone.wait() == [1] and "error: the speaker has ended" in alone.log.read_text(), alone.log.read_text()
