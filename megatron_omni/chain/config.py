"""What a chain file says: its stages, and what each takes from earlier ones."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.objectives import RewardConfig
from megatron_omni.config.ranges import file_path, number

PAIRS_REPORT = "pairs.json"
"""What a finished stage of pairs leaves, last."""


@dataclass(kw_only=True)
class UpcycleConfig:
    """Sources of a mixture, in the order of its routed experts (the base is the last)."""

    base: str
    vision: str | None = None
    speech: list[str] = field(default_factory=list)
    trunk: str = "base"


@dataclass(kw_only=True)
class RolloutsConfig:
    """Responses of an earlier stage, and which of them are right."""

    rollouts: str
    """The stage of task ``reinforce`` whose responses are read."""
    correct: list[str] = field(default_factory=list)
    """Rewards that say whether a response is right: all of them that gave a value gave ``correct_at`` or more. Empty: all
    of the stage's that judge content, a judge's apart."""
    correct_at: float = number(1.0, at_least=-(10**6), at_most=10**6)
    """Least value of a right response."""


@dataclass(kw_only=True)
class PairsConfig(RolloutsConfig):
    """Pairs of responses to learn preferences from (verify.py has the rules)."""

    consistency: RewardConfig | None = None
    """What says whether a thought leads to its answer, a reward function: 1 it does, 0 it does not. ``judge`` has a
    template for it. null: a rule that compares the answer with the thought's end."""
    consistent_at: float = number(0.5, at_least=-(10**6), at_most=10**6)
    """Least value of a consistent response; a smaller one contradicts itself."""
    demonstrations: str | None = file_path(None)
    """JSONL file of a teacher's answers to prompts that were never solved; a row names its prompt by ``id``."""
    repetition_below: float = number(0.2, above=0, at_most=1)
    """Share of repeated trigrams of tokens from which a response counts as repetitive."""
    length_factor: float = number(3.0, at_least=1, at_most=1000)
    """The longer response of a pair has at most so many times the tokens of the other."""
    pairs_per_prompt: int = number(2, at_least=1, at_most=64)
    """Most pairs of a prompt."""


@dataclass(kw_only=True)
class PromptsConfig(RolloutsConfig):
    """Prompts of an earlier stage without those that it has learned to answer."""

    drop_solved: float = number(0.8, at_least=0, at_most=1)
    """Share of the prompts whose responses were all right that is left out."""


@dataclass(kw_only=True)
class StageConfig:
    """One stage: ``recipe`` (relative to the chain's file), ``upcycle`` or ``pairs``."""

    name: str
    recipe: str | None = file_path(None)
    init_from: str | None = file_path(None)
    """An earlier stage, or a path; None leaves it to the recipe."""
    overrides: list[str] = field(default_factory=list)
    """``key=value`` changes of the recipe."""
    upcycle: UpcycleConfig | None = None
    pairs: PairsConfig | None = None
    data_from: str | None = None
    """An earlier stage of pairs whose rows this one reads in place of its recipe's ``data.sources``."""
    prompts_from: PromptsConfig | None = None
    """Read the recipe's sources without the prompts that an earlier stage has solved."""
    hand_on: Literal["last", "best"] = "last"
    """Which checkpoint later stages start from; ``best`` needs ``checkpoint.keep_best``."""


@dataclass(kw_only=True)
class ChainConfig:
    """A chain file."""

    run_dir: str = file_path()
    nproc_per_node: int = number(1, at_least=1, at_most=1024)
    launcher: str | None = None
    """Words before ``-m megatron_omni.cli.train`` in place of ``torchrun --standalone``; split at spaces."""
    stages: list[StageConfig] = field(default_factory=list)
