"""POST /v1/chat/completions: answers, in pieces if asked, and images in the messages.

An image is drawn if `modalities` names "image", or the last message begins with "/draw "; if the message has an image,
that is edited. Drawn images are data URLs in
`message.images` and `delta.images`.
"""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from unimm.serving.images_out import ImageFormat
from unimm.serving.inputs import image_to_edit, last_prompt
from unimm.serving.jobs import DrawRequest, Finished, Piece, TextRequest
from unimm.serving.schemas import ChatBody
from unimm.serving.service import Service, Usage
from unimm.serving.streams import Answers, EventStream

DRAW = "/draw "
_END = "[DONE]"


def chat_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", summary="Answer a conversation, or draw")
    async def complete(body: ChatBody, request: Request) -> Response:
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name(body)}
        prompt = _drawing_prompt(body)
        plan: TextRequest | DrawRequest
        if prompt is not None:
            url = image_to_edit(body.messages)
            image = None if url is None else await service.reader.image(url, "to edit")
            plan = await service.draw_request(prompt, body, n=body.n, image=image)
        else:
            plan = await service.text_request(
                await service.reader.conversation(body.messages),
                body,
                n=body.n,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                stop=body.stops,
                stream=bool(body.stream),
            )
        answers = service.submit(plan)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(answers, _chunks(service, plan, answers, head, include_usage))
        results = await answers.results(request)
        choices, usage = await _choices(service, plan, results)
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": _usage(usage)})

    return router


def _drawing_prompt(body: ChatBody) -> str | None:
    """Return what to draw, or None for a conversation."""
    prompt = next((last_prompt([message]) for message in reversed(body.messages) if message.role == "user"), "")
    if prompt.startswith(DRAW):
        return prompt.removeprefix(DRAW)
    return last_prompt(body.messages) if "image" in (body.modalities or ()) else None


async def _choices(
    service: Service, plan: TextRequest | DrawRequest, results: list[Any]
) -> tuple[list[dict[str, Any]], Usage]:
    """Return the choices of an answer, and its usage."""
    if isinstance(plan, TextRequest):
        contents = [({"content": each.text}, each.finish_reason) for each in results]
        usage = service.written_usage(plan, results)
    else:
        contents = [(content, "stop") for content in await _image_contents(service, results)]
        usage = service.drawn_usage(plan)
    choices = [
        {"index": index, "message": {"role": "assistant", **content}, "finish_reason": reason, "logprobs": None}
        for index, (content, reason) in enumerate(contents)
    ]
    return choices, usage


async def _image_contents(service: Service, images: list[Any]) -> list[dict[str, Any]]:
    """Return the content of messages with one drawn image each."""
    texts = await service.encoded(images, ImageFormat())
    urls = [f"data:image/png;base64,{text}" for text in texts]
    return [{"content": "", "images": [{"type": "image_url", "image_url": {"url": url}, "index": 0}]} for url in urls]


async def _chunks(
    service: Service, plan: TextRequest | DrawRequest, answers: Answers, head: dict[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any] | str]:
    """Yield the chunks of a stream: roles, pieces or images, finish reasons, and the usage if it is wanted."""

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    for index in range(plan.n):
        yield chunk(index, {"role": "assistant", "content": ""})
    while not isinstance(event := await answers.next(), Finished):
        if isinstance(event, Piece):
            yield chunk(event.row, {"content": event.text})
    choices, usage = await _choices(service, plan, event.results)
    for choice in choices:
        if images := choice["message"].get("images"):
            yield chunk(choice["index"], {"images": images})
        yield chunk(choice["index"], {}, choice["finish_reason"])
    if include_usage:
        yield {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(usage)}
    yield _END


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.read + usage.generated
    return {"prompt_tokens": usage.read, "completion_tokens": usage.generated, "total_tokens": total}
