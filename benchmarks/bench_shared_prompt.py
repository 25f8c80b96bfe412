"""An update of GSPO on rows that share their prompt against a row for each response: processor time and tokens.

    python -m benchmarks.bench_shared_prompt --json FILE [--group 8] [--prompts 8] [--response 12] [--repeats 5]

The model is the quickstart's (recipes/tiny/quickstart.yaml) with gate and encoders frozen, as recipes of reinforcement
have them. A prompt is two pictures and 24 tokens of text, 60 in all; responses are ``--response`` tokens long, some
shorter, some longer. An update is zeroing gradients, forward, backward and step of the optimizer, over micro-batches of
four prompts. fp32, one thread; thread CPU time on a CPU. The contenders take turns and the median counts. FILE gets
[{rows, tokens, median_ms, share}], share of the separate rows' time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import seconds
from megatron_omni.platform.device import device, install

WARM_UP, PICTURES, TEXT = 1, 2, 24
PROMPTS_AT_ONCE = 4
"""Of a micro-batch."""
FREEZE = ["gate", "vision", "audio"]


def prompt_of(model: Any, generator: torch.Generator) -> Any:
    """Two pictures between words."""
    from megatron_omni.batch import IGNORE_LABEL, Modality
    from megatron_omni.data.sample import Sample
    from megatron_omni.positions import ImageSpan, PositionRule, TextSpan, position_ids

    side = model.vision.pooled_side**2
    picture = [TextSpan(1), ImageSpan(1, 1), TextSpan(1)]
    spans = [*picture * PICTURES, TextSpan(TEXT)]
    kinds = ([0] + [int(Modality.IMAGE)] * side + [0]) * PICTURES + [0] * TEXT
    positions, after = position_ids(spans, PositionRule.from_config(model))
    ids = torch.randint(0, model.vocab_size, (len(kinds),), generator=generator)
    return Sample(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_LABEL),
        position_ids=positions,
        next_position=after,
        modality=torch.tensor(kinds),
        tiles=torch.randint(256, (PICTURES, 3, *2 * [model.vision.image_size]), generator=generator).byte(),
        chunks=None,
    )


def batches_of(groups: Sequence[tuple[Any, list[list[int]]]], *, share: bool) -> list[Any]:
    """Micro-batches of prompts and their responses."""
    from megatron_omni.data.collate import collate
    from megatron_omni.data.responses import group_sample, separate_samples

    batches = []
    for start in range(0, len(groups), PROMPTS_AT_ONCE):
        rows = []
        for prompt, responses in groups[start : start + PROMPTS_AT_ONCE]:
            rows += [group_sample(prompt, responses)] if share else separate_samples(prompt, responses)
        batches.append(collate([row.sample for row in rows], pad_id=0, multiple_of=8))
    return batches


class Update:
    """Updates of one model."""

    def __init__(self, recipe: Any, num_sequences: int) -> None:
        from megatron_omni.models.build import build_model
        from megatron_omni.models.parts import apply_freeze
        from megatron_omni.parallel import groups
        from megatron_omni.parallel.wrap import wrap_model
        from megatron_omni.training.optimizer import build_optimizer

        self.recipe, self.num_sequences = recipe, num_sequences
        self.pg = groups.initialize(recipe.parallel)
        built = build_model(recipe, self.pg)
        apply_freeze(built, set(recipe.freeze))
        self.model = wrap_model(built, recipe, self.pg)
        self.optimizer, self.scheduler = build_optimizer(self.model, recipe, self.pg)

    def __call__(self, batches: Sequence[Any]) -> None:
        """One update."""
        from megatron_omni.parallel.schedule import run_step
        from megatron_omni.training.optimizer import update

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        run_step(self._forward, batches, self.model, pg=self.pg, recipe=self.recipe)
        update(self.optimizer, self.scheduler, clip_grad=self.recipe.optim.clip_grad)

    def _forward(self, batch: Any, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        from megatron_omni.data.responses import responses_of
        from megatron_omni.losses.gspo import gspo_loss

        def loss(token_loss: torch.Tensor) -> tuple[torch.Tensor, None]:
            found = responses_of(batch)
            new = found.of(-token_loss)
            advantages = torch.linspace(-1.0, 1.0, len(new), device=new.device)
            kept = torch.ones_like(advantages, dtype=torch.bool)
            terms = gspo_loss(
                new, new.detach(), found.valid, advantages, kept, num_sequences=self.num_sequences, clip_low=3e-4,
                clip_high=4e-4,
            )  # fmt: skip
            return terms.loss, None

        return model(batch, step=1, stochastic=False), loss


def measured(*, group: int, prompts: int, response: int, repeats: int) -> list[dict[str, Any]]:
    """The two rows of the table, separate rows first."""
    from megatron_omni.config.load import load_recipe

    recipe = load_recipe(
        Path(__file__).resolve().parents[1] / "recipes" / "tiny" / "quickstart.yaml", [f"freeze={FREEZE}"]
    )
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, generator=generator)
    groups = []
    for _ in range(prompts):
        lengths = draw(max(1, response // 2), response + response // 2 + 1, (group,)).tolist()
        responses = [draw(0, recipe.model.vocab_size, (length,)).tolist() for length in lengths]
        groups.append((prompt_of(recipe.model, generator), responses))
    update = Update(recipe, group * prompts)
    contenders = {name: batches_of(groups, share=name == "shared") for name in ("separate", "shared")}
    on_device = {name: [batch.to(device()) for batch in batches] for name, batches in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(WARM_UP + repeats):
        for name, batches in on_device.items():
            duration, _ = seconds(partial(update, batches), device=device(), threads=1)
            if repeat >= WARM_UP:
                times[name].append(duration)
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "rows": name,
            "tokens": sum(batch.num_tokens for batch in contenders[name]),
            "median_ms": round(1e3 * median[name], 2),
            "share": round(median[name] / median["separate"], 3),
        }
        for name in contenders
    ]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--group", type=int, default=8, help="responses to each prompt (default: 8)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of an update (default: 8)")
    parser.add_argument("--response", type=int, default=12, help="tokens of a response, on average (default: 12)")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of each (default: 5)")
    options = parser.parse_args(arguments)
    install()
    torch.set_num_threads(1)
    from megatron_omni.parallel import groups

    try:
        rows = measured(
            group=options.group, prompts=options.prompts, response=options.response, repeats=options.repeats
        )
    finally:
        groups.destroy()
    for row in rows:
        print("{rows:>9} {tokens:7d} tokens {median_ms:10.1f} ms {share:6.3f}".format(**row), flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
