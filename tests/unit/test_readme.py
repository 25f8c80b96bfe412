"""Every command of README.md runs as it is written there, on tiny data: a line that nobody runs here fails.

Commands run in forked processes in a folder that looks like a checkout after ``make quickstart``: the recipes, and the
quickstart's files in small. Words in capitals (``RECIPE``) stand for the reader's own files. ``SHORTER`` are words added
to a command so that it ends soon; nothing is taken away from it.
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from megatron_omni.cli.main import COMMANDS
from megatron_omni.cli.main import main as megatron_omni
from megatron_omni.config.load import load_recipe, recipe_to_yaml
from megatron_omni.config.run import Recipe
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import make_corpus
from tests.distributed.tiny_run import tiny_recipe as small_recipe
from tests.drawing import train_drawing
from tests.unit.dense_checkpoints import write_dense
from tests.unit.speech_models import write_speaker
from tests.unit.tiny_data import row, tokenizer_file, write_clip, write_image, write_sound

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^    (?! )((?:.*\\\n)*.*)$", re.MULTILINE)
SHORTER = {
    "recipes/tiny/quickstart.yaml": [
        "train_iters=1", "optim.lr_warmup_iters=0", "optim.lr_wsd_decay_iters=1",
        "model.moe.moe_aux_loss_decay_iters=1", "log.eval_interval=0", "data.num_workers=0",
    ],
    "generate": ["--max-new-tokens", "2"],
    "evaluate": ["--max-new-tokens", "2"],
    "prepare": ["--workers", "1"],
    "preflight": ["--samples", "1", "--steps", "2"],
}  # fmt: skip


def commands() -> list[str]:
    """The lines of README's blocks of commands, comments taken off, continued lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.partition("## Read these files")[0]  # the tree and the citation are no commands
    lines = [re.sub(r"\s*#.*$", "", block, flags=re.MULTILINE) for block in BLOCK.findall(text)]
    return [re.sub(r"\s*\\\n\s*", " ", line).strip() for line in lines]


LINES = commands()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped recipes and the quickstart's files in small."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "recipes").symlink_to(ROOT / "recipes")
    data = place / "runs" / "quickstart" / "data"
    media = data / "eval" / "media" / "image.held_out"
    for folder in (data / "train", media):
        folder.mkdir(parents=True)
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "quickstart.yaml")
    tokenizer = Path(tokenizer_file(place))
    (place / recipe.data.tokenizer).write_bytes(tokenizer.read_bytes())
    for name in {Path(s.path).name for s in [*recipe.data.sources, *recipe.data.eval_sources]}:
        write_records(data / "train" / name)
    for name in (
        "image",
        "image_two",
        "word",
        "speech",
        "sound",
        "video",
        "text",
    ):  # of evaluation/sets/quickstart.yaml
        write_records(data / "eval" / f"{name}.held_out.jsonl")
    write_image(media / "000000.png", size=(64, 64))
    words = ["train", "recipes/tiny/quickstart.yaml"]
    assert run(place, shorter(words)) == [(0, "")]
    base = write_dense(place / "hf_model")
    write_dense(place / "hf_vision", like=base, seed=1)
    write_speaker(place)
    train_drawing(place / "painted")
    corpus = make_corpus(place / "corpus")
    (place / "mine.yaml").write_text(recipe_to_yaml(own_recipe(corpus, place / "own_run")))
    return place


def write_records(path: Path) -> None:
    """Records of the kind that the file's name says."""
    kind = path.name.partition(".")[0]
    marker, answer, files = "", "a cat", {}
    if kind.startswith("image"):
        write_image(path.with_suffix(".png"), size=(64, 64))
        marker, files = "<image>", {"images": [path.with_suffix(".png").name]}
    elif kind in ("word", "speech", "sound"):
        write_sound(path.with_suffix(".wav"), 0.5)
        marker, files = "<audio>", {"audios": [path.with_suffix(".wav").name]}
    elif kind == "video":
        write_clip(path.with_suffix(".mp4"), [10, 60, 110, 160])
        marker, files = "<video>", {"videos": [path.with_suffix(".mp4").name]}
    rows = [row(f"{marker}what is {n}?", answer, **files) for n in ("it", "this", "that", "left")]
    path.write_text("".join(json.dumps(record) + "\n" for record in rows * 3))


def own_recipe(corpus: Path, run_dir: Path) -> Recipe:
    return small_recipe(corpus, run_dir, train_iters=1)


def run(place: Path, words: list[str], ranks: int = 1) -> list[tuple[int, str]]:
    """Exit status of ``megatron-omni WORDS`` in ``place``, on every rank, and what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(_run, ranks, place, words, port, timeout_seconds=180.0)


def _run(rank: Rank, place: Path, words: list[str], port: int) -> tuple[int, str]:
    os.chdir(place)
    if words[0] == "serve":  # a server ends when it is told to
        words = [*words[:-1], str(port)]
        threading.Thread(target=_stop_when_ready, args=(port,), daemon=True).start()
    if rank.world_size > 1:
        values = {"RANK": rank.index, "WORLD_SIZE": rank.world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in values.items()}
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = megatron_omni(words)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, "" if status == 0 else out.getvalue() + err.getvalue()


def _stop_when_ready(port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            urlopen(f"http://127.0.0.1:{port}/ready")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.2)


def shorter(words: list[str]) -> list[str]:
    """The command with what makes it end soon; training of the quickstart's recipe alone is long."""
    return [*words, *SHORTER.get(words[1] if words[0] == "train" else words[0], [])]


def filled(words: list[str]) -> list[str]:
    """The reader's files in place of the words in capitals; a word nobody knows stays and fails its command."""
    known = {
        "HF_MODEL": "hf_model", "HF_VISION": "hf_vision", "RECIPE": "mine.yaml", "CHAIN": "recipes/tiny/chain.yaml",
        "IMPORTED": "imported", "MIXTURE": "mixture", "SPEAKER": "speaker",
        "PAINTER": "painted/draws",
    }  # fmt: skip
    return [known.get(word, word) for word in words]


@pytest.mark.parametrize("line", LINES)
def test_the_line_runs(line: str, checkout: Path) -> None:
    first, *words = shlex.split(line)
    if first == "megatron-omni":
        status, said = run(checkout, shorter(filled(words)))[0]
        # preflight ends with 1 where something on its page needs attention, doctor where a check failed.
        assert status == 0 or (words[0] == "preflight" and status == 1 and "wrote" in said), said
    elif first == "torchrun":
        assert words[:4] == ["--nproc-per-node", "2", "-m", "megatron_omni.cli.train"]
        outcomes = run(checkout, shorter(["train", *filled(words[4:])]), ranks=2)
        assert outcomes == [(0, ""), (0, "")]
    else:
        {"make": make, "source": source, "pip": pip, "docker": docker, "sbatch": sbatch, "python": python}[first](words)


def test_readme_names_every_command() -> None:
    named = {shlex.split(line)[1] for line in LINES if line.startswith("megatron-omni ")}
    assert named == set(COMMANDS)


def make(words: list[str]) -> None:
    """A target of the Makefile; what it does is run by .ci/run."""
    assert re.search(rf"^{re.escape(words[0])}:.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def source(words: list[str]) -> None:
    """The environment that the Makefile makes."""
    assert words == [".venv/bin/activate"]
    assert re.search(r"^VENV := \.venv$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def pip(words: list[str]) -> None:
    """An extra that the package has."""
    assert words[:2] == ["install", "-e"]
    extra = re.fullmatch(r"\.\[(\w+)\]", words[2])
    assert extra and extra[1] in project()["optional-dependencies"]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def docker(words: list[str]) -> None:
    """Arguments and files that the Dockerfile names."""
    text = (ROOT / "Dockerfile").read_text()
    assert words[:3] == ["build", "--build-arg", "BASE=IMAGE"] and re.search(r"^ARG BASE$", text, re.MULTILINE)
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split()), copied


def sbatch(words: list[str]) -> None:
    """A shipped script that tests/slurm submits to a real SLURM word for word."""
    assert (ROOT / words[0]).is_file() and len(words) == 1
    assert f'"{words[0]}"' in (ROOT / "tests" / "slurm" / "test_slurm.py").read_text()


def python(words: list[str]) -> None:
    """tools/bench_moe.py, whose own test (test_bench_moe.py) runs it; here its command line is parsed."""
    from tools.bench_moe import parser

    assert words[0] == "tools/bench_moe.py"
    assert parser().parse_args(words[1:]).tokens == 2048


def test_the_console_script_is_the_table_of_commands() -> None:
    assert project()["scripts"] == {"megatron-omni": "megatron_omni.cli.main:main"}
