"""A chain of stages: which checkpoint each starts from, what it trains, how far it is, and running what is left.

    stages:
      - {name: 1_pretrain, recipe: 1_pretrain.yaml, init_from: path/of/a/checkpoint}
      - {name: 2_vision, recipe: 2_expert_warmup_vision.yaml, init_from: 1_pretrain}
      - {name: upcycle, upcycle: {base: 1_pretrain, vision: 2_vision, speech: [2_speech]}}
      - {name: 3_sft, recipe: 3_sft.yaml, init_from: upcycle}
      - {name: 6_gspo, recipe: 6_gspo.yaml, init_from: 3_sft}
      - {name: 6_pairs, pairs: {rollouts: 6_gspo}}
      - {name: 7_dpo, recipe: 7_dpo.yaml, init_from: 6_gspo, data_from: 6_pairs}

``init_from`` and the sources of an upcycling are names of earlier stages, or paths; the other hand-offs are names. A chain
that was stopped anywhere goes on there, and a stage whose predecessor was made anew since is an error.

Needs neither torch nor megatron but for an upcycling, and for rows that are made.
"""

from megatron_omni.chain.config import ChainConfig
from megatron_omni.chain.plan import Chain, Stage, load_chain, stage_ranks
from megatron_omni.chain.report import report, report_file
from megatron_omni.chain.running import (
    check_inputs,
    check_paths,
    clean_environment,
    recipe_with_rows,
    run_pairs,
    run_upcycle,
    training_command,
)

__all__ = [
    "Chain", "ChainConfig", "Stage", "check_inputs", "check_paths", "clean_environment", "load_chain",
    "recipe_with_rows", "report", "report_file", "run_pairs", "run_upcycle", "stage_ranks", "training_command",
]  # fmt: skip
