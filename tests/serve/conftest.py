"""A server of the tiny trained checkpoint that most tests of a file share."""

from collections.abc import Iterator

import pytest

from tests.serve.harness import Running, serving
from tests.trained import Trained


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without a key that fetches from one host, and holds at most 24 waiting requests."""
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--max-waiting", "24", "--media-domains", "media.example", "--max-body-mib", "2"]
    with serving(trained.run_dir, *words, log=log) as running:
        yield running
        assert all(rank.is_alive() for rank in running.ranks), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
