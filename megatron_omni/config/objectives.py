"""What the tasks beside supervised training are told: reinforcement (docs/reinforcement.md), preferences, codecs."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_omni.config.ranges import number


@dataclass(kw_only=True)
class RewardConfig:
    """One reward function and its weight in the sum."""

    function: str
    """Name of a reward of the package (docs/reinforcement.md), or ``FILE.py:NAME``, a function of yours."""
    weight: float = number(1.0, at_least=-1000, at_most=1000)
    """Factor of its value in a response's reward."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, besides the columns of the records."""


@dataclass(kw_only=True)
class ReinforceConfig:
    """Task ``reinforce``: GSPO. ``data.global_batch_size`` counts prompts of a step."""

    group_size: int = number(8, at_least=2, at_most=64, fix="an advantage compares responses to one prompt")
    """Responses to each prompt."""
    mini_batches: int = number(4, at_least=1, at_most=1000)
    """Steps of an iteration: so many times ``data.global_batch_size`` prompts are answered before the first of them."""
    max_new_tokens: int = number(2048, at_least=1, at_most=10**6)
    """Longest response, its end token included; a longer one is cut and keeps its tokens."""
    temperature: float = number(1.0, above=0, at_most=100)
    """Of the sampled responses, and of the distributions whose ratio is taken."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Only 1: a nucleus would sample from another distribution than the one that is trained."""
    clip_low: float = number(3e-4, at_least=0, below=1)
    """A sequence whose ratio fell below 1 - this is not pushed down further."""
    clip_high: float = number(4e-4, at_least=0, at_most=1000)
    """A sequence whose ratio rose above 1 + this is not pushed up further."""
    kl_coeff: float = number(0.0, at_least=0, at_most=1000)
    """Factor of the KL divergence from the weights of ``init_from``, per token (the estimator e^d - d - 1, d = log
    reference - log policy); 0 computes none."""
    form: Literal["sequence", "token"] = "sequence"
    """GSPO's ratio of a sequence, or its token form: the same ratio and gradient through each token."""
    overlong: Literal["none", "penalize", "mask"] = "none"
    """What becomes of long responses: nothing; a penalty that grows linearly to -1 over the last ``overlong_tokens``
    (DAPO); or those that were cut are left out of the loss, though not of their group's mean."""
    overlong_tokens: int | None = number(None, at_least=1, at_most=10**6)
    """Tokens over which the penalty of ``overlong`` ``penalize`` grows, up to ``max_new_tokens``."""
    resample: int = number(0, at_least=0, at_most=100)
    """Rounds in which prompts whose responses all got one reward give way to the next prompts of the order; 0: they are
    left out of the loss."""
    routes: Literal["live", "old", "rollout"] = "live"
    """Experts in an iteration's updates: chosen anew, or those of the forward pass before the first update (``old``), or
    those of the sampled responses (``rollout``)."""
    share_prompt: bool = True
    """Responses to one prompt are computed in one sequence, the prompt once (exact); False: a sequence each."""
    max_running: int = number(32, at_least=1, at_most=65536)
    """Responses that a model replica computes together in a rollout."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """Reward functions; a response's reward is the sum of weight x value."""


@dataclass(kw_only=True)
class PreferenceConfig:
    """Task ``preference``: DPO. ``data.global_batch_size`` counts pairs of a step."""

    beta: float = number(0.1, above=0, at_most=1000)
    """Factor of the margin: how far the policy may leave the reference."""
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    """Probability that a pair's label is wrong."""
    length_normalized: bool = False
    """Log-probabilities are means over a response's tokens instead of sums."""
    sft_weight: float = number(0.0, at_least=0, at_most=1000)
    """Factor of the chosen responses' next-token loss that is added, so that their probability does not fall."""
    share_prompt: bool = True
    """Both responses are computed in one sequence, the prompt once (exact); False: a sequence each."""


@dataclass(kw_only=True)
class CodecTrainingConfig:
    """Task ``codec`` (docs/speech.md). ``data.global_batch_size`` counts crops of a step."""

    crop_codes: int = number(120, at_least=1, at_most=10**6)
    """Length of a crop in codes; what a recording lacks is silence."""
    speed_octaves: float = number(0.0, at_least=0, at_most=1)
    """A crop is played up to so many octaves faster or slower, pitch included."""
    gain_db: list[float] = number(lambda: [0.0, 0.0], at_least=-100, at_most=100)
    """A crop is made louder by a number of decibels between these two."""
    start_step: int = number(0, at_least=0)
    """Steps before the codebook starts, in which the decoder hears the encoder's vectors themselves."""
    start_vectors: int = number(20_000, at_least=1, at_most=10**7)
    """Newest vectors of the encoder whose k-means the codebook starts as."""
    decay: float = number(0.99, at_least=0, below=1)
    """Of the running means that the codebook's entries are, per step."""
    dead_below: float = number(2.0, at_least=0, at_most=10**6)
    """A code that fewer vectors of a step choose (running mean) starts again at one of the step's vectors. Choose a tenth of
    ``global_batch_size * crop_codes / num_codes`` or less; WavTokenizer's 2 suits steps of 100,000 codes."""
    commitment_weight: float = number(1.0, at_least=0, at_most=10**6)
    """Factor of the squared distance of the encoder's vectors to their entries."""
    mel_weight: float = number(1.0, above=0, at_most=10**6)
    """Factor of the distance of log-mel spectrograms."""
    mel_fft_sizes: list[int] = number(lambda: [256, 512, 1024, 2048], at_least=16, at_most=65536)
    """Sizes of their transforms; frames are a quarter of it apart."""
    mel_bins: list[int] = number(lambda: [32, 64, 80, 80], at_least=1, at_most=4096)
    """Bands of each."""
    magnitude_weight: float = number(0.5, at_least=0, at_most=10**6)
    """Factor of the distance of the decoder's log magnitude to the recording's."""
    adversarial_weight: float = number(0.0, at_least=0, at_most=10**6)
    """Factor of what judges that are trained beside the codec hold against its sound; 0: there are none."""
    adversarial_start: int = number(0, at_least=0)
    """Steps in which the judges learn alone."""
    feature_weight: float = number(2.0, at_least=0, at_most=10**6)
    """Factor, beside 1 for the verdict, of the distance of what the judges' layers make of the sound and of the recording."""
    adversarial_fft_sizes: list[int] = number(lambda: [512, 1024, 2048], at_least=64, at_most=65536)
    """A judge for each size of the transform."""


@dataclass(kw_only=True)
class PictureCodecTrainingConfig:
    """Task ``picture_codec`` (docs/images_out.md). ``data.global_batch_size`` counts crops of a step."""

    crop_size: int = number(64, at_least=8, at_most=4096)
    """Pixels a side of a crop, a multiple of what a place of the latent stands for. Smaller pictures are skipped."""
    mirror: bool = False
    """Half of the crops are mirrored, left to right."""
    grey: float = number(0.0, at_least=-1, at_most=1)
    """Mean of the pictures, black -1 and white 1: a picture of this alone begins with latents of 0."""
    latent_noise: float = number(0.1, at_least=0, at_most=10)
    """Standard deviation of normal noise on the latents that the decoder learns from: errors of a generator up to about this size
    then stay small in pixels."""
    power_weight: float = number(0.02, at_least=0, at_most=10**6)
    """Factor of what a picture's mean squared latent has above 1; without it noise means nothing."""
    square_weight: float = number(1.0, at_least=0, at_most=10**6)
    """Factor of the mean squared error of pixels from -1 to 1."""
    absolute_weight: float = number(0.0, at_least=0, at_most=10**6)
    """Factor of their mean absolute error."""
    edge_weight: float = number(0.0, at_least=0, at_most=10**6)
    """Factor of the mean squared error of the differences of neighbouring pixels: sharp edges."""
    grid_weight: float = number(0.0, at_least=0, at_most=10**6)
    """Factor of the same of those neighbours alone that two places of the latent part: no grid."""
