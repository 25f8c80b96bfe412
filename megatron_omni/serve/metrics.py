"""What ``/metrics`` says, in Prometheus' text format: names begin with ``omni:`` and otherwise are those of vLLM's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_omni.generation.request import EngineState, StepFacts
from megatron_omni.serve.link import Happened

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.http_waiting = Gauge(
            "omni:num_requests_waiting", "Requests received that have no token yet, decoding of media included",
            registry=r,
        )  # fmt: skip
        self.running = Gauge("omni:num_requests_running", "Samples that the engine computes", registry=r)
        self.engine_waiting = Gauge("omni:num_samples_waiting", "Samples that wait for room in the cache", registry=r)
        self.cache_used = Gauge("omni:kv_cache_usage_perc", "Share of the cache that running samples hold", registry=r)
        self.prefix_kept = Gauge("omni:prefix_cache_usage_perc", "Share kept for prompts to come", registry=r)
        self.bytes_waiting = Gauge("omni:media_bytes_waiting", "Bytes of bodies and prompts in memory", registry=r)
        self.set_back = Counter("omni:num_preemptions", "Samples set back for want of cache", registry=r)
        self.prompt_tokens = Counter("omni:prompt_tokens", "Tokens of prompts", ["modality"], registry=r)
        self.prefix_hits = Counter("omni:prefix_cache_hits", "Prompt tokens found in the prefix cache", registry=r)
        self.prefix_queries = Counter("omni:prefix_cache_queries", "Prompt tokens looked up in it", registry=r)
        self.generated = Counter("omni:generation_tokens", "Tokens of answers", registry=r)
        self.started = Counter("omni:request_started", "Requests handed to the engine", registry=r)
        self.succeeded = Counter("omni:request_success", "Answers that ended", ["finish_reason"], registry=r)
        self.errors = Counter("omni:request_errors", "Requests that got an error", ["status"], registry=r)
        self.aborted = Counter("omni:aborts", "Requests whose client left", registry=r)
        self.paused = Counter("omni:request_pauses", "Times that a request waited for its reader", registry=r)
        self.first_token = self._seconds("time_to_first_token_seconds", "From the request to its first token")
        self.per_token = self._seconds("inter_token_latency_seconds", "Between tokens of an answer")
        self.whole = self._seconds("e2e_request_latency_seconds", "From the request to its end")
        self.in_queue = self._seconds(
            "request_queue_time_seconds", "From the request to the first step that computes it"
        )
        self.building = self._seconds("prompt_build_seconds", "Waiting for a builder, decoding, tokenizing")
        self.decoding = self._seconds("media_decode_seconds", "Decoding one medium", "kind")
        self.encoding = self._seconds("encoder_seconds", "One run of an encoder, media of several requests", "kind")
        self.step = self._seconds(
            "step_seconds", "One step of the engine; prompt: it computed parts of prompts", "phase"
        )
        self.painting = self._seconds("picture_seconds", "From a block of an answer to its picture")
        self.batch_tokens = Histogram(
            "omni:batch_tokens", "Tokens of a step of a replica", buckets=[1 << i for i in range(14)], registry=r
        )
        self.mean_k = Gauge("omni:moe_mean_k", "Real experts per token", ["layer"], registry=r)
        self.null_share = Gauge("omni:moe_null_share", "Null part of the selected slots", ["layer"], registry=r)
        self._last: EngineState | None = None

    def _seconds(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(f"omni:{name}", what, labels, buckets=_SECONDS, registry=self.registry)

    def happened(self, message: Happened) -> None:
        """A step of the engine. Its counts are totals; Prometheus' counters take what was added."""
        state, last = message.state, self._last
        self.running.set(state.running)
        self.engine_waiting.set(state.waiting)
        self.cache_used.set(state.cache_tokens / max(state.budget_tokens, 1))
        self.prefix_kept.set(state.prefix_tokens / max(state.budget_tokens, 1))
        hits = state.cached_tokens - (last.cached_tokens if last else 0)
        computed = state.prompt_tokens - (last.prompt_tokens if last else 0)
        if message.step_seconds is not None:
            self.step.labels("prompt" if computed else "decode").observe(message.step_seconds)
        for step in message.steps:
            self._computed(step)
        self.prefix_hits.inc(hits)
        self.prefix_queries.inc(hits + computed)
        self.generated.inc(state.generated_tokens - (last.generated_tokens if last else 0))
        self.set_back.inc(state.set_back - (last.set_back if last else 0))
        self._last = state

    def _computed(self, step: StepFacts) -> None:
        self.batch_tokens.observe(step.tokens)
        for kind, seconds in step.encoded:
            self.encoding.labels(kind).observe(seconds)
        for layer, (mean_k, null_share) in enumerate(step.routing):
            self.mean_k.labels(str(layer)).set(mean_k)
            self.null_share.labels(str(layer)).set(null_share)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
