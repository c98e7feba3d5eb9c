"""What goes over the wire: the OpenAI Images API (generations, models), with our four extensions.

Field by field after OpenAI's reference and the newest client's types; what cannot be honoured is refused with the
reason, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator
from pydantic_core import PydanticCustomError

from fewstep.serve.settings import MAX_IMAGES_PER_REQUEST

MAX_PROMPT_CHARACTERS = 32_000
#: Seeds stay below 2³²: every JSON reader keeps them exact, and all of them seed numpy and torch.
SEED_BOUND = 2**32

OutputFormat = Literal["png", "webp", "jpeg"]


def refuse(code: str, message: str) -> PydanticCustomError:
    """Return the exception by which a field validator refuses a value in our own words."""
    # Braces would be read as a template; `request_rule` tells the error body that the words are ours.
    safe = message.replace("{", "(").replace("}", ")")
    return PydanticCustomError(code, safe, {"request_rule": True})


class ImageGenerationRequest(BaseModel):
    """Body of POST /v1/images/generations. Only `prompt` is required; null means the default."""

    model_config = ConfigDict(extra="forbid", title="ImageGenerationRequest")

    prompt: StrictStr = Field(max_length=MAX_PROMPT_CHARACTERS, description="What to draw.")
    model: StrictStr | None = Field(default=None, description="An id from /v1/models; unset takes the default model.")
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES_PER_REQUEST)] | None = Field(
        default=None, description="How many pictures; 1 when unset."
    )
    size: StrictStr | None = Field(default=None, description='"WIDTHxHEIGHT", the model\'s native size, or "auto".')
    response_format: StrictStr | None = Field(default=None, description="b64_json.")
    output_format: StrictStr | None = Field(default=None, description="png (default), webp or jpeg.")
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of webp and jpeg, 0 to 100 (default 100). Not for png."
    )
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = Field(
        default=None, description="Accepted and echoed; the number of steps decides the quality."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description="Accepted, without effect.")
    background: StrictStr | None = Field(default=None, description="auto or opaque.")
    moderation: Literal["low", "auto"] | None = Field(default=None, description="Accepted, without effect.")
    user: StrictStr | None = Field(default=None, description="Accepted, never logged.")
    safety_identifier: StrictStr | None = Field(default=None, description="Accepted, never logged.")
    stream: StrictBool | None = Field(default=None, description="Only false for now.")
    partial_images: StrictInt | None = Field(default=None, description="Only 0 for now.")
    complexity: Any = Field(default=None, description="Not supported: leave out.")
    frame_count: Any = Field(default=None, description="Not supported: leave out.")
    frame_duration_ms: Any = Field(default=None, description="Not supported: leave out.")
    svg: Any = Field(default=None, description="Not supported: leave out.")
    seed: Annotated[StrictInt, Field(ge=0, lt=SEED_BOUND)] | None = Field(
        default=None, description="Seed of the first picture; picture k has seed + k. Random when unset."
    )
    num_inference_steps: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="A step count that the student was made for."
    )
    guidance_scale: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = Field(
        default=None, description="Guidance g = 1 + w, in the range that the student was trained for."
    )
    extrapolate: StrictBool | None = Field(
        default=None, description="Take a guidance_scale outside that range on purpose."
    )
    negative_prompt: Any = Field(default=None, description="Not supported: guidance is distilled into the student.")

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, value: str) -> str:
        if not value.strip():
            raise refuse("empty_prompt", "The prompt is empty: say what to draw, for example 'a red apple, twemoji'.")
        return value

    @field_validator("response_format")
    @classmethod
    def _only_b64_json(cls, value: str | None) -> str | None:
        if value not in (None, "b64_json"):
            raise refuse(
                "unsupported_value",
                f"response_format={value[:40]!r} is not supported: pictures come in the answer itself; "
                "send 'b64_json' or leave it out.",
            )
        return value

    @field_validator("output_format")
    @classmethod
    def _known_output_format(cls, value: str | None) -> str | None:
        if value not in (None, "png", "webp", "jpeg"):
            raise refuse("unsupported_value", f"output_format={value[:40]!r} is not supported: use png, webp or jpeg.")
        return value

    @field_validator("background")
    @classmethod
    def _opaque_only(cls, value: str | None) -> str | None:
        if value not in (None, "auto", "opaque"):
            raise refuse(
                "unsupported_value",
                f"background={value[:40]!r} is not supported: the models draw opaque pictures; use 'opaque' or 'auto'.",
            )
        return value

    @field_validator("stream", "partial_images")
    @classmethod
    def _no_streaming(cls, value: int | None) -> int | None:
        if value:
            raise refuse(
                "unsupported_value",
                "Streaming of partial images is not supported yet: leave out 'stream' and 'partial_images' and the "
                "finished pictures come in one answer.",
            )
        return value

    @field_validator("complexity", "frame_count", "frame_duration_ms", "svg")
    @classmethod
    def _left_out(cls, value: Any) -> None:
        if value is not None:
            raise refuse(
                "unsupported_parameter", "This field is for animations and SVG, which are not made here: leave it out."
            )

    @field_validator("negative_prompt")
    @classmethod
    def _no_negative_prompt(cls, value: Any) -> None:
        if value is not None:
            raise refuse(
                "unsupported_parameter",
                "negative_prompt has no effect on a student whose guidance is distilled: leave it out and say what "
                "you want in 'prompt'; guidance_scale sets how closely it is followed.",
            )


class ImageData(BaseModel):
    """One picture of the answer."""

    b64_json: str = Field(description="The encoded file, base64.")
    seed: int = Field(description="Send this seed with n=1 to get this picture again.")
    model: str | None = Field(
        default=None, description="id@version that drew it, only where the pictures of one answer are not all by one."
    )


class InputTokensDetails(BaseModel):
    """What the input tokens were."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """All four members always: the client takes all or nothing."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int = 0
    total_tokens: int


class ImagesResponse(BaseModel):
    """Answer of POST /v1/images/generations."""

    created: int = Field(description="Unix time, seconds.")
    data: list[ImageData]
    background: str = "opaque"
    output_format: OutputFormat
    quality: str
    size: str = Field(description='"WIDTHxHEIGHT" of every picture.')
    model: str = Field(description="Which model drew it, NAME@VERSION when it came from the registry.")
    num_inference_steps: int
    guidance_scale: float
    usage: Usage
    warnings: list[str] | None = Field(default=None, description="What the caller should know, such as a cut prompt.")


class Model(BaseModel):
    """One entry of /v1/models; the fields after owned_by are ours."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time at which the server loaded it, seconds.")
    owned_by: str = "fewstep"
    version: str | None = Field(description="Version in the registry, if it came from there.")
    size: str
    num_inference_steps: list[int] = Field(description="Step counts to choose from, the default first.")
    guidance_scale_range: tuple[float, float]
    guidance_scale_default: float


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Answer of GET /healthz when ready."""

    status: Literal["ready"] = "ready"
    models: list[str]
    waiting: list[str] | None = Field(default=None, description="Models that have no version yet, if there are any.")


class ErrorDetail(BaseModel):
    """Why a request failed."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail
