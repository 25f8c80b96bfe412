"""What a picture generator is to know of its training data: whose latents and whose hidden states they are.

A run fills ``model.image.vae_fingerprint`` and ``hidden_fingerprint`` in where its recipe leaves them open, so that its
checkpoints refuse those of others. The first record of each source that names such a file says so.
"""

from megatron_omni.config.run import Recipe
from megatron_omni.data.picture_arrays import vae_fingerprint
from megatron_omni.data.record import RecordError
from megatron_omni.data.row_files import Kind, open_rows
from megatron_omni.data.sources import Source, open_sources

RECORDS_READ = 1000
"""Of a source, before it counts as one that names none."""


def known_of_pictures(recipe: Recipe) -> tuple[str | None, str | None]:
    """Fingerprints of the VAE and of the language model; None where neither recipe nor data names one."""
    image = recipe.model.image
    assert image is not None
    vae, hidden = vae_fingerprint(image), image.hidden_fingerprint
    cached = recipe.generative.conditions == "cached"
    if vae is not None and (hidden is not None or not cached):
        return vae, hidden
    for source in open_sources(recipe.data.sources):
        vae = vae or _first(source, "latents")
        if cached:
            hidden = hidden or _first(source, "hidden")
    return vae, hidden


def _first(source: Source, kind: Kind) -> str | None:
    for row in range(min(len(source), RECORDS_READ)):
        try:
            drawing = source[row].drawing
            for named in () if drawing is None else getattr(drawing, kind):
                for at in named.values():
                    return open_rows(at.file, kind).fingerprint
        except (RecordError, ValueError):  # the loader says so
            continue
    return None
