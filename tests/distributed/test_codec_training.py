"""A codec in the training loop: it learns, goes on bit by bit where it was stopped, and has one codebook on all ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch

from megatron_omni.checkpoint.codec_folders import convert_codec
from megatron_omni.config.load import recipe_from_dict, recipe_to_dict
from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.codec import load_codec
from megatron_omni.models.generators.codec_model import CodecModel
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.tasks.choice import task_of
from megatron_omni.training import loop
from megatron_omni.training.setup import setup
from megatron_omni.training.task import StepInfo
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import records

RATE = 8000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        time = np.arange(RATE) / RATE
        wave = sum(np.sin(2 * np.pi * hertz * time) for hertz in rng.uniform(100, 3000, 3)) * 0.1
        soundfile.write(folder / f"{number}.wav", wave.astype(np.float32), RATE)
        rows.append({"messages": [{"role": "user", "content": "<audio>"}], "audios": [f"{number}.wav"]})
    (folder / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(
    sounds: Path, run_dir: Path, *, steps: int, dropout: float = 0.0, span: Sequence[int] = (), **optim: Any
) -> Recipe:
    codec = {
        "sample_rate": RATE,
        "encoder": "mel",
        "strides": [4, 50],
        "num_codes": 24,
        "code_size": 8,
        "num_mel_bins": 20,
        "encoder_hidden_size": 16,
        "hidden_size": 64,
        "ffn_hidden_size": 32,
        "num_layers": 1,
        "num_bandwidths": 2,
        "dropout": dropout,
        "decoder_span": list(span),
    }
    source = {"name": "sounds", "path": str(sounds / "sounds.jsonl")}
    return recipe_from_dict(
        {
            "task": "codec",
            "seed": 3,
            "run_dir": str(run_dir),
            "train_iters": steps,
            "load": "auto",
            "model": {"moe": None, "vision": None, "audio": None, "codec": codec},
            "data": {
                "seq_length": 10,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "sources": [source],
                "eval_sources": [{**source, "name": "again"}],
            },
            "codec": {
                "crop_codes": 10,
                "start_step": 4,
                "start_vectors": 100,
                "dead_below": 0.2,
                "speed_octaves": 0.2,
                "mel_fft_sizes": [128, 512],
                "mel_bins": [16, 24],
            },
            "optim": {"lr": 3e-3, "lr_decay_style": "constant", "precision": "fp32", **optim},
            "checkpoint": {"save_interval": 0},
            "log": {"interval": 1, "eval_interval": steps, "eval_iters": 1, "tensorboard": False},
        }
    )


def train(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Train on this rank; the weights, codebook included."""
    run = setup(recipe, task_of(recipe), pg=rank.initialize(recipe.parallel))
    assert loop.train(run) == 0
    return {name: value.clone() for name, value in unwrap_model(run.model).state_dict().items() if value is not None}


def codebook(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if name.startswith("codec.codebook.")}


def fixed_means(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of the norms of a decoder with a span."""
    return [value for name, value in weights.items() if name.endswith(".mean")]


@pytest.mark.parametrize("span", [(), (6, 3)])
def test_it_learns_and_a_run_that_was_stopped_twice_has_the_same_bits(
    sounds: Path, tmp_path: Path, span: Sequence[int]
) -> None:
    (whole,) = run_ranks(train, 1, recipe(sounds, tmp_path / "whole", steps=12, dropout=0.1, span=span))
    for steps in (3, 8):  # before the codebook starts, and after
        (stopped,) = run_ranks(train, 1, recipe(sounds, tmp_path / "parts", steps=steps, dropout=0.1, span=span))
        assert bool(stopped["codec.codebook.inited"]) == (steps > 4)
        for mean in fixed_means(stopped):
            assert bool(mean.any()) == (steps > 4), "statistics are of the step at which the codebook starts"
    (parts,) = run_ranks(train, 1, recipe(sounds, tmp_path / "parts", steps=12, dropout=0.1, span=span))
    assert len(fixed_means(whole)) == (10 if span else 0)
    assert whole.keys() == parts.keys() and len(codebook(whole)) == 4
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    lines = [line for line in records(recipe(sounds, tmp_path / "whole", steps=12)) if "codec loss" in line]
    assert lines[-1]["codec loss"] < 0.9 * lines[0]["codec loss"]
    assert lines[3]["codec/commitment"] == 0 < lines[5]["codec/commitment"]
    assert 1 < lines[-1]["codec/perplexity"] <= lines[-1]["codec/codes used"] <= 24


@pytest.mark.parametrize("distributed", [False, True])
def test_two_ranks_hold_one_codebook_which_is_that_of_one_rank(sounds: Path, tmp_path: Path, distributed: bool) -> None:
    optim = {"use_distributed_optimizer": distributed}
    span = (6, 3) if distributed else ()
    (alone,) = run_ranks(train, 1, recipe(sounds, tmp_path / "alone", steps=7, span=span, **optim))
    first, second = run_ranks(train, 2, recipe(sounds, tmp_path / "together", steps=7, span=span, **optim))
    assert len(fixed_means(first)) == len(fixed_means(second))
    for mean, other in zip(fixed_means(first), fixed_means(second)):
        assert torch.equal(mean, other)
    for name, value in codebook(first).items():
        assert torch.equal(value, second[name]), name
        assert torch.allclose(value, alone[name], rtol=1e-2, atol=1e-3), name
    losses = [
        [line["codec loss"] for line in records(recipe(sounds, tmp_path / name, steps=7)) if "codec loss" in line]
        for name in ("alone", "together")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_trained_run_becomes_a_codec_s_folder(sounds: Path, tmp_path: Path) -> None:
    (weights,) = run_ranks(train, 1, recipe(sounds, tmp_path / "run", steps=6))
    for dtype in ("fp32", "fp16"):
        (said,) = convert_codec(tmp_path / "run", tmp_path / dtype, dtype=dtype)
        codec = load_codec(tmp_path / dtype)
        assert codec.fingerprint in said
        for name, value in codec.state_dict().items():
            wanted = weights[f"codec.{name}"]
            if name == "decoder.window":  # follows from its size, and is whole in either
                assert torch.allclose(value, wanted, atol=1e-3)
                continue
            assert torch.equal(value, wanted if dtype == "fp32" else wanted.half().float()), name
    wave = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert codec.decode(codec.encode(wave)).shape == (1, 2000)
    run_ranks(train, 1, recipe(sounds, tmp_path / "early", steps=2))
    for source, options, expected in (
        (tmp_path / "early", {}, "no codebook yet"),
        (tmp_path / "run", {"yaml": Path("a.yaml")}, "has its configuration in it"),
        (tmp_path / "fp32", {"dtype": "fp16"}, "for a run that trained a codec alone"),
        (tmp_path / "run", {}, "exists already"),
    ):
        with pytest.raises(ValueError, match=expected):
            list(convert_codec(source, tmp_path / ("fp32" if "exists" in expected else "new"), **options))


def gradients(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Gradients of a first step."""
    run = setup(recipe, task_of(recipe), pg=rank.initialize(recipe.parallel))
    (batch,) = run.loader.next_step() if run.loader is not None else ()  # type: ignore[attr-defined]
    info = StepInfo(step=1, training=True, divisor=batch.num_label_tokens)
    run.model.zero_grad_buffer()
    output, loss_function = run.task.forward_step(batch, run.model, info=info)
    loss_function(output)[0].backward()
    return {n: p.main_grad.clone() for n, p in unwrap_model(run.model).named_parameters()}  # type: ignore[attr-defined]


def test_judges_learn_beside_the_codec_which_hears_them_from_its_start_on(sounds: Path, tmp_path: Path) -> None:
    judged = {"adversarial_fft_sizes": [128, 256], "adversarial_weight": 0.5}
    found = {}
    for name, codec in (("none", {}), ("early", {**judged, "adversarial_start": 1}), ("judged", judged)):
        values = recipe_to_dict(recipe(sounds, tmp_path / name, steps=6))
        values["codec"] |= codec
        values["data"]["micro_batch_size"] = 4
        (found[name],) = run_ranks(gradients, 1, recipe_from_dict(values))
    judges = {name for name in found["judged"] if name.startswith("discriminators.")}
    assert len(judges) == 2 * 10 and found["none"].keys() == found["judged"].keys() - judges
    assert all(found["early"][name].norm() > 0 for name in judges if name.endswith("weight"))
    for name in judges:  # the decoder's own loss leaves their weights alone
        assert torch.allclose(found["early"][name], found["judged"][name], rtol=1e-4, atol=1e-7), name
    ours = "codec.decoder.out.weight"
    assert torch.allclose(found["none"][ours], found["early"][ours], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found["none"][ours], found["judged"][ours], rtol=1e-2)
    values = recipe_to_dict(recipe(sounds, tmp_path / "run", steps=6))
    values["codec"] |= judged
    first, second = run_ranks(train, 2, recipe_from_dict(values))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    (said,) = convert_codec(tmp_path / "run", tmp_path / "folder")
    assert load_codec(tmp_path / "folder").fingerprint in said
    last = records(recipe_from_dict(values))[-2]
    assert {"codec/judges", "codec/verdict", "codec/features"} <= last.keys()


def poisoned(rank: Rank, recipe: Recipe) -> bool:
    """Train until step 6, whose gradient is not finite; whether its vectors left the codebook alone."""
    run = setup(recipe, task_of(recipe), pg=rank.initialize(recipe.parallel))
    model = cast(CodecModel, unwrap_model(run.model))
    before: list[dict[str, torch.Tensor]] = []
    forward = run.task.forward_step

    def spoiled(batch: Any, model_: Any, *, info: Any) -> Any:
        output, loss_function = forward(batch, model_, info=info)
        if not (info.training and info.step == 6):
            return output, loss_function
        before.append({name: value.clone() for name, value in model.codec.codebook.state_dict().items()})
        return output, lambda wave: tuple(
            value * float("nan") if index == 0 else value for index, value in enumerate(loss_function(wave))
        )

    run.task.forward_step = spoiled  # type: ignore[method-assign]
    assert loop.train(run) == 0
    after = model.codec.codebook.state_dict()
    return run.state.skipped_in_a_row == 1 and all(torch.equal(value, after[name]) for name, value in before[0].items())


def test_a_step_that_is_skipped_teaches_the_codebook_nothing(sounds: Path, tmp_path: Path) -> None:
    assert run_ranks(poisoned, 1, recipe(sounds, tmp_path / "run", steps=6)) == [True]
