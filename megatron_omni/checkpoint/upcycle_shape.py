"""The shape of a mixture that is made of dense models, and what its parts are called in the released layouts (upcycle.py).

Experts are as wide as the feed-forward part that they copy; shared ones are an eighth of it (paper Table 1). A mixture of
speech generators has routed experts alone, of which a token gets two.
"""

import dataclasses
from dataclasses import dataclass

from megatron_omni.checkpoint.names import THEIR_BLOCK
from megatron_omni.checkpoint.uni_moe import GATE, ROUTED, SHARED
from megatron_omni.checkpoint.uni_moe_speech import (
    PREFIX,
    SPEECH_BLOCK,
    SPEECH_EMBEDDING,
    SPEECH_GATE,
    SPEECH_ROUTED,
    released_moe,
)
from megatron_omni.checkpoint.upcycle_sources import SAME_FIELDS
from megatron_omni.config.model import ModelConfig, MoEConfig

SHARED_DIVISOR = 8
"""A shared expert is an eighth of a routed one (paper Table 1)."""
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the parts of a mixture are called in its released layout."""

    family: str
    block: str
    gate: str
    routed: str
    shared: str | None
    embedding: str


NAMES = {
    "uni_moe": Names(family="uni_moe", block=THEIR_BLOCK, gate=GATE, routed=ROUTED, shared=SHARED, embedding=EMBEDDING),
    "speech_gen": Names(
        family="speech_gen",
        block=PREFIX + SPEECH_BLOCK,
        gate=PREFIX + SPEECH_GATE,
        routed=PREFIX + SPEECH_ROUTED,
        shared=None,
        embedding=PREFIX + SPEECH_EMBEDDING,
    ),
}


def upcycled_model(base: ModelConfig, *, num_experts: int) -> ModelConfig:
    """The mixture's default shape on a dense ``base``: experts as wide as its feed-forward part, shared ones an eighth.

    Of a speech generator the released one: routed experts alone, two a token.
    """
    width = base.ffn_hidden_size
    if base.speech is not None:
        return dataclasses.replace(base, moe=released_moe(num_experts, width))
    shared = max(1, width // SHARED_DIVISOR)
    mixture = MoEConfig(
        num_routed_experts=num_experts, moe_ffn_hidden_size=width, moe_shared_expert_intermediate_size=shared
    )
    return dataclasses.replace(base, moe=mixture)


def check_mixture(model: ModelConfig, base: ModelConfig, *, num_experts: int) -> None:
    """ValueError unless ``model`` can be had of dense models like ``base`` by copying."""
    moe = model.moe
    if moe is None:
        raise ValueError("model.moe=null: upcycling makes a mixture of experts; leave it out")
    for name in ("vision", "audio", "speech", *SAME_FIELDS):
        if getattr(model, name) != getattr(base, name):
            raise ValueError(
                f"model.{name}={getattr(model, name)}: the sources have {getattr(base, name)}; only model.moe and settings "
                "without weights can be chosen"
            )
    if moe.num_routed_experts != num_experts:
        raise ValueError(
            f"model.moe.num_routed_experts={moe.num_routed_experts}: there are {num_experts} dense checkpoints, one for each "
            "routed expert; leave it out"
        )
    width = base.ffn_hidden_size
    if moe.moe_ffn_hidden_size != width:
        raise ValueError(
            f"model.moe.moe_ffn_hidden_size={moe.moe_ffn_hidden_size}: routed experts are the feed-forward parts as they are, "
            f"{width} wide; leave it out"
        )
    if base.speech is not None and (moe.num_null_experts or moe.num_shared_experts):
        raise ValueError(
            f"model.moe.num_null_experts={moe.num_null_experts}, num_shared_experts={moe.num_shared_experts}: a speech "
            "generator has routed experts alone; set both to 0"
        )
    shared = moe.num_shared_experts * moe.moe_shared_expert_intermediate_size
    if shared > width:
        raise ValueError(
            f"model.moe.num_shared_experts={moe.num_shared_experts} of moe_shared_expert_intermediate_size="
            f"{moe.moe_shared_expert_intermediate_size}: a feed-forward part {width} wide has no {shared} disjoint columns; "
            "choose smaller ones"
        )
