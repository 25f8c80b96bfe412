"""The questions of ``make reason``: answers in equal shares, thoughts that come to them, rules that read what is said, and
how each question is asked."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is not installed

from examples.quickstart import compose  # noqa: E402
from examples.quickstart.assets import load_assets  # noqa: E402
from examples.quickstart.compose import is_held_out  # noqa: E402
from examples.quickstart.tokenizer import train_tokenizer  # noqa: E402
from examples.reason import ask, corpus, measure, questions  # noqa: E402
from examples.reason.questions import ANSWERS, SOURCES, conclusion, contradicts, split  # noqa: E402
from examples.reason.rewards import permuted, right  # noqa: E402
from megatron_omni.batch import IGNORE_LABEL  # noqa: E402
from megatron_omni.config.load import load_recipe  # noqa: E402
from megatron_omni.data.record import Message  # noqa: E402
from megatron_omni.data.sample import SampleBuilder  # noqa: E402
from megatron_omni.rewards.shape import is_well_formed  # noqa: E402

SIZES = {"demonstrations": 12, "prompts": 12, "held_out": 60, "choice": 12}


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reason")
    corpus.compose(out, sizes=SIZES)
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("thought", "answer"),
    [
        ("cat left of horse:3+5", "8"), ("cat above horse:5+5", "10"), (" pig left of egg:3+3 ", "6"),
        ("cat horse:3,5", "2"), ("horse cat:5,3", "1"), ("cat dog:3,3", "0"), ("cat dog:4,3", "1"),
        ("cat left said: horse:3,5<", "right"), ("cat up said: horse:3,5<", "down"), ("horse up said: cat:5,3>", "up"),
        ("cat down said: dog:3,3=", "down"), ("cat down said: horse:5,3>", "down"),
        ("cat left said: horse:3,5>", None), ("cat left said: dog:3,3<", None), ("horse up said: cat:5,3=", None),
        ("cat left of horse:3,5", None), ("cat horse:3+5", None), ("cat horse", None), ("cat:3,5", None),
        ("cat horse:3,", None), ("cat left said: horse", None), ("cat above said: horse:3,5<", None), ("", None),
        ("cat horse:3,5 cat", None), ("cat horse:13,5", None), ("cat left said: horse:3,5", None), ("cat horse:3,5<", None),
    ],
)  # fmt: skip
def test_what_a_thought_comes_to(thought: str, answer: str | None) -> None:
    assert conclusion(thought) == answer


@pytest.mark.parametrize(
    ("said", "thought", "answer", "bad"),
    [
        ("<think>a b:3,3</think>0", "a b:3,3", "0", False),
        ("<think>a b:3,3</think> 0 ", "a b:3,3", "0", False),
        ("<think>a b:3,3</think>1", "a b:3,3", "1", True),
        ("<think>a b</think>0", "a b", "0", True),
        ("0", None, "0", True),
        ("<think>a b:3,3", None, "<think>a b:3,3", True),
        ("0<think>a b:3,3</think>0", None, "0", True),
        ("<think>a b:3,3<think></think>0", None, "0", True),
        ("<think>a b:3,3</think></think>0", None, "0", True),
    ],
)
def test_thought_and_answer_are_told_apart(said: str, thought: str | None, answer: str, bad: bool) -> None:
    assert split(said) == (thought, answer)
    assert contradicts(said) is bad


def test_the_reward_is_for_an_answer_behind_a_thought() -> None:
    said = ["<think>a b:3,3</think>0", "<think>a b:9,3</think>0", "0", "<think>a b:3,3</think>1", "<think>0"]
    assert right(said, ["0"] * 5, prompts=[""] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_all_answers_come_equally_often_and_thoughts_come_to_them(composed: Path) -> None:
    for source in SOURCES:
        found = rows(composed / "held_out" / f"{source}.jsonl")
        counts = Counter(row["solution"] for row in found)
        assert set(counts) == set(ANSWERS[source]) and len(counts) >= 3
        assert set(counts.values()) == {SIZES["held_out"] // len(ANSWERS[source])}
        assert all(conclusion(row["thought"]) == row["solution"] == row["messages"][-1]["content"] for row in found)
        assert questions.CHANCE[source] == pytest.approx(1 / len(counts))


def test_pairs_that_the_quickstart_holds_out_stay_held_out(composed: Path) -> None:
    names = load_assets().english
    for name, held_out in (("demonstrations", False), ("prompts", False), ("held_out", True), ("choice", True)):
        for source in SOURCES:
            for row in rows(composed / name / f"{source}.jsonl"):
                thought = row.get("thought") or split(row["messages"][-1]["content"])[0]
                if thought:
                    words = re.findall(r"[a-z]+", thought)
                    assert is_held_out(*[names.index(word) for word in words if word in names]) is held_out


def test_every_demonstration_is_there_with_a_thought_and_without(composed: Path) -> None:
    for source in SOURCES:
        found = rows(composed / "demonstrations" / f"{source}.jsonl")
        for thinking, at_once in zip(found[::2], found[1::2], strict=True):
            assert at_once["messages"][-1]["content"].startswith("<think></think>")
            assert is_well_formed(thinking["messages"][-1]["content"])
            assert not contradicts(thinking["messages"][-1]["content"])
            assert split(thinking["messages"][-1]["content"])[1] == split(at_once["messages"][-1]["content"])[1]
            assert [turn["role"] for turn in thinking["messages"]] == ["system", "user", "assistant"]
            assert [turn["role"] for turn in at_once["messages"]] == ["user", "assistant"]
            assert all(thinking[kind] == at_once[kind] for kind in ("images", "audios", "videos"))


def test_the_same_seed_composes_the_same(composed: Path, tmp_path: Path) -> None:
    corpus.compose(tmp_path, sizes={"choice": 5})
    for source in SOURCES:
        assert rows(tmp_path / "choice" / f"{source}.jsonl") == rows(composed / "choice" / f"{source}.jsonl")[:5]
        media = sorted((tmp_path / "choice" / "media" / source).iterdir())
        assert all(
            one.read_bytes() == (composed / "choice" / "media" / source / one.name).read_bytes() for one in media
        )


def test_another_question_is_never_the_same_one_and_of_its_source(composed: Path) -> None:
    asked = ask.read_questions(composed / "held_out", limit=7)
    partner = ask.neighbours(asked, seed=0)
    assert sorted(partner) == list(range(len(asked)))
    for place, other in enumerate(partner):
        assert place != other and asked[place].record.source == asked[other].record.source
        swapped = ask.with_media_of(asked[place], asked[other])
        given = asked[other].record
        assert (swapped.record.images, swapped.record.videos) == (given.images, given.videos)
        assert swapped.expected == asked[place].expected and swapped.record.messages == asked[place].record.messages
    at_once = ask.at_once(asked[0])
    assert at_once.record.messages == asked[0].record.messages[1:] and at_once.thought == ""


def test_only_a_thought_that_comes_to_another_answer_is_forced(composed: Path) -> None:
    asked = ask.read_questions(composed / "held_out", limit=1)[1]
    assert (asked.record.source, asked.expected) == ("speech", "1")
    forced = ask.with_thought_of(asked, "<think>cat horse:3,5</think>1")
    assert forced is not None and (forced.expected, forced.thought) == ("2", "cat horse:3,5")
    assert ask.with_thought_of(asked, "<think>horse dog:5,3</think>1") is None
    assert ask.with_thought_of(asked, "<think>cat dog</think>0") is None
    assert ask.with_thought_of(asked, "5") is None


def test_a_forced_thought_is_the_beginning_of_the_answer(composed: Path, tmp_path: Path) -> None:
    """The same tokens and positions as those of an answer with this thought, up to where the answer proper begins."""
    tokenizer = train_tokenizer(compose.tokenizer_corpus(load_assets()), tmp_path / "t.model")
    recipe = load_recipe(ROOT / "recipes/tiny/reason/1_cold_start.yaml", [f"data.tokenizer={tokenizer}"])
    builder = SampleBuilder(recipe)
    for asked in ask.read_questions(composed / "held_out", limit=1):
        said = questions.with_thought("cat horse:3,5", "2")
        turns = (*asked.record.messages[:-1], Message("assistant", said))
        whole = builder.build_sample(replace(asked.record, messages=turns))
        forced = ask.prompt_of(replace(asked, thought="cat horse:3,5"), builder)
        plain = ask.prompt_of(asked, builder)
        assert forced.input_ids.tolist() == [
            *plain.input_ids,
            *builder.tokenizer.encode("<think>cat horse:3,5</think>"),
        ]
        assert forced.input_ids.tolist() == whole.input_ids[: forced.length].tolist()
        assert forced.position_ids.equal(whole.position_ids[:, : forced.length])
        assert forced.next_position == int(whole.position_ids[0, forced.length])
        assert (forced.labels == IGNORE_LABEL).all() and forced.modality.equal(whole.modality[: forced.length])


def test_scores_are_shares_of_what_was_said(composed: Path) -> None:
    """A model that always thinks of nothing and says 0, and one that follows what is forced."""
    asked = ask.read_questions(composed / "held_out", limit=5)

    def says(given: list[ask.Asked], temperature: float, samples: int) -> list[list[measure.Response]]:
        text = {True: "<think>a b:3,3</think>0", False: "0"}
        said = []
        for one in given:
            is_thinking = one.record.messages[0].role == "system"
            answer = one.expected if one.thought else text[is_thinking]
            said.append([measure.Response(one.record.source, one.record.id, one.expected, answer, 9, False)] * samples)
        return said

    said = measure.measure(says, asked, ways=measure.WAYS, samples=2)
    assert list(said) == list(measure.WAYS) and len(said["sampled"]) == 2 * len(asked)
    scores = measure.by_source(said)
    assert scores["speech"]["greedy"] == scores["speech"]["sampled"] == scores["speech"]["no_think"] == 0.2
    assert scores["picture"]["greedy"] == scores["clip"]["swapped_media"] == 0.0
    assert scores["all"]["greedy"] == pytest.approx(1 / 15, abs=1e-4) and scores["all"]["count"] == 15
    assert scores["all"]["format"] == 1.0 and scores["all"]["contradiction"] == 0.0 and scores["all"]["length"] == 9
    assert scores["all"]["swapped_thought"] == 1.0  # of the 14 where a thought of 0 is another answer
    assert len(said["swapped_thought"]) == 14


def test_permuted_rewards_are_those_of_what_groups_with_spread_say_dealt_anew() -> None:
    said = [
        "<think>a</think>1",
        *["<think>a</think>2"] * 3,
        *["<think>b</think>1"] * 3,
        "c",
        *["<think>d</think>1"] * 8,
    ]
    columns = {"solution": ["1"] * 16, "thought": ["a"] * 4 + ["b"] * 4 + ["d"] * 8, "prompts": [""] * 16}
    dealt = [permuted(completions=said, step=step, **columns) for step in range(60)]
    assert all(totals[8:] == [1.5] * 8 for totals in dealt), "a group without spread keeps its reward"
    assert all(len(set(totals[1:4])) == len(set(totals[4:7])) == 1 for totals in dealt), (
        "equal responses, equal rewards"
    )
    distinct = [(totals[0], totals[1], totals[4], totals[7]) for totals in dealt]
    assert all(sorted(four) == [0.0, 0.5, 1.5, 1.5] for four in distinct)
    assert len(set(distinct)) == 12, "dealt over the batch, not within a group"
    assert dealt[3] == permuted(completions=said, step=3, **columns)


def test_permuted_rewards_pull_a_group_that_says_two_things_as_hard_as_its_own() -> None:
    """The gradient of such a group is (sum of A over one of the two texts) x (difference of the texts' gradients)."""

    def pull(totals: list[float], text: list[bool]) -> float:
        spread = pstdev(totals)
        return abs(sum((total - fmean(totals)) / spread for total, own in zip(totals, text) if own)) if spread else 0.0

    texts = [[place < count for place in range(8)] for count in (1, 3, 6)]
    said = [f"<think>a</think>{int(own)}" for text in texts for own in text]
    columns = {"solution": ["1"] * 24, "thought": [str(place // 8) for place in range(24)], "prompts": [""] * 24}
    kept = 0
    for step in range(30):
        totals = permuted(completions=said, step=step, **columns)
        for number, text in enumerate(texts):
            own = pull([float(one) for one in text], text)
            found = pull(totals[8 * number : 8 * number + 8], text)
            kept += found > 0.0
            assert found == pytest.approx(own) or found == 0.0
    assert kept > 30  # of 90; the others were dealt one reward and are left out
