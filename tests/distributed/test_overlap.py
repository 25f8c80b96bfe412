"""Messages of data-parallel ranks that overlap with computation: buckets follow the order in which a forward uses weights.

That a run with them equals one without them is held where layouts are compared (test_layouts_training.py), and that their
checkpoints hold the weights of the last update, where runs are resumed (test_resume.py).
"""

import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training.setup import Run
from tests.distributed.tiny_run import make_corpus, run_tiny, tiny_recipe

SEVERAL_BUCKETS = 3_000


@pytest.mark.parametrize("frozen", [(), ("vision", "audio", "attention", "norms")], ids=["nothing", "towers"])
def test_weights_are_gathered_in_the_order_of_their_use(tmp_path: Path, frozen: tuple[str, ...]) -> None:
    """Otherwise Megatron warns that the next bucket's gather was sent before its turn: here that ends the run."""
    recipe = tiny_recipe(
        make_corpus(tmp_path / "corpus"),
        tmp_path / "run",
        train_iters=2,
        freeze=list(frozen),
        parallel__overlap_grad_reduce=True,
        parallel__overlap_param_gather=True,
        parallel__bucket_size=SEVERAL_BUCKETS,
    )
    assert len(run_tiny(recipe, 2, partial(watch_order, frozen))) == 2


def watch_order(frozen: tuple[str, ...], run: Run) -> None:
    """The warning is an error; the groups that hold an encoder's weights are several."""
    warnings.filterwarnings("error", message="The next bucket's parameter all-gather", category=UserWarning)
    groups = run.model.param_to_bucket_group
    for encoder in (unwrap_model(run.model).vision, unwrap_model(run.model).audio):
        own = {id(groups[p]) for p in encoder.parameters() if p.requires_grad}
        assert len(own) >= (1 if frozen else 2)
    assert len(run.model.bucket_groups) > 4


SAYS = """
import warnings
from megatron_omni.cli.train import quiet
quiet()
registry = {}  # the module's own
for text, kind in {
    "order of buckets": UserWarning,
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.": UserWarning,
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.": UserWarning,
    "MimoModelConfig is experimental and still under active development.": UserWarning,
    "old name": DeprecationWarning,
}.items():
    for line in (1, 2):
        warnings.warn_explicit(text, kind, "file.py", line, module="megatron.core.distributed.x", registry=registry)
"""


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_what_megatron_says_of_a_run_is_said_once(rank: str, times: int) -> None:
    said = subprocess.run([sys.executable, "-c", SAYS], env={"RANK": rank}, capture_output=True, text=True, check=True)
    assert said.stderr.count("order of buckets") == times
    assert not any(unsaid in said.stderr for unsaid in ("old name", "leaf", "not installed", "Mimo"))
