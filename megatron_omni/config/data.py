"""What is read, how it is mixed and how it is cut into micro-batches."""

from dataclasses import dataclass, field
from typing import Literal

FrameChoice = Literal["rate", "release"]


@dataclass(kw_only=True)
class SourceConfig:
    """A set of records: JSONL files, ``.json`` files that hold an array of rows, or WebDataset tars."""

    name: str
    path: str
    """A file, ``shards/{000..127}.tar``, a pattern such as ``shards/*.tar``, or a folder prepared by Energon (``DIR``:
    its split ``train``; ``DIR#val``). Tars need an index (tools/prepare_data.py); JSONL files gain from one."""
    root: str = ""
    """Folder that media paths in JSONL files are relative to and must lie under; empty: the folder of the file. Tars
    hold their media."""
    prompt: str = ""
    """Asked of a tar's media that come with a caption alone; empty: "Describe the picture." or the like."""
    weight: float = 1.0
    """Share of the mixture, relative to the other active sources: of its samples, or of its tokens (``weight_by``)."""
    epochs: float | None = None
    """Times that its records are drawn before it leaves the mixture; null: for ever."""
    from_sample: int = 0
    """Global sample count at which the source joins the mixture (curriculum)."""
    reweight: dict[int, float] = field(default_factory=dict)
    """Later weights: global sample count at which each takes effect -> weight (0 takes the source out)."""
    loss_weight: float = 1.0
    """Factor on the training loss of its label tokens; the divisor stays the number of label tokens of the step, and the
    losses that are logged stay without it. Raise it for short answers, which a mean over tokens counts little."""


@dataclass(kw_only=True)
class DataConfig:
    """Data group of a recipe."""

    sources: list[SourceConfig] = field(default_factory=list)
    eval_sources: list[SourceConfig] = field(default_factory=list)
    """Held-out sets: evaluated every ``log.eval_interval`` steps; never drawn for training."""
    tokenizer: str = ""
    """A SentencePiece ``.model`` file or a directory with a Hugging Face ``tokenizer.json``."""
    system_prompt: str = ""
    """System turn of the chat template; empty leaves the turn out."""
    seq_length: int = 8192
    """Longest sample in tokens, media placeholders included; a longer one is skipped and counted. The row length when
    samples are packed."""
    packing: bool = False
    """Several samples share a row of ``seq_length`` tokens (each takes the oldest that waits and what fills it best),
    attention and positions kept apart. A step then
    takes as many samples as its rows hold."""
    micro_batch_size: int = 1
    """Rows of a micro-batch: samples, or packed rows."""
    global_batch_size: int = 8
    """Rows per optimizer step over all data-parallel ranks."""
    weight_by: Literal["samples", "tokens"] = "samples"
    """What the weights of sources are shares of; ``tokens`` needs an index of each."""
    balance: Literal["none", "modality"] = "none"
    """``modality``: samples with video, with pictures, with sound and of text alone are drawn equally often (annealing);
    needs an index of each source."""
    batch_by: Literal["mixed", "source"] = "mixed"
    """``source``: all samples of a step come from one source, drawn by weight (less padding at small scale)."""
    pad_to_multiple_of: int = 8
    max_bad_fraction: float = 0.01
    """Share of bad samples above which training stops and says so."""
    num_workers: int = 0
    """Threads that prepare the next steps, per rank; 0 decodes inside the training step."""
    prefetch_gib: float = 1.0
    """Most memory of the steps that are prepared ahead, per rank; the next step is prepared whatever its size."""
    stall_seconds: float = 120.0
    """A thread that works on one record for longer is given up and its work done again by another; a record that stalls
    twice is skipped and counted."""
    cache_gib: float = 0.0
    """Decoded samples kept in memory per rank, so that a second epoch decodes nothing."""
    decoder: Literal["cpu", "dali"] = "cpu"
    """What decodes media: Pillow, soundfile and PyAV, or NVIDIA DALI (on the GPU where there is one; what it cannot
    read goes to ``cpu``, counted and logged)."""
    video_fps: float = 1.0
    min_frames: int = 8
    max_frames: int = 64
    max_frames_with_audio: int = 32
    frame_choice: FrameChoice = "rate"
    """Which frames of a video: those nearest to ``video_fps``, or what the authors' published code takes (``release``: an
    even number, evenly spaced from the first to the last), for released weights."""
    use_video_sound: bool = True
    """The sound track of a video follows its frames as an audio block."""
