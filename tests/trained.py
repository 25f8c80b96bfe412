"""A tiny trained checkpoint, which tests of the command line and of the server share (the fixture ``trained``)."""

from dataclasses import dataclass
from pathlib import Path

from tests.distributed.tiny_run import make_corpus, run_tiny, tiny_recipe
from tests.unit.tiny_data import write_clip

SEQ_LENGTH = 256


@dataclass(frozen=True)
class Trained:
    """A run directory, and the corpus that it was trained on."""

    run_dir: Path
    media: Path


def train_tiny(directory: Path) -> Trained:
    """A run of one step with large weights, whose answers to different questions differ."""
    corpus = make_corpus(directory / "corpus")
    write_clip(corpus / "v.mp4", [10, 60, 110, 160])
    settings = {
        "model__init_method_std": 0.25, "data__seq_length": SEQ_LENGTH, "data__min_frames": 2, "data__max_frames": 4,
        "data__max_frames_with_audio": 4,
    }  # fmt: skip
    run_tiny(tiny_recipe(corpus, directory / "tiny", train_iters=1, **settings), 1)
    return Trained(directory / "tiny", corpus)
