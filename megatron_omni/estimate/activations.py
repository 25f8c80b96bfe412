"""Bytes that autograd keeps of one micro-batch on one rank until its backward: counted tensor by tensor from the code.

Every tensor saved for a gradient counts once, weights do not. A part that is not trained keeps nothing for its weights'
gradients; a frozen encoder keeps nothing at all. With recomputation a layer keeps its input alone. What the backward of
a layer needs on top while it runs is ``working_bytes``.

The count is that of the plain path (own RMSNorm, Megatron's linear layers, ``model.moe.kernels: omni``), held within 5 %
of ``torch.autograd.graph.saved_tensors_hooks`` by tests/distributed/test_plan.py; Transformer Engine's norms keep less
(no fp32 copy of their input). Dropout, off in every recipe, is not counted.

Of a micro-batch's tiles and chunks a rank computes its share, ceil(N / (TP x CP)), and gathers the rows of all. Under
context parallelism it has 1 / CP of the tokens and, as is expected of them, of the labels; in attention the keys and values
of all.

T tokens of the micro-batch on this rank, t = T / TP of its sequence shard, H hidden, w bytes of an activation, A rows that
this rank sends to experts (mean k times t), R rows that its own experts get (A times the imbalance).
"""

from dataclasses import dataclass
from math import ceil

from megatron_omni.config.model import AudioConfig, VisionConfig
from megatron_omni.config.parallel import LOGITS_CHUNK, stage_blocks
from megatron_omni.config.parts import NEW_TOKEN_ROWS, frozen_matrices, trained_parts
from megatron_omni.config.run import Recipe
from megatron_omni.estimate.memory import element_bytes
from megatron_omni.estimate.parameters import AUDIO_POSITIONS_PER_SECOND, padded_vocab_size
from megatron_omni.estimate.pictures import picture_bytes, trunk_learns

FP32, INDEX = 4, 8
"""Bytes of an fp32 value and of an int64 index."""
LEAST_OFFLOADED = 2**20
"""Megatron's ``min_offloaded_tensor_size``, elements."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What a micro-batch holds, as far as memory and time depend on it."""

    rows: int = 1
    length: int
    """Tokens of a sequence, padding included."""
    label_tokens: float
    tiles: float = 0.0
    chunks: float = 0.0
    lengths: tuple[int, ...] = ()
    """Tokens of each sample; empty: one sample fills each sequence."""
    mean_k: float = 0.0
    """Real experts per token."""
    imbalance: float = 1.0
    """Rows that the fullest rank's experts get, over the mean."""
    prefix_share: float = 0.0
    """Of a sample's tokens, those that all see each other (a speech generator's condition)."""
    pictures: float = 0.0
    """Drawn ones, each of the largest size and with a source."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def mean_length(self) -> float:
        """Tokens of a sample."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else self.length

    @property
    def pairs(self) -> float:
        """(query, key) pairs of attention: l (l + 1) / 2 of a sample of l tokens, and c (c - 1) / 2 more where c of them see
        each other."""
        lengths = self.lengths or self.rows * (self.length,)
        seen = [length * self.prefix_share for length in lengths]
        return sum(n * (n + 1) / 2 + max(0.0, c * (c - 1) / 2) for n, c in zip(lengths, seen, strict=True))


class Activations:
    """Byte counts of ``recipe`` on a rank, for micro-batches like ``batch``."""

    def __init__(self, recipe: Recipe, batch: MicroBatch) -> None:
        self.recipe, self.batch = recipe, batch
        self.model, self.parallel = recipe.model, recipe.parallel
        self.w = element_bytes(recipe)
        self.trained = trained_parts(recipe)
        if NEW_TOKEN_ROWS in self.trained:
            self.trained |= frozen_matrices(recipe)  # their rows keep what the whole matrix would
        self.learns = trunk_learns(recipe)
        self.replays = recipe.parallel.recompute == "full"
        self.tp = recipe.parallel.tensor_model_parallel_size
        self.cp = recipe.parallel.context_parallel_size
        self.tokens, self.labels = batch.tokens / self.cp, batch.label_tokens / self.cp
        self.shard = self.tokens / self.tp
        self.tiles, self.chunks = self._share(batch.tiles), self._share(batch.chunks)
        self.sent_rows = batch.mean_k * self.shard
        self.received_rows = self.sent_rows * batch.imbalance * recipe.parallel.expert_tensor_parallel_size

    def _share(self, inputs: float) -> float:
        """Of so many inputs of an encoder, those that the fullest of the ranks that share them computes."""
        ranks = self.tp * self.cp
        return inputs if ranks == 1 else ceil(inputs / ranks)

    def stage(self, stage: int) -> float:
        """Bytes kept by pipeline ``stage`` of one micro-batch, recomputation taken into account."""
        stages = self.parallel.pipeline_model_parallel_size
        if not self.learns:
            return self.drawing() if stage == stages - 1 else 0.0
        blocks = stage_blocks(self.parallel, self.model.num_layers)[stage]
        total = blocks * (self.layer(moe=False) + self.layer(moe=True))
        total -= max(0, blocks - 1) * self.offloaded()  # the last block's stays, since its backward comes at once
        if stage == 0:
            total += self.embedding() + self.vision() + self.audio()
        if stage == stages - 1:
            total += self.norm() + self.head() + self.drawing()
        return total

    def drawing(self) -> float:
        """Projectors and generator on the micro-batch's pictures (estimate/pictures.py)."""
        return self.batch.pictures * picture_bytes(self.recipe, self.trained, element=self.w)

    def layer(self, *, moe: bool) -> float:
        """Bytes kept by an attention layer or, with ``moe``, by the feed-forward layer that follows it.

        ``recompute: full`` replays both together, from the input of the attention layer.
        """
        if self.replays and moe:
            return 0.0
        if self.replays or (self.parallel.recompute == "moe" and moe and self.model.moe is not None):
            return self.shard * self.model.hidden_size * self.w
        return self.feed_forward() if moe else self.attention()

    def norm(self) -> float:
        """RMSNorm: fp32 copy of the input, reciprocal norm, normalised values for its weight."""
        width = self.model.hidden_size
        return self.shard * (width * FP32 + FP32 + ("norms" in self.trained) * width * self.w)

    def attention(self) -> float:
        """Norm, its output, cos and sin of queries and keys, rotated query and key, value, output and its log-sum.

        The value is a view of the joint projection, and the output what the next matrix reads; with several rows they
        are put in order of the [rows, length] grid, so the value is kept alone and the output twice. Under context parallelism
        rotated key and value are gathered, and what is gathered is kept alone.
        """
        model, tp = self.model, self.tp
        head = model.kv_channels
        query = model.num_attention_heads * head // tp
        key = model.num_query_groups * head // tp
        several = self.batch.rows > 1
        keys = key + (key if several else query + 2 * key) if self.cp == 1 else 2 * key * self.cp
        kept = 4 * head + query + keys + query * (1 + several)
        projection_input = ("attention" in self.trained) * self.shard * model.hidden_size
        return (
            self.norm()
            + (self.tokens * kept + projection_input) * self.w
            + self.tokens * model.num_attention_heads / tp * FP32
            + self._adapters(
                "attention", self.shard * model.hidden_size + self.tokens * query, self.tokens + self.shard
            )
        )

    def offloaded(self) -> float:
        """Of :meth:`attention`, what waits in main memory: tensors of at least ``LEAST_OFFLOADED`` elements.

        The output of the product is what the next matrix reads, so it stays unless that offloads it, too.
        """
        model, tp, modules = self.model, self.tp, self.parallel.offload_modules
        query = self.tokens * model.num_attention_heads * model.kv_channels / tp
        key = self.tokens * model.num_query_groups * model.kv_channels / tp * self.cp
        hidden, w = self.shard * model.hidden_size, self.w
        kept = {
            "attn_norm": [(hidden, FP32), (hidden * ("norms" in self.trained), w)],
            "qkv_linear": [(hidden * ("attention" in self.trained), w)],
            "core_attn": [(query, w), (key, w), (key, w)],
            "attn_proj": [(query, w)],
        }
        sizes = (size for module in modules for size in kept[module])
        return sum(elements * size for elements, size in sizes if elements >= LEAST_OFFLOADED)

    def feed_forward(self) -> float:
        """Norm and dense FFN, or MoE."""
        if self.model.moe is not None:
            return self.norm() + self.moe()
        width = self.model.ffn_hidden_size // self.tp
        ffn = "ffn" in self.trained
        inner = 4 + ffn  # gate and up, silu(gate), a copy of up, and their product
        return self.norm() + (ffn * self.shard * self.model.hidden_size + self.tokens * inner * width) * self.w

    def moe(self) -> float:
        """Router, permutation, rows and pre-activations of the experts, rows back, shared experts."""
        moe, width, w, t = self.model.moe, self.model.hidden_size, self.w, self.shard
        assert moe is not None
        gate, shared = "gate" in self.trained, "shared_experts" in self.trained
        wide = FP32 if moe.fp32_gate else w
        jitter = moe.input_jitter > 0
        copies = gate and (jitter or wide != w)  # otherwise the gate's input is the layer's
        slots, num_shared = moe.num_routed_experts + moe.num_null_experts, moe.num_shared_experts
        router = t * width * wide * (jitter + copies)
        # Weights, scale and selection softmax; two masks; shared weights; the token's weight in the auxiliary loss.
        router += t * (slots * (3 * FP32 + 2) + num_shared * FP32 + FP32)
        if wide != w:
            router += (slots + num_shared) * width * wide  # the gate itself, converted
        sent, received = self.sent_rows, self.received_rows
        if moe.moe_token_dispatcher_type == "allgather":
            sent = received
        indices = sent * 3 * INDEX + t * INDEX  # tokens, experts, the way back; where each token's begin
        ranks = self.parallel.expert_model_parallel_size * self.parallel.expert_tensor_parallel_size
        regrouped = moe.moe_token_dispatcher_type == "alltoall" and ranks > 1
        if regrouped and moe.num_routed_experts > self.parallel.expert_model_parallel_size:
            indices += received * 2 * INDEX
        weights = sent * FP32 * (2 if moe.gradient_estimator == "paper" else 1)
        ffn = moe.moe_ffn_hidden_size // self.parallel.expert_tensor_parallel_size
        rows = received * (width + 2 * ffn) * w + sent * width * w
        if self.model.lora is not None and "experts" in self.model.lora.targets:
            rows += received * 2 * ffn * w  # silu(gate) and the product, which the fused MLP does not keep
        total = router + indices + weights + rows + self._adapters("experts", received * (width + ffn), 2 * received)
        if num_shared:
            hidden = num_shared * moe.moe_shared_expert_intermediate_size
            total += t * (4 + shared) * hidden * w  # gate and up, silu(gate), product, weighted product
        if shared or (gate and not copies):
            total += t * width * w
        return total

    def _adapters(self, target: str, inputs: float, narrow_rows: float) -> float:
        """LoRA on ``target``: its inputs after dropout with their masks, and the narrow results."""
        lora = self.model.lora
        if lora is None or target not in lora.targets:
            return 0.0
        return (2 * inputs * (lora.dropout > 0) + narrow_rows * lora.rank) * self.w

    def embedding(self) -> float:
        """Token ids; where the first layer keeps its input as it is, the other shards too, of which it is a view; a speech
        generator's rows of text and which tokens they are."""
        whole = self.tp > 1 and (self.replays or self.w == FP32)
        others = whole * (self.tokens - self.shard) * self.model.hidden_size * self.w
        if (speech := self.model.speech) is not None:
            others += self.tokens * (1 + ("text_projection" in self.trained) * speech.text_hidden_size * self.w)
        return ("embeddings" in self.trained) * self.tokens * INDEX + others

    def head(self) -> float:
        """Labelled rows, targets, masks and, of one chunk of logits, the log-probabilities: the output layer and its loss."""
        labels, rows = self.labels, self.labels * self.model.hidden_size * self.w
        total = labels * INDEX + 2 * self.tokens
        if self.chunked_logits:
            return total + rows
        total += labels * (padded_vocab_size(self.model) // self.tp) * FP32 + (self.tp > 1) * labels
        return total + ("output" in self.trained) * rows

    @property
    def chunked_logits(self) -> bool:
        """Whether the logits are more than a chunk, so that the backward makes them again."""
        return self.labels * (padded_vocab_size(self.model) // self.tp) > LOGITS_CHUNK

    def media(self) -> float:
        """Pixels and log-mels of the micro-batch, and of the next, which arrive meanwhile (parallel/sharing.py)."""
        total = 0.0
        if (vision := self.model.vision) is not None:
            total += self.batch.tiles * 3 * vision.image_size**2
        if (audio := self.model.audio) is not None:
            frames = audio.chunk_seconds * 2 * AUDIO_POSITIONS_PER_SECOND
            total += self.batch.chunks * audio.num_mel_bins * frames * self.w
        return 2 * total

    def vision(self) -> float:
        """SigLIP layers where they are trained, projector, rows and their places."""
        config = self.model.vision
        if config is None:
            return 0.0
        patches = self.tiles * (config.image_size // config.patch_size) ** 2
        out = self.model.hidden_size
        rows = config.pooled_side**2
        trains_tower, trains_projector = "vision" in self.trained, "projectors" in self.trained
        if not trains_tower and not trains_projector:
            return 0.0
        total = self._tower(config, patches) if trains_tower else 0.0
        # Both sides of GELU, of which the second is the pooling's input; inputs of the two matrices.
        total += patches * (2 * out + trains_projector * config.hidden_size) * self.w
        total += self.tiles * rows * trains_projector * out * self.w
        return total + self._placed(self.batch.tiles, self.tiles, rows)

    def _placed(self, inputs: float, share: float, rows: int) -> float:
        """Rows of all inputs, ``rows`` of each, with what fills up the ranks' shares, and their places."""
        return share * self.tp * self.cp * rows * self.model.hidden_size * self.w + inputs * rows * INDEX

    def _tower(self, config: VisionConfig, patches: float) -> float:
        pixels = self.tiles * 3 * config.image_size**2 * self.w
        layer = patches * config.hidden_size * self.w if self.replays else self.siglip_layer(config, patches)
        return pixels + config.num_layers * layer

    def siglip_layer(self, config: VisionConfig, patches: float) -> float:
        """Two norms (input, mean, scale), their outputs, query, key, value, attention output, both sides of GELU."""
        values = 8 * config.hidden_size + 2 * config.ffn_hidden_size + 4
        return patches * (values * self.w + config.num_attention_heads * FP32)

    def audio(self) -> float:
        """Whisper's encoder where it is trained, Q-former, projector, rows and their places."""
        config = self.model.audio
        if config is None:
            return 0.0
        trains_tower, trains_queries = "audio" in self.trained, "projectors" in self.trained
        if not trains_tower and not trains_queries:
            return 0.0
        width, chunks = config.hidden_size, self.chunks
        frames = chunks * int(config.chunk_seconds * AUDIO_POSITIONS_PER_SECOND)
        queries = chunks * config.num_query_tokens
        total = 0.0
        if trains_tower:
            total += frames * self.w * (2 * config.num_mel_bins + 5 * width + width + 2)  # convolutions, last norm
            total += config.num_encoder_layers * (
                frames * width * self.w if self.replays else self.whisper_layer(config, frames)
            )
        total += config.num_decoder_layers * (
            queries * width * self.w if self.replays else self.qformer_layer(config, frames, queries)
        )
        total += (trains_queries * frames * width + queries * (2 * width + 2)) * self.w
        return total + self._placed(self.batch.chunks, chunks, config.num_query_tokens)

    def whisper_layer(self, config: AudioConfig, frames: float) -> float:
        """As SigLIP's, and the attention output once more for the projection."""
        values = 9 * config.hidden_size + 2 * config.ffn_hidden_size + 4
        return frames * (values * self.w + config.num_attention_heads * FP32)

    def qformer_layer(self, config: AudioConfig, frames: float, queries: float) -> float:
        """Self-attention and cross-attention of the queries; keys and values of every frame."""
        values = 14 * config.hidden_size + 2 * config.ffn_hidden_size + 6
        kept = queries * (values * self.w + 2 * config.num_attention_heads * FP32)
        return kept + frames * 2 * config.hidden_size * self.w
