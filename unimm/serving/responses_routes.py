"""POST /v1/responses: text, or an image if the request has the tool image_generation. Nothing is stored."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from unimm.errors import UserError
from unimm.serving.image_routes import file_format
from unimm.serving.images_out import ImageFormat
from unimm.serving.inputs import data_of, image_to_edit, last_prompt
from unimm.serving.jobs import DrawRequest, Finished, Piece, Preview, TextRequest
from unimm.serving.schemas import DrawnItem, ImagePart, ImageTool, Message, ResponsesBody
from unimm.serving.service import Service, Usage
from unimm.serving.streams import Answers, EventStream

_SHOWN = ("instructions", "max_output_tokens", "temperature", "top_p")


def responses_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/responses", summary="Answer, or draw with the tool image_generation")
    async def respond(body: ResponsesBody, request: Request) -> Response:
        reply = _Reply(service, body, service.model_name(body))
        if body.previous_response_id is not None:
            raise UserError("This server stores no responses: send the whole conversation as input.")
        if body.image_tool is not None:
            plan: TextRequest | DrawRequest = await _drawing(service, body, body.image_tool)
        else:
            conversation = await service.reader.conversation(_messages(body))
            plan = await service.text_request(
                conversation, body, max_new_tokens=body.max_output_tokens, stream=bool(body.stream)
            )
        answers = service.submit(plan)
        if body.stream:
            return EventStream(answers, reply.events(plan, answers))
        results = await answers.results(request)
        return JSONResponse(await reply.completed(plan, results))

    return router


async def _drawing(service: Service, body: ResponsesBody, tool: ImageTool) -> DrawRequest:
    partial_images = tool.partial_images or 0
    if not body.stream:
        partial_images = 0
    messages = _messages(body)
    image = mask = None
    if tool.action != "generate" and (url := image_to_edit(messages, anywhere=tool.action == "edit")) is not None:
        image = await service.reader.image(url, "to edit")
    if tool.action == "edit" and image is None:
        raise UserError("There is no image to edit: send one.")
    if image is not None and tool.input_image_mask is not None:
        mask = await service.reader.mask(data_of(tool.input_image_mask.image_url), "of the mask")
    prompt = last_prompt(messages)
    return await service.draw_request(
        prompt, body, size=tool.size, partial_images=partial_images, image=image, mask=mask
    )


def _messages(body: ResponsesBody) -> list[Message]:
    """Return the instructions and the input as messages of a chat."""
    messages = []
    if body.instructions:
        messages.append(Message(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    for item in body.input:
        if isinstance(item, DrawnItem):
            drawn = ImagePart(type="input_image", image_url=f"data:image/png;base64,{item.result or ''}")
            messages.append(Message(role="assistant", images=[drawn]))
        else:
            messages.append(Message(role=item.role, content=item.content))
    return messages


class _Reply:
    """The response object, whole or as a stream of events."""

    def __init__(self, service: Service, body: ResponsesBody, model: str) -> None:
        self.service, self.body = service, body
        self.format = file_format(body.image_tool) if body.image_tool else ImageFormat()
        self.item_id = f"{'ig' if body.image_tool else 'msg'}_{uuid.uuid4().hex}"
        self.sequence = 0
        self.head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": time.time(),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            **{name: getattr(body, name) for name in _SHOWN},
        }

    async def completed(self, plan: TextRequest | DrawRequest, results: Sequence[Any]) -> dict[str, Any]:
        """Return the response with its output and usage."""
        if isinstance(plan, TextRequest):
            (written,) = results
            item = self._message(written.text, "completed")
            usage = self.service.written_usage(plan, results)
            cut = written.finish_reason == "length"
        else:
            (text,) = await self.service.encoded(results, self.format)
            item, cut = self._call("completed", text), False
            usage = self.service.drawn_usage(plan)
        details = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
        status = "incomplete" if cut else "completed"
        return {**self.head, "status": status, "output": [item], "usage": _usage(usage), **details}

    async def events(self, plan: TextRequest | DrawRequest, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream, the whole response last."""
        begun = {**self.head, "status": "in_progress", "output": []}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        drawing = isinstance(plan, DrawRequest)
        item = self._call("in_progress", None) if drawing else self._message(None, "in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        if drawing:
            yield self._call_event("in_progress")
            yield self._call_event("generating")
        else:
            yield self._part_event("response.content_part.added", part=_text_part(""))
        while not isinstance(event := await answers.next(), Finished):
            if isinstance(event, Piece):
                yield self._part_event("response.output_text.delta", delta=event.text, logprobs=[])
            elif isinstance(event, Preview):
                (text,) = await self.service.encoded([event.image], self.format)
                look = {"output_format": self.format.name, "size": self.service.size_name, "background": "opaque"}
                preview = {"partial_image_b64": text, "partial_image_index": event.number}
                yield self._call_event("partial_image", **preview, **look)
        response = await self.completed(plan, event.results)
        (item,) = response["output"]
        if drawing:
            yield self._call_event("completed")
        else:
            (part,) = item["content"]
            yield self._part_event("response.output_text.done", text=part["text"], logprobs=[])
            yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return event

    def _call_event(self, name: str, **fields: Any) -> dict[str, Any]:
        kind = f"response.image_generation_call.{name}"
        return self._event(kind, item_id=self.item_id, output_index=0, **fields)

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self.item_id, output_index=0, content_index=0, **fields)

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_text_part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _call(self, status: str, result: str | None) -> dict[str, Any]:
        call = {"id": self.item_id, "type": "image_generation_call", "status": status, "result": result}
        return {**call, "output_format": self.format.name, "size": self.service.size_name, "background": "opaque"}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.read + usage.generated,
    }
