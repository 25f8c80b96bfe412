"""Shape of what draws (``model.image``, docs/images_out.md): the block of tokens, the projectors behind it, the diffusion
transformer (DiT) and how it is sampled.

Plain dataclasses, as config/model.py. The defaults are the released ones: Task-DiT of Uni-MoE-2.0-Omni on PixWizard's DiT
and SDXL's latents, with its known defects repaired; ``release`` and the fields that name it bring them back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.ranges import file_path, number

TASK_TOKENS = tuple(f"[TASK{i}]" for i in range(3))
"""First tokens of a block: what kind of picture is asked for."""
IMAGE_TOKENS = tuple(f"[IMG{i}]" for i in range(32))
"""The tokens behind them: what is to be seen."""
IMAGE_PARTS = frozenset({"image_projectors", "image_generator"})
"""Named parts of ``model.image`` alone (models/parts.py)."""


@dataclass(kw_only=True)
class DiTConfig:
    """The diffusion transformer (PixWizard's, of Lumina-Next): velocity of latents under caption, task, source and vision."""

    patch_size: int = number(2, at_least=1, at_most=64)
    """Side in latent cells of a token."""
    hidden_size: int = number(2304, at_least=4, at_most=10**6)
    """Width of a token."""
    num_layers: int = number(24, at_least=1, at_most=1000)
    """Blocks."""
    num_attention_heads: int = number(32, at_least=1, at_most=4096)
    """Heads of queries; a head's width is a multiple of 4 (two coordinates turn pairs of channels)."""
    num_query_groups: int = number(8, at_least=1, at_most=4096)
    """Heads of keys and values; they divide the heads of queries."""
    ffn_hidden_size: int = number(6144, at_least=1, at_most=10**6)
    """Width inside the gated MLPs."""
    condition_size: int = number(1024, at_least=1, at_most=10**6)
    """Width of the vector that time, task and the mean of the vision rows add up to (released: 1024, at most ``hidden_size``)."""
    caption_size: int = number(2048, at_least=1, at_most=10**6)
    """Width of caption rows (Gemma-2B's)."""
    task_size: int = number(768, at_least=1, at_most=10**6)
    """Width of a task vector (CLIP ViT-L/14's text embedding)."""
    vision_size: int = number(1024, at_least=1, at_most=10**6)
    """Width of vision rows (CLIP ViT-L/14's patches)."""
    kept_vision_tokens: int = number(256, at_least=0, at_most=10**6)
    """Vision rows that each block chooses to attend to; all where there are fewer. 0: always all, and no layers that choose."""
    latent_channels: int = number(4, at_least=1, at_most=1024)
    """Channels of the latents, as the VAE has them."""
    learn_sigma: bool = True
    """The output has twice as many channels, of which the second half is thrown away (released)."""
    noisy_selection: bool = False
    """Gumbel noise in the choice of vision rows when pictures are drawn as well, as the published code has it."""
    rope_base: float = number(10_000.0, at_least=1)
    """Base of the rotary frequencies of row and column."""


@dataclass(kw_only=True)
class ProjectorConfig:
    """What turns hidden rows of the block into the DiT's caption rows and task vectors: an encoder-decoder transformer each."""

    hidden_size: int = number(1536, at_least=1, at_most=10**6)
    """Width inside."""
    num_attention_heads: int = number(4, at_least=1, at_most=4096)
    """Heads; they divide ``hidden_size``."""
    num_layers: int = number(4, at_least=1, at_most=1000)
    """Layers of the encoder, and as many of the decoder."""
    ffn_hidden_size: int = number(6144, at_least=1, at_most=10**6)
    """Width inside their MLPs."""
    num_caption_rows: int = number(32, at_least=1, at_most=10**6)
    """Queries of the caption's decoder, and so rows of a caption."""
    query_init: Literal["normal", "zero"] = "normal"
    """``zero``: as the release begins, which gives equal rows for ever where only a flow loss teaches them."""
    input_positions: bool = True
    """A learned vector for each token of the block is added before the encoder; the released weights have none."""

    @property
    def num_task_rows(self) -> int:
        """Queries of the task's decoder: a vector for each branch of guidance."""
        return len(TASK_TOKENS)


@dataclass(kw_only=True)
class SamplingConfig:
    """How a picture is drawn, where a request says nothing else."""

    steps: int = number(60, at_least=1, at_most=1000)
    """Euler steps from noise to picture. What the release calls 60 is a grid of 60 times, 59 steps."""
    shift: float = number(1.0, above=0, at_most=1000)
    """s: times t become t / (t + s - s t); above 1 more of the steps are near the noise."""
    text_guidance: float = number(4.0, at_least=0, at_most=1000)
    """Factor of what the words change, 1: no guidance by them."""
    image_guidance: float = number(1.0, at_least=0, at_most=1000)
    """Factor of what the source picture changes. At 1 the branch without both is not computed."""
    guided_channels: int = number(0, at_least=0, at_most=1024)
    """Guidance acts on so many channels of the latents, 0: on all. Released: 3 of 4."""


@dataclass(kw_only=True)
class ImageGeneratorConfig:
    """``model.image``: the model draws. A block of tokens in its answer stands for a picture."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    """The diffusion transformer."""
    projectors: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Between the language model and it."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How pictures are drawn."""
    num_image_tokens: int = number(32, at_least=1, at_most=len(IMAGE_TOKENS))
    """[IMG] tokens of a block, from [IMG0] on; there are 32."""
    image_token_repeat: int = number(1, at_least=1, at_most=16)
    """Times that these follow each other in a block. The released weights need 2: 64 positions."""
    weights: str | None = file_path(None)
    """Run directory or checkpoint whose generator and projectors (``image.*``) take the place of those that ``init_from``
    lacks."""
    vae: str | None = file_path(None)
    """Folder of the VAE that turns pictures into latents and back. Latents of another are refused by its fingerprint."""
    vae_fingerprint: str | None = None
    """Of the VAE whose latents were learned. null: training fills it in; a checkpoint that has it draws with no other VAE."""
    hidden_fingerprint: str | None = None
    """Of the language model whose hidden states on disk are learned from (``generative.conditions: cached``). null: training
    fills it in; other hidden states are refused."""
    latent_scale: float = number(0.13025, above=0, at_most=10**6)
    """Latents are what the VAE's encoder gives, times this (SDXL)."""
    downsampling: int = number(8, at_least=1, at_most=256)
    """Pixels of a picture's side for each cell of the latents' side."""
    base_size: int = number(768, at_least=1, at_most=8192)
    """Pictures have an area of at most its square, in pixels."""
    size_step: int = number(16, at_least=1, at_most=1024)
    """Widths and heights are multiples of this, and this one of ``downsampling`` x ``dit.patch_size``."""
    max_aspect: float = number(4.0, at_least=1, at_most=100)
    """The longer side is at most so many times the shorter."""
    blank_source: Literal["none", "white"] = "none"
    """Source of a picture that has none: zeros in the place of its latents, or a white picture (released)."""
    release: bool = False
    """As the authors' published code draws: the second and third task vector of a prompt are those of the branches without
    words, and no learned null takes their place."""

    @property
    def block(self) -> tuple[str, ...]:
        """Names of the tokens that stand for one picture, in their order."""
        return TASK_TOKENS + IMAGE_TOKENS[: self.num_image_tokens] * self.image_token_repeat

    def block_ids(self, specials: Mapping[str, int]) -> tuple[int, ...]:
        """Their ids in a tokenizer's ``specials``. ValueError where it lacks one."""
        missing = [name for name in self.block if name not in specials]
        if missing:
            raise ValueError(
                f"data.tokenizer: lacks {', '.join(dict.fromkeys(missing))}, by which model.image draws; make it with "
                "megatron_omni.data.tokenizer.train_sentencepiece, or set model.image=null"
            )
        return tuple(specials[name] for name in self.block)

    @property
    def latent_step(self) -> int:
        """Pixels of a token's side."""
        return self.downsampling * self.dit.patch_size
