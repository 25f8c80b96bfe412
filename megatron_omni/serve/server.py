"""What the paths of a server share: its settings, the engine, the builders, what waits at the door, and the metrics."""

import time
from collections.abc import Iterable

from megatron_omni.serve.builders import Builders
from megatron_omni.serve.engine_client import EngineClient
from megatron_omni.serve.errors import ApiError, server_fault, unavailable
from megatron_omni.serve.intake import Door
from megatron_omni.serve.jobs import Built, Job
from megatron_omni.serve.link import ModelFacts
from megatron_omni.serve.metrics import Metrics
from megatron_omni.serve.picture_client import PictureClient
from megatron_omni.serve.settings import Settings
from megatron_omni.serve.speech_client import SpeechClient


class Server:
    """State of the process that speaks HTTP."""

    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        metrics: Metrics,
        speech: SpeechClient | None = None,
        pictures: PictureClient | None = None,
    ) -> None:
        self.settings, self.engine, self.metrics, self.speech = settings, engine, metrics, speech
        self.pictures = pictures
        self.builders: Builders | None = None
        self.door = Door(settings, metrics)

    @property
    def facts(self) -> ModelFacts:
        """Of the model; it has been opened."""
        assert self.engine.facts is not None
        return self.engine.facts

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        helpers = [helper for helper in (self.speech, self.pictures) if helper is not None]
        if not self.engine.ready or self.engine.draining or any(helper.ready is None for helper in helpers):
            return False
        return self.builders is not None or self.only_speaks

    @property
    def only_speaks(self) -> bool:
        """Whether there is a speaker and no model beside it."""
        return "text" not in self.facts.output_modalities

    @property
    def output_modalities(self) -> tuple[str, ...]:
        """What answers are made of."""
        spoken = ("audio",) if self.speech is not None and not self.only_speaks else ()
        drawn = ("image",) if self.pictures is not None else ()
        return (*self.facts.output_modalities, *drawn, *spoken)

    @property
    def alive(self) -> bool:
        """Whether the engine has given a sign of life lately."""
        return self.engine.failed is None and time.monotonic() - self.engine.last_sign < self.settings.engine_seconds

    def check_takes_requests(self) -> None:
        """ApiError 503 while the model is loaded and while the server stops, 500 when the engine has ended."""
        if self.engine.failed is not None:
            raise server_fault(self.engine.failed, code="engine_dead")
        if self.engine.draining:
            raise unavailable("the server is stopping", code="shutting_down")
        if not self.ready:
            raise unavailable("the model is being loaded", code="loading")

    def check_model(self, name: str, *also: str) -> None:
        """ApiError 404 for another model than the one that is served, and those that are one here ``also``."""
        if name not in (self.facts.name, *also):
            raise ApiError(404, f"no model {name[:100]!r} here: this server has {self.facts.name!r}", param="model",
                           code="model_not_found")  # fmt: skip

    async def build(self, job: Job) -> tuple[Built, bytes]:
        """A job done by a builder."""
        assert self.builders is not None
        start = time.monotonic()
        built, request = await self.builders.build(job)
        self.metrics.building.observe(time.monotonic() - start)
        for kind, seconds in built.decoding:
            self.metrics.decoding.labels(kind).observe(seconds)
        return built, request

    def count_prompts(self, prompts: Iterable[Built]) -> None:
        """Tell the metrics what was asked."""
        for prompt in prompts:
            for modality, tokens in prompt.tokens.items():
                self.metrics.prompt_tokens.labels(modality).inc(tokens)
