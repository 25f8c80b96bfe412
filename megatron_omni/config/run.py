"""The recipe: everything that one training run needs, in one typed tree."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.data import DataConfig
from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.objectives import (
    CodecTrainingConfig,
    PictureCodecTrainingConfig,
    PreferenceConfig,
    ReinforceConfig,
)
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.ranges import file_path, number


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    save_interval: int = number(1000, at_least=0)
    """Steps between checkpoints; 0 saves only at the end and on a stop signal."""
    keep: int = number(2, at_least=0)
    """Newest checkpoints kept; older ones are removed after a newer one is whole. 0 keeps all."""
    async_save: bool = False
    """Write files while training goes on, from a copy in main memory (as large as this rank's part of the checkpoint).
    The last save of a run is always waited for."""
    keep_best: str | None = None
    """A metric of the held-out evaluation, lower is better (``eval/loss``: mean over the held-out sets,
    ``eval/loss/<name>``: one of them). The checkpoint with the lowest value stays too, and ``best.json`` names it."""


@dataclass(kw_only=True)
class LogConfig:
    """Progress line, metrics.jsonl and TensorBoard."""

    interval: int = number(10, at_least=1)
    """Steps between two lines of the log and of metrics.jsonl."""
    eval_interval: int = number(0, at_least=0)
    """Steps between held-out loss evaluations; 0 never."""
    eval_iters: int = number(4, at_least=1)
    """Global batches per held-out source and evaluation."""
    tensorboard: bool = True
    """Write what metrics.jsonl holds for TensorBoard as well (``tensorboard --logdir RUN_DIR/tensorboard``)."""
    wandb_project: str | None = None
    """Project of Weights & Biases that gets what metrics.jsonl holds as well (package ``wandb``; docs/training.md); null:
    none."""
    expert_load: bool = True
    """Routing statistics per layer x expert x modality."""
    profile_steps: list[int] = number(list, at_least=1)
    """First and last step of a torch profiler trace (training/profile.py); empty for none."""
    profile_ranks: list[int] = number(lambda: [0], at_least=0)
    """Ranks whose trace is written."""
    memory_snapshot: bool = False
    """Write as well where each of these ranks allocated the memory of its GPU in these steps, for
    https://docs.pytorch.org/memory_viz."""


@dataclass(kw_only=True)
class Recipe:
    """One training run. ``load`` resumes everything; ``init_from`` takes weights only."""

    task: Literal["supervised", "reinforce", "preference", "codec", "picture_codec", "generative"] = "supervised"
    """What is learned: the answers of the records; to get rewards for responses of its own (GSPO, docs/reinforcement.md);
    to prefer one answer to another (DPO); to turn sound into codes and back (docs/speech.md); to turn pictures into latents
    and back, and to draw the pictures of the answers (docs/images_out.md)."""
    seed: int = number(3407, at_least=0, at_most=2**32 - 1)
    """Decides every random draw: initial weights, the order of the data, routing, dropout."""
    deterministic_mode: bool = False
    """Take kernels that give the same bits in every run, slower ones on a GPU; an operation that has none is an error
    (docs/reliability.md)."""
    run_dir: str = file_path("runs/default")
    """Where logs and checkpoints of the run go (docs/training.md)."""
    train_iters: int = number(1000, at_least=1)
    """Optimizer steps of the run."""
    init_from: str | None = file_path(None)
    """Run directory or checkpoint whose weights start the run. A dense one starts a model with experts by upcycling:
    every routed expert is its feed-forward part (experts from several checkpoints: megatron-omni upcycle)."""
    init_allow_missing: list[str] = field(default_factory=list)
    """Tensors (shell-style patterns of their names) that ``init_from`` may lack; they keep their initial values."""
    init_allow_extra: list[str] = field(default_factory=list)
    """Tensors (shell-style patterns of their names) of ``init_from`` that this model does not have."""
    init_allow_changed: list[str] = field(default_factory=list)
    """Fields (``model.rotary_base``, ``data.tokenizer``) that may differ from those that the weights of ``init_from`` were
    made with, although they give them their meaning."""
    load: str | None = file_path(None)
    """Run directory or checkpoint to resume; ``auto`` resumes ``run_dir`` when it holds a checkpoint."""
    overwrite: bool = False
    """Start anew in a ``run_dir`` that holds checkpoints: they, metrics and records of the earlier run are deleted when the
    new one is ready for its first step. Without it, and without ``load``, such a directory is refused."""
    freeze: list[str] = field(default_factory=list)
    """Named parts that are not trained: vision, audio, projectors, text_projection, attention, norms, experts,
    shared_experts, gate, ffn, embeddings, output, new_token_rows, image_projectors, image_generator;
    of a codec codec_encoder, codec_decoder, discriminators (docs/config.md)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read, how it is mixed and batched."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    """Of task ``reinforce``."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Of task ``preference``."""
    codec: CodecTrainingConfig = field(default_factory=CodecTrainingConfig)
    """Of task ``codec``."""
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    """Of task ``generative``."""
    picture_codec: PictureCodecTrainingConfig = field(default_factory=PictureCodecTrainingConfig)
    """Of task ``picture_codec``."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is measured and written down."""
