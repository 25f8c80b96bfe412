"""The judge against a real server on this machine that stalls, refuses, breaks off and says nonsense; and its cache."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_omni.config.objectives import RewardConfig
from megatron_omni.rewards import RewardError, Rewards
from tests.unit.judge_server import Handler, Reply, Server, completion, says, started, status


def stall(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.over.wait(30)


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then: never late for a time-out of single reads."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


def half(handler: Handler, body: dict[str, Any]) -> None:
    data = completion("fine.\nSCORE: 1")
    handler.send(data[: len(data) // 2], length=len(data))


def close(handler: Handler, body: dict[str, Any]) -> None:
    """No byte of an answer."""


@pytest.fixture
def server() -> Iterator[Server]:
    with started() as found:
        yield found


def score(server: Server, run_dir, completions=("<think>a</think>4",), *, also=(), rank=0, **settings):
    given = {"url": server.url, "model": "judge-1", "backoff_seconds": 0.001, "timeout_seconds": 5.0} | settings
    configs = [RewardConfig(function="judge", settings=given), *also]
    count = len(completions)
    with Rewards(configs, run_dir=run_dir, rank=rank) as rewards:
        return rewards.score(
            completions=completions, prompts=["2+2?"] * count, completion_ids=[[1]] * count,
            finish_reasons=["stop"] * count, step=1, columns={"solution": ["4"] * count},
        )  # fmt: skip


def test_what_is_asked_and_what_is_read(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "very secret")
    server.script = [says("Right.\n\nSCORE: 0.75\n")]
    scores = score(server, tmp_path, key_env="JUDGE_KEY", body={"seed": 1})
    assert scores.totals == [0.75] and scores.unanswered_share == 0.0
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["seed"]) == ("judge-1", 0, 1)
    content = asked["messages"][0]["content"]
    assert "2+2?" in content and "Answer to grade:\n4\n" in content and "<think>" not in content
    assert server.headers[0]["Authorization"] == "Bearer very secret"
    assert "very secret" not in (tmp_path / "judge.jsonl").read_text()


@pytest.mark.parametrize(
    "last, value",
    [
        ("SCORE: 1", 1.0), ("**SCORE: 0.5**", 0.5), ("score：0", 0.0), ("Score: 1.0.", 1.0), ("SCORE: 1/1", None),
        ("SCORE: 2", None), ("SCORE: -1", None), ("SCORE:", None), ("I give SCORE: 1", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_line(server, tmp_path, last, value):
    server.script = [says(f"SCORE: 0.25\n{last}" if last else "")]
    scores = score(server, tmp_path, tries=1)
    assert scores.totals == [value]
    assert scores.counts["judge/unanswered"] == (value is None)


@pytest.mark.parametrize(
    "fault",
    [
        status(500), status(503), status(429), status(429, Retry_After="0"), status(408), half, close,
        says("I cannot say."), says("SCORE: 7"),
        lambda handler, body: handler.send(b'{"error": "busy"}'),
        lambda handler, body: handler.send(b'{"choices": []}'),
        lambda handler, body: handler.send(b'{"choices": [{"message": {"content": null}}]}'),
        lambda handler, body: handler.send(b"<html>502</html>"),
        lambda handler, body: handler.send(b"\xff\xfe"),
    ],
)  # fmt: skip
def test_a_fault_is_tried_again_and_abstains_when_it_stays(server, tmp_path, fault):
    server.script = [fault, says("SCORE: 1")]
    found = score(server, tmp_path / "once")
    assert found.totals == [1.0] and len(server.asked) == 2
    assert (found.counts["judge/unanswered"], found.counts["judge/failed_tries"]) == (0, 1)
    server.script, server.asked = [fault], []
    found = score(server, tmp_path / "always")
    assert found.totals == [None] and len(server.asked) == 3
    assert (found.counts["judge/unanswered"], found.unanswered_share) == (1, 1.0)


@pytest.mark.parametrize("fault", [stall, drip])
def test_a_server_that_stalls_is_left_after_the_time_of_a_try(server, tmp_path, fault):
    server.script = [fault, says("SCORE: 1")]
    began = time.monotonic()
    assert score(server, tmp_path, timeout_seconds=0.2).totals == [1.0]
    assert len(server.asked) == 2
    assert time.monotonic() - began < 10  # a drip lasts as long as the test


def test_the_batch_has_a_time_too(server, tmp_path):
    server.script = [says("SCORE: 1"), stall]
    scores = score(server, tmp_path, ["<think>a</think>4", "<think>a</think>5"], batch_seconds=0.3, concurrency=1)
    assert sorted(scores.totals, key=str) == [1.0, None]
    assert scores.unanswered_share == 0.5
    server.script, server.asked = [status(429, Retry_After="3600"), says("SCORE: 1")], []
    assert score(server, tmp_path / "later", batch_seconds=2).totals == [None]  # not waited for
    assert len(server.asked) == 1


def test_retry_after_is_waited_for(server, tmp_path):
    times: list[float] = []

    def timed(reply: Reply) -> Reply:
        def answer(handler: Handler, body: dict[str, Any]) -> None:
            times.append(time.monotonic())
            reply(handler, body)

        return answer

    server.script = [timed(status(429, Retry_After="1")), timed(says("SCORE: 1"))]
    assert score(server, tmp_path).totals == [1.0]
    assert times[1] - times[0] >= 0.99


def test_a_request_that_is_at_fault_itself_is_not_repeated(server, tmp_path):
    server.script = [status(400)]
    assert score(server, tmp_path).totals == [None]
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [401, 403, 404])
def test_an_endpoint_that_refuses_everything_ends_the_run(server, tmp_path, code):
    server.script = [status(code)]
    with pytest.raises(RewardError, match=rf"reward judge: raised .* answers {code} .*check url, model and the key"):
        score(server, tmp_path)


def test_an_endpoint_that_is_not_there_abstains(server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()
    assert score(server, tmp_path, url=url).totals == [None]


def test_a_resume_asks_nothing_twice(server, tmp_path):
    server.script = [says("SCORE: 0.5")]
    answers = ["<think>a</think>4", "<think>a</think>5", "<think>a</think>4"]
    assert score(server, tmp_path, answers).totals == [0.5] * 3
    assert len(server.asked) == 2  # equal answers are one question
    server.script = [says("SCORE: 1")]
    assert score(server, tmp_path, answers, rank=1).totals == [0.5] * 3
    assert len(server.asked) == 2
    assert score(server, tmp_path, answers, model="judge-2").totals == [1.0] * 3  # another judge


def test_a_cache_that_a_kill_has_cut_is_read_as_far_as_it_is_whole(server, tmp_path):
    server.script = [says("SCORE: 0.5")]
    score(server, tmp_path, ["<think>a</think>4"])
    path = tmp_path / "judge.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    server.script = [says("SCORE: 1")]
    assert score(server, tmp_path, ["<think>a</think>4", "<think>a</think>5"]).totals == [0.5, 1.0]
    assert score(server, tmp_path, ["<think>a</think>4", "<think>a</think>5"]).totals == [0.5, 1.0]
    assert len(server.asked) == 2


def test_a_failure_is_not_kept(server, tmp_path):
    server.script = [status(500)]
    assert score(server, tmp_path).totals == [None]
    server.script = [says("SCORE: 1")]
    assert score(server, tmp_path).totals == [1.0]


def test_at_most_so_many_at_once(server, tmp_path):
    def counted(handler: Handler, body: dict[str, Any]) -> None:
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        handler.send(completion("SCORE: 1"))
        with server.lock:
            server.at_once -= 1

    server.script = [counted]
    answers = [f"<think>a</think>{n}" for n in range(20)]
    assert score(server, tmp_path, answers, concurrency=3).totals == [1.0] * 20
    assert server.most_at_once <= 3


def test_a_judge_beside_another_reward_leaves_out_what_it_did_not_answer(server, tmp_path):
    server.script = [status(400), says("SCORE: 1")]
    choice = RewardConfig(function="number")
    answers = ["<think>a</think>4", "<think>a</think>5"]
    with Rewards(
        [RewardConfig(function="judge", settings={"url": server.url, "model": "m", "backoff_seconds": 0.001, "concurrency": 1}),
         choice], run_dir=tmp_path,
    ) as rewards:  # fmt: skip
        scores = rewards.score(
            completions=answers, prompts=["2+2?"] * 2, completion_ids=[[1]] * 2, finish_reasons=["stop"] * 2, step=1,
            columns={"solution": ["4"] * 2}, group_size=2,
        )  # fmt: skip
    missing = scores.values["judge"].index(None)
    assert scores.totals[missing] is None and scores.totals[1 - missing] is not None


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"api_key": "sk-1"}, "settings.api_key: a recipe holds no key"),
        ({"judge_key": "sk-1"}, "a recipe holds no key"),
        ({"body": {"api_key": "sk-1"}}, "settings.api_key: a recipe holds no key"),
        ({"key_env": "sk-abcdef"}, "never the key itself"),
        ({"key_env": "sk_abcdef"}, "never the key itself"),
        ({"key_env": "a1b2c3d4e5f60718293a4b5c6d7e8f90"}, "never the key itself"),
        ({"key_env": "NO_SUCH_VARIABLE_HERE"}, "NO_SUCH_VARIABLE_HERE: this environment variable is not set"),
        ({"url": "https://user:sk-1@host/v1"}, "holds a user, password or query"),
        ({"url": "https://host/v1?key=sk-1"}, "holds a user, password or query"),
        ({"url": "host/v1"}, "give http:// or https://"),
        ({"template": "{prompt}"}, "neither {completion} nor {answer}"),
        ({"template": "{answer} {gold}"}, "template names {gold}"),
        ({"tries": 0}, "tries = 0: must be above 0"),
        ({"modle": "x"}, "no setting 'modle'"),
    ],
)
def test_settings_that_cannot_work(server, tmp_path, settings, said):
    with pytest.raises(ValueError) as raised:
        score(server, tmp_path, **settings)
    assert said in str(raised.value)
    assert "sk-1" not in str(raised.value) and "sk-abc" not in str(raised.value) and "a1b2" not in str(raised.value)
