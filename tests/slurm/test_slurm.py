"""The shipped job scripts on a real SLURM of two nodes: trained on 2 x 2 ranks, preempted by a signal, requeued, they end
with the loss of a run that was never stopped.

Skipped, with its reason, where SLURM or munge is not installed. The first start is one torchrun per node, the second
is SLURM's own ranks; ``OMNI_STRESS=1`` (`make stress`) preempts both shapes.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from openai import OpenAI, OpenAIError

from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.run import Recipe
from tests.distributed.test_resume import exact
from tests.distributed.tiny_run import make_corpus, records, run_tiny, tiny_recipe
from tests.slurm.cluster import NODES, Cluster, free_ports, missing_programs, two_nodes

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
STEPS = 24
RANKS = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")

pytestmark = pytest.mark.skipif(
    bool(missing_programs()),
    reason=f"SLURM is not installed ({', '.join(missing_programs())} missing); Debian: apt-get install slurm-wlm munge",
)

ENVIRONMENT = """
OMNI_PYTHON={python}
SHAPES=({shapes})
LAUNCH=${{SHAPES[${{SLURM_RESTART_COUNT:-0}}]}}
SRUN_OPTIONS=()
CONTAINER=()
MASTER_ADDR=127.0.0.1
export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
SAVE_SECONDS=240
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with two_nodes(root) as running:
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


def site(directory: Path, shapes: tuple[str, ...]) -> Path:
    """A checkout as a site would have it: the shipped files, an env.sh of its own."""
    import sys

    scripts = directory / "examples" / "slurm"
    shutil.copytree(ROOT / "examples" / "slurm", scripts)
    (scripts / "env.sh").write_text(ENVIRONMENT.format(python=sys.executable, shapes=" ".join(shapes)))
    (directory / "tools").symlink_to(ROOT / "tools")
    (directory / "recipes").mkdir()
    return directory


def tiny(corpus: Path, run_dir: Path) -> Recipe:
    """Text alone, on TP 2 x PP 2 x EP 2."""
    layout = {f"parallel__{kind}_model_parallel_size": 2 for kind in ("tensor", "pipeline", "expert")}
    recipe = tiny_recipe(
        corpus, run_dir, train_iters=STEPS, model__vision=None, model__audio=None, data__micro_batch_size=4, **layout
    )
    recipe.data.sources = recipe.data.sources[:1]
    return recipe


SHAPES = [("torchrun", "srun")] if not os.environ.get("OMNI_STRESS") else [("torchrun", "srun", "torchrun")]


@pytest.mark.parametrize("shapes", SHAPES, ids="-".join)
def test_preempted_and_requeued_equals_undisturbed(cluster: Cluster, tmp_path: Path, shapes: tuple[str, ...]) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    undisturbed = exact(run_tiny(tiny(corpus, tmp_path / "straight"), 4))
    place = site(tmp_path / "site", (shapes[0], *shapes))
    recipe = tiny(corpus, tmp_path / "run")
    (place / "recipes" / "3_sft.yaml").write_text(recipe_to_yaml(recipe))
    job = cluster.submit(*RANKS, "--output=log.txt", "examples/slurm/3_sft.sbatch", "log.interval=1", cwd=place)
    log, metrics = place / "log.txt", tmp_path / "run" / "metrics.jsonl"
    _stop_while_it_starts(cluster, job)
    for restarts in range(1, len(shapes)):
        _wait_for_step(metrics, len(_lines(metrics)) + 2, log)
        cluster.call("scancel", "--signal=USR1", job)
        cluster.wait_for(job, {"RUNNING", "COMPLETED"}, restarts=restarts + 1)
    state = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, restarts=len(shapes))
    text = log.read_text()
    assert state["JobState"] == "COMPLETED", text
    assert "== stopped by a signal, nothing saved since the last checkpoint; requeued" in text
    for number, shape in enumerate(shapes, start=2):
        assert f"start {number}: recipes/3_sft.yaml" in text and f"by {shape}" in text
    stopped = [int(step) for step in re.findall(r"== stopped after step (\d+); requeued", text)]
    assert len(stopped) == len(shapes) - 1 and all(2 <= step < STEPS for step in stopped), text
    assert [int(step) for step in re.findall(r"resumed after step (\d+)", text)] == stopped
    assert exact(records(recipe)) == undisturbed
    assert not (tmp_path / "run" / "requeue").exists()
    assert f"over {len(shapes)} start(s)" in text  # goodput


def test_preflight_looks_at_every_node_and_a_dry_run_at_the_recipe(cluster: Cluster, tmp_path: Path) -> None:
    place = site(tmp_path / "site", ("srun",))
    job = cluster.submit(*RANKS, "--output=log.txt", "examples/slurm/preflight.sbatch", cwd=place)
    state = cluster.wait_for(job, {"COMPLETED", "FAILED"})
    text = (place / "log.txt").read_text()
    assert state["JobState"] == "COMPLETED", text
    assert text.count("ok   kernels: compiled extension loads") == len(NODES)
    assert "ok   4 ranks on 1 machines sum up" in text and "FAIL" not in text
    recipe = tiny(make_corpus(tmp_path / "corpus"), tmp_path / "run")
    (place / "recipes" / "3_sft.yaml").write_text(recipe_to_yaml(recipe))
    job = cluster.submit(*RANKS, "--output=dry.txt", "examples/slurm/3_sft.sbatch", "seed=5", "--dry-run", cwd=place)
    state = cluster.wait_for(job, {"COMPLETED", "FAILED"})
    text = (place / "dry.txt").read_text()
    assert state["JobState"] == "COMPLETED" and "fullest of 4 rank(s):" in text and "\nseed: 5\n" in text, text
    assert not (tmp_path / "run").exists()


def test_a_served_checkpoint_answers_until_its_job_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    place, port = site(tmp_path / "site", ("torchrun",)), free_ports(1)[0]
    shutil.copytree(ROOT / "examples" / "serve", place / "examples" / "serve")
    (place / "serve_keys.txt").write_text("a-long-secret\n")
    run_tiny(tiny_recipe(make_corpus(tmp_path / "corpus"), tmp_path / "tiny", train_iters=1), 1)
    ranks = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--output=log.txt")
    words = ("examples/serve/serve.sbatch", str(tmp_path / "tiny"), "--port", str(port))
    job = cluster.submit(*ranks, *words, cwd=place)
    log, url = place / "log.txt", f"http://127.0.0.1:{port}"
    _wait_until_ready(url, log)
    client = OpenAI(base_url=f"{url}/v1", api_key="a-long-secret", max_retries=0)
    question = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_completion_tokens": 4}
    assert client.chat.completions.create(**question).usage.completion_tokens > 0
    cluster.call("scancel", job)
    cluster.wait_for(job, {"CANCELLED"})
    deadline = time.monotonic() + 60
    with pytest.raises(OpenAIError):
        while time.monotonic() < deadline:
            client.chat.completions.create(**question)
    assert "2 ranks" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()


def _wait_until_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            urlopen(f"{url}/ready")
            return
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no output"
        time.sleep(0.2)


def _stop_while_it_starts(cluster: Cluster, job: str) -> None:
    """Signal a job that has just begun, when no rank is there yet to take the signal; until it is requeued."""
    deadline = time.monotonic() + 120
    cluster.wait_for(job, {"RUNNING"})
    while int(cluster.job(job)["Restarts"]) == 0:
        assert time.monotonic() < deadline, f"not requeued\n{cluster.logs()}"
        if cluster.call("squeue", "--steps", f"--jobs={job}", "--noheader").strip():
            cluster.call("scancel", "--signal=USR1", job, check=False)
            time.sleep(2)  # a signal between two steps is lost
        time.sleep(0.05)


def _lines(metrics: Path) -> list[str]:
    return metrics.read_text().splitlines() if metrics.exists() else []


def _wait_for_step(metrics: Path, step: int, log: Path) -> None:
    """Until the run has recorded ``step``."""
    deadline = time.monotonic() + 300
    while len(_lines(metrics)) < step:
        assert time.monotonic() < deadline, (
            f"step {step} was not reached:\n{log.read_text() if log.exists() else 'no output'}"
        )
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- the files


def test_every_stage_script_names_a_recipe_and_differs_from_the_others_in_that_and_its_nodes() -> None:
    bodies = set()
    for script in SCRIPTS:
        text = script.read_text()
        stage = re.search(r"^train recipes/(\S+)\.yaml", text, re.MULTILINE)
        if stage is None:
            continue
        assert (ROOT / "recipes" / f"{stage[1]}.yaml").exists(), f"{script.name} names a recipe that does not exist"
        assert stage[1] == script.stem and f"--job-name={script.stem}" in text
        body = re.sub(r"^# .*\n", "", text, flags=re.MULTILINE).replace(stage[1], "STAGE")
        bodies.add(re.sub(r"^#SBATCH --nodes=[14]$", "#SBATCH --nodes=NODES", body, flags=re.MULTILINE))
    assert len(bodies) == 1
