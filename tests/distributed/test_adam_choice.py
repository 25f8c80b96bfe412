"""Which Adam a machine with an accelerator trains with, seen in fresh interpreters: the choice is made once, at the start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.tiny_run import make_corpus

ROOT = Path(__file__).resolve().parents[2]

CHOICE = """
from megatron_omni.platform import device
device.accelerator_present = lambda: True
device.install()
import json
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron_omni.platform import adam
print(json.dumps({
    "adam": [optimizer.Adam.__module__, distrib_optimizer.Adam.__module__],
    "torch's": optimizer.USING_PYTORCH_OPTIMIZER,
    "step in groups": distrib_optimizer.HAVE_APEX_OR_TE,
    "name": adam.name(),
}))
"""

RUN = """
import sys
from pathlib import Path
from megatron_omni.platform import adam, cpu
rows, adam.PATCHES = adam.PATCHES, ()
cpu.install()  # all that a CPU needs, but an Adam
adam.PATCHES = rows
if "choose" in sys.argv:
    adam.install_where_missing()  # as with an accelerator
if __name__ == "__main__":
    from tests.distributed.tiny_run import run_tiny, tiny_recipe
    corpus, out = map(Path, sys.argv[1:3])
    settings = {"train_iters": 4, "checkpoint__save_interval": 2, "checkpoint__keep": 0, "optim__precision": "bf16"}
    straight = run_tiny(tiny_recipe(corpus, out / "straight", **settings), 2)
    load = str(out / "straight" / "checkpoints" / "iter_0000002")
    resumed = run_tiny(tiny_recipe(corpus, out / "resumed", load=load, **settings), 2)
    for name in ("lm loss", "grad-norm", "learning-rate"):
        assert [r[name] for r in straight[2:]] == [r[name] for r in resumed], name
    assert len(resumed) == 2
"""


def python(script: str, *arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(str(place) for place in (path, ROOT) if place is not None)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": search},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


def installed(*packages: str) -> bool:
    found = python(f"import importlib.util as u; print(any(u.find_spec(p) for p in {packages}))")
    return found.stdout.strip() == "True"


@pytest.fixture(autouse=True)
def without_libraries() -> None:
    if installed("transformer_engine", "apex"):
        pytest.skip("Transformer Engine or Apex is installed here")


def test_ours_where_neither_library_is_there() -> None:
    found = python(CHOICE)
    assert found.returncode == 0, found.stderr
    module = "megatron_omni.platform.adam"
    assert json.loads(found.stdout.splitlines()[-1]) == {
        "adam": [module, module],
        "torch's": False,
        "step in groups": True,
        "name": "own",
    }


def test_the_librarys_where_it_is(tmp_path: Path) -> None:
    """A stand-in for Apex that has nothing but the two classes that Megatron asks for."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers.py").write_text(
        "import torch\nclass FusedAdam(torch.optim.AdamW): pass\nclass FusedSGD(torch.optim.SGD): pass\n"
    )
    found = python(CHOICE, path=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["adam"] == ["apex.optimizers"] * 2


def test_a_run_on_that_choice_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    found = python(RUN, corpus, tmp_path, "choose")
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_megatron_chooses_by_itself_does_not_train(tmp_path: Path) -> None:
    """Why there is a choice to make: where this passes no more, platform/adam.py may go."""
    corpus = make_corpus(tmp_path / "corpus")
    found = python(RUN, corpus, tmp_path)
    assert found.returncode != 0 and "KeyError: 'step'" in found.stdout + found.stderr
