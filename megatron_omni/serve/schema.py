"""What a request may say: pydantic models of the bodies, strict about types and names.

A field that is not known is refused with the nearest name (``--ignore-unknown-fields`` drops it instead). A field that
OpenAI knows and this server cannot honour is refused by name: dropping it would give an answer to another question. An
empty value (null, false, [], {}) asks for nothing and is allowed. Types are strict: "0.5" is no number.

``parse(Model, body)`` gives the model, or an ApiError of status 400 whose ``param`` is the path of the field.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from megatron_omni.serve.errors import ApiError, bad_request
from megatron_omni.serve.picture_schema import PictureFields
from megatron_omni.serve.speech_link import SoundFormat
from megatron_omni.serve.strict import Model as Model
from megatron_omni.serve.strict import refuse

MOST_ERRORS = 5
"""Named in one message."""
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_CHOICES = 8
MOST_TOP_LOGPROBS = 20
LONGEST_NAME, LONGEST_STYLE, LONGEST_INPUT = 200, 4096, 65_536
"""Characters of a voice's name, of its description, and of a text to be spoken."""


# ------------------------------------------------------------------------------------------------ messages


class TextPart(Model):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Model):
    """Where a picture is."""

    url: str
    detail: Literal["auto"] = "auto"
    """Of OpenAI's; the number of tiles follows from the size of the picture."""


class ImagePart(Model):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Model):
    """Sound in base64."""

    data: str
    format: str = Field(default="wav", max_length=16)
    """For the reader's information: what the bytes are is read from them."""


class InputAudioPart(Model):
    """Sound, as OpenAI writes it."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class MediaUrl(Model):
    """Where sound or a video is."""

    url: str


class AudioPart(Model):
    """Sound by URL, as vLLM writes it."""

    type: Literal["audio_url"]
    audio_url: MediaUrl


class VideoPart(Model):
    """A video, as vLLM writes it."""

    type: Literal["video_url"]
    video_url: MediaUrl


Part = Annotated[TextPart | ImagePart | InputAudioPart | AudioPart | VideoPart, Field(discriminator="type")]


def _form(value: Any) -> str:
    """Which of several forms a value has: complaints are then about that one alone."""
    if isinstance(value, list):
        first = value[0] if value else None
        return "<ids>" if isinstance(first, int) else "<lists>" if isinstance(first, list) else "<list>"
    return "<text>"


_Text = Annotated[str, Tag("<text>")]
_FORM = Discriminator(_form)
TextOrParts = Annotated[_Text | Annotated[list[TextPart], Tag("<list>")], _FORM]
TextOrMedia = Annotated[_Text | Annotated[list[Part], Tag("<list>")], _FORM]
TextOrTexts = Annotated[_Text | Annotated[list[str], Tag("<list>")], _FORM]
TextsOrIds = Annotated[
    _Text
    | Annotated[list[str], Tag("<list>")]
    | Annotated[list[int], Tag("<ids>")]
    | Annotated[list[list[int]], Tag("<lists>")],
    _FORM,
]


class SystemMessage(Model):
    """Instructions; they come first."""

    role: Literal["system", "developer"]
    content: TextOrParts
    name: str | None = None


class UserMessage(Model):
    """A question."""

    role: Literal["user"]
    content: TextOrMedia
    name: str | None = None


_NOTHING_STORED = "the server stores nothing: send the text"
_NO_TOOLS = "write what tools said into user turns"


class AssistantMessage(Model):
    """An earlier answer. Its thoughts and drawings, which clients send back, are not part of the conversation."""

    refused: ClassVar[Mapping[str, str]] = {
        "audio": _NOTHING_STORED,
        "tool_calls": _NO_TOOLS,
        "function_call": _NO_TOOLS,
        "refusal": "leave it out",
    }

    role: Literal["assistant"]
    content: TextOrParts
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    images: list[Any] | None = None
    annotations: list[Any] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]

# ------------------------------------------------------------------------------------------------ requests


class StreamOptions(Model):
    """What a stream says besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Of OpenAI's; nothing is added either way."""


class _Generation(Model):
    """What both kinds of completion take."""

    model: str = Field(max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=1 << 31)
    """0 and -1: no limit."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: TextOrTexts | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=64)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    user: str | None = None
    """Names the client's user; nothing depends on it."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for stop in self.stops:
            if not 1 <= len(stop) <= LONGEST_STOP:
                refuse("stop", f"each string needs 1 to {LONGEST_STOP} characters, one has {len(stop)}")
        if len(self.stops) > MOST_STOPS:
            refuse("stop", f"{len(self.stops)} strings, at most {MOST_STOPS} are taken")
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", 'means nothing without "stream": true')
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            refuse("min_tokens", f"is {self.min_tokens}, above the {self.max_new_tokens} tokens that may be made")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def max_new_tokens(self) -> int | None:
        """Most tokens of an answer, None where the request does not say."""
        return self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Log-probabilities that are asked for besides the chosen token's; None for none at all."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


_NO_GRAMMAR = "answers are not constrained here: ask for the form in the prompt and check the answer"
_UNSUPPORTED = "leave it out"


class ChatAudio(Model):
    """How an answer is to sound."""

    voice: str = Field(min_length=1, max_length=LONGEST_NAME)
    format: Literal["wav", "pcm16", "flac", "opus", "mp3", "aac"]

    @property
    def sound_format(self) -> SoundFormat:
        """By the name that /v1/audio/speech has for it."""
        return "pcm" if self.format == "pcm16" else self.format


class ResponseFormat(Model):
    """Free text; others are refused."""

    type: Literal["text"]


class TemplateSettings(Model):
    """Settings of the chat template, as vLLM and SGLang take them."""

    enable_thinking: bool | None = None
    """Ask for a thought before the answer (true), or begin the answer behind an empty one (false)."""


class ChatRequest(_Generation):
    """Body of ``POST /v1/chat/completions``."""

    refused: ClassVar[Mapping[str, str]] = {
        "tools": _NO_TOOLS, "tool_choice": _NO_TOOLS, "parallel_tool_calls": _NO_TOOLS, "functions": _NO_TOOLS,
        "function_call": _NO_TOOLS, "logit_bias": _UNSUPPORTED, "prediction": _UNSUPPORTED, "store": _NOTHING_STORED,
        "web_search_options": _UNSUPPORTED, "reasoning_effort": _UNSUPPORTED, "verbosity": _UNSUPPORTED,
        "guided_json": _NO_GRAMMAR, "guided_regex": _NO_GRAMMAR, "guided_choice": _NO_GRAMMAR,
        "structured_outputs": _NO_GRAMMAR, "mm_processor_kwargs": "the checkpoint's recipe says how media are read",
    }  # fmt: skip

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    modalities: list[str] = Field(default=["text"], min_length=1, max_length=8)
    audio: ChatAudio | None = None
    image: PictureFields = PictureFields()
    """Of pictures in the answer."""
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateSettings = TemplateSettings()
    metadata: dict[str, Any] | None = None
    """For the client's own use; nothing is kept."""
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            refuse(
                "max_tokens", f"is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}: give one"
            )
        if self.max_new_tokens == 0:
            refuse("max_tokens", "must be at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            refuse("top_logprobs", 'means nothing without "logprobs": true')
        if self.audio is not None and "audio" not in self.modalities:
            refuse("audio", 'means nothing unless modalities holds "audio"')
        if "audio" in self.modalities:
            self._check_audio()
        if "image" not in self.modalities and self.image != PictureFields() and "modalities" in self.model_fields_set:
            refuse("image", 'means nothing unless modalities holds "image"')
        if self.messages[-1].role != "user":
            refuse("messages", "the last message must be the user's: earlier answers are not continued")
        return self

    def _check_audio(self) -> None:
        if "text" not in self.modalities:
            refuse("modalities", 'must be ["text", "audio"]: a spoken answer comes with its transcript')
        if self.n > 1:
            refuse("n", "is above 1: one answer is spoken")
        if self.logprobs:
            refuse("logprobs", "are those of text: leave them out, or ask for no audio")

    @property
    def max_new_tokens(self) -> int | None:
        """Most tokens of an answer, None where the request does not say."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Log-probabilities that are asked for besides the chosen token's; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class SpeechRequest(Model):
    """Body of ``POST /v1/audio/speech``."""

    model: str = Field(max_length=256)
    input: str = Field(min_length=1, max_length=LONGEST_INPUT)
    voice: str | None = Field(default=None, min_length=1, max_length=LONGEST_NAME)
    instructions: str | None = Field(default=None, max_length=LONGEST_STYLE)
    """Describes the voice, in place of a name."""
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: float = 1.0
    stream: bool = False
    """Send sound while it is made."""
    stream_format: Literal["audio", "sse"] = "audio"
    """Of a stream: bytes, or OpenAI's events."""
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)

    @model_validator(mode="after")
    def _check_speech(self) -> Self:
        if self.speed != 1.0:
            refuse("speed", f"is {self.speed:g}; sound is made at speed 1 alone: describe the pace in instructions")
        if not self.input.strip():
            refuse("input", "is white space: write what is to be said")
        if self.voice is not None and self.style is not None and self.voice != "style":
            refuse(
                "instructions", 'stand beside a voice; the model takes one of the two: give "voice": "style" with them'
            )
        if self.style is None and self.voice in (None, "style"):
            refuse("voice", "is missing: name one of /v1/audio/voices, or describe one in instructions")
        return self

    @property
    def style(self) -> str | None:
        """What describes the voice."""
        return self.instructions if self.instructions is not None and self.instructions.strip() else None


class CompletionRequest(_Generation):
    """Body of ``POST /v1/completions``: text, or ids, to be continued; no turns."""

    refused: ClassVar[Mapping[str, str]] = {
        "suffix": "text is only continued here, not filled in", "logit_bias": _UNSUPPORTED,
        "guided_json": _NO_GRAMMAR, "guided_regex": _NO_GRAMMAR, "structured_outputs": _NO_GRAMMAR,
    }  # fmt: skip

    prompt: TextsOrIds
    max_tokens: int | None = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of not in (None, self.n):
            refuse("best_of", f"is {self.best_of} and n {self.n}: all that are made are returned, so leave it out")
        if self.max_tokens == 0 and not self.echo:
            refuse("max_tokens", 'is 0, which needs "echo": true: nothing would be returned')
        if self.echo and self.stream:
            refuse("echo", "cannot be streamed")
        if not 1 <= len(self.prompts) <= 64 or not all(self.prompts):
            refuse("prompt", "must be one to 64 texts or lists of token ids, none of them empty")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each a text or its token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if prompt and isinstance(prompt[0], int) else prompt  # type: ignore[list-item, return-value]

    @property
    def num_top_logprobs(self) -> int | None:
        """Log-probabilities that are asked for besides the chosen token's; None for none at all."""
        return self.logprobs


class TokenizeRequest(Model):
    """Body of ``POST /tokenize``: a text, or a conversation with the header of its answer."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    chat_template_kwargs: TemplateSettings = TemplateSettings()

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "give prompt or messages, one of them")
        return self


# ------------------------------------------------------------------------------------------------ reading


def parse[M: Model](model: type[M], body: object, *, ignore_unknown: bool = False) -> M:
    """The body as ``model``; ApiError 400 that names each wrong field."""
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, got {type(body).__name__}")
    try:
        return model.model_validate(body, context={"ignore_unknown": ignore_unknown})
    except ValidationError as error:
        raise _as_api_error(error) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None


def _as_api_error(error: ValidationError) -> ApiError:
    found: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        field = _path(item)
        found.setdefault(field, _said(item))
        if len(found) == MOST_ERRORS:
            break
    more = error.error_count() - len(found)
    first = next(iter(found))
    said = "; ".join(f"{field[:_PATH_SHOWN]}: {problem}" for field, problem in found.items())
    code = "unknown_field" if error.errors(include_input=False)[0]["type"] == "unknown" else None
    return bad_request(said + (f"; and {more} more" if more > 0 else ""), param=first[:_PATH_SHOWN], code=code)


_PATH_SHOWN = 120
_TAGS = {"text", "image_url", "input_audio", "audio_url", "video_url", "system", "developer", "user", "assistant"}


def _path(item: Any) -> str:
    """``messages[1].content[0].image_url.url``: pydantic's place without the names of branches that it took."""
    where: list[Any] = list(item["loc"])
    out = ""
    for i, step in enumerate(where):
        if isinstance(step, int):
            out += f"[{step}]"
        elif not step.startswith("<") and not (i and isinstance(where[i - 1], int) and step in _TAGS):
            out += f".{step}" if out else step
    at = (item.get("ctx") or {}).get("at")
    return (f"{out}.{at}" if out else at) if at else out or "body"


def _said(item: Any) -> str:
    return item["msg"] if item["type"] != "missing" else "is missing"
