"""Pairs of hand-made rollouts: the rows, the counts, what is dropped, and prompts that were solved."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.chain.config import PairsConfig, PromptsConfig
from megatron_omni.chain.pairs import Unanswered, inputs_of, made_of, make_pairs, pair_sources
from megatron_omni.chain.prompts import dropped_places, left_sources
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.objectives import RewardConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.sources import open_sources
from megatron_omni.data.tokenizer import IM_END, Tokenizer, load_tokenizer
from megatron_omni.rewards.rollouts import Rollout, write_rollouts
from tests.unit.tiny_data import tokenizer_file, write_image

RIGHT, WRONG, ASTRAY = "<think>3 and 5 is 8</think>8", "<think>3 and 5 is 9</think>9", "<think>3 and 5 is 9</think>8"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_file(tmp_path_factory.mktemp("tokenizer")))


class Stage:
    """A reinforced stage of one source of so many prompts, and its rollouts."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, prompts: int = 4) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        (folder / "media").mkdir()
        write_image(folder / "media" / "a.png")
        rows = [
            {
                "messages": [{"role": "user", "content": f"<image> sum {n}?"}, {"role": "assistant", "content": "8"}],
                "images": ["media/a.png"], "id": f"p{n}", "level": n,
            }
            for n in range(prompts)
        ]  # fmt: skip
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.recipe = Recipe(run_dir=str(folder / "6_gspo"), task="reinforce")
        self.recipe.data.tokenizer = str(tokenizer.path)
        self.recipe.data.sources = [SourceConfig(name="sums", path=str(folder / "sums.jsonl"), weight=3.0)]
        self.recipe.reinforce.rewards = [
            RewardConfig(function="number"),
            RewardConfig(function="think_format", weight=0.5),
        ]

    def rollout(self, record: int, g: int, text: str, right: float | None, **change: Any) -> Rollout:
        ids = [*self.tokenizer.encode(text), self.tokenizer.special(IM_END)]
        values: dict[str, Any] = {
            "iteration": 1, "prompt": record, "source": "sums", "record": record, "id": f"p{record}", "where": f"sums:{record}",
            "g": g, "turns": [{"role": "user", "content": f"<image> sum {record}?"}], "media": [], "text": text,
            "tokens": len(ids), "token_ids": ids, "finish": "stop",
            "rewards": {"number": right, "think_format": 1.0}, "total": right, "advantage": None,
        }  # fmt: skip
        return Rollout(**values | change)

    def write(self, *rollouts: Rollout, iteration: int = 1) -> None:
        write_rollouts(self.recipe.run_dir, rollouts, iteration=iteration, rank=0, ranks=1)

    def make(self, **settings: Any) -> dict[str, Any]:
        return make_pairs(PairsConfig(rollouts="6_gspo", **settings), self.recipe, self.folder / "6_pairs")

    def rows(self) -> list[dict[str, Any]]:
        found = pair_sources(self.folder / "6_pairs", self.recipe, Recipe())
        return [json.loads(line) for source in found for line in Path(source.path).read_text().splitlines()]


@pytest.fixture
def stage(tmp_path: Path, tokenizer: Tokenizer) -> Stage:
    return Stage(tmp_path, tokenizer)


def test_pairs_are_rows_of_the_records_with_their_media(stage: Stage) -> None:
    stage.write(
        stage.rollout(0, 0, RIGHT, 1.0), stage.rollout(0, 1, WRONG, 0.0), stage.rollout(0, 2, ASTRAY, 1.0),
        stage.rollout(1, 0, RIGHT, 1.0), stage.rollout(1, 1, RIGHT, 1.0),
        stage.rollout(2, 0, WRONG, 0.0),
    )  # fmt: skip
    report = stage.make()
    rows = stage.rows()
    assert [(row["rejected_response"], row["pair"]) for row in rows] == [
        (ASTRAY, {"kind": "inconsistent", "chosen": "1.0", "rejected": "1.2"}),
        (WRONG, {"kind": "wrong", "chosen": "1.0", "rejected": "1.1"}),
    ]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "<image> sum 0?"}, {"role": "assistant", "content": RIGHT},
    ]  # fmt: skip
    assert (rows[0]["images"], rows[0]["id"], rows[0]["level"]) == (["media/a.png"], "p0", 0)
    assert (report["pairs"], report["prompts"], report["by_kind"]) == (2, 3, {"inconsistent": 1, "wrong": 1})
    assert report["prompts_without"] == {"no_negative": 1, "never_solved": 1}
    assert report["responses"] == {"right": 3, "wrong": 2, "inconsistent": 1}
    reader = Recipe()
    reader.data.sources = [SourceConfig(name="pairs", path="elsewhere.jsonl", epochs=2.0)]
    (source,) = pair_sources(stage.folder / "6_pairs", stage.recipe, reader)
    assert (source.name, source.epochs) == ("sums", 2.0)
    record = open_sources([source])[0][0]
    assert source.weight == 2 and Path(str(record.images[0])).is_file() and record.rejected is not None


def test_what_comes_back_as_other_tokens_and_what_was_cut_is_dropped_and_counted(
    stage: Stage, tokenizer: Tokenizer
) -> None:
    good, bad = stage.rollout(0, 0, RIGHT, 1.0), stage.rollout(0, 1, WRONG, 0.0)
    split = [i for letter in WRONG for i in tokenizer.encode(letter)] + [tokenizer.special(IM_END)]
    special = [*bad.token_ids[:-1], tokenizer.special("<|image_pad|>"), bad.token_ids[-1]]
    assert tokenizer.decode(split) == WRONG and split != bad.token_ids
    stage.write(
        good, bad, stage.rollout(0, 2, WRONG, 0.0, token_ids=split), stage.rollout(0, 3, WRONG, 0.0, token_ids=special),
        stage.rollout(0, 4, WRONG, 0.0, finish="length", token_ids=bad.token_ids[:-1]),
    )  # fmt: skip
    assert stage.make()["responses"] == {"right": 1, "wrong": 1, "cut_or_other_tokens": 3}
    assert len(stage.rows()) == 1


def test_a_prompt_counts_with_its_last_iteration(stage: Stage) -> None:
    stage.write(stage.rollout(0, 0, WRONG, 0.0), stage.rollout(0, 1, RIGHT, 1.0))
    stage.write(
        stage.rollout(0, 0, RIGHT, 1.0, iteration=2), stage.rollout(0, 1, ASTRAY, 1.0, iteration=2), iteration=2
    )
    stage.make()
    assert [row["pair"]["rejected"] for row in stage.rows()] == ["2.1"]


def test_a_teacher_is_checked_by_the_same_rewards(stage: Stage) -> None:
    stage.write(*(stage.rollout(n, 0, WRONG, 0.0) for n in range(3)))
    taught = stage.folder / "teacher.jsonl"
    answers = {"p0": RIGHT, "p1": WRONG, "p9": RIGHT}
    taught.write_text("".join(json.dumps(demonstration(i, text)) + "\n" for i, text in answers.items()))
    report = stage.make(demonstrations=str(taught))
    assert [(row["id"], row["messages"][-1]["content"]) for row in stage.rows()] == [("p0", RIGHT)]
    assert report["by_kind"] == {"wrong": 1, "demonstration": 1}
    assert report["prompts_without"] == {"bad_demonstration": 1, "never_solved": 1}


def demonstration(name: str, text: str) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": demonstration("", RIGHT)["messages"]}], r"teacher.jsonl:1: has no id"),
        ([demonstration("p0", RIGHT)] * 2, r"teacher.jsonl:2: id 'p0' is there twice"),
        ([{"id": "p0", "messages": [{"role": "user", "content": "?"}]}], r"teacher.jsonl:1: has no answer"),
    ],
)
def test_bad_demonstrations_are_named(stage: Stage, rows: list[Any], message: str) -> None:
    stage.write(stage.rollout(0, 0, WRONG, 0.0))
    (stage.folder / "teacher.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        stage.make(demonstrations=str(stage.folder / "teacher.jsonl"))


def test_a_function_of_the_users_can_say_what_is_consistent(stage: Stage) -> None:
    file = stage.folder / "mine.py"
    file.write_text(
        "def agrees(completions, level, **columns):\n"
        "    return [float('is 8' in c and n == 0) for c, n in zip(completions, level)]\n"
    )
    stage.write(*(stage.rollout(n, g, text, 1.0) for n in (0, 1) for g, text in enumerate((RIGHT, ASTRAY))))
    consistency = RewardConfig(function=f"{file}:agrees")
    assert stage.make(consistency=consistency)["prompts_without"] == {"no_positive": 1}
    assert [row["id"] for row in stage.rows()] == ["p0"]
    before = inputs_of(PairsConfig(rollouts="6_gspo", consistency=consistency), stage.recipe)
    file.write_text(file.read_text() + "# another\n")
    after = inputs_of(PairsConfig(rollouts="6_gspo", consistency=consistency), stage.recipe)
    assert {name for name in before if before[name] != after[name]} == {"consistency"}


def test_a_judge_that_is_away_ends_the_stage_and_leaves_no_pairs(stage: Stage) -> None:
    stage.write(stage.rollout(0, 0, RIGHT, 1.0), stage.rollout(0, 1, WRONG, 0.0))
    settings = {"url": "http://127.0.0.1:9/v1", "model": "m", "tries": 1, "timeout_seconds": 1.0}
    with pytest.raises(Unanswered, match="no score to 1 of 1 responses"):
        stage.make(consistency=RewardConfig(function="judge", settings=settings))
    assert made_of(stage.folder / "6_pairs") is None


def test_no_pair_at_all_is_an_error_that_says_what_there_was(stage: Stage) -> None:
    stage.write(stage.rollout(0, 0, RIGHT, 1.0))
    with pytest.raises(
        ValueError, match=r"none of 1 prompts gives a pair \(prompts: no_negative 1; responses: right 1\)"
    ):
        stage.make()
    with pytest.raises(ValueError, match=r"correct: 'accuracy' is no reward of .*number, think_format"):
        stage.make(correct=["accuracy"])


def test_other_data_under_the_rollouts_are_noticed(stage: Stage) -> None:
    stage.write(stage.rollout(0, 0, RIGHT, 1.0, turns=[{"role": "user", "content": "another"}]))
    with pytest.raises(ValueError, match="has another record there now"):
        stage.make()


def test_pairs_are_a_function_of_what_they_are_made_of(stage: Stage) -> None:
    rollouts = [stage.rollout(0, 0, RIGHT, 1.0), stage.rollout(0, 1, WRONG, 0.0)]
    stage.write(*rollouts)
    first, rows = stage.make(), stage.rows()
    assert stage.make() == first and stage.rows() == rows
    assert stage.make(length_factor=2.0)["digest"] != first["digest"]
    stage.write(*rollouts, stage.rollout(0, 2, ASTRAY, 1.0))
    changed = stage.make()
    differ = {name for name in first["inputs"] if first["inputs"][name] != changed["inputs"][name]}
    assert differ == {"rollouts"} and changed["digest"] != first["digest"]


def test_solved_prompts_are_dropped_by_hash_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stage = Stage(tmp_path, tokenizer, prompts=10)
    solved = [*range(5), 9]
    stage.write(
        *(
            stage.rollout(n, g, RIGHT if n in solved else WRONG, float(n in solved or g == 0))
            for n in range(10)
            for g in (0, 1)
        )
    )
    next_stage = Recipe(run_dir=str(tmp_path / "8_gspo"), task="reinforce", seed=5)
    next_stage.data.sources = stage.recipe.data.sources
    config = PromptsConfig(rollouts="6_gspo", drop_solved=0.5)
    (source,) = left_sources(config, stage.recipe, next_stage)
    dropped = dropped_places(config, stage.recipe, 5)
    assert len(dropped) == 3 and {n for _, n in dropped} <= set(solved)
    left = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    assert [row["level"] for row in left] == [n for n in range(10) if ("sums", n) not in dropped]
    record = open_sources([source])[0][0]
    assert record.answer == "8" and Path(str(record.images[0])).is_file() and source.weight == 3.0
    report = json.loads((tmp_path / "8_gspo" / "prompts.json").read_text())
    assert (report["solved"], report["dropped"], report["left"]) == (6, 3, {"sums": 7})
    # The same again, nothing written; another seed drops others; more to drop takes those of before with it.
    written = Path(source.path).stat().st_mtime_ns
    assert (
        left_sources(config, stage.recipe, next_stage) == [source] and Path(source.path).stat().st_mtime_ns == written
    )
    assert any(dropped_places(config, stage.recipe, seed) != dropped for seed in range(6, 12))
    most = PromptsConfig(rollouts="6_gspo", drop_solved=0.8)
    assert dropped < dropped_places(most, stage.recipe, 5) and len(dropped_places(most, stage.recipe, 5)) == 5
