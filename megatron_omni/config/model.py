"""Shape of the model: Qwen2.5 language trunk, dynamic-capacity MoE, SigLIP vision, Whisper audio (spec: docs/model.md).

Plain dataclasses: no torch and no megatron here, so that ``--help`` and ``tools/plan.py`` answer at once.
Field names are Megatron-Core's (``hidden_size``, ``ffn_hidden_size``, ``num_query_groups``, ...) wherever Megatron has one.
The defaults are the full Uni-MoE-2.0-Omni on Qwen2.5-7B; ``recipes/tiny/`` overrides the sizes and nothing else.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class MoEConfig:
    """Dynamic-capacity MoE (paper section 2.3.2, Algorithm 1): routed + null + shared experts behind one gate."""

    num_routed_experts: int = 4
    """Real routed experts; each is a SwiGLU MLP of width ``moe_ffn_hidden_size``."""
    num_null_experts: int = 1
    """Gate columns that stand for "no expert": they take part in Top-P and cost nothing."""
    num_shared_experts: int = 2
    """Experts that every token uses, weighted per token by the same masked softmax."""
    moe_ffn_hidden_size: int = 18944
    moe_shared_expert_intermediate_size: int = 2368
    """Width of each shared expert (an eighth of a routed one in the paper)."""
    top_p: float = 0.7
    """Smallest set of dynamic slots whose summed probability reaches this, in (0, 1]."""
    top_k: int | None = None
    """Fixed number of dynamic slots per token instead of Top-P."""
    routing_weight_mode: Literal["masked_softmax", "release"] = "masked_softmax"
    """``masked_softmax``: Algorithm 1. ``release``: what the authors' published code computes."""
    sample_experts: bool = True
    """Training draws slots without replacement (Gumbel order) instead of taking the sorted ones."""
    gradient_estimator: Literal["paper", "grin", "none"] = "paper"
    max_routed: int | None = None
    """Cap on real experts per token; None leaves the count to the rule."""
    fp32_gate: bool = True
    """Gate in fp32, in training and evaluation alike."""
    input_jitter: float = 0.01
    """Training only: the gate's input is multiplied by U(1 - x, 1 + x), element by element; 0 switches it off."""
    router_jitter_eps: float = 0.01
    """Near-tie threshold of ``release`` mode (2 eps relative)."""
    moe_aux_loss_coeff: float = 0.025
    moe_aux_loss_coeff_min: float = 0.001
    moe_aux_loss_decay_iters: int = 10_000
    """Optimizer steps over which the coefficient falls linearly to its minimum."""
    aux_loss_probs: Literal["selected", "full"] = "selected"
    """Softmax of the auxiliary loss over the selected slots (published code) or over all dynamic slots (Switch)."""
    aux_loss_counts_null: bool = True
    aux_loss_label_weight: float = 10.0
    """Weight of tokens that carry a label, against 1 for other real tokens."""
    capacity_factor: float | None = None
    """Training only: cap per real expert, keeping the tokens of largest logit; None is dropless."""
    min_capacity: int = 8
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    kernels: Literal["omni", "torch", "te", "megatron"] = "omni"
    """What moves rows and multiplies experts, on the same weights and checkpoints (docs/kernels.md): ours, plain PyTorch,
    Transformer Engine's grouped linear, megatron-core's functions expert by expert. Free to change on resume."""


UPCYCLED_SHAPE = (
    "num_null_experts", "num_shared_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip
"""What a recipe decides about a mixture that is made of dense weights; the rest follows from those."""


@dataclass(kw_only=True)
class VisionConfig:
    """SigLIP tower, MLP projector and 2D pooling (spec section 4). One tile is ``image_size`` square."""

    image_size: int = 384
    """Side of a tile in pixels (the paper's patch p)."""
    patch_size: int = 14
    stem: Literal["patch", "conv"] = "patch"
    """``conv``: patches are embedded by log2(patch_size) convolutions of stride 2 instead of one matrix (training from
    scratch; SigLIP's weights do not fit)."""
    hidden_size: int = 1152
    ffn_hidden_size: int = 4304
    num_layers: int = 26
    """Layers kept: the released model drops the last of so400m's 27, and its post-layernorm."""
    num_attention_heads: int = 16
    pooled_side: int = 12
    """s: every tile becomes s x s tokens (the paper's T = s^2)."""
    max_tiles_per_side: int = 6
    """Any-resolution candidates are (1x1) .. (n x n) tiles."""


@dataclass(kw_only=True)
class AudioConfig:
    """Whisper encoder, Whisper decoder as Q-former, linear projector (spec section 5)."""

    num_mel_bins: int = 128
    chunk_seconds: float = 30.0
    """One encoder input; the last chunk of a clip is zero-padded to it."""
    hidden_size: int = 1280
    ffn_hidden_size: int = 5120
    num_encoder_layers: int = 32
    num_decoder_layers: int = 32
    num_attention_heads: int = 20
    num_query_tokens: int = 200
    """Tokens per chunk; 20 tokens stand for 3 seconds."""
    max_target_positions: int = 448
    causal_queries: bool = True
    """Self-attention among the queries as in Hugging Face's decoder; False makes it bidirectional."""
    query_init: Literal["normal", "aligned"] = "normal"
    """``aligned``: queries start at the sinusoid of the encoder position in the middle of their span (training from scratch)."""
    max_chunks: int = 40
    """Longest clip, in chunks; a longer one is refused."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters: they alone are trained, whatever ``freeze`` says. Defaults: the authors' published fine-tuning."""

    rank: int = 8
    alpha: float = 16.0
    """The adapters' product is scaled by ``alpha / rank``."""
    dropout: float = 0.05
    """Training only: share of an adapter's input that is left out."""
    targets: list[str] = field(default_factory=lambda: ["attention", "experts"])
    """``attention``: queries, keys and values, and the output projection. ``experts``: the routed experts. Never the gate."""

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank


@dataclass(kw_only=True)
class ModelConfig:
    """Language trunk (Qwen2.5 architecture) and the parts around it."""

    num_layers: int = 28
    """Transformer blocks (attention + FFN); Megatron's hybrid pattern counts two layers for each."""
    hidden_size: int = 3584
    ffn_hidden_size: int = 18944
    """Width of the dense FFN; used where ``moe`` is null."""
    num_attention_heads: int = 28
    num_query_groups: int = 4
    kv_channels: int = 128
    vocab_size: int = 152064
    make_vocab_size_divisible_by: int = 128
    max_position_embeddings: int = 32768
    rotary_base: float = 1_000_000.0
    mrope_section: list[int] = field(default_factory=lambda: [16, 24, 24])
    """Rotary frequencies given to time, height and width; sums to ``kv_channels / 2``."""
    rope_theta_seconds: float = 2.0
    """theta of the paper: position steps per second of audio or video."""
    audio_only_1d: bool = False
    """Released weights only: a sample with audio but no picture gets plain positions 0..L-1."""
    half_even_positions: bool = False
    """Released weights only: half a position step of a frame or of sound rounds to the even one instead of up."""
    layernorm_epsilon: float = 1e-6
    add_qkv_bias: bool = True
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    """null makes the model dense."""
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model; export merges them."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Escape hatch: further ``TransformerConfig`` fields, checked against it when the model is built."""
