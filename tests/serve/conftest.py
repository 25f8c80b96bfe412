"""A tiny trained checkpoint, and a server of it that most tests of a file share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.tiny_run import make_corpus, run_tiny, tiny_recipe
from tests.serve.harness import Running, serving
from tests.unit.tiny_data import write_clip

SEQ_LENGTH = 256


@dataclass(frozen=True)
class Trained:
    run_dir: Path
    media: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of one step with large weights, whose answers to different questions differ."""
    directory = tmp_path_factory.mktemp("serve")
    corpus = make_corpus(directory / "corpus")
    write_clip(corpus / "v.mp4", [10, 60, 110, 160])
    settings = {
        "model__init_method_std": 0.25, "data__seq_length": SEQ_LENGTH, "data__min_frames": 2, "data__max_frames": 4,
        "data__max_frames_with_audio": 4,
    }  # fmt: skip
    run_tiny(tiny_recipe(corpus, directory / "tiny", train_iters=1, **settings), 1)
    return Trained(directory / "tiny", corpus)


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without a key that fetches from one host, and holds at most 24 waiting requests."""
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--max-waiting", "24", "--media-domains", "media.example", "--max-body-mib", "2"]
    with serving(trained.run_dir, *words, log=log) as running:
        yield running
        assert all(rank.is_alive() for rank in running.ranks), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
