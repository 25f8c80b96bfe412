"""What the operator of a server decides: one field for each option of ``megatron-omni serve``."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of the part that speaks HTTP. Sizes are bytes, times seconds."""

    name: str
    """The model's name in requests."""
    api_keys: tuple[str, ...] = ()
    """One of them must come with every request but /, /health and /ready; none: no key is asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header, beside localhost and addresses, that are served without a key."""
    media_domains: tuple[str, ...] = ()
    """Hosts that media may be fetched from; none: data: URLs only."""
    media_separator: str = " "
    """Between a medium and a text without white space at that end: models are trained with one."""
    ignore_unknown_fields: bool = False
    max_new_tokens: int | None = None
    """Of an answer to a request that does not say; None: what the model has room for."""
    max_body_bytes: int = 32 << 20
    max_media: int = 16
    """Pictures, sounds and videos of one request."""
    max_image_bytes: int = 20 << 20
    max_clip_bytes: int = 64 << 20
    """Of one sound or video, encoded."""
    max_waiting: int = 256
    """Requests that were received and have no token yet."""
    max_waiting_bytes: int = 2 << 30
    """Of the bodies and the media of all requests that are there."""
    speaks: bool = False
    """A speaker makes sound beside the model, or alone."""
    draws: bool = False
    """A painter draws pictures beside the model."""
    builders: int = 2
    """Processes that decode media."""
    build_seconds: float = 60.0
    fetch_seconds: float = 20.0
    queue_seconds: float = 60.0
    """Until the first token."""
    request_seconds: float = 600.0
    """Until the last."""
    patience_seconds: float = 30.0
    """Until a client has sent the head of a request, has begun to send the rest, or has taken what was sent to it."""
    engine_seconds: float = 600.0
    """Without a sign of life from the engine, after which /health says 503."""
    ping_seconds: float = 15.0
    chunk_seconds: float = 0.01
    """Tokens of an answer that come within it are one chunk of its stream; the first and the last never wait."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
