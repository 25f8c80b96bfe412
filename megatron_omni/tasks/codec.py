"""Training of a codec: crops of sound through encoder, codebook and decoder, and back (losses/codec.py; docs/speech.md).

    loss = w_mel mel + w_mag magnitude + w_com commitment  (+ w_adv (verdict + w_feat features) + what the judges learn)

The encoder and the decoder learn by the optimizer as every model does, the codebook by running means (codebook.py beside
the codec). For the first ``codec.start_step`` steps the decoder hears the encoder's vectors themselves; then the codebook
starts as the k-means of the newest of them, and from there on takes each step's vectors into its means. With ``decoder_span``
the decoder's norms take their fixed statistics of the same vectors at that step (local_decoder.py).

Judges of adversarial training learn in the same step by the same optimizer: their loss hears the decoded sound without a
gradient to the decoder, the decoder's hears them without a gradient to their weights. Their part is not in ``codec loss``.

What the codebook learns of a step it learns once the step's update is done and counted, of the vectors of all data-parallel ranks
in the order of their samples: every rank gathers them and computes the same, so that all hold one codebook, and a step that is
skipped changes it no more than it changes a weight. Checkpoints hold it among the weights; vectors that wait for its start
are the task's own state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.losses.codec import MelDistance, feature_loss, judges_loss, magnitude_loss, verdict_loss
from megatron_omni.models.generators.codebook import Codebook, draw_vectors
from megatron_omni.models.generators.codec import Codec, CodecOutput
from megatron_omni.models.generators.codec_model import CodecModel
from megatron_omni.models.generators.discriminators import Discriminators
from megatron_omni.models.generators.istft import stft
from megatron_omni.models.generators.local_decoder import fix_statistics
from megatron_omni.parallel.sharing import StepData
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.platform.seeds import named_generator, named_seed
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.setup import Run
from megatron_omni.training.task import LossFunction, StepInfo, Task

NAMES = (
    "codec loss",
    "codec/mel",
    "codec/magnitude",
    "codec/commitment",
    "codec/judges",
    "codec/verdict",
    "codec/features",
)
"""Of the report table; the last three in adversarial training alone."""


@dataclass
class _Learned:
    """Vectors of a step that the codebook has not learned yet."""

    updates: int
    """Of the run, before the step's own."""
    step: int
    sample_ids: list[Tensor] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    """[B, n, D] of each micro-batch."""


class CodecTask(Task):
    """See the module."""

    report_names: Sequence[str] = NAMES

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.model.codec is not None
        self.config, self.model_config, self.seed = recipe.codec, recipe.model.codec, recipe.seed
        self.mel = MelDistance(self.model_config.sample_rate, self.config.mel_fft_sizes, self.config.mel_bins)
        self._pending: _Learned | None = None
        self._pool: list[Tensor] = []
        """Vectors [k, D] of the newest steps, the same on all ranks, until the codebook starts."""
        self._chosen: Tensor | None = None
        """[C] times that each code was chosen since the last record."""
        self._revived = 0

    def begin(self, run: Run) -> None:
        """See :class:`Task`."""
        self.mel.to(run.device)

    # -------------------------------------------------------------------------------------------- steps

    def batches(
        self, run: Run, *, timer: PartTimer, stop: Callable[[], bool], written: Callable[[], bool]
    ) -> tuple[StepData | None, dict[str, int]]:
        """See :class:`Task`. The codebook first learns of the step before."""
        self._settle(run)
        if run.state.step >= self.config.start_step and not _codebook(run).is_started and self._pool:
            self._start(run)
        found = super().batches(run, timer=timer, stop=stop, written=written)
        self._pending = _Learned(updates=run.state.updates, step=run.state.step + 1)
        return found

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`Task`."""
        assert batch.audio_features is not None
        wave = batch.audio_features[:, 0]
        row = named_seed(self.seed, "bandwidth", info.step) % self.model_config.num_bandwidths if info.training else 0
        inner = cast(CodecModel, unwrap_model(cast(Any, model)))
        codec, judges = inner.codec, inner.discriminators if info.training else None
        output: CodecOutput = model(wave, row=row, quantise=codec.codebook.is_started)
        if info.training and self._pending is not None:
            self._pending.sample_ids.append(batch.sample_ids[:, 0])
            self._pending.vectors.append(output.encoded.detach())

        def loss_function(decoded: Tensor) -> tuple[Tensor, Tensor]:
            recorded = stft(wave, codec.decoder.window, codec.hop_size)
            mel = self.mel(decoded, wave)
            magnitude = magnitude_loss(output.log_magnitude, recorded, fft_size=len(codec.decoder.window))
            zero = decoded.new_zeros(())
            commitment = output.quantised.commitment if output.quantised is not None else zero
            loss = self.config.mel_weight * mel + self.config.magnitude_weight * magnitude
            loss = loss + self.config.commitment_weight * commitment
            labels = batch.num_label_tokens
            heard = self._judged(judges, wave, decoded) if judges is not None else [zero, zero, zero]
            parts = torch.stack([loss, mel, magnitude, commitment, *heard]).detach().double()
            counts = torch.full_like(parts, labels)
            if judges is None:
                counts[-3:] = 0
            else:
                weight = self.config.adversarial_weight if info.step > self.config.adversarial_start else 0.0
                loss = loss + heard[0] + weight * (heard[1] + self.config.feature_weight * heard[2])
            return loss * (labels / max(info.divisor, 1)), torch.stack([parts * counts, counts], dim=1)

        return output.wave, loss_function

    def _judged(self, judges: Discriminators, wave: Tensor, decoded: Tensor) -> list[Tensor]:
        """What the judges learn, and their verdict and layers as the decoder learns from them."""
        recording = judges(wave)
        learned = judges_loss(recording, judges(decoded.detach()))
        fixed = {name: parameter.detach() for name, parameter in judges.named_parameters()}
        heard = functional_call(judges, fixed, (decoded,))
        return [learned, verdict_loss(heard), feature_loss(recording, heard)]

    # -------------------------------------------------------------------------------------------- codebook

    def _settle(self, run: Run) -> None:
        """Let the codebook learn of the step that has just been computed, if its update was made. All ranks together."""
        pending, self._pending = self._pending, None
        if pending is None or not pending.vectors or run.state.updates == pending.updates:
            return
        vectors = _of_all_ranks(torch.cat(pending.vectors), torch.cat(pending.sample_ids), run)
        flat = vectors.reshape(-1, vectors.shape[-1])
        codebook = _codebook(run)
        if not codebook.is_started:
            self._pool.append(flat)
            while sum(map(len, self._pool[1:])) >= self.config.start_vectors:
                del self._pool[0]
            return
        codes = codebook.nearest(flat)
        counts, sums = codebook.statistics(flat, codes)
        candidates = draw_vectors(flat, codebook.num_codes, named_generator(self.seed, "dead codes", pending.step))
        config = self.config
        self._revived += codebook.learn(counts, sums, candidates, decay=config.decay, dead_below=config.dead_below)
        self._chosen = counts if self._chosen is None else self._chosen + counts

    def _start(self, run: Run) -> None:
        """The codebook becomes the k-means of the pool."""
        vectors, self._pool = torch.cat(self._pool)[-self.config.start_vectors :], []
        per_step = run.recipe.data.global_batch_size * self.config.crop_codes
        _codebook(run).start(vectors, generator=named_generator(self.seed, "codebook"))
        # Counts of the running means are of a step.
        scale = per_step / len(vectors)
        _codebook(run).cluster_size.mul_(scale)
        _codebook(run).embed_avg.mul_(scale)
        if self.model_config.decoder_span:
            whole = len(vectors) // self.config.crop_codes * self.config.crop_codes
            clips = vectors[-whole:].unflatten(0, (-1, self.config.crop_codes))
            fix_statistics(_codec(run).decoder, clips)

    # -------------------------------------------------------------------------------------------- records and checkpoints

    def metrics(self, run: Run) -> dict[str, float]:
        """Of the codebook since the last record: perplexity of its codes, how many are chosen at all, and how many began again."""
        self._settle(run)
        chosen, self._chosen = self._chosen, None
        revived, self._revived = self._revived, 0
        if chosen is None:
            return {}
        share = chosen.double() / chosen.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        used = {"codec/perplexity": float(entropy.exp()), "codec/codes used": float((chosen > 0).sum())}
        return used | {"codec/codes revived": float(revived)}

    def state_dict(self, run: Run) -> dict[str, Any]:
        """Vectors that wait for the codebook's start."""
        self._settle(run)
        return {"pool": [vectors.cpu() for vectors in self._pool]}

    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """See :class:`Task`."""
        self._pool = [vectors.to(run.device) for vectors in state.get("pool", [])]


def _codec(run: Run) -> Codec:
    return cast(CodecModel, unwrap_model(run.model)).codec


def _codebook(run: Run) -> Codebook:
    return _codec(run).codebook


def _of_all_ranks(vectors: Tensor, sample_ids: Tensor, run: Run) -> Tensor:
    """``vectors`` [B, n, D] of all data-parallel ranks, in the order of their samples. Every rank has as many."""
    size = run.pg.dp.size()
    if size > 1:
        everyone = [torch.empty_like(vectors) for _ in range(size)]
        numbers = [torch.empty_like(sample_ids) for _ in range(size)]
        dist.all_gather(everyone, vectors.contiguous(), group=run.pg.dp)
        dist.all_gather(numbers, sample_ids.contiguous(), group=run.pg.dp)
        vectors, sample_ids = torch.cat(everyone), torch.cat(numbers)
    return vectors[sample_ids.argsort(stable=True)]
