"""What a chain file says: its stages, and what each takes from earlier ones."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.objectives import RewardConfig
from megatron_omni.config.ranges import file_path, number

PAIRS_REPORT = "pairs.json"
"""What a finished stage of pairs leaves, last."""


@dataclass(kw_only=True)
class UpcycleConfig:
    """Sources of a mixture, in the order of its routed experts (the base is the last), or speech generators."""

    base: str | None = None
    vision: str | None = None
    speech: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    """Dense speech generators, a routed expert each, in place of the others."""
    trunk: str | None = None
    """Role whose trunk is taken: ``base`` (as null), ``vision``, ``speech1``; with ``experts`` one of them by its name
    (null: the last)."""

    @property
    def sources(self) -> dict[str, str]:
        """Role -> stage or path, in the order of the routed experts."""
        if self.experts:
            return {f"expert{i + 1}": word for i, word in enumerate(self.experts)}
        found = {"vision": self.vision} if self.vision is not None else {}
        found |= {f"speech{i + 1}": word for i, word in enumerate(self.speech)}
        return found | ({"base": self.base} if self.base is not None else {})

    @property
    def trunk_role(self) -> str:
        """The role that gives the trunk."""
        if not self.experts:
            return self.trunk or "base"
        named = [role for role, word in self.sources.items() if word == self.trunk]
        return named[0] if named else f"expert{len(self.experts)}"

    def problem(self) -> str | None:
        """What is wrong with it, for people."""
        if self.experts and (self.base is not None or self.vision is not None or self.speech):
            return "experts are speech generators, which have no roles; leave out base, vision and speech"
        if not self.experts and self.base is None:
            return "has no base, and no experts (speech generators); name one or the other"
        if self.experts and self.trunk is not None and self.trunk not in self.experts:
            return f"trunk: {self.trunk!r} is none of its experts, {', '.join(self.experts)}"
        return None


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
