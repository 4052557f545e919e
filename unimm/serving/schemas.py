"""Bodies of the requests. Fields of OpenAI's that mean nothing here are accepted, ignored and logged."""

import logging
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from unimm.sampling import SamplingOptions

logger = logging.getLogger(__name__)

_MOST_SEED = 2**63 - 1

Name = Annotated[str, StringConstraints(max_length=256)]
Seed = Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TopK = Annotated[int, Field(ge=-1, le=1_000_000)]


class Body(BaseModel):
    """A request's body; unknown fields are kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Name | None = None

    def log_ignored(self) -> None:
        """Log the names of fields that are ignored."""
        if self.model_extra:
            names = ", ".join(sorted(repr(name)[:60] for name in list(self.model_extra)[:20]))
            logger.info("ignored fields of a request: %s", names)


class Sampling(BaseModel):
    """Settings of sampling, of text and of images."""

    temperature: Number | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    seed: Seed | None = None


if TYPE_CHECKING:
    _ImageSampling = Sampling
else:  # every setting of `ImageSampling`, but the scale of an edited image, which is the checkpoint's
    _ImageSampling = create_model(
        "_ImageSampling",
        __base__=Sampling,
        **{
            name: (hint, None)
            for name, hint in get_type_hints(SamplingOptions).items()
            if name not in (*Sampling.model_fields, "image_guidance_scale")
        },
    )


class Drawing(_ImageSampling):
    """Settings of drawing: those of `ImageSampling`, of which some have narrower limits here, and a negative prompt."""

    guidance_scale: Number | None = None
    negative_prompt: str | None = None


class ImageURL(BaseModel):
    """The address of an image: a data URL, or of an allowed host."""

    url: str


class TextPart(BaseModel):
    """A text of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ImagePart(BaseModel):
    """An image of a message."""

    type: Literal["image_url", "input_image"]
    image_url: ImageURL | str

    @property
    def url(self) -> str:
        """Return the image's address."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """A turn of a conversation; `images` are those that the server drew in it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    images: list[ImagePart] | None = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatBody(Body, Drawing):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Count | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    modalities: list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ImageBody(Body, Drawing):
    """POST /v1/images/generations; /v1/images/edits has the same fields in a form."""

    prompt: str
    n: Count | None = None
    size: str | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None


class Mask(BaseModel):
    """The mask of an edit: a data URL."""

    image_url: str


class ImageTool(BaseModel):
    """The tool image_generation of POST /v1/responses."""

    model_config = ConfigDict(extra="allow")

    type: Literal["image_generation"]
    size: str | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    action: Literal["generate", "edit", "auto"] | None = None
    input_image_mask: Mask | None = None


class OtherTool(BaseModel):
    """A tool that this server does not have; it is ignored."""

    model_config = ConfigDict(extra="allow")

    type: str


class MessageItem(BaseModel):
    """A turn in the input of POST /v1/responses."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class DrawnItem(BaseModel):
    """An image that an earlier response drew, sent back."""

    type: Literal["image_generation_call"]
    result: str | None = None


class ResponsesBody(Body, Drawing):
    """POST /v1/responses."""

    input: str | Annotated[list[DrawnItem | MessageItem], Field(min_length=1, max_length=1000)]
    instructions: str | None = None
    stream: bool | None = None
    tools: list[ImageTool | OtherTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_output_tokens: Count | None = None
    previous_response_id: str | None = None

    @property
    def image_tool(self) -> ImageTool | None:
        """Return the tool that draws, unless the request forbids it."""
        if self.tool_choice == "none":
            return None
        return next((tool for tool in self.tools or () if isinstance(tool, ImageTool)), None)
