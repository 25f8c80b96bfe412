"""Where numbers go: ``metrics.jsonl``, TensorBoard, Weights & Biases and the progress line.

One record per logging step, written by one rank, flushed at once: a run that dies loses no line. A resumed run drops
the lines after the step it resumes from, so that a file never holds a step twice.

Names: ``lm loss``, ``loss/modality/*``, ``loss/source/*`` (losses/lm.py; means over the label tokens since the last
record), ``accuracy/*`` (tasks/speech.py), ``grad-norm``, ``learning-rate``, ``tokens/s`` (all tokens of the run, padding
not counted), ``TFLOP/s`` per rank and ``MFU`` where the device's peak is known, ``step time`` in seconds, ``time/*``
(training/logger.py; of the logged step), ``moe/*`` (models/moe/balance.py; of the logged step), ``eval/loss/*``.

Every record says on what it was made: ``layout``, the ranks of each kind (``{"tp", "cp", "ep", "pp", "dp"}``), and
``tokens_per_rank``, the tokens, padding included, that a context-parallel rank had of the largest micro-batch since the last
record (a sequence-parallel rank has 1 / tp of them between layers).

FLOPs are those of the language model (estimate/flops.py) at the measured mean number of experts per token, and those of
the encoders on the pictures and the sound that were there; a frozen encoder counts with its forward alone.
"""

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from megatron_omni.checkpoint.run_dir import METRICS, TENSORBOARD, WANDB_ID
from megatron_omni.config.parts import draws_alone, trained_parts
from megatron_omni.config.run import Recipe
from megatron_omni.estimate import flops_per_token, media_flops
from megatron_omni.estimate.pictures import picture_flops
from megatron_omni.foreign import ForeignError, parse_json, read_text

logger = logging.getLogger(__name__)


def board_tag(name: str) -> str:
    """TensorBoard makes a group of what stands before the first slash: a rate has none, and names without one share one."""
    plain = name.replace("tokens/s", "tokens a second").replace("TFLOP/s", "TFLOP a second")
    return plain if "/" in plain else f"training/{plain}"


class MetricsWriter:
    """Writes records under ``run_dir``; only the rank that logs creates one."""

    def __init__(
        self, run_dir: Path, *, tensorboard: bool, after_step: int = 0, wandb: "WandbRun | None" = None
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS
        self.num_dropped = drop_lines_after(path, after_step) if path.exists() else 0
        """Records of an earlier start whose steps are run again."""
        self.facts: dict[str, Any] = {}
        """What every record holds beside its numbers."""
        self._file = path.open("a", encoding="utf-8")
        self._wandb = wandb
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=after_step + 1, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line and one TensorBoard point per metric; what is not finite is left out, JSON has no word for it."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **self.facts, **metrics}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(board_tag(name), value, step)
        if self._wandb is not None:
            self._wandb.write(step, metrics)

    def finish(self) -> None:
        """The run has come to its end, or stops for a while: nothing more is written."""
        if self._wandb is not None:
            self._wandb.finish()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class WandbRun:
    """One run of Weights & Biases, which a later start of the same run directory continues (``wandb_id``).

    Account, address and mode come from its own environment variables (``WANDB_MODE=offline`` writes ``wandb/`` in the run
    directory alone, ``wandb sync`` sends it later). Numbers stand over ``step``; steps that are run again are there twice,
    since nothing can be taken back there. A run that loses the connection goes on without it.
    """

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        """ValueError where wandb refuses to start."""
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        name = run_dir / WANDB_ID
        number = read_text(name, most_bytes=100).strip() if name.exists() else secrets.token_hex(4)
        name.write_text(f"{number}\n", encoding="utf-8")
        try:
            self._run: Any = wandb.init(
                project=recipe.log.wandb_project,
                name=run_dir.name,
                dir=str(run_dir),
                id=number,
                resume="allow",
                config=asdict(recipe),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise ValueError(
                f"log.wandb_project={recipe.log.wandb_project!r}: wandb does not start ({error}); log in with `wandb login`, "
                "export WANDB_MODE=offline, or set the field to null"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over a record; it is sent by a process of wandb's."""
        if self._run is not None:
            try:
                self._run.log({"step": step, **metrics})
            except Exception as error:
                logger.warning("wandb failed (%s); the run goes on without it, metrics.jsonl has everything", error)
                self._run = None

    def finish(self) -> None:
        """Send what is left, and say that this start ended well; without it the run shows as crashed."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def drop_lines_after(path: Path, step: int) -> int:
    """Remove the records of later steps and a torn last line; the file is replaced whole. How many lines went."""
    kept, lines = [], read_text(path).splitlines()
    for line in lines:
        try:
            record = parse_json(line, str(path))
        except ForeignError:
            continue
        if isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
    return len(lines) - len(kept)


def throughput(
    recipe: Recipe,
    *,
    tokens: float,
    labels: float,
    samples: float,
    tiles: float,
    chunks: float,
    images: float,
    seconds: float,
    world_size: int,
    mean_k: float,
    peak_tflops: float | None,
) -> dict[str, float]:
    """Tokens per second of the run and drawn pictures, TFLOP/s of a rank, and MFU where the peak of the device is known.

    Pictures count as the largest.
    """
    if seconds <= 0 or samples <= 0:
        return {}
    rates = {"tokens/s": tokens / seconds}
    if recipe.model.is_codec:
        return rates
    flops = 0.0
    if not draws_alone(recipe):
        mean_length = max(1, round(tokens / samples))
        prefix_share = 0.0 if recipe.model.speech is None else 1.0 - labels / tokens
        flops += tokens * flops_per_token(recipe.model, mean_length, mean_k, prefix_share=prefix_share)
        flops += media_flops(recipe.model, tiles=tiles, chunks=chunks, trained=trained_parts(recipe))
    if recipe.task == "generative":
        flops += images * picture_flops(recipe)
        rates["pictures/s"] = images / seconds
    tflops = flops / seconds / world_size / 1e12
    rates["TFLOP/s"] = tflops
    return rates if peak_tflops is None else rates | {"MFU": tflops / peak_tflops}


def progress_line(step: int, train_iters: int, metrics: Mapping[str, float]) -> str:
    """The facts that tell at a glance how a run is doing."""
    parts = [f"step {step}/{train_iters}"]
    for name, label, form in (
        ("lm loss", "loss", "{:.4f}"),
        ("dpo loss", "loss", "{:.4f}"),
        ("codec loss", "loss", "{:.4f}"),
        ("codec/mel", "mel", "{:.4f}"),
        ("picture codec loss", "loss", "{:.5f}"),
        ("picture codec/psnr", "PSNR", "{:.2f}"),
        ("codec/perplexity", "perplexity", "{:.0f}"),
        ("accuracy/codes", "codes right", "{:.3f}"),
        ("preference/accuracy", "accuracy", "{:.3f}"),
        ("preference/margin", "margin", "{:.3f}"),
        ("policy loss", "loss", "{:+.5f}"),
        ("reward/mean", "reward", "{:.3f}"),
        ("groups/kept", "kept", "{:.0%}"),
        ("rollout/length", "length", "{:.0f}"),
        ("grad-norm", "grad-norm", "{:.3f}"),
        ("learning-rate", "lr", "{:.2e}"),
        ("tokens/s", "tokens/s", "{:.0f}"),
        ("moe/mean_k", "mean k", "{:.2f}"),
        ("moe/null_share", "null", "{:.1%}"),
        ("step time", "s/step", "{:.3f}"),
    ):
        if name in metrics:
            parts.append(f"{label} {form.format(metrics[name])}")
    split = [
        f"{name.removeprefix('time/')} {value * 1e3:.0f}"
        for name, value in metrics.items()
        if name.startswith("time/") and not name.startswith("time/slow")
    ]
    if split:
        parts.append(f"ms ({', '.join(split)})")
    return " | ".join(parts)


class Progress:
    """A bar on a terminal; a line per record in a log."""

    def __init__(self, train_iters: int, *, initial: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._train_iters = train_iters
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=train_iters, initial=initial, unit="step", file=self._stream, dynamic_ncols=True)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update(1)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a record."""
        line = progress_line(step, self._train_iters, metrics)
        if self._bar is None:
            self.say(line)
        else:
            self._bar.set_postfix_str(line.partition(" | ")[2], refresh=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
