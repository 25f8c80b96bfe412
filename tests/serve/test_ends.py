"""How a server ends, what it refuses before it starts, and who is let in."""

import asyncio
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import openai
import psutil
import pytest

from megatron_omni.cli.serve import main, parse
from megatron_omni.serve.guard import Guard
from tests.serve.harness import _rank, serving
from tests.serve.test_server import QUESTIONS, ask, direct_answers
from tests.trained import Trained

LONG = {
    "model": "tiny", "messages": [{"role": "user", "content": "red"}], "temperature": 0, "max_completion_tokens": 220,
    "extra_body": {"ignore_eos": True},
}  # fmt: skip


class Listener(threading.Thread):
    """Reads a long streamed answer."""

    def __init__(self, client: openai.OpenAI, **settings: Any) -> None:
        super().__init__()
        self._client, self._settings = client, LONG | settings
        self.begun = threading.Event()
        self.chunks, self.error, self.reason = 0, None, None
        self.start()
        assert self.begun.wait(120)

    def run(self) -> None:
        try:
            for chunk in self._client.chat.completions.create(stream=True, **self._settings):
                self.chunks += bool(chunk.choices[0].delta.content)
                self.reason = chunk.choices[0].finish_reason
                if self.chunks > 2:
                    self.begun.set()
        except openai.OpenAIError as error:
            self.error = error
        self.begun.set()


def test_a_stopped_server_ends_its_running_answers_first(trained: Trained, tmp_path: Path) -> None:
    """And lets in nobody without a key before that, nor anybody new after."""
    keys = tmp_path / "keys"
    keys.write_text("first-secret\nsecond-secret\n")
    with serving(trained.run_dir, "--api-key-file", str(keys), log=tmp_path / "log") as server:
        for key in ("", "first-secre", "first-secret\n second-secret"):
            with pytest.raises(openai.AuthenticationError) as caught:
                server.client(api_key=key.replace("\n", "") or "no").models.list()
            assert (
                caught.value.code == "invalid_api_key" and caught.value.response.headers["www-authenticate"] == "Bearer"
            )
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{server.url}/metrics")
        assert urlopen(f"{server.url}/health").status == urlopen(f"{server.url}/").status == 200
        client = server.client(api_key="second-secret")
        listener = Listener(client)
        children = psutil.Process(server.ranks[0].pid).children(recursive=True)
        os.kill(server.ranks[0].pid, signal.SIGTERM)
        with pytest.raises(openai.OpenAIError) as refused:
            while True:  # until the signal has been seen
                client.chat.completions.create(**(LONG | {"max_completion_tokens": 1}))
        assert getattr(refused.value, "code", "shutting_down") == "shutting_down"
        listener.join(120)
        assert (listener.error, listener.reason) == (None, "length"), (tmp_path / "log").read_text()
        assert server.wait() == [0], (tmp_path / "log").read_text()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_two_ranks_answer_alike_and_a_dead_one_ends_the_server(trained: Trained, tmp_path: Path) -> None:
    log = tmp_path / "log"
    question = {"model": "tiny", "messages": [{"role": "user", "content": "blue one two"}], "temperature": 0}
    with serving(trained.run_dir, log=tmp_path / "alone") as server:
        alone = server.client().chat.completions.create(max_completion_tokens=12, **question)
        assert server.stop() == [0]
    tensor = "parallel.tensor_model_parallel_size=2"
    with serving(trained.run_dir, tensor, ranks=2, log=log) as server:
        client = server.client()
        both = client.chat.completions.create(max_completion_tokens=12, **question)
        assert both.choices[0].message.content == alone.choices[0].message.content
        listener = Listener(client)
        os.kill(server.ranks[1].pid, signal.SIGKILL)
        listener.join(120)
        assert isinstance(listener.error, openai.APIError) and "the model has ended" in str(listener.error)
        assert server.wait() == [1, -signal.SIGKILL], log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.parametrize("children", [2, 5], ids=["while it starts", "ready"])
def test_nothing_outlives_a_server_that_is_killed(trained: Trained, tmp_path: Path, children: int) -> None:
    """HTTP alone, then with its server of builders, a tracker and two builders."""
    log = tmp_path / "log"
    log.touch()
    server = multiprocessing.get_context("fork").Process(
        target=_rank, args=([str(trained.run_dir), "--port", "0"], 0, 1, 0, log, {})
    )
    server.start()
    family = psutil.Process(server.pid)
    while len(found := family.children(recursive=True)) < children:
        assert server.is_alive(), log.read_text()
    server.kill()
    server.join()
    _, alive = psutil.wait_procs(found, timeout=60)
    assert not alive, log.read_text()


def test_replicas_share_the_requests(trained: Trained, tmp_path: Path) -> None:
    """Two replicas that meet in every MoE layer: answers are those of one rank, whichever replica gives them."""
    direct = direct_answers(trained)[: len(QUESTIONS)]
    expert = "parallel.expert_model_parallel_size=2"
    with serving(trained.run_dir, expert, "--max-running", "3", ranks=2, log=tmp_path / "log") as server:

        async def ask_all() -> list[Any]:
            client = server.async_client()
            many = [client.chat.completions.create(**ask(question)) for question in [*QUESTIONS, *QUESTIONS]]
            return await asyncio.gather(*many, client.chat.completions.create(**ask(QUESTIONS[0], n=3)))

        *answers, three = asyncio.run(ask_all())
        assert [answer.choices[0].message.content for answer in answers] == [*direct, *direct]
        assert {choice.message.content for choice in three.choices} == {direct[0]}
        assert (server.metrics()["omni:num_requests_running"], server.metrics()["omni:kv_cache_usage_perc"]) == (0, 0)
        listener = Listener(server.client())
        assert server.stop() == [0, 0], (tmp_path / "log").read_text()
        listener.join(120)
        assert (listener.error, listener.reason) == (None, "length")
    assert "Traceback" not in (tmp_path / "log").read_text()


BAD = {
    "no checkpoint": (["{tmp}/nothing"], "no such checkpoint directory"),
    "open to all": (["{tmp}", "--host", "0.0.0.0"], "without a key"),
    "an empty key file": (["{tmp}", "--api-key-file", "{tmp}/empty"], "holds no key"),
    "a short key": (["{tmp}", "--api-key-file", "{tmp}/short"], "8 to 512"),
    "no key file": (["{tmp}", "--api-key-file", "{tmp}/none"], "cannot be read"),
    "a port": (["{tmp}", "--port", "70000"], "--port is 70000"),
    "no builders": (["{tmp}", "--builders", "0"], "--builders is 0"),
    "half of a certificate": (["{tmp}", "--ssl-certfile", "{tmp}/short"], "belong together"),
    "another override": (["{tmp}", "optim.lr=1"], "serving knows"),
    "an option": (["{tmp}", "--prot", "1"], "--prot"),
    "a codec alone": (["{tmp}", "--codec", "{tmp}"], "give --speaker too"),
    "no speaker": (["{tmp}", "--speaker", "{tmp}/none"], "none: no such directory"),
    "a speaker that is none": (["{tmp}", "--speaker", "{tmp}"], "no speech generator"),
    "speakers at once": (["{tmp}", "--max-speaking", "0"], "--max-speaking is 0"),
    "not this machine": (["{tmp}", "--host", "203.0.113.1", "--no-auth"], "cannot listen at 203.0.113.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_command_line_is_one_line_and_status_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("abc")
    arguments, message = BAD[name]
    assert main([word.format(tmp=tmp_path) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_a_directory_without_a_checkpoint_ends_with_status_2(tmp_path: Path) -> None:
    from tests.distributed.harness import run_ranks

    assert run_ranks(_status_of, 1, [str(tmp_path), "--port", "0"]) == [2]


def _status_of(_: Any, words: list[str]) -> int:
    return main(words)


def test_names_of_models(tmp_path: Path) -> None:
    run = tmp_path / "mine" / "checkpoints" / "iter_0000003"
    run.mkdir(parents=True)
    assert parse([str(run)]).settings.name == parse([str(tmp_path / "mine")]).settings.name == "mine"
    assert parse([str(run), "--model-name", "omni"]).settings.name == "omni"


def test_hosts_that_are_served_without_a_key() -> None:
    guard = Guard(None, api_keys=(), allowed_hosts=("box.example",))  # type: ignore[arg-type]
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "10.0.0.1", "BOX.example:80"):
        assert guard._is_known(host), host
    for host in ("", "evil.example", "localhost.evil.example", "box.example.evil:80", "127.0.0.1.evil", "[::1"):
        assert not guard._is_known(host), host
