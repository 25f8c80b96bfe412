"""The switch of thoughts: the paper's prompts to the letter, what the model is asked with it, and equal ids in training."""

from pathlib import Path
from typing import Any

import pytest

from megatron_omni.cli.generate import parse
from megatron_omni.config.data import DataConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.config.thinking import EMPTY_THOUGHT, SYSTEM_TEMPLATES, THINKING
from megatron_omni.data.record import Record, parse_record
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.serve.building import build
from megatron_omni.serve.jobs import Job
from tests.unit.tiny_data import tiny_recipe

PROMPTS = {
    "thinking": "ad9a4716ee95f5a3",
    "drawing": "36a61cf01a4812c5",
}
"""Beginnings of the SHA-256 of the two texts, copied out of appendix A.3."""


def record(*turns: tuple[str, str]) -> Record:
    return parse_record({"messages": [{"role": role, "content": content} for role, content in turns]})


def builder_of(folder: Path, **data: Any) -> SampleBuilder:
    return SampleBuilder(tiny_recipe(folder, [], seq_length=4096, **data))


def text_of(builder: SampleBuilder, prompt: Any) -> str:
    return builder.tokenizer.decode(prompt.input_ids.tolist(), skip_special=False)


def test_the_prompts_are_the_papers() -> None:
    import hashlib

    found = {name: hashlib.sha256(SYSTEM_TEMPLATES[name].encode()).hexdigest()[:16] for name in PROMPTS}
    assert found == PROMPTS


@pytest.mark.parametrize("template", ["none", "thinking", "drawing"])
@pytest.mark.parametrize("own", ["", "be kind"])
@pytest.mark.parametrize("think", [None, True, False])
def test_what_is_asked(tmp_path: Path, template: str, own: str, think: bool | None) -> None:
    builder = builder_of(tmp_path, system_template=template, system_prompt="be brief")
    turns = [("system", own)] * bool(own) + [("user", "how many <b>?")]
    asked = text_of(builder, prompt := builder.build_prompt(record(*turns), think=think))
    named = {None: SYSTEM_TEMPLATES[template] if not own else "", True: THINKING, False: ""}[think]  # type: ignore[index]
    system = "\n\n".join(filter(None, (named, own or "be brief")))
    assert asked == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhow many <b>?<|im_end|>\n<|im_start|>assistant\n"
        f"{EMPTY_THOUGHT if think is False else ''}"
    )
    assert builder.prompt_size(record(*turns), think=think).tokens == prompt.length


def test_thinking_twice_is_thinking_once_and_no_system_turn_is_none(tmp_path: Path) -> None:
    builder = builder_of(tmp_path)
    twice = builder.build_prompt(record(("system", f"{THINKING}\n\nbe kind"), ("user", "n?")), think=True)
    assert text_of(builder, twice).count(THINKING) == 1
    assert "system" not in text_of(builder, builder.build_prompt(record(("user", "n?")), think=False))


def test_an_answer_behind_an_empty_thought_has_the_ids_that_generation_goes_on_from(tmp_path: Path) -> None:
    builder = builder_of(tmp_path)
    answered = record(("user", "n?"), ("assistant", f"{EMPTY_THOUGHT}\nfive"))
    prompt = builder.build_prompt(answered, think=False).input_ids.tolist()
    sample = builder.build_sample(answered)
    assert sample.input_ids.tolist()[: len(prompt)] == prompt
    assert builder.size(answered).tokens == sample.length
    learned = [i for i in sample.labels.tolist() if i >= 0]
    assert builder.tokenizer.decode(learned) == f"{EMPTY_THOUGHT}\nfive", "such rows are learned whole"


def test_the_template_of_a_recipe_is_in_its_samples(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, system_template="drawing")
    sample = builder.build_sample(record(("user", "a cat"), ("assistant", "<think>fur</think> <answer>...</answer>")))
    assert text_of(builder, sample).startswith(f"<|im_start|>system\n{SYSTEM_TEMPLATES['drawing']}<|im_end|>")
    assert DataConfig(system_template="thinking", system_prompt="be brief").system_turn == f"{THINKING}\n\nbe brief"


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {system_template: thoughts}\n")
    with pytest.raises(ValueError, match=r"system_template.*thinking"):
        load_recipe(tmp_path / "r.yaml")


def test_the_switch_of_the_command_line(tmp_path: Path) -> None:
    words = [str(tmp_path), "--prompt", "x", "--out", "o"]
    assert [parse([*words, *more]).think for more in ([], ["--think"], ["--no-think"])] == [None, True, False]


def test_the_server_builds_the_same_prompt(tmp_path: Path) -> None:
    builder = builder_of(tmp_path)
    for think in (None, True, False):
        built, _ = build(builder, Job(name="j", turns=(("user", ("n?",)),), think=think))
        assert list(built.ids or ()) == builder.build_prompt(record(("user", "n?")), think=think).input_ids.tolist()
