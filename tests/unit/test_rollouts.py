"""Rollouts on disk: whole or not there, joined over ranks, replaced by a later attempt."""

import dataclasses
import math

import pytest

from megatron_omni.rewards.rollouts import FOLDER, Rollout, iterations, read_rollouts, write_rollouts


def rollout(prompt: int = 0, g: int = 0, iteration: int = 3, **fields) -> Rollout:
    defaults = {
        "source": "counting", "record": 10 + prompt, "id": f"r{prompt}", "where": f"rows.jsonl:{prompt + 1}",
        "turns": [{"role": "user", "content": "<image> How many?"}], "media": [{"kind": "image", "path": "a.png"}],
        "solution": "3", "text": "<think>three 三\u2028</think>3", "tokens": 4, "token_ids": [5, 6, 7, 2], "finish": "stop",
        "rewards": {"number": 1.0, "judge": None}, "total": 1.0, "advantage": -0.5,
    }  # fmt: skip
    return Rollout(iteration=iteration, prompt=prompt, g=g, **(defaults | fields))


def test_ranks_are_joined_in_the_order_of_prompts(tmp_path):
    rows = [rollout(prompt, g) for prompt in range(4) for g in range(2)]
    for rank in range(2):
        mine = [one for one in rows if one.prompt % 2 == rank]
        write_rollouts(tmp_path, mine, iteration=3, rank=rank, ranks=2)
        assert iterations(tmp_path) == ([3] if rank else [])  # not before the last rank
    assert read_rollouts(tmp_path, 3) == rows
    assert read_rollouts(tmp_path, 3)[0].place == ("counting", 10)


def test_an_attempt_on_fewer_ranks_replaces_the_files_of_the_earlier_one(tmp_path):
    for rank in range(2):
        write_rollouts(tmp_path, [rollout(rank)], iteration=3, rank=rank, ranks=2)
    write_rollouts(tmp_path, [rollout(7)], iteration=3, rank=0, ranks=1)
    assert [one.prompt for one in read_rollouts(tmp_path, 3)] == [7]
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    write_rollouts(tmp_path, [rollout()], iteration=3, rank=0, ranks=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rollouts(tmp_path, [rollout(total=math.nan)], iteration=3, rank=0, ranks=1)
    assert read_rollouts(tmp_path, 3) == [rollout()]


def test_iterations_that_are_not_there_and_lines_that_are_no_rollouts(tmp_path):
    with pytest.raises(ValueError, match="no rollouts of iteration 3 from all ranks; it has none"):
        read_rollouts(tmp_path, 3)
    path = write_rollouts(tmp_path, [rollout(iteration=5)], iteration=5, rank=0, ranks=1)
    with pytest.raises(ValueError, match="it has 5 to 5"):
        read_rollouts(tmp_path, 3)
    path.write_text('{"iteration": 5}\n')
    with pytest.raises(ValueError, match=r"rank_0_of_1\.jsonl:1: no rollout: .*missing"):
        read_rollouts(tmp_path, 5)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="no rollout"):
        read_rollouts(tmp_path, 5)


def test_a_field_of_a_later_version_is_passed_over(tmp_path):
    path = write_rollouts(tmp_path, [rollout()], iteration=3, rank=0, ranks=1)
    path.write_text(path.read_text().replace('{"iteration"', '{"new": 1, "iteration"'))
    assert read_rollouts(tmp_path, 3) == [rollout()]
    assert dataclasses.asdict(rollout())["text"].count("\u2028") == 1  # a separator that is no end of a line
