"""The plan of a chain: its stages with everything decided, and the hand-offs checked before anything runs.

A stage is a training run in ``run_dir/<name>``, an upcycling of earlier stages, or pairs made of an earlier stage's rollouts.
Nothing is remembered beside what the stages leave: a run is finished when its newest checkpoint is that of its last step
(``train_iters``, or where its data ended), pairs when ``pairs.json`` is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_omni.chain.config import PAIRS_REPORT, ChainConfig, PairsConfig, PromptsConfig, StageConfig, UpcycleConfig
from megatron_omni.chain.verify import correct_rewards
from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.meaning import check_handover
from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
from megatron_omni.config.load import load_config, load_recipe, read_mapping
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.config.outcome import ENDED_MARKER
from megatron_omni.config.ranges import out_of_range
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import fewest_ranks, validate


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage with everything decided but which of a predecessor's checkpoints it gets."""

    name: str
    run_dir: Path
    hand_on: str
    sources: dict[str, str]
    """Role -> earlier stage or path: ``init_from``, or base, vision, speech1, expert1, ... of an upcycling."""
    recipe_file: Path | None = None
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    upcycle: UpcycleConfig | None = None
    moe: MoEConfig | None = None
    """Of an upcycling: the shape that its consumer wants."""
    pairs: PairsConfig | None = None
    prompts_from: PromptsConfig | None = None
    reads: dict[str, str] = field(default_factory=dict)
    """Role -> earlier stage whose files it reads: ``rollouts``, ``data_from``, ``prompts_from``."""

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / commit.CHECKPOINTS

    @property
    def steps(self) -> int:
        """Steps of a finished stage."""
        return self.recipe.train_iters if self.recipe is not None else 0

    @property
    def steps_done(self) -> int | None:
        """Step of the newest checkpoint; None before the first. Of pairs 0 when they are there."""
        if self.pairs is not None:
            return 0 if (self.run_dir / PAIRS_REPORT).is_file() else None
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

    name: str
    """Of its file."""
    run_dir: Path
    nproc_per_node: int
    launcher: str | None
    stages: tuple[Stage, ...]

    def source(self, word: str) -> Stage | Path:
        """What ``word`` of a stage's ``sources`` stands for."""
        return next((stage for stage in self.stages if stage.name == word), Path(word))

    def stage(self, name: str) -> Stage:
        """The stage of this name, which was checked to be there."""
        return next(stage for stage in self.stages if stage.name == name)

    def recipe_of(self, name: str) -> Recipe:
        """The recipe of a training stage."""
        recipe = self.stage(name).recipe
        assert recipe is not None
        return recipe

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
        name=path.stem,
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
    kinds = [name for name in ("recipe", "upcycle", "pairs") if getattr(made, name) is not None]
    if len(kinds) != 1:
        said = "neither" if not kinds else "both" if len(kinds) == 2 else "all"
        of = "recipe, upcycle and pairs" if len(kinds) != 2 else " and ".join(kinds)
        raise ValueError(f"{where}: has {said} of {of}; give one of them")
    common: dict[str, Any] = {"name": made.name, "run_dir": run_dir / made.name, "hand_on": made.hand_on}
    if made.recipe is None:
        for name in ("init_from", "overrides", "data_from", "prompts_from"):
            if getattr(made, name):
                raise ValueError(f"{where}: {name} has no effect without a recipe; take it out")
    if made.pairs is not None:
        _check_order(where, {"rollouts": made.pairs.rollouts}, later)
        return Stage(**common, sources={}, pairs=made.pairs, reads={"rollouts": made.pairs.rollouts})
    if made.upcycle is not None:
        given = made.upcycle
        if (problem := given.problem()) is not None:
            raise ValueError(f"{where}: upcycle: {problem}")
        _check_order(where, given.sources, later)
        return Stage(**common, sources=given.sources, upcycle=given)
    return _training_stage(path, made, common, overrides, later)


def _training_stage(
    path: Path, made: StageConfig, common: Mapping[str, Any], overrides: Sequence[str], later: set[str]
) -> Stage:
    where = f"{path}: stage {made.name}"
    assert made.recipe is not None
    file = path.parent / made.recipe
    words = (*overrides, *made.overrides, f"run_dir={common['run_dir']}", "load=auto")
    try:
        recipe = load_recipe(file, list(words))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    word = recipe.init_from = made.init_from if made.init_from is not None else recipe.init_from
    sources = {"init_from": word} if word is not None else {}
    if made.data_from is not None and made.prompts_from is not None:
        raise ValueError(f"{where}: has both of data_from and prompts_from; give one of them")
    reads = {"data_from": made.data_from} if made.data_from is not None else {}
    reads |= {"prompts_from": made.prompts_from.rollouts} if made.prompts_from is not None else {}
    _check_order(where, sources | reads, later)
    return Stage(
        **common,
        sources=sources,
        recipe_file=file,
        overrides=words,
        recipe=recipe,
        prompts_from=made.prompts_from,
        reads=reads,
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
    _check_reads(where, chain, stage)
    for role, word in stage.sources.items():
        if isinstance(given := chain.source(word), Stage) and given.pairs is not None:
            raise ValueError(f"{where}: {role}: {word} makes pairs and no weights; name a stage that trains")
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
    if stage.pairs is not None:
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


def _check_reads(where: str, chain: Chain, stage: Stage) -> None:
    """What a stage reads of earlier ones is there to be made."""
    for role, word in stage.reads.items():
        source = chain.source(word)
        wanted = "makes pairs" if role == "data_from" else "has task reinforce"
        fits = isinstance(source, Stage) and (
            source.pairs is not None
            if role == "data_from"
            else source.recipe is not None and source.recipe.task == "reinforce"
        )
        if not fits:
            raise ValueError(f"{where}: {role}: {word!r} is no earlier stage that {wanted}; name one")
        assert isinstance(source, Stage)
        rolled = chain.recipe_of(source.reads["rollouts"]) if role == "data_from" else source.recipe
        assert rolled is not None
        if (config := stage.pairs or stage.prompts_from) is not None:
            try:
                correct_rewards(config, rolled)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        ours = stage.recipe
        if role == "data_from" and ours is not None and ours.data.system_turn != rolled.data.system_turn:
            raise ValueError(
                f"{where}: {role}: its prompts have another system turn than those of {source.reads['rollouts']}, which were "
                "answered; give both the same data.system_template and data.system_prompt"
            )
        if role == "prompts_from" and ours is not None and ours.task != "reinforce":
            raise ValueError(f"{where}: {role}: has task {ours.task}; prompts are for task reinforce")


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
        checkpoint = checkpoint_at(source)
        file = checkpoint / "run_config.yaml"
        return MadeWith(load_recipe(file).model, find_tokenizer(checkpoint)) if file.is_file() else None
    if source.recipe is not None:
        return MadeWith(source.recipe.model, Path(source.recipe.data.tokenizer))
    assert source.upcycle is not None
    base = _made_with(
        chain.source(source.sources[source.upcycle.trunk_role if source.upcycle.experts else "base"]), chain
    )
    return None if base is None else base._replace(model=replace(base.model, moe=source.moe))


def stage_ranks(chain: Chain, recipe: Recipe) -> int:
    """Ranks of a stage: the torchrun's, or with a launcher of its own the fewest that its layout allows."""
    return chain.nproc_per_node if chain.launcher is None else fewest_ranks(recipe.parallel)


def checkpoint_at(path: Path) -> Path:
    """The newest checkpoint of a run directory; any other path as it is."""
    step = commit.tracked_step(path / commit.CHECKPOINTS)
    return path if step is None else commit.iteration_dir(path / commit.CHECKPOINTS, step)
