"""Runs of a speech generator: the table of a language model, accuracies, resuming to the bit, other layouts, other starts."""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_omni.checkpoint.commit import find
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from tests.distributed.harness import RankFailure
from tests.distributed.tiny_run import records, run_tiny
from tests.distributed.tiny_speech import MIXTURE

WORDS = ("red", "green", "blue", "one", "two", "three")
VOCABULARY, WIDTH, STEPS = 256 + 1 + len(ALL_SPECIALS) + 29, 24, 4
WATCHED = ("lm loss", "accuracy/codes", "accuracy/end", "eval/loss/held", "eval/accuracy/codes/held", "grad-norm")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, spoken texts of which each word has its codes, a tokenizer, and a language model of one step."""
    folder = tmp_path_factory.mktemp("spoken")
    pick, rows = random.Random(0), []
    for _ in range(24):
        words = pick.choices(WORDS, k=2)
        codes = [5 * WORDS.index(word) + i % 5 for word in words for i in range(6)]
        speech = {"speaker": pick.choice(["Ann", "Ben"]), "language": "English", "codes": codes}
        answer = {"role": "assistant", "content": " ".join(words), "speech": speech}
        rows.append({"messages": [{"role": "user", "content": "say it"}, answer]})
    for name, part in (("train", rows[:18]), ("held", rows[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    texts = [f"{row['messages'][1]['content']} Language: English; Speaker: Ann; Ben say it" for row in rows]
    train_sentencepiece(texts * 4, folder / "tokenizer.model", vocab_size=VOCABULARY, specials=ALL_SPECIALS)
    for row in rows:
        del row["messages"][1]["speech"]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_tiny(language_recipe(folder), 1)
    return folder


def values_of(folder: Path, name: str, model: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "train_iters": STEPS, "seed": 11, "run_dir": str(folder / name), "model": model,
        "data": {
            "tokenizer": str(folder / "tokenizer.model"), "seq_length": 96, "micro_batch_size": 2, "global_batch_size": 4,
            "packing": True, "batch_by": "mixed", "pad_to_multiple_of": 8, **data,
        },
        "optim": {"lr": 5e-3, "lr_warmup_iters": 1, "lr_decay_iters": 20, "precision": "fp32"},
        "checkpoint": {"save_interval": 2}, "log": {"interval": 1, "tensorboard": False, "expert_load": False},
    }  # fmt: skip


def language_recipe(folder: Path) -> Recipe:
    sizes = {
        "num_layers": 1, "hidden_size": WIDTH, "ffn_hidden_size": 24, "num_attention_heads": 2, "num_query_groups": 2,
        "kv_channels": 8, "mrope_section": [2, 1, 1], "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 8,
        "moe": None, "vision": None, "audio": None,
    }  # fmt: skip
    values = values_of(folder, "language", sizes, sources=[{"name": "text", "path": str(folder / "text.jsonl")}])
    return recipe_from_dict(values | {"train_iters": 1})


def speech_recipe(folder: Path, name: str, **changes: Any) -> Recipe:
    """``changes``: dotted fields with ``__`` for the dot."""
    model = asdict(MIXTURE)
    model["speech"] |= {
        "text_vocab_size": VOCABULARY, "text_hidden_size": WIDTH, "text_table": str(folder / "language"),
        "least_codes_per_token": 0.5,
    }  # fmt: skip
    named = [{"name": kind, "path": str(folder / f"{kind}.jsonl")} for kind in ("train", "held")]
    values = values_of(folder, name, model, sources=named[:1], eval_sources=named[1:])
    values["log"] |= {"eval_interval": 2, "eval_iters": 1}
    for field, value in changes.items():
        *path, last = field.split("__")
        group = values
        for key in path:
            group = group.setdefault(key, {})
        group[last] = value
    return recipe_from_dict(values)


def watched(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: line[name] for name in (*WATCHED, "step") if name in line} for line in found]


def tensors(run_dir: str) -> dict[str, torch.Tensor]:
    directory = find(Path(run_dir))
    assert directory is not None
    reader = TorchDistReader(directory)
    return {key: reader.read(key) for key in reader.tensors if not key.startswith("optimizer.")}


@pytest.fixture(scope="module")
def straight(corpus: Path) -> Recipe:
    """A run from its first step to its last."""
    recipe = speech_recipe(corpus, "straight")
    run_tiny(recipe, 1)
    return recipe


def test_the_table_is_the_language_models_and_stays_it(corpus: Path, straight: Recipe) -> None:
    """Optimizer state exists for what is trained alone, and the codes are learned."""
    found, theirs = tensors(straight.run_dir), tensors(str(corpus / "language"))
    assert torch.equal(found["text_table.weight"], theirs["language.embedding.word_embeddings.weight"][:VOCABULARY])
    directory = find(Path(straight.run_dir))
    assert directory is not None
    state = [key for key in TorchDistReader(directory).tensors if key.startswith("optimizer.")]
    assert any("text_projection" in key for key in state) and not any("text_table" in key for key in state)
    lines = records(straight)
    losses = [line["lm loss"] for line in lines if "lm loss" in line]
    assert losses[-1] < losses[0]
    seen = {name for line in lines for name in line}
    assert seen >= set(WATCHED)
    assert all(0 <= line[name] <= 1 for line in lines for name in line if "accuracy" in name)


def test_the_table_of_a_hugging_face_directory(corpus: Path) -> None:
    """With rows behind those of the tokenizer."""
    folder = corpus / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shutil.copyfile(corpus / "tokenizer.model", folder / "tokenizer.model")
    words = torch.randn(VOCABULARY + 7, WIDTH, generator=torch.Generator().manual_seed(1))
    save_file({"model.embed_tokens.weight": words, "lm_head.weight": words * 2}, folder / "model.safetensors")
    recipe = speech_recipe(
        corpus, "theirs_run", model__speech__text_table=str(folder), train_iters=1, data__eval_sources=[]
    )
    run_tiny(recipe, 1)
    assert torch.equal(tensors(recipe.run_dir)["text_table.weight"], words[:VOCABULARY])


def test_a_resumed_run_is_the_same_to_the_bit(corpus: Path, straight: Recipe) -> None:
    run_tiny(speech_recipe(corpus, "halves", train_iters=2), 1)
    recipe = speech_recipe(corpus, "halves", load="auto", model__speech__text_table=None)  # where it lies may change
    run_tiny(recipe, 1)
    assert watched(records(recipe)) == watched(records(straight))
    ours, theirs = tensors(recipe.run_dir), tensors(straight.run_dir)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "sizes",
    [
        {"parallel__tensor_model_parallel_size": 2, "parallel__expert_model_parallel_size": 2},
        {"parallel__pipeline_model_parallel_size": 2},
    ],
    ids=["tp2-ep2", "pp2"],
)
def test_a_run_goes_on_in_another_layout(corpus: Path, straight: Recipe, sizes: dict[str, int], tmp_path: Path) -> None:
    """Read by two ranks, from the checkpoint in the middle: the losses and accuracies of one rank's."""
    middle = Path(straight.run_dir) / "checkpoints" / "iter_0000002"
    assert middle.is_dir()
    recipe = speech_recipe(corpus, f"layout{len(sizes)}", load=str(middle), **sizes)
    found = run_tiny(recipe, 2)
    expected = [line for line in watched(records(straight)) if line["step"] > 2]
    for line, right in zip(watched(found), expected, strict=True):
        assert line == pytest.approx(right, rel=2e-4)


def test_weights_start_another_run(corpus: Path, straight: Recipe) -> None:
    """Of the whole generator; where codes mean something else they are refused."""
    recipe = speech_recipe(corpus, "next", init_from=straight.run_dir, train_iters=2, optim__lr=0.0, optim__min_lr=0.0)
    found = run_tiny(recipe, 1)
    at_end = records(straight)[-1]
    assert found[-1]["eval/loss/held"] == at_end["eval/loss/held"]
    changed = speech_recipe(
        corpus, "wider", init_from=straight.run_dir, train_iters=2, model__speech__codes_per_second=50.0
    )
    with pytest.raises(RankFailure, match=r"model.speech.codes_per_second=50.0: the weights of .* were made with 40.0"):
        run_tiny(changed, 1)


def test_a_dense_generator_starts_the_mixture(corpus: Path) -> None:
    """Every expert is its feed-forward part and two weights sum to one, so the mixture begins with its loss. Low-rank
    adapters add nothing at first, and leave table and projection alone."""
    dense = speech_recipe(corpus, "dense", model__moe=None, train_iters=2)
    run_tiny(dense, 1)
    still: dict[str, Any] = {"train_iters": 2, "optim__lr": 0.0, "optim__min_lr": 0.0, "init_from": dense.run_dir}
    for name, changes in (("mixture", {}), ("adapters", {"model__moe": None, "model__lora": {"rank": 2}})):
        recipe = speech_recipe(corpus, name, **still, **changes)
        run_tiny(recipe, 1)
        for field in ("eval/loss/held", "eval/accuracy/codes/held"):
            assert records(recipe)[-1][field] == pytest.approx(records(dense)[-1][field], rel=1e-5)
    found = tensors(recipe.run_dir)
    assert any(".lora_" in key for key in found) and torch.equal(
        found["text_projection.weight"], tensors(dense.run_dir)["text_projection.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model__speech__text_hidden_size": 32},
            "text_hidden_size=32: the word embeddings of .* are 24 wide; set it to",
        ),
        (
            {"model__speech__text_vocab_size": VOCABULARY + 1},
            r"text_vocab_size=\d+: .* has \d+ word embeddings; set it to at most",
        ),
        (
            {"model__speech__text_table": "."},
            "no checkpoint there; give a run directory .* or a Hugging Face directory",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_told(corpus: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RankFailure, match=said):
        run_tiny(speech_recipe(corpus, "none", **changes), 1)
