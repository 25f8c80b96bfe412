"""Look at what a recipe will train on, before it starts: one HTML page with decoded samples of every source.

megatron-omni preflight recipes/tiny/quickstart.yaml --out preflight.html
megatron-omni preflight RECIPE --samples 16 --steps 50 data.packing=false

Tiles and spectrograms as the encoders get them, tokens with the loss mask, 3D positions, placeholders against encoder
tokens, lengths, packing efficiency of the first steps, epochs per source, records that cannot be used with reasons. The page
needs no server and loads nothing. Exit status: 0, 1 when something on the page needs attention, 2 for bad input.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_omni.cli.starting import say_starting
from megatron_omni.config.outcome import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from megatron_omni.config.run import Recipe
    from megatron_omni.data.preflight import EncoderRows
    from megatron_omni.data.sample import Sample

EXIT_PROBLEMS = 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="megatron-omni preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("recipe", help="YAML recipe")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    p.add_argument("--samples", type=int, default=6, help="records shown per source, spread over it (default 6)")
    p.add_argument(
        "--steps",
        type=int,
        default=20,
        help="of a run too long to plan whole: steps planned of each phase of its mixture (default 20)",
    )
    p.add_argument("--out", type=Path, default=Path("preflight.html"), help="default preflight.html")
    return p


def encoder_rows(recipe: "Recipe") -> "EncoderRows":
    """Rows that the recipe's encoders give, by running them without weights (meta tensors)."""
    import torch

    from megatron_omni.models.encoders.audio import AudioEncoder
    from megatron_omni.models.encoders.vision import VisionEncoder

    model, width = recipe.model, recipe.model.hidden_size
    with torch.device("meta"):
        vision = VisionEncoder(model.vision, width) if model.vision is not None else None
        audio = AudioEncoder(model.audio, width) if model.audio is not None else None

    def rows(encoder: VisionEncoder | AudioEncoder | None, inputs: torch.Tensor | None) -> int:
        if encoder is None or inputs is None:
            return 0
        with torch.no_grad():
            return int(encoder(inputs.to("meta")).flatten(0, 1).shape[0])

    def of_sample(sample: "Sample") -> tuple[int, int]:
        return rows(vision, sample.tiles), rows(audio, sample.chunks)

    return of_sample


def main(arguments: list[str] | None = None) -> int:
    """Parse, look, write the page."""
    options = parser().parse_intermixed_args(arguments)
    try:
        for name in ("samples", "steps"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
        if not options.out.absolute().parent.is_dir():
            raise ValueError(f"--out {options.out}: its directory does not exist; create it first")
        from megatron_omni.config.load import load_recipe
        from megatron_omni.config.validate import fewest_ranks, validate

        recipe = load_recipe(options.recipe, options.overrides)
        validate(recipe, world_size=fewest_ranks(recipe.parallel))
        say_starting("preflight", options.recipe)
        from megatron_omni.data.preflight import inspect
        from megatron_omni.data.preflight_page import page

        preflight = inspect(
            recipe, num_samples=options.samples, num_steps=options.steps, encoder_rows=encoder_rows(recipe)
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    options.out.write_text(page(preflight, title=options.recipe), encoding="utf-8")
    for source in preflight.sources:
        print(
            f"{source.name}: {source.rows} records, {source.share:.1%} of the run, {source.epochs:.2f} epochs, "
            f"{len(source.bad)} of {source.tried} records bad"
        )
    print(f"tokens that are no padding: {preflight.packing.efficiency:.1%}")
    for problem in preflight.problems:
        print(f"look at: {problem}")
    print(f"wrote {options.out}")
    return EXIT_PROBLEMS if preflight.problems else 0


if __name__ == "__main__":
    sys.exit(main())
