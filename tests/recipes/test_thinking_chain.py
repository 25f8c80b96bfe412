"""The chain of thinking for real, on a question small enough for seconds (the larger of two digits): a model that knows
nothing is shown thoughts for twenty steps, is reinforced, learns from pairs of its own responses, and is reinforced again
without what it has solved. Stages and hand-offs are those of recipes/chain_thinking.yaml.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_omni.chain import Chain, check_inputs, load_chain, recipe_with_rows, report, run_pairs
from megatron_omni.chain.prompts import dropped_places
from megatron_omni.checkpoint.run_dir import take
from megatron_omni.data.tokenizer import train_sentencepiece
from megatron_omni.evaluation.stages import read_records
from megatron_omni.rewards.rollouts import iterations, read_rollouts
from tests.distributed.tiny_run import run_ranks, train_rank

PAIRS = [(a, b) for a in range(10) for b in range(10) if a != b]
ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
    "mrope_section": [4, 2, 2], "vocab_size": 320, "vision": None, "audio": None, "init_method_std": 0.1,
    "moe": {"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 32, "input_jitter": 0.0,
            "gradient_estimator": "none", "moe_aux_loss_coeff": 0.0, "moe_aux_loss_coeff_min": 0.0},
}  # fmt: skip


def question(a: int, b: int) -> dict[str, Any]:
    return {"id": f"{a}{b}", "messages": [{"role": "user", "content": f"{a}or{b}?"}], "solution": str(max(a, b))}


def write_stages(folder: Path) -> Path:
    """Data, recipes and the chain's file."""
    questions = [question(a, b) for a, b in PAIRS]
    answers = [f"<think>{min(pair)}<{max(pair)}</think>{max(pair)}" for pair in PAIRS]
    shown = [
        {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
        for row, answer in zip(questions, answers)
    ]
    for name, rows in (("shown", shown), ("asked", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["messages"][0]["content"] for row in questions] + answers
    whole = ["<think>", "</think>", *"0123456789", "or", "?", "<"]
    train_sentencepiece([*texts, "user assistant system"] * 4, folder / "t.model", vocab_size=294, whole=whole)
    common: dict[str, Any] = {
        "seed": 5, "load": "auto", "model": MODEL,
        "optim": {"precision": "fp32", "lr": 5e-3, "lr_warmup_iters": 2, "lr_decay_style": "constant", "weight_decay": 0.0,
                  "use_distributed_optimizer": False},
        "data": {"tokenizer": str(folder / "t.model"), "seq_length": 256, "micro_batch_size": 16, "global_batch_size": 16,
                 "sources": [{"name": "digits", "path": str(folder / "shown.jsonl")}]},
        "checkpoint": {"save_interval": 0}, "log": {"interval": 1, "tensorboard": False, "expert_load": False},
        "train_iters": 20,
    }  # fmt: skip
    rewards = [{"function": "wer"}, {"function": "think_format", "weight": 0.5}]
    asked = [{"name": "digits", "path": str(folder / "asked.jsonl")}]
    gspo = {
        "extends": "cold.yaml", "task": "reinforce", "freeze": ["gate"], "train_iters": 4,
        "optim": {"lr": 5e-4, "lr_warmup_iters": 0},
        "reinforce": {"rewards": rewards, "mini_batches": 2, "max_new_tokens": 10, "clip_low": 0.2, "clip_high": 0.2},
        "data": {"sources": asked},
    }  # fmt: skip
    dpo = {
        "extends": "cold.yaml",
        "task": "preference",
        "freeze": ["gate"],
        "train_iters": 2,
        "optim": {"lr": 1e-4, "lr_warmup_iters": 0},
    }
    for name, recipe in (("cold", common), ("gspo", gspo), ("dpo", dpo)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    stages = yaml.safe_load((ROOT / "recipes" / "chain_thinking.yaml").read_text())["stages"]
    recipes = {"5_cold_start.yaml": "cold.yaml", "6_gspo.yaml": "gspo.yaml", "7_dpo.yaml": "dpo.yaml"}
    for stage in stages:
        stage |= {"recipe": recipes[stage["recipe"]]} if "recipe" in stage else {}
        stage.pop("overrides", None)
    del stages[0]["init_from"]
    file = folder / "chain_thinking.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "stages": stages}))
    return file


def run(chain: Chain, name: str) -> None:
    stage = chain.stage(name)
    if stage.pairs is not None:
        run_pairs(chain, stage)
    else:
        recipe = recipe_with_rows(chain, stage)
        recipe.init_from = next((str(path) for path in chain.inputs(stage).values()), None)
        stage.run_dir.mkdir(parents=True, exist_ok=True)
        take(recipe)
        assert run_ranks(train_rank, 1, recipe) == [0]
    assert stage.is_done
    check_inputs(chain, stage)


def test_cold_start_gspo_pairs_dpo_gspo(tmp_path: Path) -> None:
    chain = load_chain(write_stages(tmp_path))
    for stage in chain.stages:
        run(chain, stage.name)
    gspo, pairs, dpo, last = (chain.stage(name).run_dir for name in ("6_gspo", "6_pairs", "7_dpo", "8_gspo"))

    responses = [one for number in iterations(gspo) for one in read_rollouts(gspo, number)]
    formed = [one.rewards["think_format"] for one in responses]
    assert len(responses) == 2 * 32 * 8 and sum(map(float, formed)) > len(responses) / 2, (
        "the cold start taught the form"
    )

    made = json.loads((pairs / "pairs.json").read_text())
    (source,) = recipe_with_rows(chain, chain.stage("7_dpo")).data.sources
    rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    assert len(rows) == made["pairs"] > 16 and {row["pair"]["kind"] for row in rows} >= {"inconsistent", "wrong"}
    for row in rows:
        chosen, rejected = row["messages"][-1]["content"], row["rejected_response"]
        assert chosen.endswith(f"</think>{row['solution']}") and chosen != rejected
        assert (row["pair"]["kind"] == "wrong") == (not rejected.endswith(f"</think>{row['solution']}"))
    losses = [record["dpo loss"] for record in read_records(dpo)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]

    left = json.loads((last / "prompts.json").read_text())
    config = chain.stage("8_gspo").prompts_from
    assert config is not None and left["dropped"] == round(0.8 * left["solved"])
    dropped = dropped_places(config, chain.recipe_of("6_gspo"), 5)
    names = {question(a, b)["id"] for n, (a, b) in enumerate(PAIRS) if ("digits", n) in dropped}
    assert len(names) == left["dropped"]
    asked = {one.id for number in iterations(last) for one in read_rollouts(last, number)}
    assert len(asked) == 64 and not asked & names
    said = report([chain])
    assert f"- 6_pairs: {made['pairs']} pairs of 64 prompts" in said and "- 7_dpo: preference/accuracy" in said
