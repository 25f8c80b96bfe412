"""``make draw``: what is never trained on, damage and the ways to undo it, and scores of pictures that are known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not installed

from examples.draw import clues, corpus, damage, report, run, scoring
from examples.draw.judge import ARRANGEMENTS, Judge, Verdict, loss
from examples.draw.nets import scenes_of
from examples.draw.pair import Pair, contrast, encode
from examples.draw.scenes import Scene, draw_scene, paint, place
from examples.quickstart.assets import load_assets
from examples.quickstart.compose import is_held_out
from megatron_omni.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def picture(seed: int, scene: Scene) -> np.ndarray:
    return np.asarray(paint(place(np.random.default_rng(seed), scene)))


# ------------------------------------------------------------------------------------------------------------- riddles


def test_riddles_say_what_is_meant_and_are_held_out_by_rule() -> None:
    assert set(clues.CLUES) == set(load_assets().english) and len(set(clues.CLUES.values())) == 64
    star, dog = load_assets().english.index("star"), load_assets().english.index("dog")
    assert clues.count(star, 1, 3).prompt == "draw two more than one star"
    assert clues.count(star, 1, 3).scene.caption == "three stars"
    assert (
        clues.count(dog, 5, 4).prompt == "draw one less than five dogs"
        and clues.count(dog, 2, 1).scene.caption == "dog"
    )
    cat = clues.clue(0, 0)
    assert (cat.prompt, cat.scene.caption) == ("draw what says meow", "cat")
    drawn = {
        held_out: {
            clues.draw_riddle(np.random.default_rng([n, i]), kind, held_out=held_out).prompt
            for n in range(200)
            for i, kind in enumerate(clues.KINDS)
        }
        for held_out in (False, True)
    }
    assert len(drawn[True]) > 150 and not drawn[False] & drawn[True]


# -------------------------------------------------------------------------------------------------------------- corpus


@pytest.mark.parametrize("name", ["draw", "edit", "restore", "edges", "think"])
def test_rows_of_a_set(name: str, tmp_path: Path) -> None:
    for split in ("train", "eval"):
        (tmp_path / split / "media" / name).mkdir(parents=True)
    train = corpus.compose_chunk(corpus.Chunk(tmp_path, 0, name, 0, 8))
    held_out = corpus.compose_chunk(corpus.Chunk(tmp_path, 0, f"eval/{name}", 0, 8))
    assert train == corpus.compose_chunk(corpus.Chunk(tmp_path, 0, name, 0, 8))
    for folder, rows in (("train", train), ("eval", held_out)):
        for row in rows:
            assert row["messages"][-1]["content"].count("<generate>") == len(row["targets"]) == 1
            prompt = row["messages"][-2]["content"]
            made = name in ("restore", "edges") and folder == "train"
            assert prompt.count("<image>") == len(row.get("images", [])) + made
            assert all((tmp_path / folder / file).is_file() for file in row["targets"] + row.get("images", []))
    if name == "edit":
        assert all(is_held_out(row["edit"]["old"], row["edit"]["new"]) for row in held_out)
        assert not any(corpus.scene_of(row).held_out for row in train)
    if name == "draw":
        assert all(corpus.scene_of(row).held_out for row in held_out[1::2])
        assert not any(corpus.scene_of(row).held_out for row in train)
    if name == "think":
        bare = corpus.bare(train[0])
        assert train[0]["messages"][0] == {"role": "system", "content": "think"}
        assert train[0]["messages"][-1]["content"] == f"<think>{train[0]['thought']}</think><generate>"
        assert bare["messages"] == [train[0]["messages"][1], {"role": "assistant", "content": "<generate>"}]


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", damage.KINDS)
def test_classical_ways_mend(kind: str) -> None:
    clean = [picture(n, draw_scene(np.random.default_rng(n), held_out=False)) / 255 for n in range(3)]
    settings = damage.tuned(clean, kind)
    for number, one in enumerate(clean):
        broken, where = damage.damaged(one, kind, number)
        assert (broken == damage.damaged(one, kind, number)[0]).all() and not (broken == one).all()
        assert (broken[~where] == one[~where]).all()
        mended = damage.restored(broken, kind, where, settings)
        assert max(damage.psnr(m, one, where) for m in mended.values()) > damage.psnr(broken, one, where)


def test_the_fill_continues_a_plane_and_the_blur_is_undone() -> None:
    y, x = np.mgrid[:64, :64] / 64
    plane = np.stack([0.2 + 0.3 * x + 0.2 * y, x, y], axis=2)
    inside = np.zeros((64, 64), dtype=bool)
    inside[20:44, 10:34] = True
    filled = damage.biharmonic(np.where(inside[..., None], 0.5, plane), inside)
    assert np.abs(filled - plane).max() < 1e-8  # a plane is biharmonic, and its border decides it
    flat = np.full((64, 64, 3), 0.4)
    assert (
        np.abs(damage.wiener(flat, 1e-5) - 0.4).max() < 1e-4
        and np.abs(damage.richardson_lucy(flat, 5) - 0.4).max() < 1e-6
    )
    assert np.abs(damage.non_local_means(flat, 0.1) - 0.4).max() < 1e-9
    assert np.abs(damage.total_variation(flat, 0.2) - 0.4).max() < 1e-9


def test_total_variation_falls_by_its_formula() -> None:
    """The minimiser of TV(u) + |u - f|^2 / (2 w) has no smaller value near it, and less than the picture itself."""
    broken = damage.damaged(picture(1, Scene("one", (3,))) / 255, "noise", 0)[0][:24, :24]
    weight = 0.2

    def energy(u: np.ndarray) -> float:
        across, down = np.zeros_like(u), np.zeros_like(u)
        across[:, :-1], down[:-1] = np.diff(u, axis=1), np.diff(u, axis=0)
        return np.sqrt((across**2 + down**2).sum(axis=2)).sum() + ((u - broken) ** 2).sum() / (2 * weight)

    found = damage.total_variation(broken, weight, iterations=1500)
    rng = np.random.default_rng(0)
    assert energy(found) < energy(broken)
    assert all(energy(found) < energy(found + rng.normal(0, 0.01, found.shape)) for _ in range(5))


# --------------------------------------------------------------------------------------------------- judge and teachers


def test_what_the_judge_calls_right() -> None:
    two, many = Scene("two", (1, 2), "left", 2), Scene("many", (4,), count=3)
    assert Verdict("left", 1, 2, 5).right(two) and Verdict("one", 4, 9, 2).right(Scene("one", (4,)))
    for seen in (
        Verdict("above", 1, 2, 2),
        Verdict("left", 2, 1, 2),
        Verdict("left", 1, 3, 2),
        Verdict("one", 1, 2, 2),
    ):
        assert not seen.right(two)
    assert Verdict("many", 4, 0, 3).right(many) and not Verdict("many", 4, 0, 2).right(many)
    assert scoring.described(Verdict("above", 0, 1, 4)) == "cat above dog"


def test_the_judge_learns_heads_that_count() -> None:
    torch.manual_seed(0)
    judge, (scenes, pictures) = Judge(32), scenes_of(1, 0, 12)
    first = loss(judge, scenes, pictures)
    first.backward()
    gradient = judge.heads.weight.grad.abs().sum(1)
    at = len(ARRANGEMENTS) + 64
    assert (gradient[:at] > 0).all() and gradient[at:].sum() > 0
    only = [scene for scene in scenes if scene.kind == "one"]
    judge.zero_grad()
    loss(judge, only, pictures[: len(only)]).backward()
    assert judge.heads.weight.grad[at:].abs().sum() == 0  # neither a second object nor a count


def test_equal_captions_share_the_target() -> None:
    torch.manual_seed(0)
    written, seen = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    found = contrast(["a", "b", "a"], written, seen, torch.tensor(1.0, dtype=torch.float64))
    cosines = torch.nn.functional.cosine_similarity(written[:, None], seen[None], dim=2) * np.e
    target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]], dtype=torch.float64)
    one, other = (-(target * each.log_softmax(1)).sum(1).mean() for each in (cosines, cosines.T))
    assert torch.allclose(found, (one + other) / 2)


def test_teachers_tell_words_and_their_order() -> None:
    torch.manual_seed(0)
    pair = Pair().eval()
    rows, real, pooled = pair.text(encode(["cat left of dog", "dog left of cat", ""]))
    assert real.sum(1).tolist() == [4, 4, 0] and bool(pooled.isfinite().all())
    assert (pooled[0] - pooled[1]).abs().max() > 1e-4 and (rows[0, 0] - rows[1, 3]).abs().max() > 1e-4
    alone = pair.text(encode(["cat left of dog"]))
    assert torch.allclose(alone[0][0], rows[0], atol=1e-5) and torch.allclose(alone[2][0], pooled[0], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- scores


def test_steps_at_borders() -> None:
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8), (3, 64, 64)) * 2
    assert scoring.grid([np.ascontiguousarray(smooth)], 8) == 1.0
    blocks = np.broadcast_to((np.arange(64, dtype=np.uint8) // 8 * 20 + np.arange(64, dtype=np.uint8)), (3, 64, 64))
    assert scoring.grid([np.ascontiguousarray(blocks)], 8) == 21.0


def test_scores_of_rows() -> None:
    rows = [{"kind": "one", "right": True}, {"kind": "two", "right": False}, {"kind": "two", "right": True}]
    assert scoring.text_scores(rows) == {"single": 1.0, "both": 0.5, "count": 3}
    common = {"damage": "noise", "psnr": 25.0, "input_psnr": 15.0, "codec_psnr": 28.0}
    rows = [common | {"classical": {"a": 20.0, "b": 24.0}}, common | {"classical": {"a": 30.0, "b": 24.0}}]
    assert scoring.restore_scores(rows)["noise"] == {
        "psnr": 25.0, "input_psnr": 15.0, "baseline_psnr": 25.0, "baseline": "a", "codec_psnr": 28.0, "count": 2
    }  # fmt: skip


def test_an_edit_is_measured_outside_the_object() -> None:
    class Sees(Judge):
        def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
            heads = [torch.zeros(len(pictures), n) for n in (4, 64, 64, 4)]
            heads[0][:, 0], heads[1][:, 7] = 1, 1
            return tuple(heads)

    scene, placed = Scene("one", (7,)), place(np.random.default_rng(0), Scene("one", (3,)))
    target = np.asarray(paint(placed.with_object(3, 7))).transpose(2, 0, 1)
    drawn = np.where(placed.mask(3), 255 - target, target)
    row = {"edit": {"old": 3, "new": 7, "slot": 0, "objects": [list(one) for one in placed.objects]}}
    found = scoring.edit_rows(Sees(32), [row], [scene], [drawn], [target], [target])
    assert found[0]["changed"] and found[0]["kept_psnr"] == 100.0


def test_a_hole_is_measured_inside() -> None:
    clean = picture(2, Scene("one", (5,)))
    broken, where = damage.damaged(clean / 255, "hole", 3)
    source = (broken * 255).round().astype(np.uint8).transpose(2, 0, 1)
    target = clean.transpose(2, 0, 1)
    drawn = np.where(where, target, 0)
    (row,) = scoring.restore_rows([{"damage": "hole"}], [drawn], [source], [target], [target], {"hole": {}})
    assert (
        row["psnr"] == row["codec_psnr"] == 100.0 and row["input_psnr"] < 20 and set(row["classical"]) == {"biharmonic"}
    )


# ----------------------------------------------------------------------------------------------------------------- run


def test_stages_have_the_sources_that_the_driver_moves() -> None:
    for name, (file, start, sources) in run.STAGES.items():
        recipe = load_recipe(ROOT / run.RECIPES / file)
        assert [source.name for source in recipe.data.sources] == list(sources), name
        assert recipe.run_dir == str(run.OUT / name) and recipe.task == "generative"
        begins = {None: None, "quickstart": str(run.QUICKSTART)}.get(start, str(run.OUT / str(start)))
        assert recipe.init_from == begins
    assert set(corpus.FAST_SIZES) == set(corpus.SIZES) and set(report.STAGES) == set(run.STAGES)


def test_the_control_without_alignment_differs_in_that_and_its_start_alone(tmp_path: Path) -> None:
    said: dict[str, list[str]] = {}

    class Commands:
        def run(self, name: str, *words: str) -> None:
            said[name] = [*words]

    run.Draw(Commands(), tmp_path, fast=False).controls()
    recipe = str(run.RECIPES / "2_tasks.yaml")
    words = said["unaligned"]
    control = load_recipe(ROOT / recipe, words[words.index(recipe) + 1 :])
    tasks, losses = load_recipe(ROOT / recipe), control.generative.losses
    assert (losses.align_task, losses.align_caption, losses.align_visual) == (0, 0, 0)
    assert control.model.image.weights == str(tmp_path / "pictures") and control.init_from == str(run.QUICKSTART)
    control.generative.losses, control.model.image.weights = tasks.generative.losses, tasks.model.image.weights
    control.init_from, control.init_allow_missing = tasks.init_from, tasks.init_allow_missing
    control.run_dir = tasks.run_dir
    assert control == tasks


def test_the_table_has_every_number() -> None:
    scores = {
        "seconds": 1.0,
        "commit": "x",
        "restore": {"noise": {"psnr": 20.0}},
        "think": {"with": 0.5, "without": None},
    }
    assert report.lines(scores) == [
        ("seconds", "1.0"), ("restore noise psnr", "20.0"), ("think with", "0.5"), ("think without", "None")
    ]  # fmt: skip
    assert json.loads(json.dumps(scores)) == scores
