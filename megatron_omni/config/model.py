"""Shape of the model: Qwen2.5 language trunk, dynamic-capacity MoE, SigLIP vision, Whisper audio (spec: docs/model.md).

Plain dataclasses: no torch and no megatron here, so that ``--help`` and ``megatron-omni plan`` answer at once.
Field names are Megatron-Core's (``hidden_size``, ``ffn_hidden_size``, ``num_query_groups``, ...) wherever Megatron has one.
The defaults are the full Uni-MoE-2.0-Omni on Qwen2.5-7B; ``recipes/tiny/`` overrides the sizes and nothing else.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_omni.config.generators import CodecConfig, PictureCodecConfig, SpeechConfig
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.ranges import number


@dataclass(kw_only=True)
class MoEConfig:
    """Dynamic-capacity MoE (paper section 2.3.2, Algorithm 1): routed + null + shared experts behind one gate."""

    num_routed_experts: int = number(4, at_least=1, at_most=4096, fix="model.moe=null makes the model dense")
    """Real routed experts; each is a SwiGLU MLP of width ``moe_ffn_hidden_size``."""
    num_null_experts: int = number(1, at_least=0, at_most=4096)
    """Gate columns that stand for "no expert": they take part in Top-P and cost nothing."""
    num_shared_experts: int = number(2, at_least=0, at_most=4096)
    """Experts that every token uses, weighted per token by the same masked softmax."""
    moe_ffn_hidden_size: int = number(18944, at_least=1, at_most=10**6)
    """Width of each routed expert."""
    moe_shared_expert_intermediate_size: int = number(
        2368, at_least=1, at_most=10**6, fix="num_shared_experts=0 leaves shared experts out"
    )
    """Width of each shared expert (an eighth of a routed one in the paper)."""
    top_p: float = number(0.7, above=0, at_most=1)
    """Smallest set of dynamic slots whose summed probability reaches this, in (0, 1]."""
    top_k: int | None = number(None, at_least=1, at_most=8192)
    """Fixed number of dynamic slots per token instead of Top-P."""
    routing_weight_mode: Literal["masked_softmax", "release"] = "masked_softmax"
    """``masked_softmax``: Algorithm 1. ``release``: what the authors' published code computes."""
    sample_experts: bool = True
    """Training draws slots without replacement (Gumbel order) instead of taking the sorted ones."""
    gradient_estimator: Literal["paper", "grin", "none"] = "paper"
    """How the gate learns from the choice that it made: the paper's estimator (appendix A.4), GRIN's (the published
    code), or through the mixing weights alone."""
    max_routed: int | None = number(None, at_least=1, at_most=4096)
    """Cap on real experts per token; null leaves the count to the rule."""
    fp32_gate: bool = True
    """Gate in fp32, in training and evaluation alike."""
    input_jitter: float = number(0.01, at_least=0, below=1)
    """Training only: the gate's input is multiplied by U(1 - x, 1 + x), element by element; 0 switches it off."""
    router_jitter_eps: float = number(0.01, at_least=0, below=1)
    """Near-tie threshold of ``release`` mode (2 eps relative)."""
    moe_aux_loss_coeff: float = number(0.025, at_least=0, at_most=1000)
    """Factor of the load-balancing loss at the first step; 0 switches it off, if the next field is 0 as well."""
    moe_aux_loss_coeff_min: float = number(0.001, at_least=0, at_most=1000)
    """Factor of the load-balancing loss from step ``moe_aux_loss_decay_iters`` on."""
    moe_aux_loss_decay_iters: int = number(10_000, at_least=0)
    """Optimizer steps over which the factor goes linearly from the one to the other."""
    aux_loss_probs: Literal["selected", "full"] = "selected"
    """Softmax of the auxiliary loss over the selected slots (published code) or over all dynamic slots (Switch)."""
    aux_loss_counts_null: bool = True
    """The load-balancing loss balances null experts together with the real ones; False leaves them out of its sum."""
    aux_loss_label_weight: float = number(10.0, above=0, at_most=10**6)
    """Weight of tokens that carry a label, against 1 for other real tokens."""
    capacity_factor: float | None = number(None, above=0, at_most=10**6, fix="null is dropless")
    """Training only: cap per real expert, keeping the tokens of largest logit; null is dropless."""
    min_capacity: int = number(8, at_least=0)
    """Tokens that a real expert may always take, whatever ``capacity_factor`` says."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach experts on other ranks: each to those that it needs, or all tokens to all ranks. Free to change
    on resume."""
    kernels: Literal["omni", "torch", "te", "megatron"] = "omni"
    """What moves rows and multiplies experts, on the same weights and checkpoints (docs/kernels.md): ours, plain PyTorch,
    Transformer Engine's grouped linear, megatron-core's functions expert by expert. Free to change on resume."""


UPCYCLED_SHAPE = (
    "num_null_experts", "num_shared_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "routing_weight_mode", "gradient_estimator",
)  # fmt: skip
"""What a recipe decides about a mixture that is made of dense weights; the rest follows from those."""


@dataclass(kw_only=True)
class VisionConfig:
    """SigLIP tower, MLP projector and 2D pooling (paper section 2.2, docs/model.md). One tile is ``image_size`` square."""

    image_size: int = number(384, at_least=1, at_most=8192)
    """Side of a tile in pixels (the paper's patch p)."""
    patch_size: int = number(14, at_least=1, at_most=8192)
    """Side in pixels of the squares that a tile is cut into, one position of the tower each."""
    stem: Literal["patch", "conv"] = "patch"
    """``conv``: patches are embedded by log2(patch_size) convolutions of stride 2 instead of one matrix (training from
    scratch; SigLIP's weights do not fit)."""
    hidden_size: int = number(1152, at_least=2, at_most=10**6)
    """Width of the tower."""
    ffn_hidden_size: int = number(4304, at_least=1, at_most=10**6)
    """Width inside the tower's MLPs."""
    num_layers: int = number(26, at_least=1, at_most=1000)
    """Layers kept: the released model drops the last of so400m's 27, and its post-layernorm."""
    num_attention_heads: int = number(16, at_least=1, at_most=4096)
    """Attention heads of a layer of the tower; they divide ``hidden_size``."""
    pooled_side: int = number(12, at_least=1, at_most=8192)
    """s: every tile becomes s x s tokens (the paper's T = s^2)."""
    max_tiles_per_side: int = number(6, at_least=1, at_most=64)
    """Any-resolution candidates are (1x1) .. (n x n) tiles."""


@dataclass(kw_only=True)
class AudioConfig:
    """Whisper encoder, Whisper decoder as Q-former, linear projector (paper section 2.2, docs/model.md)."""

    num_mel_bins: int = number(128, at_least=1, at_most=1024)
    """Frequency bands of the log-mel spectrogram."""
    chunk_seconds: float = number(30.0, above=0, at_most=3600)
    """One encoder input; the last chunk of a clip is zero-padded to it."""
    hidden_size: int = number(1280, at_least=4, at_most=10**6)
    """Width of encoder and Q-former."""
    ffn_hidden_size: int = number(5120, at_least=1, at_most=10**6)
    """Width inside their MLPs."""
    num_encoder_layers: int = number(32, at_least=1, at_most=1000)
    """Layers of Whisper's encoder."""
    num_decoder_layers: int = number(32, at_least=1, at_most=1000)
    """Layers of the Q-former."""
    num_attention_heads: int = number(20, at_least=1, at_most=4096)
    """Attention heads of a layer of either; they divide ``hidden_size``."""
    num_query_tokens: int = number(200, at_least=1, at_most=10**6)
    """Tokens per chunk; 20 tokens stand for 3 seconds."""
    tokens_per_position: int = number(20, at_least=1, at_most=10**6)
    """Neighbouring audio tokens that share one position: 20 (3 s) in the paper. A clip within one position has no order
    that the trunk can see from positions, so a model of short clips that is trained from scratch needs fewer."""
    max_target_positions: int = number(448, at_least=1, at_most=10**6)
    """Positions that the Q-former has embeddings for; at least ``num_query_tokens``."""
    causal_queries: bool = True
    """Self-attention among the queries as in Hugging Face's decoder; False makes it bidirectional."""
    query_init: Literal["normal", "aligned"] = "normal"
    """``aligned``: queries start at the sinusoid of the encoder position in the middle of their span (training from scratch)."""
    max_chunks: int = number(40, at_least=1, at_most=10**6)
    """Longest clip, in chunks; a longer one is refused."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters: they alone are trained, whatever ``freeze`` says. Defaults: the authors' published fine-tuning."""

    rank: int = number(8, at_least=1, at_most=65536)
    """Width between the two matrices of an adapter."""
    alpha: float = number(16.0, above=0, at_most=10**6)
    """The adapters' product is scaled by ``alpha / rank``."""
    dropout: float = number(0.05, at_least=0, below=1)
    """Training only: share of an adapter's input that is left out."""
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])
    """``attention``: queries, keys and values, and the output projection. ``experts``: the routed experts. Never the gate."""

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank

    def computes_as(self, other: "LoraConfig") -> bool:
        """Whether adapters of one mean the same in the other; dropout is training's own affair."""
        return (self.rank, self.alpha, set(self.targets)) == (other.rank, other.alpha, set(other.targets))


@dataclass(kw_only=True)
class ModelConfig:
    """Language trunk (Qwen2.5 architecture) and the parts around it."""

    num_layers: int = number(28, at_least=1, at_most=1000)
    """Transformer blocks (attention + FFN); Megatron's hybrid pattern counts two layers for each."""
    hidden_size: int = number(3584, at_least=1, at_most=10**6)
    """Width of the language model: of its embeddings and of what its blocks add to."""
    ffn_hidden_size: int = number(18944, at_least=1, at_most=10**6)
    """Width of the dense FFN; used where ``moe`` is null."""
    num_attention_heads: int = number(28, at_least=1, at_most=4096)
    """Attention heads (queries) of a block."""
    num_query_groups: int = number(4, at_least=1, at_most=4096)
    """Heads of keys and values (grouped-query attention); they divide the heads of queries."""
    kv_channels: int = number(128, at_least=2, at_most=65536)
    """Width of a head."""
    vocab_size: int = number(152064, at_least=1, at_most=10**8)
    """Token ids that the model has, at least the tokenizer's."""
    make_vocab_size_divisible_by: int = number(128, at_least=1, at_most=10**6)
    """Embedding and output matrices get rows up to a multiple of this, on every layout the same."""
    max_position_embeddings: int = number(32768, at_least=1)
    """Longest context, written into exported checkpoints; it limits nothing here, since rotary positions have no table."""
    rotary_base: float = number(1_000_000.0, at_least=1)
    """Base of the rotary frequencies: channel pair i turns by base^(-2i / ``kv_channels``) a position."""
    mrope_section: list[int] = number(lambda: [16, 24, 24], at_least=0, at_most=65536)
    """Rotary frequencies given to time, height and width; sums to ``kv_channels / 2``."""
    rope_theta_seconds: float = number(2.0, above=0, at_most=10**6)
    """theta of the paper: position steps per second of audio or video."""
    audio_only_1d: bool = False
    """Released weights only: a sample with audio but no picture gets plain positions 0..L-1."""
    half_even_positions: bool = False
    """Released weights only: half a position step of a frame or of sound rounds to the even one instead of up."""
    layernorm_epsilon: float = number(1e-6, above=0, at_most=1)
    """Added to the mean square under the root of every RMSNorm."""
    add_qkv_bias: bool = True
    """Projections to queries, keys and values have a bias, as in Qwen2.5."""
    untie_embeddings_and_output_weights: bool = True
    """Embeddings and output layer are two matrices; False makes them one."""
    init_method_std: float = number(0.02, above=0, at_most=1000)
    """Standard deviation of random initial weights; those that write to the residual stream get less
    (megatron_omni/models/init.py)."""
    attention_dropout: float = number(0.0, at_least=0, below=1)
    """Training only: share of the attention weights that is left out."""
    hidden_dropout: float = number(0.0, at_least=0, below=1)
    """Training only: share of what attention and FFN add to the residual stream that is left out."""
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    """null makes the model dense."""
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    """null: no pictures and no video."""
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    """null: no sound."""
    output_bias: bool = False
    """The output layer has a bias (the released speech generator)."""
    speech: SpeechConfig | None = None
    """The trunk is a speech generator: codes out of text. null: it is a language model."""
    codec: CodecConfig | None = None
    """The model is a codec and has no trunk (``task: codec``)."""
    image: ImageGeneratorConfig | None = None
    """The model draws (docs/images_out.md). null: it does not."""
    picture_codec: PictureCodecConfig | None = None
    """The model is a codec of pictures and has no trunk (``task: picture_codec``)."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model; export merges them."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Escape hatch: further fields of Megatron-Core's ``TransformerConfig``, of those that act (config/megatron_fields.py).
    Any other is refused, and the error says what acts instead."""

    @property
    def is_codec(self) -> bool:
        """Whether it is a codec, of sound or of pictures, which has no trunk and reads no text."""
        return self.codec is not None or self.picture_codec is not None
