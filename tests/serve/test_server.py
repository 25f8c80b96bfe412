"""A real server with OpenAI's own client: answers, streams, media, log-probabilities, errors, cancelling, many at once."""

import asyncio
import base64
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import psutil
import pytest

from megatron_omni.data.record import parse_record
from megatron_omni.generation.batches import generate
from megatron_omni.generation.load import open_checkpoint
from tests.distributed.harness import Rank, run_ranks
from tests.serve.harness import Running
from tests.trained import SEQ_LENGTH, Trained

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("repeat red green", "blue one two three", "high", "four five and then low", "two", "red " * 20)
NEW_TOKENS = 12


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(trained: Trained, name: str = "1.png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(trained.media / name, "image/png")}}


def sound(trained: Trained) -> dict[str, Any]:
    data = base64.b64encode((trained.media / "2.wav").read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def clip(trained: Trained) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(trained.media / "v.mp4", "video/mp4")}}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(content: Any, **settings: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_completion_tokens": NEW_TOKENS,
    } | settings  # fmt: skip


def answers_directly(rank: Rank, run_dir: Path, records: list[dict[str, Any]]) -> list[str]:
    """The library's greedy answers, one prompt at a time."""
    checkpoint = open_checkpoint(run_dir)
    model, tokenizer = checkpoint.load_model(), checkpoint.builder.tokenizer
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": NEW_TOKENS, "pg": checkpoint.pg}
    prompts = [checkpoint.builder.build_prompt(parse_record(record)) for record in records]
    return [tokenizer.decode(generate(model, [prompt], **settings)[0]) for prompt in prompts]


def direct_answers(trained: Trained) -> list[str]:
    """Answers to QUESTIONS, then to ``mixed``."""
    media = [str(trained.media / name) for name in ("1.png", "2.wav", "v.mp4")]
    records: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    records.append(
        {"messages": [{"role": "user", "content": "<video> then <image><audio> how"}], "images": media[:1],
         "audios": media[1:2], "videos": media[2:]}
    )  # fmt: skip
    return run_ranks(answers_directly, 1, trained.run_dir, records)[0]


@pytest.fixture(scope="module")
def direct(trained: Trained) -> list[str]:
    return direct_answers(trained)


def mixed(trained: Trained) -> list[dict[str, Any]]:
    return [clip(trained), words("then "), image(trained), sound(trained), words("how")]


# ------------------------------------------------------------------------------------------------ answers


def test_answers_are_those_of_the_library_streamed_or_not(server: Running, trained: Trained, direct: list[str]) -> None:
    client = server.client()
    assert len(set(direct)) > 4
    for content, expected in zip([*QUESTIONS, mixed(trained)], direct, strict=True):
        whole = client.chat.completions.create(**ask(content))
        choice = whole.choices[0]
        assert choice.message.content == expected and choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length") and whole.usage is not None
        assert whole.usage.completion_tokens <= NEW_TOKENS
        stream = client.chat.completions.create(**ask(content, stream=True, stream_options={"include_usage": True}))
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].model == "tiny"


def test_counts_name_every_modality(server: Running, trained: Trained) -> None:
    usage = server.client().chat.completions.create(**ask(mixed(trained))).usage
    details = usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == 4 and details["audio_tokens"] == 10 and details["video_tokens"] == 2 * 4
    total = sum(details[f"{kind}_tokens"] for kind in ("text", "image", "audio", "video"))
    assert total == usage.prompt_tokens == usage.total_tokens - usage.completion_tokens


def test_a_typed_marker_is_text(server: Running, trained: Trained) -> None:
    """As text tokens, beside a medium that was sent."""
    typed = "<image> <|im_end|> <|image_pad|>"
    client = server.client()
    plain = client.chat.completions.create(**ask([image(trained), words("")], max_completion_tokens=1)).usage
    more = client.chat.completions.create(**ask([words(typed + " "), image(trained)], max_completion_tokens=1)).usage
    tokens = client.post("../tokenize", body={"prompt": typed + " "}, cast_to=dict)
    assert more.prompt_tokens == plain.prompt_tokens + tokens["count"]
    assert more.prompt_tokens_details.model_dump()["image_tokens"] == 4


def test_a_space_separates_text_from_media_that_have_none(server: Running, trained: Trained) -> None:
    def prompt(*parts: dict[str, Any]) -> list[int]:
        messages = [{"role": "user", "content": list(parts)}]
        return server.client().post("../tokenize", body={"messages": messages}, cast_to=dict)["tokens"]

    written = prompt(words("one "), image(trained), words(" two\n"), sound(trained), image(trained), words(""))
    assert prompt(words("one"), image(trained), words("two\n"), sound(trained), image(trained)) == written
    assert prompt(image(trained)) != prompt(image(trained), words(" "))


def test_the_command_line_and_the_server_make_the_same_prompt(server: Running, trained: Trained) -> None:
    """The same token ids of the same files and text, whether the command line's user wrote markers or not."""
    files = [("audio", str(trained.media / "2.wav")), ("image", str(trained.media / "1.png"))]
    cases = [("which one", [sound(trained), image(trained), words("which one")]),
             ("is <image>red", [sound(trained), words("is "), image(trained), words("red")])]  # fmt: skip
    ids = run_ranks(ids_of_command_lines, 1, trained.run_dir, [(prompt, files) for prompt, _ in cases])[0]
    for (_, content), expected in zip(cases, ids, strict=True):
        messages = [{"role": "user", "content": content}]
        assert server.client().post("../tokenize", body={"messages": messages}, cast_to=dict)["tokens"] == expected


def ids_of_command_lines(rank: Rank, run_dir: Path, lines: list[tuple[str, list[tuple[str, str]]]]) -> list[list[int]]:
    """Token ids of the prompts that ``cli.generate`` makes."""
    from megatron_omni.cli.generate import parse, turn_record

    builder = open_checkpoint(run_dir).builder
    commands = []
    for prompt, files in lines:
        media = [word for kind, path in files for word in (f"--{kind}", path)]
        commands.append(parse([str(run_dir), "--prompt", prompt, *media, "--out", "nowhere"]))
    return [builder.build_prompt(turn_record(command)).input_ids.tolist() for command in commands]


def test_samples_differ_and_a_seed_repeats_them(server: Running) -> None:
    client = server.client()
    settings = {"temperature": 1.0, "n": 4, "seed": 7}
    first, again = (client.chat.completions.create(**ask("red", **settings)) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 4 and [choice.index for choice in first.choices] == [0, 1, 2, 3]
    other = client.chat.completions.create(**ask("red", **(settings | {"seed": 8})))
    assert [choice.message.content for choice in other.choices] != texts
    streamed: dict[int, str] = dict.fromkeys(range(4), "")
    for chunk in client.chat.completions.create(**ask("red", stream=True, **settings)):
        for part in chunk.choices:
            streamed[part.index] += part.delta.content or ""
    assert list(streamed.values()) == texts


def test_a_stop_string_ends_the_answer_and_is_not_sent(server: Running, direct: list[str]) -> None:
    question, text = max(zip(QUESTIONS, direct), key=lambda pair: len(pair[1]))
    stop = text[2:4]
    whole = server.client().chat.completions.create(**ask(question, stop=["never this", stop]))
    assert whole.choices[0].message.content == text[: text.index(stop)]
    assert (whole.choices[0].finish_reason, whole.choices[0].stop_reason) == ("stop", stop)
    stream = server.client().chat.completions.create(**ask(question, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text[: text.index(stop)]


def test_log_probabilities_are_of_the_chosen_tokens(server: Running, direct: list[str]) -> None:
    whole = server.client().chat.completions.create(**ask(QUESTIONS[1], logprobs=True, top_logprobs=3))
    entries = whole.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace") == direct[1]
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0, "greedy: the chosen one is the most likely"
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[1].logprob <= entry.logprob


def test_a_text_scored_is_the_text_generated(server: Running) -> None:
    """Log-probabilities of a prompt (echo) equal those that were given when the same tokens were made."""
    client = server.client()
    made = client.completions.create(model="tiny", prompt="one two", max_tokens=6, temperature=0, logprobs=2)
    ids = client.post("../tokenize", body={"prompt": "one two"}, cast_to=dict)["tokens"]
    told = client.completions.create(model="tiny", prompt=[ids], max_tokens=6, temperature=0, logprobs=2, echo=True)
    assert told.choices[0].text == "one two" + made.choices[0].text
    assert told.choices[0].logprobs.token_logprobs[0] is None
    new, all_tokens = made.choices[0].logprobs, told.choices[0].logprobs
    assert all_tokens.tokens[len(ids) :] == new.tokens
    scored = client.completions.create(model="tiny", prompt=told.choices[0].text, max_tokens=0, logprobs=0, echo=True)
    kept = scored.choices[0].logprobs
    if kept.tokens == all_tokens.tokens:  # the same text may be other tokens
        assert kept.token_logprobs[1:] == pytest.approx(all_tokens.token_logprobs[1:], abs=1e-4)
    assert all_tokens.token_logprobs[1 : len(ids)] == pytest.approx(kept.token_logprobs[1 : len(ids)], abs=1e-4)
    assert scored.usage.completion_tokens == 0


def test_several_prompts_are_answered_in_order(server: Running) -> None:
    client = server.client()
    prompts = ["red", "green blue", "one"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0)
    alone = [client.completions.create(model="tiny", prompt=p, max_tokens=5, temperature=0) for p in prompts]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]
    assert [choice.index for choice in together.choices] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ what it says of itself


def test_models_health_and_metrics(server: Running) -> None:
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    assert model.input_modalities == ["text", "image", "video", "audio"] and model.max_model_len == SEQ_LENGTH
    assert urlopen(f"{server.url}/health").read() == b'{"status":"ok"}'
    before = server.metrics()
    client.chat.completions.create(**ask("red", max_completion_tokens=3, extra_body={"ignore_eos": True}))
    after = server.metrics()
    said = lambda name: after[name] - before.get(name, 0.0)  # noqa: E731
    assert said("omni:generation_tokens_total") == 3 and said('omni:request_success_total{finish_reason="length"}') == 1
    assert said("omni:request_started_total") == 1 and said("omni:time_to_first_token_seconds_count") == 1
    assert said('omni:prompt_tokens_total{modality="text"}') > 3 and after["omni:num_requests_waiting"] == 0


def test_metrics_tell_what_a_request_was_made_of(server: Running, trained: Trained) -> None:
    before = server.metrics()
    made = server.client().chat.completions.create(**ask(mixed(trained), extra_body={"ignore_eos": True}, seed=1))
    after = server.metrics()
    said = lambda name: after[f"omni:{name}"] - before.get(f"omni:{name}", 0.0)  # noqa: E731
    details = made.usage.prompt_tokens_details.model_dump()
    for kind in ("text", "image", "audio", "video"):
        assert said(f'prompt_tokens_total{{modality="{kind}"}}') == details[f"{kind}_tokens"] > 0
    assert all(said(f'media_decode_seconds_count{{kind="{kind}"}}') == 1 for kind in ("image", "audio", "video"))
    assert all(said(f'encoder_seconds_count{{kind="{kind}"}}') >= 1 for kind in ("image", "audio"))
    assert said("request_queue_time_seconds_count") == 1
    assert 0 < said("request_queue_time_seconds_sum") <= said("time_to_first_token_seconds_sum")
    steps = {phase: said(f'step_seconds_count{{phase="{phase}"}}') for phase in ("prompt", "decode")}
    assert steps["prompt"] >= 1 and steps["decode"] == NEW_TOKENS - 1
    assert said("batch_tokens_count") == sum(steps.values())
    assert said("batch_tokens_sum") == made.usage.prompt_tokens + NEW_TOKENS - 1
    assert said("prefix_cache_queries_total") == made.usage.prompt_tokens and said("prefix_cache_hits_total") == 0
    for layer in ("0", "1"):  # of one of the first steps
        assert 0 < after[f'omni:moe_mean_k{{layer="{layer}"}}'] <= 4
        assert 0 <= after[f'omni:moe_null_share{{layer="{layer}"}}'] < 1


def test_what_comes_later_answers_501(server: Running) -> None:
    client = server.client(max_retries=2)
    for work in (
        lambda: client.audio.speech.create(model="tiny", input="hi", voice="Jenny"),
        lambda: client.images.generate(model="tiny", prompt="a cat"),
        lambda: client.images.edit(model="tiny", image=b"x", prompt="a cat"),
    ):
        with pytest.raises(openai.InternalServerError, match="cannot make") as caught:
            work()
        assert caught.value.status_code == 501 and caught.value.code == "not_implemented"


# ------------------------------------------------------------------------------------------------ errors

ERRORS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str | None, str]] = {
    "another model": ({"model": "gpt"}, openai.NotFoundError, "model", "this server has 'tiny'"),
    "unknown field": ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "'temperature'"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", "not supported"),
    "too long": ({"messages": [{"role": "user", "content": "red " * 900}]}, openai.BadRequestError, "messages", str(SEQ_LENGTH)),
    "no room": ({"max_completion_tokens": SEQ_LENGTH}, openai.BadRequestError, "messages", f"takes {SEQ_LENGTH} together"),
    "spoken": ({"modalities": ["text", "audio"]}, openai.BadRequestError, "modalities", "only text"),
    "two system turns": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]},
        openai.BadRequestError, "messages", "first turn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_openais_and_names_the_field(server: Running, name: str) -> None:
    fields, kind, param, said = ERRORS[name]
    with pytest.raises(kind) as caught:
        server.client().chat.completions.create(**(ask("red") | fields))
    assert caught.value.param == param and said in str(caught.value) and caught.value.type


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}, "is no picture"),
        (
            {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,UklGRgAAAABXQVZF"}},
            "content[1].audio_url.url",
        ),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "content[1].video_url.url"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, "media are not fetched from"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "send the bytes"),
    ],
)
def test_a_bad_medium_is_named(server: Running, part: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**ask([words("see"), part]))
    assert caught.value.status_code in (400, 403)
    assert caught.value.param.startswith("messages[0].content[1].") and said in str(caught.value)
    assert "/tmp" not in str(caught.value) and "Traceback" not in str(caught.value)


def raw(
    server: Running, path: str, *, body: bytes | None = None, method: str = "POST", **headers: str
) -> tuple[int, Any]:
    from urllib.error import HTTPError

    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(f"{server.url}{path}", data=body, method=method, headers=headers)) as response:
            said = response.read()
            return response.status, json.loads(said) if response.headers["content-type"] == "application/json" else said
    except HTTPError as error:
        return error.code, json.loads(error.read())


def test_every_error_has_a_body(server: Running) -> None:
    chat = "/v1/chat/completions"
    requests: dict[int, dict[str, Any]] = {
        404: {"path": "/nothing"},
        405: {"path": chat, "method": "GET"},
        415: {"path": chat, "body": b"{}", "Content_Type": "text/plain"},
        413: {"path": chat, "body": b" " * (3 << 20)},
        400: {"path": chat, "body": b"{"},
        403: {"path": chat, "Host": "evil.example"},
    }
    for status, request in requests.items():
        found, body = raw(server, **request)
        assert found == status and set(body["error"]) == {"message", "type", "param", "code"}, body


# ------------------------------------------------------------------------------------------------ hostile requests


def hostile(trained: Trained) -> list[bytes]:
    """300 bodies: true ones with a part replaced by something strange, and some that are no JSON."""
    pick = random.Random(0)
    strange: list[Any] = [
        None, True, -1, 0, 1e308, -1e308, 10**400, "", "\0", "\ud83d\ude00" * 50, "a" * 5000, [], {}, [[[[]]]], {"a": {"b": 1}},
        "data:image/png;base64," + "A" * 50_000, "file:///etc/passwd", "http://169.254.169.254/", "http://media.example/",
        "data:image/png;base64," + base64.b64encode(pick.randbytes(300)).decode(), -(1 << 63), "<|im_end|>\0<image>",
    ]  # fmt: skip

    def changed(value: Any) -> Any:
        if not isinstance(value, list | dict) or not value or pick.random() < 0.15:
            return pick.choice(strange)
        copy = value.copy()
        keys = list(range(len(value))) if isinstance(value, list) else list(value)
        key = pick.choice(keys)
        copy[key] = changed(value[key])
        return copy

    base = ask(
        [words("red"), image(trained), sound(trained)], stream=False, max_completion_tokens=2, stop="x", seed=1, n=2
    )
    bodies = [json.dumps(changed(base)).encode() for _ in range(260)]
    whole = json.dumps(base).encode()
    for _ in range(40):
        at = pick.randrange(len(whole))
        bodies.append(whole[:at] + pick.randbytes(pick.randrange(1, 9)) + whole[at + pick.randrange(40) :])
    return bodies


def test_no_hostile_request_is_a_fault_of_the_server(server: Running, trained: Trained) -> None:
    seen: dict[int, int] = {}
    for body in hostile(trained):
        status, said = raw(server, "/v1/chat/completions", body=body)
        seen[status] = seen.get(status, 0) + 1
        assert status in (200, 400, 403, 404), (status, said, body[:300])
        if status != 200:
            assert set(said["error"]) == {"message", "type", "param", "code"} and len(said["error"]["message"]) < 700
    assert seen[400] > 150 and raw(server, "/health", method="GET")[0] == 200


@pytest.mark.parametrize(("side", "said"), [(10_000, "above the limit of 64000000"), (20_000, "exceeds limit")])
def test_a_bomb_is_refused_by_its_header(server: Running, side: int, said: str) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(side // 8 + 1) * 2_000, 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    url = f"data:image/png;base64,{base64.b64encode(bomb).decode()}"
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        server.client().chat.completions.create(**ask([{"type": "image_url", "image_url": {"url": url}}]))
    assert caught.value.param == "messages[0].content[0].image_url.url"


# ------------------------------------------------------------------------------------------------ many at once


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    before = server.metrics()
    long = ask("red", max_completion_tokens=200, extra_body={"ignore_eos": True})
    client = server.client()
    with client.chat.completions.create(**long, stream=True) as stream:
        for _, _chunk in zip(range(4), stream):
            pass
    with pytest.raises(openai.APITimeoutError):  # not streamed: only the end of the connection says it
        client.with_options(timeout=0.15).chat.completions.create(**long | {"n": 4})
    deadline = time.monotonic() + 60
    while (now := server.metrics())["omni:num_requests_running"] or now["omni:aborts_total"] < before[
        "omni:aborts_total"
    ] + 2:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    made = now["omni:generation_tokens_total"] - before["omni:generation_tokens_total"]
    assert made < 900, "a thousand tokens were asked for"


def test_a_full_queue_says_so(server: Running) -> None:
    async def flood() -> list[Any]:
        client = server.async_client()
        many = [client.chat.completions.create(**ask("red " * 30, max_completion_tokens=40)) for _ in range(60)]
        return await asyncio.gather(*many, return_exceptions=True)

    outcomes = asyncio.run(flood())
    refused = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
    answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(refused) + len(answered) == 60 and len(answered) >= 24 and refused
    assert refused[0].response.headers["retry-after"] == "2" and refused[0].code == "queue_full"
    assert len({outcome.choices[0].message.content for outcome in answered}) == 1


def test_many_clients_some_of_which_leave(server: Running, trained: Trained, direct: list[str]) -> None:
    """Three rounds of 20 clients: answers right, nothing left behind. ``make stress-serve`` is the long one."""

    async def one(client: openai.AsyncOpenAI, pick: random.Random) -> bool:
        number = pick.randrange(len(direct))
        content = [*QUESTIONS, mixed(trained)][number]
        stream = await client.chat.completions.create(**ask(content, stream=True))
        leaves, text = pick.random() < 0.3, ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if leaves and len(text) > 1:
                await stream.close()
                return True
        return text == direct[number]

    async def round_of(seed: int) -> None:
        client = server.async_client()
        outcomes = await asyncio.gather(*(one(client, random.Random(seed * 100 + i)) for i in range(20)))
        assert all(outcomes)
        await client.close()

    def idle() -> int:
        """Descriptors of all processes of the server once nothing runs."""
        deadline = time.monotonic() + 60
        while (now := server.metrics())["omni:num_requests_running"] or now["omni:num_requests_waiting"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.05)
        assert now["omni:kv_cache_usage_perc"] == 0 and now["omni:media_bytes_waiting"] == 0
        me = psutil.Process(server.ranks[0].pid)
        return sum(process.num_fds() for process in [me, *me.children(recursive=True)])

    def ended() -> float:
        """Requests that were begun and whose end was not counted."""
        now = server.metrics()
        successes = sum(value for name, value in now.items() if name.startswith("omni:request_success_total"))
        return now["omni:request_started_total"] - successes - now["omni:aborts_total"]

    open_before = ended()
    asyncio.run(round_of(0))
    before = idle()
    for seed in (1, 2):
        asyncio.run(round_of(seed))
    time.sleep(0.5)
    assert idle() <= before + 2
    assert ended() == open_before, "each request that begins is counted as an answer or as one whose client left"


# ------------------------------------------------------------------------------------------------ examples


def run_example(words: list[str], server: Running) -> str:
    environment = os.environ | {"URL": server.url, "MODEL": "tiny", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_examples_print_the_answer(server: Running, trained: Trained) -> None:
    picture = trained.media / "1.png"
    question = 'which "colour" \\ is it?'
    expected = server.client().chat.completions.create(
        **ask([image(trained), words(f" {question}")], max_completion_tokens=64)
    )
    text = expected.choices[0].message.content
    client = ["examples/serve/chat.py", question, "--file", str(picture), "--url", f"{server.url}/v1"]
    assert run_example([sys.executable, *client], server) == text + "\n"
    said = json.loads(run_example(["sh", "examples/serve/chat.sh", question, str(picture)], server))
    assert said["choices"][0]["message"]["content"] == text
