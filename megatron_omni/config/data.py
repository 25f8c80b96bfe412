"""What is read, how it is mixed and how it is cut into micro-batches."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_omni.config.ranges import file_path, number
from megatron_omni.config.thinking import SYSTEM_TEMPLATES, TemplateName, joined

FrameChoice = Literal["rate", "release"]
MetricName = Literal[
    "exact_match", "choice", "likelihood_choice", "mean_relative_accuracy", "relaxed_accuracy", "anls", "wer", "cer", "bleu",
    "chrf", "iou", "perplexity",
]  # fmt: skip
"""Metrics of evaluation (scoring/ has the table)."""


@dataclass(kw_only=True)
class SourceConfig:
    """A set of records: JSONL files, ``.json`` files that hold an array of rows, or WebDataset tars."""

    name: str
    """What logs, metrics (``loss/source/NAME``) and overrides (``data.sources.NAME.weight=2``) call it."""
    path: str = file_path()
    """A file, ``shards/{000..127}.tar``, a pattern such as ``shards/*.tar``, or a folder prepared by Energon (``DIR``:
    its split ``train``; ``DIR#val``). Tars need an index (megatron-omni prepare); JSONL files gain from one."""
    root: str = file_path("")
    """Folder that media paths in JSONL files are relative to and must lie under; empty: the folder of the file. Tars
    hold their media."""
    prompt: str = ""
    """Asked of a tar's media that come with a caption alone; empty: "Describe the picture." or the like."""
    weight: float = number(1.0, at_least=0)
    """Share of the mixture, relative to the other active sources: of its samples, or of its tokens (``weight_by``)."""
    epochs: float | None = number(None, above=0, fix="null is for ever")
    """Times that its records are drawn before it leaves the mixture; null: for ever."""
    from_sample: int = number(0, at_least=0)
    """Global sample count at which the source joins the mixture (curriculum)."""
    reweight: dict[int, float] = number(dict, at_least=0)
    """Later weights: global sample count at which each takes effect -> weight (0 takes the source out)."""
    loss_weight: float = number(1.0, above=0, at_most=10**6, fix="weight: 0 takes a source out")
    """Factor on the training loss of its label tokens; the divisor stays the number of label tokens of the step, and the
    losses that are logged stay without it. Raise it for short answers, which a mean over tokens counts little."""


@dataclass(kw_only=True)
class EvalSourceConfig(SourceConfig):
    """A held-out set. With a metric its records are answered and scored beside the loss (docs/evaluation.md)."""

    metric: MetricName | None = None
    """Score of greedy answers, logged as ``eval/METRIC/NAME``; null: the loss alone."""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the metric."""
    rule: str = ""
    """How the answer is taken from the text; empty: the metric's own."""
    max_new_tokens: int = number(64, at_least=1, at_most=10**6)
    """Longest answer that is scored."""
    limit: int | None = number(None, at_least=1)
    """The first so many records are scored; null: all."""


@dataclass(kw_only=True)
class DataConfig:
    """Data group of a recipe."""

    sources: list[SourceConfig] = field(default_factory=list)
    """What is trained on. A list stands for itself; a mapping by name changes, adds or (null) takes out single sources of
    the file that is extended: see "Sources by name"."""
    eval_sources: list[EvalSourceConfig] = field(default_factory=list)
    """Held-out sets: evaluated every ``log.eval_interval`` steps; never drawn for training."""
    tokenizer: str = file_path("")
    """A SentencePiece ``.model`` file or a directory with a Hugging Face ``tokenizer.json``."""
    system_prompt: str = ""
    """System turn of the chat template; empty leaves the turn out."""
    system_template: TemplateName = "none"
    """A prompt of the paper's (A.3) that comes first in that turn: ``thinking`` asks for a thought and a solution,
    ``drawing`` for a thought and a picture (docs/reinforcement.md)."""
    voice_request: str = ""
    """What ``--voice`` and ``--style`` write behind a question, as the records have it, with ``{voice}`` where the voice
    stands; empty: the released wording (data/speech_request.py)."""
    seq_length: int = number(8192, at_least=1, at_most=10**8)
    """Longest sample in tokens, media placeholders included; a longer one is skipped and counted. The length of
    packed sequences."""
    packing: bool = False
    """Several samples share a sequence of ``seq_length`` tokens (each takes the oldest that waits and what fills it best),
    attention and positions kept apart. A step then takes as many samples as its sequences hold."""
    micro_batch_size: int = number(1, at_least=1, at_most=10**8)
    """Sequences of a micro-batch: samples, or packed sequences."""
    global_batch_size: int = number(8, at_least=1, at_most=10**8)
    """Sequences of an optimizer step over all data-parallel ranks."""
    weight_by: Literal["samples", "tokens"] = "samples"
    """What the weights of sources are shares of; ``tokens`` needs an index of each."""
    balance: Literal["none", "modality"] = "none"
    """``modality``: samples with video, with pictures, with sound and of text alone are drawn equally often (annealing);
    needs an index of each source."""
    batch_by: Literal["mixed", "source"] = "mixed"
    """``source``: all samples of a step come from one source, drawn by weight (less padding at small scale)."""
    pad_to_multiple_of: int = number(8, at_least=1, at_most=65536)
    """Sequences of a micro-batch are padded to its longest and then to a multiple of this many tokens."""
    max_bad_fraction: float = number(0.01, at_least=0, at_most=1)
    """Share of bad samples above which training stops and says so."""
    num_workers: int = number(0, at_least=0, at_most=1024)
    """Threads that prepare the next steps, per rank; 0 decodes inside the training step."""
    prefetch_gib: float = number(1.0, above=0)
    """Most memory of the steps that are prepared ahead, per rank; the next step is prepared whatever its size."""
    stall_seconds: float = number(120.0, at_least=0.1, at_most=604_800)
    """A thread that works on one record for longer is given up and its work done again by another; a record that stalls
    twice is skipped and counted."""
    cache_gib: float = number(0.0, at_least=0)
    """Decoded samples kept in memory per rank, so that a second epoch decodes nothing."""
    decoder: Literal["cpu", "dali"] = "cpu"
    """What decodes media: Pillow, soundfile and PyAV, or NVIDIA DALI (on the GPU where there is one; what it cannot
    read goes to ``cpu``, counted and logged)."""
    video_fps: float = number(1.0, above=0, at_most=1000)
    """Frames taken from a second of video, within the next three bounds."""
    min_frames: int = number(8, at_least=1, at_most=10**6)
    """Fewest frames of a video; a short one is sampled more densely."""
    max_frames: int = number(64, at_least=1, at_most=10**6)
    """Most frames of a video; a long one is sampled more sparsely."""
    max_frames_with_audio: int = number(32, at_least=1, at_most=10**6)
    """The same for a video whose sound is heard as well."""
    frame_choice: FrameChoice = "rate"
    """Which frames of a video: those nearest to ``video_fps``, or what the authors' published code takes (``release``: an
    even number, evenly spaced from the first to the last), for released weights."""
    use_video_sound: bool = True
    """The sound track of a video follows its frames as an audio block."""

    @property
    def system_turn(self) -> str:
        """The whole system turn of a record that has none; empty: it has none."""
        return joined(SYSTEM_TEMPLATES[self.system_template], self.system_prompt)
