"""The reward accuracy: what math-verify takes for equal, and what a comparison that never ends costs."""

import importlib.util
import os
import signal

import pytest

from megatron_omni.config.objectives import RewardConfig
from megatron_omni.rewards import Rewards
from megatron_omni.rewards import accuracy as module
from megatron_omni.rewards.accuracy import Accuracy

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is not installed: pip install 'megatron-omni[rl]'",
)
T = "<think>It may be 7.</think>"
NASTY = "$9^{9^{9^{9}}}$"
EQUAL = [
    # solution, answer, value
    ("3", "3", 1.0),
    ("3", "4", 0.0),
    ("\\frac{1}{2}", "0.5", 1.0),
    ("$\\frac{1}{2}$", "\\boxed{\\frac{2}{4}}", 1.0),
    ("24/7", "\\boxed{\\frac{24}{7}}", 1.0),
    ("$24/7$", "3.4286", 0.0),
    ("x^2+2x+1", "\\boxed{(x+1)^2}", 1.0),
    ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", 1.0),
    ("50\\%", "0.5", 1.0),
    ("$x=3$", "3", 1.0),
    ("$5$", "5 cm", 1.0),
    ("1,000", "1000", 1.0),
    ("$\\{1,2\\}$", "\\boxed{\\{2,1\\}}", 1.0),
    (["7", "8"], "8", 1.0),
    (12, "the total is 12", 1.0),
    ("\\frac{\\pi}{2}", "So it is $\\frac{\\pi}{2}$.", 1.0),
    ("\\frac{\\pi}{2}", "So it is $\\frac{\\pi}{2}$, about 1.57.", 0.0),  # the last expression counts
    ("2\\sin x", "\\boxed{2 \\sin(x)}", 1.0),
    ("x = 2", "2", 1.0),
    ("(1, 2)", "\\boxed{(1,2)}", 1.0),
    ("3.5", "\\boxed{7/2}", 1.0),
    ("3", "", 0.0),
    (None, "3", None),
    ("no mathematics at all", "3", None),
]


@pytest.fixture(scope="module")
def accuracy():
    """Two processes, for all tests of this file."""
    found = Accuracy(processes=2, timeout_seconds=2.0)
    yield found
    found.close()


@needs_math_verify
def test_what_is_equal(accuracy):
    values = accuracy(completions=[T + answer for _, answer, _ in EQUAL], solution=[right for right, _, _ in EQUAL])
    wrong = [(row, value) for row, value in zip(EQUAL, values, strict=True) if row[2] != value]
    assert not wrong
    assert accuracy.take_counts() == {}


@needs_math_verify
def test_a_comparison_that_never_ends_costs_one_process_and_not_the_run(accuracy):
    accuracy(completions=[f"{T}1"] * 2, solution=["1", "2"])
    before = {child._process.pid for child in accuracy._children}
    answers = [*(f"{T}{n}" for n in range(20)), T + NASTY]
    values = accuracy(completions=answers, solution=["3"] * 20 + ["$10^{10}$"])
    assert values == [float(n == 3) for n in range(20)] + [0.0]
    assert accuracy.take_counts() == {"hung": 1}
    assert len(before & {child._process.pid for child in accuracy._children}) == len(before) - 1
    assert accuracy(completions=[f"{T}5"], solution=["5"]) == [1.0]


@needs_math_verify
def test_a_process_that_dies_is_replaced_and_counted(accuracy):
    accuracy(completions=[f"{T}1", f"{T}2"], solution=["1", "1"])
    ready = sum(child.is_free for child in accuracy._children)
    for child in accuracy._children:
        os.kill(child._process.pid, signal.SIGKILL)
        child._process.wait()
    assert accuracy(completions=[f"{T}{n}" for n in range(4)], solution=list(range(4))) == [1.0] * 4
    assert accuracy.take_counts() == {"lost": ready}


@needs_math_verify
def test_a_process_that_never_starts_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 0.0)
    broken = Accuracy(processes=1)
    with pytest.raises(RuntimeError, match="did not start within 0 s, 3 times; python -m"):
        broken(completions=[f"{T}1"], solution=["1"])
    assert not broken._children


@needs_math_verify
def test_equal_comparisons_are_made_once(accuracy, monkeypatch):
    asked = []
    compare = accuracy._compare
    monkeypatch.setattr(accuracy, "_compare", lambda rows: asked.append(len(rows)) or compare(rows))
    assert accuracy(completions=[f"{T}3"] * 8, solution=["3"] * 8) == [1.0] * 8
    assert asked == [1]


@needs_math_verify
def test_as_a_reward_hung_processes_are_counted_by_name(tmp_path):
    config = RewardConfig(function="accuracy", settings={"timeout_seconds": 1.0, "processes": 1})
    with Rewards([config], run_dir=tmp_path) as rewards:
        scores = rewards.score(
            completions=[T + NASTY], prompts=["q"], completion_ids=[[1]], finish_reasons=["stop"], step=1,
            columns={"solution": ["$10^{10}$"]},
        )  # fmt: skip
    assert scores.totals == [0.0]
    assert scores.metrics()["reward/accuracy/hung"] == 1.0


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"accuracy needs math-verify.*pip install 'megatron-omni\[rl\]'"):
        Accuracy()


@needs_math_verify
def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="processes = 0"):
        Accuracy(processes=0)
