"""Rewards: a table of answers worked by hand, the sum, abstentions, and functions of the user's that fail."""

import math
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_omni.config.objectives import ReinforceConfig, RewardConfig
from megatron_omni.rewards import RewardError, Rewards, columns_of
from megatron_omni.rewards.answer import answer_text
from megatron_omni.rewards.compare import edits
from megatron_omni.rewards.score import join

T = "<think>It may be A, 7 or \\boxed{8}.</think>"
"""A thought with guesses that no parser may take for the answer."""
OPTIONS = ["a red bus", "a blue car", "a bed", "B flat"]


def _value(function, completion, solution=None, *, settings=None, prompt="q", ids=(), reason="stop", **columns):
    """Of one completion."""
    with Rewards([RewardConfig(function=function, settings=settings or {})], run_dir="unused") as rewards:
        found = rewards.score(
            completions=[completion], prompts=[prompt], completion_ids=[list(ids)], finish_reasons=[reason], step=1,
            columns={"solution": [solution], **{name: [cell] for name, cell in columns.items()}},
        )  # fmt: skip
    return found.values[function][0]


ANSWERS = [
    # completion, answer
    (f"{T}B", "B"),
    ("B", ""),  # a thought that never ends has no answer
    (f"{T} <answer> 12 </answer> tail", "12"),
    (f"{T}<answer>1</answer> no, <answer>2</answer>", "2"),
    (f"{T}so \\boxed{{1}}, or rather \\boxed{{\\frac{{1}}{{2}}}}.", "\\frac{1}{2}"),
    (f"{T}<answer>\\boxed{{3}}</answer>", "\\boxed{3}"),
    (f"{T}first</think> second", "second"),
    (f"{T}\\boxed{{unclosed", "\\boxed{unclosed"),
    (T, ""),
]
CHOICES = [
    # completion, solution, options, value
    (f"{T}B", "B", None, 1.0),
    (f"{T}b", "B", None, 1.0),
    (f"{T}The answer is (C).", "C", None, 1.0),
    (f"{T}C. because of A", "C", None, 1.0),
    (f"{T}the bed", "B", None, 0.0),  # contains b, e and d
    (f"{T}The bed is what D shows", "D", None, 1.0),
    (f"{T}A cat sits on B", "B", None, 1.0),  # an article is no letter
    (f"{T}I think it is B", "B", None, 1.0),
    (f"{T}\\boxed{{\\text{{D}}}}", "D", None, 1.0),
    (f"{T}a blue car", "B", OPTIONS, 1.0),
    (f"{T}A BLUE CAR.", "a blue car", OPTIONS, 1.0),
    (f"{T}B flat", "D", OPTIONS, 1.0),  # the text of D
    (f"{T}E", "B", OPTIONS, 0.0),
    (f"{T}答案是B", "B", None, 1.0),
    ("The answer is B", "B", None, 0.0),  # no </think>
    (f"{T}B", "none of them", OPTIONS, None),
    (f"{T}B", None, None, None),
]
NUMBERS = [
    (f"{T}10", "10", 1.0),
    (f"{T}about 10.5 metres", "10", 1.0),  # 5 % off: a tie that floats may lose
    (f"{T}9.5", 10, 1.0),
    (f"{T}11", "10", 0.9),
    (f"{T}1.1", "1", 0.9),  # 0.10000000000000009 in floats
    (f"{T}15", "10", 0.1),
    (f"{T}15.0000001", "10", 0.0),
    (f"{T}-10", "10", 0.0),
    (f"{T}0", "0", 1.0),
    (f"{T}0.0001", "0", 0.0),
    (f"{T}1,000", "1000", 1.0),
    (f"{T}none", "10", 0.0),
    (f"{T}3 of 4", ["9", "4"], 1.0),
    (f"{T}4", "four", None),
]
INTERVALS = [
    (f"{T}from 0 to 10", "[0, 10]", {}, {}, 1.0),
    (f"{T}from 10 to 0", [0, 10], {}, {}, 1.0),  # order fixed up
    (f"{T}5 - 15", [0.0, 10.0], {}, {}, 1 / 3),
    (f"{T}20 to 30", [0, 10], {}, {}, 0.0),
    (f"{T}7", [0, 10], {}, {}, 0.0),
    (f"{T}[0, 0, 10, 10]", [0, 0, 10, 20], {"kind": "box"}, {}, 0.5),
    (f"{T}[10, 10, 0, 0]", "[0, 0, 10, 10]", {"kind": "box"}, {}, 1.0),
    (f"{T}[0, 0, 500, 500]", [0, 0, 320, 240], {"kind": "box", "normalised": 1000}, {"size": [640, 480]}, 1.0),
    (f"{T}[0, 0, 1, 1]", [0, 0, 1], {"kind": "box"}, {}, None),
]
WORDS = [
    (f"{T}the cat sat", "The cat sat.", 1.0),
    (f"{T}the cat", "the cat sat down", 0.5),
    (f"{T}one two three four five", "a", 0.0),  # never below 0
    (f"{T}don't", "dont", 1.0),
    (f"{T}今天天氣", "今天天气", 0.75),  # characters
    (f"{T}hello", "...", None),  # nothing to compare with
    (f"{T}", "hello", 0.0),
]
FORMATS = [
    ("<think>a</think>b", "q", 1.0),
    (" <think>a</think> b", "q", 1.0),
    ("<think></think>b", "q", 0.0),
    ("<think>a</think>", "q", 0.0),
    ("<think>a</think>b</think>c", "q", 0.0),
    ("<think>a<think>b</think>c", "q", 0.0),
    ("so <think>a</think>b", "q", 0.0),
    ("</think>a<think>b", "q", 0.0),
    ("a</think>b", "Assistant: <think>\n", 1.0),  # the prompt opened it
    ("a</think>b", "q", 0.0),
]
SHAPES = [
    ("repetition", {"ids": [1, 2, 3, 4]}, 0.0),
    ("repetition", {"ids": [1, 1, 1, 1, 1, 1]}, -0.75),
    ("repetition", {"ids": [1, 2]}, 0.0),
    ("repetition", {"ids": [1, 2, 1, 2], "settings": {"n": 2, "most": 0.5}}, -1 / 6),
    ("overlong", {"ids": [0] * 6}, 0.0),
    ("overlong", {"ids": [0] * 8}, -0.5),
    ("overlong", {"ids": [0] * 10}, -1.0),
    ("overlong", {"ids": [0] * 7, "reason": "length"}, -1.0),
]


def test_the_table_has_more_than_60_answers():
    """The tables below are what issue 20 asks for."""
    assert sum(map(len, (ANSWERS, CHOICES, NUMBERS, INTERVALS, WORDS, FORMATS, SHAPES))) >= 60


@pytest.mark.parametrize("completion, answer", ANSWERS)
def test_answer(completion, answer):
    assert answer_text(completion) == answer


def test_answer_of_a_model_that_does_not_think():
    assert answer_text("B", thinking=False) == "B"
    assert answer_text("<think>A</think>B", thinking=False) == "B"
    assert _value("choice", "B", "B", settings={"thinking": False}) == 1.0


@pytest.mark.parametrize("completion, solution, options, value", CHOICES)
def test_choice(completion, solution, options, value):
    assert _value("choice", completion, solution, options=options) == value


@pytest.mark.parametrize("completion, solution, value", NUMBERS)
def test_number(completion, solution, value):
    assert _value("number", completion, solution) == value


def test_number_against_its_definition_in_fractions():
    """Every answer from 0.00 to 20.00 to a question whose solution is 10: ties are right."""
    for hundredths in range(0, 2001, 5):
        answer = f"{hundredths / 100:.2f}"
        error = abs(Fraction(answer) - 10) / 10
        right = sum(error <= 1 - Fraction(c, 100) for c in range(50, 100, 5))
        assert _value("number", f"{T}{answer}", "10") == right / 10


@pytest.mark.parametrize("completion, solution, settings, columns, value", INTERVALS)
def test_iou(completion, solution, settings, columns, value):
    found = _value("iou", completion, solution, settings=settings, **columns)
    assert found == (None if value is None else pytest.approx(value, abs=1e-12))


@pytest.mark.parametrize("completion, solution, value", WORDS)
def test_wer(completion, solution, value):
    assert _value("wer", completion, solution) == value


def test_edits_are_those_of_jiwer():
    jiwer = pytest.importorskip("jiwer")
    texts = ["a b c d", "a x c", "d c b a", "a a a b", "b", "c d e f g a b"]
    for given in texts:
        for right in texts:
            found = jiwer.process_words(right, given)
            assert edits(given.split(), right.split()) == found.substitutions + found.deletions + found.insertions


@pytest.mark.parametrize("completion, prompt, value", FORMATS)
def test_think_format(completion, prompt, value):
    assert _value("think_format", completion, prompt=prompt) == value


@pytest.mark.parametrize("function, given, value", SHAPES)
def test_shape(function, given, value):
    settings = {"overlong": {"max_new_tokens": 10, "overlong_tokens": 4}}.get(function, {})
    assert _value(function, "x", **{"settings": settings, **given}) == pytest.approx(value, abs=1e-12)


MINE = '''
import asyncio, math, threading

def length(completions, **columns):
    return [len(text) / 10 for text in completions]

async def slow(completions, prompts, completion_ids, finish_reasons, step, bonus=0.0, **columns):
    await asyncio.sleep(0)
    return [None if level == "hard" else step + bonus for level in columns["level"]]

def short(completions, **columns):
    return [1.0] * (len(completions) - 1)

def nan(completions, **columns):
    return [math.nan if "bad" in text else 0.0 for text in completions]

def text(completions, **columns):
    return ["1.0" for _ in completions]

def one_number(completions, **columns):
    return 1.0

def raises(completions, **columns):
    return [1 / (text != "bad") for text in completions]

async def raises_async(completions, **columns):
    return [1 / (text != "bad") for text in completions]

def hangs(completions, **columns):
    threading.Event().wait(60)

async def hangs_async(completions, **columns):
    await asyncio.Event().wait()

def leaves(completions, **columns):
    raise SystemExit(3)

def no_columns(completions, solution):
    return [1.0 for _ in completions]
'''  # fmt: skip


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def _score(functions, completions, *, group_size=1, step=1, settings=None, **columns):
    configs = [RewardConfig(function=name, weight=weight, settings=settings or {}) for name, weight in functions]
    with Rewards(configs, run_dir="unused") as rewards:
        return rewards.score(
            completions=completions,
            prompts=["q"] * len(completions),
            completion_ids=[[1, 2, 3]] * len(completions),
            finish_reasons=["stop"] * len(completions),
            step=step,
            columns=columns,
            records=[f"rows.jsonl:{place + 1}" for place in range(len(completions))],
            group_size=group_size,
        )


def test_a_reward_of_ones_own_sync_and_async_with_a_setting_and_a_column(mine):
    scores = _score([(f"{mine}:slow", 0.5)], ["ab", "cd"], step=3, settings={"bonus": 1.0}, level=["easy", "hard"])
    assert scores.values == {"slow": [4.0, None]}
    assert scores.totals == [2.0, None]
    both = _score([(f"{mine}:length", 1.0), (f"{mine}:slow", 0.5)], ["ab", "cd"], step=3, level=["easy", "easy"])
    assert both.totals == [0.2 + 1.5, 0.2 + 1.5]


@pytest.mark.parametrize(
    "function, said",
    [
        (
            "short",
            r"reward .*mine\.py:short: gave 2 values for 3 completions \(the first of rows\.jsonl:1\): \[1\.0, 1\.0\]",
        ),
        ("nan", r"reward .*mine\.py:nan: rows\.jsonl:2: gave nan for the completion 'bad'"),
        ("text", r"reward .*mine\.py:text: rows\.jsonl:1: gave '1\.0' for the completion 'ok'"),
        ("one_number", r"reward .*mine\.py:one_number: gave 1\.0 for 3 completions"),
        ("raises", r"reward .*mine\.py:raises: rows\.jsonl:2: raised ZeroDivisionError: division by zero on .* 'bad'"),
        (
            "leaves",
            r"reward .*mine\.py:leaves: rows\.jsonl:1: raised RuntimeError: SystemExit\(3\) on the completion 'ok'",
        ),
        ("raises_async", r"reward .*mine\.py:raises_async: rows\.jsonl:2: raised ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_names_function_record_and_value(mine, function, said):
    with pytest.raises(RewardError, match=said):
        _score([(f"{mine}:{function}", 1.0)], ["ok", "bad", "ok"])


@pytest.mark.parametrize("function", ["hangs", "hangs_async"])
def test_a_reward_that_hangs_ends_the_run(mine, function):
    said = rf"mine\.py:{function}: no values within 0\.05 s.*the first of rows:7"
    rewards = Rewards([RewardConfig(function=f"{mine}:{function}")], run_dir="unused", longest_seconds=0.05)
    with rewards, pytest.raises(RewardError, match=said):
        rewards.score(
            completions=["x"], prompts=["q"], completion_ids=[[1]], finish_reasons=["stop"], step=1, columns={},
            records=["rows:7"],
        )  # fmt: skip


def test_functions_that_cannot_be_opened(mine):
    def opened(name, **settings):
        return Rewards([RewardConfig(function=name, settings=settings)], run_dir="unused")

    with pytest.raises(ValueError, match="did you mean 'choice'"):
        opened("choise")
    with pytest.raises(ValueError, match="has no function 'absent'"):
        opened(f"{mine}:absent")
    with pytest.raises(ValueError, match=r"there is no file .*other\.py"):
        opened("other.py:f")
    with pytest.raises(ValueError, match=r"takes no \*\*columns"):
        opened(f"{mine}:no_columns")
    with pytest.raises(ValueError, match="has no setting 'kinds'; did you mean 'kind'"):
        opened("iou", kinds="box")
    with pytest.raises(ValueError, match=r"judge lacks settings\.url;"):
        opened("judge", model="m")
    with pytest.raises(ValueError, match=r"overlong lacks settings\.max_new_tokens, settings\.overlong_tokens;"):
        opened("overlong")
    with pytest.raises(ValueError, match="judge: settings of another type"):
        opened("judge", url="http://localhost/v1", model="m", tries="many")
    with pytest.raises(ValueError, match=r"settings\.step is what every reward is called with"):
        opened(f"{mine}:slow", step=1)
    with pytest.raises(ValueError, match="at least one function"):
        Rewards([], run_dir="unused")
    mine.write_text("import absent_module")
    mine.rename(mine.with_name("broken.py"))
    with pytest.raises(ValueError, match=r"broken\.py does not load: ModuleNotFoundError"):
        opened(f"{mine.with_name('broken.py')}:f")


def test_a_setting_that_is_a_column_too(mine):
    with pytest.raises(RewardError, match=r"settings\.bonus is a column of the records"):
        _score([(f"{mine}:slow", 1.0)], ["a"], settings={"bonus": 1.0}, bonus=[2.0], level=["easy"])


def test_the_total_is_the_weighted_sum():
    scores = _score([("choice", 1.0), ("think_format", 0.5)], [f"{T}B", f"{T}C", "B"], solution=["B"] * 3)
    assert scores.totals == [1.5, 0.5, 0.0]
    found = scores.metrics()
    assert found["reward/mean"] == pytest.approx(2 / 3)
    assert found["reward/choice"] == pytest.approx(1 / 3)
    assert found["reward/choice/spread"] == pytest.approx(math.sqrt(2) / 3)
    assert found["reward/left_out"] == 0.0


def test_a_record_without_a_usable_solution_is_left_out_and_not_trained_on_its_format():
    scores = _score(
        [("choice", 1.0), ("number", 1.0), ("think_format", 0.5)], [f"{T}B", f"{T}7", f"{T}x"],
        solution=["B", "7", "no choice and no number"],
    )  # fmt: skip
    assert scores.values["choice"] == [1.0, None, None]
    assert scores.values["number"] == [None, 1.0, None]
    assert scores.totals == [1.5, 1.5, None]
    assert _score([("think_format", 0.5)], [f"{T}B"]).totals == [0.5]  # where nothing judges content, the format may


def test_an_abstention_within_a_group_leaves_the_completion_out(mine):
    scores = _score(
        [("choice", 1.0), (f"{mine}:slow", 1.0)], [f"{T}B"] * 4, group_size=2, solution=["B"] * 4,
        level=["easy", "hard", "hard", "hard"],
    )  # fmt: skip
    assert scores.totals == [2.0, None, 1.0, 1.0]  # of the second group it abstains altogether
    assert scores.metrics()["reward/left_out"] == 0.25
    assert scores.metrics()["reward/slow/abstained"] == 0.75


def test_two_of_one_name_and_the_scores_of_ranks_joined(mine):
    configs = [RewardConfig(function="repetition", settings={"n": n}) for n in (1, 2)]
    with Rewards(configs, run_dir="unused") as rewards:
        assert rewards.names == ["repetition", "repetition_2"]
    parts = [_score([("choice", 1.0)], [f"{T}B"], solution=[right]) for right in "BA"]
    assert join(parts).totals == [1.0, 0.0]
    assert join(parts).metrics()["reward/choice"] == 0.5


def test_the_overlong_penalty_of_a_recipe_is_a_reward():
    config = ReinforceConfig(
        overlong="penalize", overlong_tokens=4, max_new_tokens=10, rewards=[RewardConfig(function="choice")]
    )
    with Rewards.of(config, run_dir="unused") as rewards:
        assert rewards.names == ["choice", "overlong"]
        scores = rewards.score(
            completions=[f"{T}B"], prompts=["q"], completion_ids=[[0] * 8], finish_reasons=["stop"], step=1,
            columns={"solution": ["B"]},
        )  # fmt: skip
    assert scores.totals == [0.5]


def test_columns_and_the_solution_that_falls_back_to_the_last_answer():
    columns = columns_of([{"solution": "7", "level": 1}, {"solution": None}, {}], ["six", "eight", None])
    assert columns == {"solution": ["7", "eight", None], "level": [1, None, None]}
    assert columns_of([{}, {}], [None, None]) == {}
    with pytest.raises(ValueError, match="column 'step'"):
        columns_of([{"step": 1}], [None])
    with pytest.raises(RewardError, match="no column 'solution'"):
        _score([("choice", 1.0)], [f"{T}B"])


def test_async_functions_work_side_by_side(tmp_path):
    """Each waits for the other: one after the other would never end."""
    path = tmp_path / "pair.py"
    path.write_text(
        "import asyncio\nevents = {}\n"
        "async def meet(me, other):\n"
        "    events.setdefault(me, asyncio.Event()).set()\n"
        "    await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), 5)\n"
        "async def first(completions, **columns):\n    await meet(1, 2)\n    return [1.0 for _ in completions]\n"
        "async def second(completions, **columns):\n    await meet(2, 1)\n    return [2.0 for _ in completions]\n"
    )
    assert _score([(f"{path}:first", 1.0), (f"{path}:second", 1.0)], ["x"]).totals == [3.0]


def test_consistency_of_thought_and_answer():
    """Cases: tests/unit/test_verify.py."""
    assert _value("consistency", "<think>1 + 2 = 3</think>3") == 1.0
    assert _value("consistency", "<think>1 + 2 = 4</think>3") == 0.0
    assert _value("consistency", "3") is None
