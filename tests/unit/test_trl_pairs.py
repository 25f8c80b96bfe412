"""TRL's preference rows: each of their shapes becomes the record that it means, or is left out and counted."""

import json

import pytest

from megatron_omni.cli.prepare import main
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.data.pairs import PairBuilder, sides
from megatron_omni.data.record import RecordError, parse_record
from megatron_omni.data.sources import open_sources
from megatron_omni.data.trl_pairs import pair_row, records_of_pairs
from tests.unit.test_pairs import recipe_of
from tests.unit.tiny_data import write_image, write_source

USER, CHOSEN, REJECTED = (
    {"role": r, "content": c} for r, c in (("user", "What?"), ("assistant", "this"), ("assistant", "that"))
)
SYSTEM = {"role": "system", "content": "be brief"}
SHAPES = {
    "texts": {"prompt": "What?", "chosen": " this", "rejected": "that\n"},
    "turns": {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
    "implicit": {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    "repeated": {"prompt": "What?", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    "parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], "chosen": [CHOSEN],
              "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "that"}]}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_the_same_pair(shape):
    row = pair_row(SHAPES[shape] | {"score": 3}, where="f:1")
    assert row == {"messages": [USER, CHOSEN], "rejected_response": "that", "score": 3}
    assert sides(parse_record(row)).same_prompt


def test_earlier_turns_and_a_system_prompt_belong_to_the_prompt():
    earlier = [SYSTEM, USER, CHOSEN, {"role": "user", "content": "sure?"}]
    row = pair_row({"chosen": [*earlier, CHOSEN], "rejected": [*earlier, REJECTED]}, where="f:1")
    assert row == {"messages": [*earlier, CHOSEN], "rejected_response": "that"}


def test_media_stand_where_parts_say_or_before_the_question():
    parts = [
        {"type": "text", "text": "left "},
        {"type": "image"},
        {"type": "text", "text": " right "},
        {"type": "image"},
    ]
    placed = pair_row({"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b", "images": ["1", "2"]},
                      where="f:1")  # fmt: skip
    assert placed["messages"][0]["content"] == "left <image> right <image>" and placed["images"] == ["1", "2"]
    before = pair_row(
        {"prompt": "same?", "chosen": "a", "rejected": "b", "images": ["1", "2"], "audios": "s"}, where="f:1"
    )
    assert before["messages"][0]["content"] == "<image><image>\n<audio>\nsame?" and before["audios"] == "s"
    parse_record(before)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["x"], "is no JSON object"),
        ({"prompt": "a", "chosen": "b"}, "rejected = None: is missing"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "is neither text nor turns"),
        ({"prompt": [{"role": "user", "content": [{"type": "tool"}]}], "chosen": "b", "rejected": "c"}, "unknown kind"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "b", "rejected": "c"}, "nor a list of parts"),
        ({"prompt": "a", "chosen": [CHOSEN, USER, CHOSEN], "rejected": "c"}, "more than one answer"),
        (
            {"chosen": [USER, CHOSEN], "rejected": [{"role": "user", "content": "Who?"}, REJECTED]},
            "more than one answer",
        ),
    ],
)
def test_what_is_no_pair_is_refused(row, said):
    with pytest.raises(RecordError, match=said):
        pair_row(row, where="f:1")


def test_the_command_writes_records_and_counts_what_it_leaves_out(tmp_path, capsys):
    write_image(tmp_path / "a.png")
    same = {"prompt": "What?", "chosen": "this", "rejected": "this"}
    rows = [*SHAPES.values(), {"prompt": "what?", "chosen": "a cat", "rejected": "a dog", "images": ["a.png"]}, same]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{not json\n")
    recipe = recipe_of(tmp_path, [write_source(tmp_path, "none", [])])
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert main([str(tmp_path / "recipe.yaml"), "--trl", str(tmp_path / "p.jsonl"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "p.records.jsonl: 6 records" in said and "(bad_pair): 1" in said and "(not_json): 1" in said
    (source,) = open_sources([SourceConfig(name="p", path=str(tmp_path / "p.records.jsonl"))])
    builder = PairBuilder(recipe)
    assert [builder.build_sample(source[i]).length == builder.size(source[i]).tokens for i in range(6)] == [True] * 6
    with pytest.raises(ValueError, match="is there already"):
        records_of_pairs(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("content", "said"), [("", "holds no pair"), ('{"prompt": "a"}', "holds no pair; the first: .*is missing")]
)
def test_a_file_without_pairs_is_an_error(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        records_of_pairs(tmp_path / "p.jsonl")
    assert not (tmp_path / "p.records.jsonl").exists()
