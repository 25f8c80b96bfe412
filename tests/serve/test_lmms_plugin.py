"""The lmms-eval plug-in (examples/lmms_eval_plugin) against a real server: answers, order, refusals, likelihoods, its own
server. lmms-eval itself is not needed; ``make lmms-eval`` runs it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from megatron_omni_lmms.asking import Asker, Question
from megatron_omni_lmms.body import chat_messages, generation_fields
from megatron_omni_lmms.local_server import LocalServer
from PIL import Image

from tests.serve.conftest import Trained
from tests.serve.harness import Running

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def question(name: str, *parts: Any, **settings: Any) -> Question:
    messages = [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]
    return Question(name, lambda: {"messages": chat_messages(messages), **generation_fields(SETTINGS | settings)})


def asker(server: Running, **settings: Any) -> Asker:
    return Asker(f"{server.url}/v1", **settings)


@pytest.fixture
def media(trained: Trained) -> dict[str, Any]:
    """As lmms-eval's tasks give them: a Pillow picture, a waveform, the path of a clip."""
    import soundfile

    wave, rate = soundfile.read(trained.media / "2.wav", dtype="float32")
    return {
        "image": {"type": "image", "url": Image.open(trained.media / "1.png")},
        "audio": {"type": "audio", "url": {"array": wave, "sampling_rate": rate}},
        "video": {"type": "video", "url": str(trained.media / "v.mp4")},
    }


def test_answers_are_those_to_the_files_in_the_order_of_the_requests(
    server: Running, trained: Trained, media: dict[str, Any]
) -> None:
    """64 requests, 16 under way: long and short, with media and without; each answer is the one that it gets alone."""
    from tests.serve.test_server import ask, clip, image, sound, words

    def alone(*parts: dict[str, Any]) -> str:
        asked = ask(list(parts), max_completion_tokens=8)
        return server.client().chat.completions.create(**asked).choices[0].message.content or ""

    kinds: list[tuple[list[Any], str]] = [
        (["repeat red green"], alone(words("repeat red green"))),
        ([media["image"], "which colour"], alone(image(trained), words("which colour"))),
        (["how high", media["audio"]], alone(words("how high"), sound(trained))),
        ([media["video"], "then", media["image"], media["audio"], "how"],
         alone(clip(trained), words("then"), image(trained), sound(trained), words("how"))),
        (["two " * 30], alone(words("two " * 30))),
    ]  # fmt: skip
    assert len({answer for _, answer in kinds}) == len(kinds)
    questions = [question(f"q{i}", *kinds[i % 5][0], max_new_tokens=8 if i % 2 else 3) for i in range(64)]
    given = asker(server, concurrency=16).answers(questions)
    assert given[1::2] == [kinds[i % 5][1] for i in range(1, 64, 2)]
    assert len(set(given[::2])) > 1 and all(len(short) < 40 for short in given[::2])


def test_a_body_is_made_when_its_turn_comes(server: Running) -> None:
    """Media of all requests never lie in memory together."""
    made: list[str] = []
    most = 0

    def counted(i: int) -> Question:
        inner = question(f"q{i}", "red", max_new_tokens=2)

        def body() -> dict[str, Any]:
            nonlocal most
            made.append(inner.name)
            most = max(most, len(made) - int(server.metrics()["omni:request_started_total"] - before))
            return inner.body()

        return Question(inner.name, body)

    before = server.metrics().get("omni:request_started_total", 0.0)
    asker(server, concurrency=3).answers([counted(i) for i in range(12)])
    assert made == [f"q{i}" for i in range(12)] and 1 <= most <= 3


def test_a_bad_sample_is_named_and_counted_and_ends_nothing(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    bad = question("sounds, document 7", {"type": "audio", "url": {"bytes": b"hello", "path": "x.wav"}})
    long = question("sounds, document 8", "red " * 900)
    asked = asker(server)
    given = asked.answers([question("a", "red"), bad, long, question("b", "red")])
    assert given[0] == given[3] != "" and given[1:3] == ["", ""]
    assert sorted(asked.refused) == [bad.name, long.name]
    assert "sounds, document 7: refused" in caplog.text and "2 of 4 requests were refused" in caplog.text


def test_what_concerns_all_requests_ends_the_run(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        asker(server, model="gpt").answers([question("a", "red"), question("b", "red")])
    with pytest.raises(ValueError, match="num_concurrent is 0"):
        asker(server, concurrency=0)


def test_likelihoods_are_sums_over_the_continuation(server: Running) -> None:
    client = server.client()
    context, settings = "one two three", {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 1}
    told = client.completions.create(prompt=f"{context} four", **settings).choices[0].logprobs
    count = len(client.post("../tokenize", body={"prompt": context}, cast_to=dict)["tokens"])
    pairs = [("d0", context, " four"), ("d1", f"{context} ", "four")]
    first, spaced = asker(server).likelihoods(pairs)
    assert first == spaced == (pytest.approx(sum(told.token_logprobs[count:]), abs=1e-4), False)
    with pytest.raises(ValueError, match="neither of them empty"):
        asker(server).likelihoods([("d4", "", "red")])


def test_what_the_model_says_itself_is_greedy(server: Running) -> None:
    """Where its text is read as the tokens that it was made of."""
    client, compared = server.client(), 0
    for context in ("one two three", "red", "repeat green", "four five", "low", "and then"):
        made = client.completions.create(model="tiny", prompt=context, max_tokens=2, temperature=0, logprobs=1).choices[
            0
        ]
        read, before = (
            client.post("../tokenize", body={"prompt": text}, cast_to=dict)["tokens"]
            for text in (context + made.text, context)
        )
        if (
            len(read) == len(before) + len(made.logprobs.tokens)
            and made.text.strip()
            and made.finish_reason == "length"
        ):
            again = client.completions.create(model="tiny", prompt=[read], max_tokens=0, echo=True, logprobs=1).choices[
                0
            ]
            if again.logprobs.tokens[len(before) :] == made.logprobs.tokens:
                (found,) = asker(server).likelihoods([("d", context, made.text)])
                assert found == (pytest.approx(sum(made.logprobs.token_logprobs), abs=1e-3), True)
                compared += 1
    assert compared


# ------------------------------------------------------------------------------------------------ a server of its own


def runner(trained: Trained, logs: Path, then: str = "") -> subprocess.Popen[str]:
    """A process that starts a server as lmms-eval would under a launcher, and tells its address."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from megatron_omni_lmms.local_server import LocalServer\n"
        "server = LocalServer(sys.argv[1], python=sys.executable, options='--max-running 4')\n"
        "print(server.url, server.log, flush=True)\n"
        f"{then}"
    )
    path = f"{ROOT}:{ROOT / 'examples' / 'lmms_eval_plugin'}"
    environment = os.environ | {"PYTHONPATH": path, "RANK": "3", "WORLD_SIZE": "4", "TMPDIR": str(logs)}
    words = [sys.executable, "-c", code, str(trained.run_dir)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def server_of(process: subprocess.Popen[str]) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children():
            if "megatron_omni.cli.serve" in child.cmdline():
                return child
        time.sleep(0.02)
    raise AssertionError("no server was started")


def test_its_own_server_answers_and_ends_with_an_interrupted_run(trained: Trained, tmp_path: Path) -> None:
    process = runner(trained, tmp_path, "time.sleep(600)")
    serves = server_of(process)
    assert process.stdout is not None
    url, log = process.stdout.readline().split()
    assert Asker(f"{url}/v1").answers([question("a", "repeat red green")])[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    serves.wait(5)
    assert not Path(log).exists(), Path(log).read_text()  # kept where it did not end with status 0


def test_a_server_does_not_outlive_a_run_that_is_killed(trained: Trained, tmp_path: Path) -> None:
    process = runner(trained, tmp_path)
    serves = server_of(process)
    process.kill()
    process.wait()
    serves.wait(30)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"status 2:\n.*no such checkpoint directory"):
        LocalServer(str(tmp_path / "nothing"), python=sys.executable)
