"""A chain of stages: which checkpoint each starts from, what it trains, how far it is, and running what is left.

    stages:
      - {name: 1_pretrain, recipe: 1_pretrain.yaml, init_from: path/of/a/checkpoint}
      - {name: 2_vision, recipe: 2_expert_warmup_vision.yaml, init_from: 1_pretrain}
      - {name: upcycle, upcycle: {base: 1_pretrain, vision: 2_vision, speech: [2_speech]}}
      - {name: 3_sft, recipe: 3_sft.yaml, init_from: upcycle}

A stage is a training run in ``run_dir/<name>`` or an upcycling of earlier stages; ``init_from`` and the sources of an
upcycling are names of earlier stages (or paths). Nothing is remembered beside what the stages leave: a run is finished when
its newest checkpoint is that of its last step (``train_iters``, or where its data ended), and what it was started from
stands in its ``resolved.yaml``. So a chain that was stopped anywhere goes on there, and a stage whose predecessor was made
anew since is an error, not a guess.

Training stages are subprocesses (torchrun, or ``launcher``), so that none leaves memory or process groups behind. Needs
neither torch nor megatron but for the upcycling itself.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.meaning import check_handover
from megatron_omni.checkpoint.run_dir import RESOLVED
from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
from megatron_omni.config.load import load_config, load_recipe, read_mapping
from megatron_omni.config.model import UPCYCLED_SHAPE, ModelConfig, MoEConfig
from megatron_omni.config.outcome import ENDED_MARKER
from megatron_omni.config.ranges import file_path, number, out_of_range
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import fewest_ranks, validate
from megatron_omni.evaluation import stages as reading
from megatron_omni.foreign import read_json

UPCYCLE_REPORT = "upcycle.json"
REPORT = "held_out.md"
"""In the chain's directory: what its stages show on held-out data."""


@dataclass(kw_only=True)
class UpcycleConfig:
    """Sources of a mixture, in the order of its routed experts (the base is the last)."""

    base: str
    vision: str | None = None
    speech: list[str] = field(default_factory=list)
    trunk: str = "base"


@dataclass(kw_only=True)
class StageConfig:
    """One stage: ``recipe`` (relative to the chain's file) or ``upcycle``."""

    name: str
    recipe: str | None = file_path(None)
    init_from: str | None = file_path(None)
    """An earlier stage, or a path; None leaves it to the recipe."""
    overrides: list[str] = field(default_factory=list)
    """``key=value`` changes of the recipe."""
    upcycle: UpcycleConfig | None = None
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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage with everything decided but which of a predecessor's checkpoints it gets."""

    name: str
    run_dir: Path
    hand_on: str
    sources: dict[str, str]
    """Role -> earlier stage or path: ``init_from``, or base, vision, speech1, ... of an upcycling."""
    recipe_file: Path | None = None
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    upcycle: UpcycleConfig | None = None
    moe: MoEConfig | None = None
    """Of an upcycling: the shape that its consumer wants."""

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / commit.CHECKPOINTS

    @property
    def steps(self) -> int:
        """Steps of a finished stage."""
        return self.recipe.train_iters if self.recipe is not None else 0

    @property
    def steps_done(self) -> int | None:
        """Step of the newest checkpoint; None before the first."""
        step = commit.tracked_step(self.checkpoints)
        return step if step is not None and commit.iteration_dir(self.checkpoints, step).is_dir() else None

    @property
    def is_done(self) -> bool:
        done, ended = self.steps_done, self.run_dir / ENDED_MARKER
        return done is not None and (done >= self.steps or (ended.is_file() and ended.read_text() == f"{done}\n"))

    @property
    def result(self) -> Path:
        """Checkpoint that later stages start from."""
        assert self.steps_done is not None
        step = self.steps_done
        if self.hand_on == "best":
            best = commit.best_checkpoint(self.checkpoints)
            if best is None:
                raise ValueError(f"stage {self.name}: no best checkpoint in {self.checkpoints}; set hand_on to last")
            step = int(best["step"])
        return commit.iteration_dir(self.checkpoints, step)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A checked chain."""

    run_dir: Path
    nproc_per_node: int
    launcher: str | None
    stages: tuple[Stage, ...]

    def source(self, word: str) -> Stage | Path:
        """What ``word`` of a stage's ``sources`` stands for."""
        return next((stage for stage in self.stages if stage.name == word), Path(word))

    def inputs(self, stage: Stage) -> dict[str, Path]:
        """Role -> checkpoint that ``stage`` starts from; the stages before it are finished."""
        found = {role: self.source(word) for role, word in stage.sources.items()}
        return {role: source.result if isinstance(source, Stage) else source for role, source in found.items()}


def load_chain(path: Path, overrides: Sequence[str] = (), *, nproc_per_node: int | None = None) -> Chain:
    """The chain in ``path``. ``overrides`` change every stage's recipe, ``run_dir=`` and ``launcher=`` the chain.

    ValueError that names the stage for a recipe or a hand-off that cannot work.
    """
    own = [word for word in overrides if word.startswith(("run_dir=", "launcher="))]
    config = _read(path, own)
    if nproc_per_node is not None:
        config.nproc_per_node = nproc_per_node
    rest = [word for word in overrides if word not in own]
    stages: list[Stage] = []
    for place, made in enumerate(config.stages):
        earlier = {stage.name for stage in stages}
        if made.name in earlier:
            raise ValueError(f"{path}: two stages are called {made.name!r}; give each its own name")
        later = {stage.name for stage in config.stages[place:]}
        stages.append(_stage(path, made, Path(config.run_dir), rest, later))
    stages = [_with_shape(stage, stages) for stage in stages]
    chain = Chain(
        run_dir=Path(config.run_dir),
        nproc_per_node=config.nproc_per_node,
        launcher=config.launcher,
        stages=tuple(stages),
    )
    for stage in chain.stages:
        _check(chain, stage)
    return chain


def _read(path: Path, overrides: Sequence[str]) -> ChainConfig:
    config = load_config(ChainConfig, [(str(path), read_mapping(path, "chain"))], list(overrides))
    if problem := next(out_of_range(config), None):
        raise ValueError(f"{path}: {problem}")
    if not config.stages:
        raise ValueError(f"{path}: stages is empty; a chain has at least one")
    return config


def _stage(path: Path, made: StageConfig, run_dir: Path, overrides: Sequence[str], later: set[str]) -> Stage:
    where = f"{path}: stage {made.name}"
    if (made.recipe is None) == (made.upcycle is None):
        raise ValueError(f"{where}: has {'both' if made.recipe else 'neither'} of recipe and upcycle; give one of them")
    directory = run_dir / made.name
    if made.upcycle is not None:
        if made.init_from is not None or made.overrides:
            raise ValueError(f"{where}: init_from and overrides have no effect on an upcycling; take them out")
        given = made.upcycle
        sources = {"vision": given.vision} if given.vision is not None else {}
        sources |= {f"speech{i + 1}": word for i, word in enumerate(given.speech)}
        _check_order(where, sources | {"base": given.base}, later)
        return Stage(
            name=made.name,
            run_dir=directory,
            hand_on=made.hand_on,
            sources=sources | {"base": given.base},
            upcycle=given,
        )
    assert made.recipe is not None
    file = path.parent / made.recipe
    words = (*overrides, *made.overrides, f"run_dir={directory}", "load=auto")
    try:
        recipe = load_recipe(file, list(words))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    word = made.init_from if made.init_from is not None else recipe.init_from
    sources = {"init_from": word} if word is not None else {}
    _check_order(where, sources, later)
    return Stage(
        name=made.name,
        run_dir=directory,
        hand_on=made.hand_on,
        sources=sources,
        recipe_file=file,
        overrides=words,
        recipe=recipe,
    )


def _check_order(where: str, sources: dict[str, str], later: set[str]) -> None:
    for role, word in sources.items():
        if word in later:
            raise ValueError(f"{where}: {role}: {word!r} comes later in the chain; name an earlier stage")


def _with_shape(stage: Stage, stages: Sequence[Stage]) -> Stage:
    """An upcycling with the mixture's shape that the first stage that starts from it has."""
    if stage.upcycle is None:
        return stage
    models = [other.recipe.model for other in stages if other.recipe and other.sources.get("init_from") == stage.name]
    return replace(stage, moe=models[0].moe if models else None)


def _check(chain: Chain, stage: Stage) -> None:
    """The typed hand-off: what arrives has the shape of what is made of it."""
    where = f"stage {stage.name}"
    sources = {role: _made_with(chain.source(word), chain) for role, word in stage.sources.items()}
    models = {role: source.model if source is not None else None for role, source in sources.items()}
    if stage.recipe is not None:
        try:
            validate(stage.recipe, world_size=stage_ranks(chain, stage.recipe), check_files=False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if stage.hand_on == "best" and stage.recipe.checkpoint.keep_best is None:
            raise ValueError(f"{where}: hand_on=best needs checkpoint.keep_best in its recipe; set it, or hand_on=last")
        if (source := sources.get("init_from")) is not None:
            theirs = source.model
            _check_handover(where, stage.recipe, source, stage.sources["init_from"])
            if theirs.moe is not None and stage.recipe.model.moe is None:
                raise ValueError(
                    f"{where}: is dense but starts from {stage.sources['init_from']}, a mixture of experts; start it "
                    "from a dense stage"
                )
        return
    known = {role: model for role, model in models.items() if model is not None}
    for role, model in known.items():
        if model.moe is not None:
            raise ValueError(
                f"{where}: {role}: {stage.sources[role]} is a mixture of experts already; name a dense stage"
            )
        if stage.moe is not None and model.ffn_hidden_size != stage.moe.moe_ffn_hidden_size:
            raise ValueError(
                f"{where}: {role}: {stage.sources[role]} has a feed-forward part {model.ffn_hidden_size} wide, the mixture "
                f"wants experts of model.moe.moe_ffn_hidden_size={stage.moe.moe_ffn_hidden_size}; make them equal"
            )
    if stage.moe is not None and stage.moe.num_routed_experts != len(stage.sources):
        raise ValueError(
            f"{where}: {len(stage.sources)} sources make as many routed experts, but the stage that starts from it has "
            f"model.moe.num_routed_experts={stage.moe.num_routed_experts}"
        )


def _check_handover(where: str, ours: Recipe, source: "MadeWith", word: str) -> None:
    parts = () if ours.init_allow_missing or ours.init_allow_extra else ("vision", "audio")
    for part in parts:
        if (getattr(ours.model, part) is None) != (getattr(source.model, part) is None):
            raise ValueError(
                f"{where}: only one of it and {word}, from which it starts, has model.{part}; make them equal, or name "
                "its tensors in init_allow_missing or init_allow_extra"
            )
    ours_read = Path(ours.data.tokenizer)
    there = ours_read.exists() and source.tokenizer is not None and source.tokenizer.exists()
    try:
        check_handover(
            ours.model,
            source.model,
            tokenizers=(ours_read, source.tokenizer) if there else (None, None),
            origin=word,
            allowed=ours.init_allow_changed,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class MadeWith(NamedTuple):
    """What weights were made with: the model that they are of, and the tokenizer where it is known."""

    model: ModelConfig
    tokenizer: Path | None


def _made_with(source: Stage | Path, chain: Chain) -> MadeWith | None:
    """Of the weights that a stage or path hands on; None where nothing says yet."""
    if isinstance(source, Path):
        checkpoint = _checkpoint(source)
        file = checkpoint / "run_config.yaml"
        return MadeWith(load_recipe(file).model, find_tokenizer(checkpoint)) if file.is_file() else None
    if source.recipe is not None:
        return MadeWith(source.recipe.model, Path(source.recipe.data.tokenizer))
    base = _made_with(chain.source(source.sources["base"]), chain)
    return None if base is None else base._replace(model=replace(base.model, moe=source.moe))


def check_paths(chain: Chain) -> None:
    """ValueError for a stage that has yet to start from a path where nothing is."""
    for stage in chain.stages:
        for role, word in stage.sources.items():
            if stage.steps_done is None and isinstance(path := chain.source(word), Path) and not path.exists():
                raise ValueError(f"stage {stage.name}: {role}: {word!r} is no earlier stage and no checkpoint is there")


def stage_ranks(chain: Chain, recipe: Recipe) -> int:
    """Ranks of a stage: the torchrun's, or with a launcher of its own the fewest that its layout allows."""
    return chain.nproc_per_node if chain.launcher is None else fewest_ranks(recipe.parallel)


def check_inputs(chain: Chain, stage: Stage) -> None:
    """ValueError unless the checkpoint that a started stage was made from is what the chain hands to it now."""
    if stage.steps_done is None:
        return
    expected = {role: _checkpoint(path) for role, path in chain.inputs(stage).items()}
    if stage.upcycle is not None:
        report = commit.iteration_dir(stage.checkpoints, 0) / UPCYCLE_REPORT
        found = read_json(report)["sources"]
    else:
        resolved = stage.run_dir / RESOLVED
        origin = load_recipe(resolved).init_from if resolved.is_file() else None
        found = {} if origin is None else {"init_from": origin}
    found = {role: _checkpoint(Path(path)) for role, path in found.items()}
    if expected != found:
        raise ValueError(
            f"stage {stage.name}: was made from {_said(found)}, but the chain hands it {_said(expected)}; move {stage.run_dir} "
            "away to make it again, or take another run_dir"
        )


def _checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run directory; any other path as it is."""
    step = commit.tracked_step(path / commit.CHECKPOINTS)
    return path if step is None else commit.iteration_dir(path / commit.CHECKPOINTS, step)


def _said(inputs: dict[str, Path]) -> str:
    return ", ".join(map(str, inputs.values())) or "random weights"


def training_command(chain: Chain, stage: Stage, python: str) -> list[str]:
    """The subprocess of a training stage whose predecessors are finished."""
    launcher = (
        [python, "-m", "megatron_omni.platform.torchrun", "--standalone", "--nproc-per-node", str(chain.nproc_per_node)]
        if chain.launcher is None
        else chain.launcher.split()
    )
    inputs = [f"{role}={path}" for role, path in chain.inputs(stage).items()]
    return [*launcher, "-m", "megatron_omni.cli.train", str(stage.recipe_file), *stage.overrides, *inputs]


def run_upcycle(chain: Chain, stage: Stage) -> Path:
    """Make the mixture of an upcycling stage; ValueError, CheckpointError or OSError as ``upcycle`` raises them."""
    from megatron_omni.checkpoint.upcycle import upcycle

    assert stage.upcycle is not None
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    shape = [f"model.moe.{name}={getattr(stage.moe, name)}" for name in UPCYCLED_SHAPE] if stage.moe is not None else []
    return upcycle(chain.inputs(stage), stage.run_dir, trunk=stage.upcycle.trunk, overrides=shape)


def clean_environment() -> dict[str, str]:
    """This process's environment without what a torchrun around it said, which would mislead the one of a stage."""
    dropped = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")
    prefixes = ("TORCHELASTIC_", "LOCAL_", "ROLE_")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(prefixes)}
    # torchrun gives its workers 30 seconds to save and leave; a large checkpoint takes longer.
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", **kept}


def report(chains: Sequence[Chain]) -> str:
    """The table over all ``chains`` (one recipe, several seeds) and the reading of each."""
    first = chains[0]
    trained = [stage for stage in first.stages if stage.recipe is not None]
    losses = [{s.name: reading.held_out_losses(s.run_dir) for s in chain.stages} for chain in chains]
    if not any(seed[stage.name] for seed in losses for stage in trained):
        raise ValueError(f"{first.run_dir}: no stage has evaluated anything; run the chain, with log.eval_interval > 0")
    blocks = [reading.table([stage.name for stage in trained], losses)]
    scores = [{s.name: reading.held_out_scores(s.run_dir) for s in chain.stages} for chain in chains]
    if any(found for seed in scores for found in seed.values()):
        blocks += ["", "Scores:", "", reading.table([stage.name for stage in trained], scores)]
    for chain, found in zip(chains, losses):
        blocks += [f"{chain.run_dir}:" if len(chains) > 1 else "", *(f"- {line}" for line in _lines(chain, found))]
    return "\n".join(blocks)


def _lines(chain: Chain, losses: dict[str, reading.Losses]) -> list[str]:
    by_name = {stage.name: stage for stage in chain.stages}
    lines: list[str] = []
    for merge in chain.stages:
        if merge.upcycle is None:
            continue
        experts = {
            name: _own_sets(by_name[name], losses[name])
            for role, name in merge.sources.items()
            if role != "base" and losses.get(name)
        }
        lines += reading.own_modality(experts, losses)
        for stage in chain.stages:
            if stage.sources.get("init_from") == merge.name and losses[stage.name]:
                lines += reading.against_best(stage.name, list(experts), losses)
                lines += _after(chain, stage, losses)
    return lines


def _after(chain: Chain, tuned: Stage, losses: dict[str, reading.Losses]) -> list[str]:
    """Of the stages that start from the fine-tuned mixture, and of its gate after the last of them."""
    lines, last = [], tuned
    for stage in chain.stages:
        if stage.sources.get("init_from") == tuned.name and losses[stage.name]:
            lines += reading.change(tuned.name, stage.name, losses)
            last = stage
    return [*lines, *(f"{last.name}, {line}" for line in reading.routing(last.run_dir))]


def _own_sets(stage: Stage, losses: reading.Losses) -> list[str]:
    assert stage.recipe is not None
    return [source.name for source in stage.recipe.data.sources if source.name in losses]
