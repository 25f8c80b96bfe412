"""The judge and the teachers of the repository: small, whole, and as good on held-out scenes as they say."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not installed

from examples.draw import judge, pair
from examples.draw.nets import load
from megatron_omni.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", [judge.FOLDER, pair.FOLDER])
def test_an_asset_says_how_it_was_made(folder: Path) -> None:
    facts = json.loads((folder / f"{folder.name}.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert (folder / f"{folder.name}.safetensors").stat().st_size < 2_500_000
    assert log[-1]["step"] == facts["steps"] - 1 and log[-1]["loss"] < log[0]["loss"] / 5


def test_another_file_of_weights_is_refused(tmp_path: Path) -> None:
    for one in judge.FOLDER.iterdir():
        (tmp_path / "judge").mkdir(exist_ok=True)
        (tmp_path / "judge" / one.name).write_bytes(one.read_bytes())
    weights = tmp_path / "judge" / "judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"judge\.safetensors: not the file"):
        load(judge.Judge, tmp_path / "judge")


def test_the_judge_sees_held_out_scenes() -> None:
    facts = json.loads((judge.FOLDER / "judge.json").read_text())
    found = judge.accuracy(judge.load_judge(), count=200)
    assert facts["held_out"]["all"] >= 0.95 and found["all"] >= 0.93
    assert abs(found["all"] - facts["held_out"]["all"]) < 0.05


def test_the_pair_finds_held_out_captions() -> None:
    facts = json.loads((pair.FOLDER / "pair.json").read_text())
    found = pair.found(pair.load_pair(), count=100, rounds=1)
    assert found > 0.5 and abs(found - facts["held_out_found_among_100"]) < 0.15  # a guess finds 0.01


def test_the_recipe_takes_what_the_teachers_give() -> None:
    image = load_recipe(ROOT / "recipes/tiny/draw/0_pictures.yaml").model.image
    assert image is not None
    sizes = (image.dit.caption_size, image.dit.task_size, image.dit.vision_size, image.projectors.num_caption_rows)
    assert sizes == (pair.CAPTION_SIZE, pair.TASK_SIZE, pair.VISUAL_SIZE, pair.ROWS)
