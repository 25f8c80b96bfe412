"""What models make of rows that draw, for ``megatron-omni prepare``: the data layer knows no model, here they meet.

``LatentMaker`` is a VAE of a folder, ``HiddenMaker`` the language model of a checkpoint: hidden states of its last layer at the
block of each picture, and its vision encoder's rows of the source, as a step of task ``generative`` with ``conditions: model``
computes them (frozen, so without routing draws). Both on this process's device, the whole model on one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_omni.batch import KeptRows
from megatron_omni.checkpoint.commit import MANIFEST, sha256
from megatron_omni.checkpoint.meaning import check_handover
from megatron_omni.config.generative import GenerativeConfig, GenerativeLosses
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.picture_arrays import vae_fingerprint
from megatron_omni.data.record import Record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation.load import open_checkpoint
from megatron_omni.models.generators.vae import load_picture_codec
from megatron_omni.platform.device import device, select_device


class LatentMaker:
    """A VAE as :func:`megatron_omni.data.picture_cache.cache_pictures` takes it. ValueError for one that is not the recipe's."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        assert recipe.model.image is not None
        self._device = select_device()
        self._codec = load_picture_codec(folder).to(self._device)
        self._codec.check(recipe.model.image)
        self.fingerprint = self._codec.fingerprint
        if (wanted := vae_fingerprint(recipe.model.image)) not in (None, self.fingerprint):
            raise ValueError(
                f"--latents {folder}: fingerprint {self.fingerprint[:12]}, and model.image.vae = {recipe.model.image.vae!r} of the "
                f"recipe has {str(wanted)[:12]}; name the same VAE in both"
            )

    def encode(self, pixels: Tensor) -> Tensor:
        """[C, h, w] of [3, H, W] uint8."""
        return self._codec.encode(pixels[None].to(self._device))[0]


class HiddenMaker:
    """The language model of a checkpoint. ValueError for one whose weights mean something else under the recipe."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        checkpoint = open_checkpoint(path)
        tokenizer = Path(recipe.data.tokenizer), Path(checkpoint.recipe.data.tokenizer)
        check_handover(recipe.model, checkpoint.recipe.model, tokenizers=tokenizer, origin=path)
        self.fingerprint = sha256(checkpoint.directory / MANIFEST)
        if recipe.model.image is not None and recipe.model.image.hidden_fingerprint not in (None, self.fingerprint):
            raise ValueError(
                f"--hidden {path}: fingerprint {self.fingerprint[:12]}, and model.image.hidden_fingerprint of the recipe is "
                f"{str(recipe.model.image.hidden_fingerprint)[:12]}; name that checkpoint, or set the field to null"
            )
        reading = GenerativeConfig(losses=GenerativeLosses(flow=0.0))  # places and rows of pictures, but no targets
        self._builder = SampleBuilder(replace(recipe, task="generative", generative=reading))
        self._multiple = recipe.data.pad_to_multiple_of
        self._model = checkpoint.load_model().eval().requires_grad_(False)

    def sample(self, record: Record) -> Sample:
        """What it reads of a record."""
        return self._builder.build_sample(record)

    @torch.inference_mode()
    def rows(self, samples: Sequence[Sample]) -> list[list[tuple[Tensor, Tensor | None]]]:
        """Of each picture of each sample: hidden states [T, H], and the encoder's rows [n, H] of its source."""
        batch = collate(samples, pad_id=self._builder.pad_id, multiple_of=self._multiple, rule=self._builder.rule)
        if batch.drawn is None:  # no answer that draws is learned
            return [[] for _ in samples]
        batch = replace(batch.to(device()), kept_rows=KeptRows())
        assert batch.drawn is not None and batch.kept_rows is not None
        last = torch.zeros(len(batch.input_ids), 1, dtype=torch.int64, device=device())
        _, hidden = self._model(
            batch,
            step=0,
            stochastic=False,
            compute_loss=False,
            logits_positions=last,
            hidden_places=batch.drawn.places,
        )
        seen = batch.kept_rows.rows.get("vision")
        pictures = [
            (states, None if place is None or seen is None else seen[slice(*place)])
            for states, place in zip(hidden, batch.drawn.vision_rows)
        ]
        rest = iter(pictures)
        return [[next(rest) for _ in sample.drawn] for sample in samples]
