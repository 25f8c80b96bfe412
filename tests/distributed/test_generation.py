"""Cached generation equals recomputing the whole sequence for every token, on one rank and on every kind of layout.

The model is the tiny recipe with larger initial weights, so that its logits differ enough for answers to vary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.record import parse_record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation import engine
from megatron_omni.generation.engine import generate
from megatron_omni.generation.request import Sampling
from megatron_omni.models.build import build_model
from megatron_omni.models.omni import OmniModel
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import make_corpus, tiny_recipe

NEW_TOKENS = 6
TOLERANCE = 1e-5
SAMPLED = Sampling(temperature=1.0, top_p=0.9)
QUESTIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "repeat red green blue one two three"}]},
    {"messages": [{"role": "user", "content": "<image> which colour"}], "images": ["0.png"]},
    {"messages": [{"role": "user", "content": "one <audio> how high"}], "audios": ["1.wav"]},
    {"messages": [{"role": "user", "content": "<video> then <image> and <audio> three"}],
     "videos": ["v.mp4"], "images": ["2.png"], "audios": ["2.wav"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_corpus(tmp_path_factory.mktemp("generation") / "corpus")
    with av.open(str(directory / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(16):
            pixels = numpy.full((32, 32, 3), 16 * i, dtype=numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return directory


def recipe_for(corpus: Path, **overrides: Any) -> Recipe:
    settings = {"data__min_frames": 2, "data__max_frames": 4, "data__max_frames_with_audio": 4} | overrides
    return tiny_recipe(corpus, corpus / "run", model__init_method_std=0.25, **settings)


def placed_questions(corpus: Path) -> list[dict[str, Any]]:
    kinds = ("images", "audios", "videos")
    return [q | {kind: [str(corpus / file) for file in q.get(kind, [])] for kind in kinds} for q in QUESTIONS]


def prompts_of(builder: SampleBuilder, corpus: Path) -> list[Sample]:
    return [builder.build_prompt(parse_record(question)) for question in placed_questions(corpus)]


def recorded_generation(
    model: OmniModel, prompts: list[Sample], **settings: Any
) -> tuple[list[list[int]], list[Tensor]]:
    """Answers, and the logits [B, V] from which the token of each step was chosen (empty before the last stage)."""
    seen: list[Tensor] = []

    def recording(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits.clone())
        return next_tokens(logits, *args, **kwargs)

    next_tokens = engine.next_tokens
    engine.next_tokens = recording
    try:
        return generate(model, prompts, max_new_tokens=NEW_TOKENS, **settings), seen
    finally:
        engine.next_tokens = next_tokens


def extended(prompt: Sample, answer: list[int]) -> Sample:
    """``prompt`` and then ``answer``, as a sequence that was never cached."""
    new = torch.tensor(answer, dtype=torch.int64)
    positions = (prompt.next_position + torch.arange(len(answer))).expand(3, -1)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new]),
        labels=torch.cat([prompt.labels, torch.full_like(new, -100)]),
        position_ids=torch.cat([prompt.position_ids, positions], dim=1),
        modality=torch.cat([prompt.modality, torch.zeros_like(new)]),
    )


@torch.no_grad()
def full_logits(model: OmniModel, sample: Sample) -> Tensor:
    """[V] logits after the last token of ``sample``, by one forward without a cache."""
    logits = model(collate([sample], pad_id=0), step=0, stochastic=False, compute_loss=False)
    return logits[0, sample.length - 1]


@pytest.fixture(scope="module")
def alone(corpus: Path) -> dict[str, Any]:
    """What one rank computes: the reference of every layout, and its own comparisons with forwards without a cache."""
    return run_ranks(one_rank, 1, corpus)[0]


def one_rank(rank: Rank, corpus: Path) -> dict[str, Any]:
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    model.train()
    model.vision.eval()
    modes = [module.training for module in model.modules()]
    prompts = prompts_of(builder, corpus)
    common: dict[str, Any] = {"tokenizer": builder.tokenizer, "pg": pg}
    batches: list[OmniBatch] = []
    encoder_calls: list[str] = []
    hooks = [model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0]))]
    for name in ("vision", "audio"):
        hooks.append(getattr(model, name).register_forward_pre_hook(lambda *_, name=name: encoder_calls.append(name)))
    answers, steps = recorded_generation(model, prompts, **common)
    for hook in hooks:
        hook.remove()
    modes_after = [module.training for module in model.modules()]
    several = {"max_new_tokens": NEW_TOKENS, "sampling": SAMPLED, "seed": 5, **common}
    model.eval()
    result = {
        "answers": answers,
        "steps": steps,
        "modes": (modes, modes_after),
        "encoder_calls": encoder_calls,
        "decode_positions": [batch.position_ids for batch in batches[1:]],
        "next_positions": [prompt.next_position for prompt in prompts],
        "full": [
            [full_logits(model, extended(prompt, answer[:i])) for i in range(len(answer))]
            for prompt, answer in zip(prompts, answers)
        ],
        "one_by_one": [generate(model, [prompt], max_new_tokens=NEW_TOKENS, **common)[0] for prompt in prompts],
        "sampled": generate(model, prompts, **several),
        "sampled_one_by_one": [generate(model, [prompts[i]], rows=[i], **several)[0] for i in range(len(prompts))],
        "other_seed": generate(model, prompts, **(several | {"seed": 6})),
        "none": generate(model, [], max_new_tokens=1, **common),
        "taught": taught_positions(builder, corpus),
    }
    with torch.no_grad():
        model.language.output_layer.weight[0, 0] = torch.nan
    try:
        generate(model, prompts, max_new_tokens=1, **common)
    except FloatingPointError as error:
        result["not_finite"] = str(error)
    return result


def taught_positions(builder: SampleBuilder, corpus: Path) -> list[tuple[Tensor, int]]:
    """Per question: 3D positions of a given answer, as training sees them, and the position after the prompt."""
    answer = {"role": "assistant", "content": "one two three four five and then red green"}
    taught = []
    for question in placed_questions(corpus):
        record = parse_record(question | {"messages": [*question["messages"], answer]})
        prompt, sample = builder.build_prompt(record), builder.build_sample(record)
        assert torch.equal(prompt.input_ids, sample.input_ids[: prompt.length])
        taught.append((sample.position_ids[:, prompt.length :], prompt.next_position))
    return taught


def test_cached_logits_equal_a_forward_of_the_whole_sequence(alone: dict[str, Any]) -> None:
    lengths = [len(answer) for answer in alone["answers"]]
    assert max(lengths) == NEW_TOKENS
    assert torch.stack(alone["steps"]).std() > 0.5, "logits too alike to tell a mistake"
    for row, full in enumerate(alone["full"]):
        for step, expected in enumerate(full):
            torch.testing.assert_close(alone["steps"][step][row], expected, rtol=0, atol=TOLERANCE)


def test_answers_do_not_depend_on_the_batch(alone: dict[str, Any]) -> None:
    assert alone["one_by_one"] == alone["answers"]
    assert alone["sampled_one_by_one"] == alone["sampled"]
    assert alone["sampled"] != alone["answers"]
    assert alone["other_seed"] != alone["sampled"]
    assert alone["none"] == []


def test_decode_positions_are_those_of_training(alone: dict[str, Any]) -> None:
    for row, (taught, following) in enumerate(alone["taught"]):
        assert alone["next_positions"][row] == following
        decoded = torch.cat([positions[:, row] for positions in alone["decode_positions"]], dim=1)
        assert decoded.shape[1] == NEW_TOKENS - 1
        torch.testing.assert_close(decoded, taught[:, : NEW_TOKENS - 1])


def test_encoders_run_once_and_modes_are_restored(alone: dict[str, Any]) -> None:
    assert sorted(alone["encoder_calls"]) == ["audio", "vision"]
    before, after = alone["modes"]
    assert before == after
    assert len(set(before)) == 2


def test_logits_that_are_not_finite_are_an_error(alone: dict[str, Any]) -> None:
    assert "not finite" in alone["not_finite"]


def on_layout(rank: Rank, corpus: Path, parallel: dict[str, int], shares: list[list[int]]) -> dict[str, Any]:
    """This rank's answers to the questions that its data-parallel rank is given, greedy and sampled."""
    recipe = recipe_for(corpus, **{f"parallel__{name}_model_parallel_size": size for name, size in parallel.items()})
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    mine = shares[pg.dp.rank()]
    prompts = [prompts_of(builder, corpus)[i] for i in mine]
    common: dict[str, Any] = {"tokenizer": builder.tokenizer, "pg": pg, "rows": mine}
    answers, steps = recorded_generation(model, prompts, **common)
    sampled = generate(model, prompts, max_new_tokens=NEW_TOKENS, sampling=SAMPLED, seed=5, **common)
    return {"questions": mine, "answers": answers, "steps": steps, "sampled": sampled}


ALL = list(range(len(QUESTIONS)))
LAYOUTS: dict[str, tuple[dict[str, int], int, list[list[int]]]] = {
    "tensor 2": ({"tensor": 2}, 2, [ALL]),
    "pipeline 2": ({"pipeline": 2}, 2, [ALL]),
    "expert 2, same prompts": ({"expert": 2}, 2, [ALL, ALL]),
    "expert 2, own prompts": ({"expert": 2}, 2, [[0, 2, 1], [3]]),
    "expert 2, one rank without prompts": ({"expert": 2}, 2, [[], [1, 0]]),
    "tensor 2 and expert 2": ({"tensor": 2, "expert": 2}, 2, [ALL]),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2}, 4, [ALL]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_one_ranks_answers(name: str, corpus: Path, alone: dict[str, Any]) -> None:
    parallel, world_size, shares = LAYOUTS[name]
    results = run_ranks(on_layout, world_size, corpus, parallel, shares)
    assert any(result["steps"] for result in results)
    for result in results:
        assert result["answers"] == [alone["answers"][i] for i in result["questions"]]
        assert result["sampled"] == [alone["sampled"][i] for i in result["questions"]]
        for step, logits in enumerate(result["steps"][: len(alone["steps"])] if result["questions"] else []):
            for row, i in enumerate(result["questions"]):
                if step <= len(alone["answers"][i]):  # rows that have ended hold nothing
                    torch.testing.assert_close(logits[row], alone["steps"][step][i], rtol=0, atol=TOLERANCE)
