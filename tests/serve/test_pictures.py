"""Pictures from a real server with OpenAI's own client: of words, of words and a picture, inside chat answers; what is refused; and
the page, in headless Chromium (skipped, with its reason, where there is none). Its model is a tiny one that draws something."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy
import openai
import pytest
from PIL import Image

from megatron_omni.generation.png import facts_of
from tests.serve.harness import Running, serving
from tests.trained import Trained
from tests.unit.in_browser import browser, keep, wait_for  # noqa: F401
from tests.unit.test_cli_generate import command


@pytest.fixture(scope="module")
def server(draws: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(draws.run_dir, "--builders", "1", log=log) as running:
        yield running
        assert all(rank.is_alive() for rank in running.ranks), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()


def png_of(data: str) -> tuple[numpy.ndarray, str, dict[str, Any]]:
    file = io.BytesIO(base64.b64decode(data))
    with Image.open(file) as image:
        pixels = numpy.asarray(image).copy()
    prompt, facts = facts_of(file)  # type: ignore[arg-type]
    return pixels, prompt, facts


def of_url(url: str) -> tuple[numpy.ndarray, str, dict[str, Any]]:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return png_of(data)


def refused(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as error:
        call()
    return error.value


def test_pictures_of_words_are_those_of_the_command_line(server: Running, draws: Trained, tmp_path: Path) -> None:
    made = server.client().images.generate(model="draws", prompt="draw red", n=2, extra_body={"seed": 3, "steps": 3})
    assert made.size == "16x16" and made.usage is not None and made.usage.output_tokens == 2
    (first, prompt, facts), (second, _, _) = (png_of(image.b64_json or "") for image in made.data or [])
    assert prompt == "draw red" and (facts["seed"], facts["steps"], facts["number"]) == (3, 3, 0)
    assert first.shape == (16, 16, 3) and (first != second).any()
    asked = ["--prompt", "draw red", "--draw", tmp_path / "a.png", "--seed", 3, "--steps", 3, "--out", tmp_path]
    (outcome,) = command(draws.run_dir, *asked, "--max-new-tokens", 1)
    assert outcome.status == 0, outcome.err
    with Image.open(tmp_path / "a.png") as image:
        assert numpy.abs(numpy.asarray(image).astype(int) - first).max() <= 1
    assert facts_of(tmp_path / "a.png")[1] == facts


def test_a_picture_is_changed_by_form_and_by_json(server: Running, draws: Trained) -> None:
    source = (draws.media / "1.png").read_bytes()
    client = server.client()
    made = client.images.edit(
        model="draws", image=("a.png", source), prompt="then blue", size="auto", extra_body={"seed": 5}
    )
    (form, prompt, facts) = png_of((made.data or [])[0].b64_json or "")
    assert facts["source"] and prompt == "<image> then blue"
    url = "data:image/png;base64," + base64.b64encode(source).decode()
    body = {"prompt": "then blue", "images": [{"url": url}], "seed": 5}
    said = post(server, "/v1/images/edits", body)
    assert (png_of(said["data"][0]["b64_json"])[0] == form).all()
    other = post(server, "/v1/images/edits", body | {"image_guidance": 3.0})
    assert (png_of(other["data"][0]["b64_json"])[0] != form).any()
    two = client.images.edit(model="draws", image=[("a.png", source), ("b.png", source)], prompt="then blue")
    assert two.data and two.data[0].b64_json


def post(server: Running, path: str, body: Any) -> Any:
    request = Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urlopen(request))


def test_a_size_that_the_model_has_not_is_the_nearest_and_said(server: Running) -> None:
    said = post(server, "/v1/images/generations", {"prompt": "draw red", "size": "400x100"})
    assert said["size"] == "32x8" and "400x100 is none of this model's" in said["note"]
    assert png_of(said["data"][0]["b64_json"])[0].shape == (8, 32, 3)


def chat(**settings: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "draw red"}
    return {
        "model": "draws",
        "messages": [question],
        "temperature": 0,
        "seed": 3,
        "max_completion_tokens": 3,
    } | settings


def test_a_chat_answer_has_its_picture_whole_and_as_a_stream(server: Running) -> None:
    whole = post(server, "/v1/chat/completions", chat(modalities=["image"], image={"steps": 3}))
    message = whole["choices"][0]["message"]
    (part,) = message["images"]
    assert (part["type"], part["index"]) == ("image_url", 0)
    pixels, prompt, facts = of_url(part["image_url"]["url"])
    assert prompt == "draw red" and facts["steps"] == 3
    assert whole["usage"]["completion_tokens_details"]["images"] == 1
    made = server.client().images.generate(model="draws", prompt="draw red", extra_body={"seed": 3, "steps": 3})
    assert (png_of((made.data or [])[0].b64_json or "")[0] == pixels).all()
    stream = server.client().chat.completions.create(
        **chat(stream=True, modalities=["image"], extra_body={"image": {"steps": 3}})
    )
    deltas = [chunk.choices[0] for chunk in stream if chunk.choices]
    images = [image for choice in deltas for image in (choice.delta.model_extra or {}).get("images", [])]
    assert images == [part] and deltas[-1].finish_reason == "length"
    assert [choice.finish_reason for choice in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert "".join(choice.delta.content or "" for choice in deltas) == message["content"]


def test_samples_of_a_chat_answer_have_a_picture_each(server: Running) -> None:
    said = post(server, "/v1/chat/completions", chat(modalities=["image"], n=2, temperature=1))
    first, second = (of_url(choice["message"]["images"][0]["image_url"]["url"])[0] for choice in said["choices"])
    assert (first != second).any()


def test_a_request_for_text_draws_nothing(server: Running) -> None:
    for settings in ({"modalities": ["text"]}, {}):
        said = post(server, "/v1/chat/completions", chat(**settings))
        assert said["usage"]["completion_tokens_details"].get("images", 0) == 0
        assert "images" not in said["choices"][0]["message"]


def test_what_the_server_says_of_itself(server: Running) -> None:
    (model,) = server.client().models.list().data
    assert model.output_modalities == ["text", "image"]  # type: ignore[attr-defined]
    post(server, "/v1/images/generations", {"prompt": "draw red"})
    assert server.metrics()["omni:picture_seconds_count"] >= 1


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "steps": ({"steps": 0}, "steps", "greater than or equal to 1"),
    "many steps": ({"steps": 10_000}, "steps", "less than or equal to 1000"),
    "guidance": ({"guidance": -1.0}, "guidance", "greater than or equal to 0"),
    "size": ({"size": "huge"}, "size", "WIDTHxHEIGHT"),
    "empty size": ({"size": "0x16"}, "size", "WIDTHxHEIGHT"),
    "number": ({"n": 99}, "n", "less than or equal to 8"),
    "url": ({"response_format": "url"}, "response_format", "b64_json"),
    "format": ({"output_format": "webp"}, "output_format", "png"),
    "mask": ({"mask": "x"}, "mask", "drawn anew"),
    "stream": ({"stream": True}, "stream", "False"),
    "words": ({"prompt": "  "}, "prompt", "white space"),
    "unknown": ({"stepps": 3}, "stepps", "did you mean 'steps'?"),
    "model": ({"model": "other"}, "model", "no model 'other'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_by_name(server: Running, name: str) -> None:
    change, param, message = BAD[name]
    wanted = {"model": "draws", "prompt": "draw red"} | change
    error = refused(lambda: server.client().post("/images/generations", body=wanted, cast_to=object))
    assert error.status_code in (400, 404) and error.param == param and message in error.message


def test_bad_sources_are_refused(server: Running, draws: Trained) -> None:
    edit = server.client().images.edit
    good = (draws.media / "1.png").read_bytes()
    for data in (good[:60], b"no picture", b""):
        error = refused(lambda data=data: edit(model="draws", image=("a.png", data), prompt="then"))
        assert error.status_code == 400 and error.param and error.param.startswith("image"), error.message
    error = refused(lambda: server.client().post("/images/edits", body={"prompt": "then"}, cast_to=object))
    assert error.status_code == 400 and error.param == "images"
    broken = Request(
        f"{server.url}/v1/images/edits", b"--x\r\nno end", {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(OSError, match="400"):
        urlopen(broken)
    error = refused(
        lambda: server.client().chat.completions.create(**chat(modalities=["text"], extra_body={"image": {"steps": 3}}))
    )
    assert error.param == "image" and "means nothing" in error.message
    error = refused(lambda: server.client().chat.completions.create(**chat(modalities=["text", "audio", "image"])))
    assert error.param == "modalities"


def test_the_first_of_an_animation_and_an_odd_source_are_drawn(server: Running) -> None:
    for size, mode, form in (((16, 16), "CMYK", "JPEG"), ((1, 1), "RGB", "PNG"), ((3000, 2), "P", "GIF")):
        data = io.BytesIO()
        Image.new(mode, size).save(data, form)
        made = server.client().images.edit(model="draws", image=("a", data.getvalue()), prompt="then")
        assert made.size == ("32x8" if size[0] > 16 else "16x16")


def test_the_page_shows_a_picture_and_takes_it_up_again(server: Running, browser: Any) -> None:  # noqa: F811
    page = browser.new_page()
    page.goto(server.url)
    wait_for(page, "() => document.title === 'draws'")
    page.click("#options")
    page.select_option("#pictures", "drawn")
    page.fill("#text", "draw red")
    page.click("#send")
    wait_for(
        page, "() => { const i = document.querySelector('.assistant .drawn img'); return i && i.naturalWidth === 16; }"
    )
    keep(page, "drawn")
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector("#waiting img")
    page.fill("#text", "then blue")
    wait_for(page, "() => document.querySelector('#send').textContent === 'Send'")  # it stops an answer that goes on
    page.click("#send")
    wait_for(page, "() => document.querySelectorAll('.assistant .drawn img').length === 2")
    page.close()
