"""POST /v1/images/generations and /v1/images/edits: images of a prompt, or edited by one, with previews in a stream."""

import time
from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.responses import Response

from unimm.errors import UserError
from unimm.serving.errors import APIError
from unimm.serving.images_out import ImageFormat
from unimm.serving.jobs import DrawRequest, Finished, Preview
from unimm.serving.schemas import ImageBody
from unimm.serving.service import Service
from unimm.serving.streams import Answers, EventStream

_FILES = ("image", "image[]", "mask")
MAX_FIELDS = 64  # of a form
MAX_FIELD = 1 << 17  # bytes of a field that is no file
_EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "mask": {"type": "string", "format": "binary"},
                        "prompt": {"type": "string"},
                        "model": {"type": "string"},
                        "n": {"type": "integer", "minimum": 1},
                        "size": {"type": "string"},
                        "seed": {"type": "integer"},
                        "stream": {"type": "boolean"},
                        "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
                    },
                }
            }
        },
    }
}


def image_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post("/v1/images/generations", summary="Draw images of a prompt")
    async def generate(body: ImageBody, request: Request) -> Response:
        service.model_name(body)
        check_store(service, body)
        plan = await service.draw_request(
            body.prompt, body, n=body.n, size=body.size, partial_images=_partial_images(body)
        )
        return await answer(service, plan, body, request, "image_generation")

    @router.post("/v1/images/edits", summary="Edit an image", openapi_extra=_EDIT_FORM)
    async def edit(request: Request) -> Response:
        most = service.settings.max_images + 1
        async with request.form(max_files=most, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD) as form:
            body = ImageBody.model_validate({name: value for name, value in form.items() if name not in _FILES})
            service.model_name(body)
            check_store(service, body)
            images = [await _upload(each) for name in _FILES[:2] for each in form.getlist(name)]
            mask = None if form.get("mask") in (None, "") else await _upload(form["mask"])
        if len(images) != 1:
            raise UserError(f"There are {len(images)} images and this model edits 1: upload it as the field image.")
        plan = await service.draw_request(
            body.prompt,
            body,
            n=body.n,
            size=body.size,
            partial_images=_partial_images(body),
            image=await service.reader.decoded(images[0], "to edit"),
            mask=None if mask is None else await service.reader.mask(mask, "of the mask"),
        )
        return await answer(service, plan, body, request, "image_edit")

    @router.get("/images/{name}", summary="A kept image, for response_format url")
    async def kept(name: str) -> Response:
        found = service.store.get(name)
        if found is None:
            raise APIError(404, "There is no such image, or it is not kept any more.")
        return Response(found[0], media_type=found[1])

    return router


async def _upload(field: UploadFile | str) -> bytes:
    """Return the bytes of an uploaded file."""
    if isinstance(field, str):
        raise UserError("An image to edit, and its mask, are uploaded as files of a form: these are text.")
    return await field.read()


def check_store(service: Service, body: ImageBody) -> None:
    """Raise UserError if URLs are asked for and no images are kept."""
    if body.response_format == "url" and not service.store.size:
        raise UserError("This server keeps no images, so it has no URLs: give response_format b64_json.")


def _partial_images(body: ImageBody) -> int:
    """Return the number of previews; only streams have them."""
    if body.partial_images and not body.stream:
        raise UserError(f"partial_images is {body.partial_images} and stream is off: set stream to true.")
    return body.partial_images or 0


def file_format(body: Any) -> ImageFormat:
    """Return the file format that a body or a tool asks for."""
    quality = 100 if body.output_compression is None else body.output_compression
    return ImageFormat(body.output_format or "png", quality)


async def answer(service: Service, plan: DrawRequest, body: ImageBody, request: Request, kind: str) -> Response:
    """Draw, and answer with the images or with a stream of events whose names begin with `kind`."""
    answers = service.submit(plan)
    look = {"output_format": file_format(body).name, "background": "opaque", "size": service.size_name}
    if body.stream:
        return EventStream(answers, _events(service, plan, answers, file_format(body), kind, look))
    images = await answers.results(request)
    data = await to_thread.run_sync(lambda: [_datum(service, image, body, str(request.base_url)) for image in images])
    return JSONResponse(
        {"created": int(time.time()), "data": data, **look, "seed": plan.seed, "usage": _usage(service, plan)}
    )


def _datum(service: Service, image: Any, body: ImageBody, base_url: str) -> dict[str, str]:
    """Return an image as base64 text or as a URL."""
    encoded = file_format(body)
    if body.response_format == "url":
        return {"url": f"{base_url}images/{service.store.keep(encoded.encode(image), encoded.media_type)}"}
    return {"b64_json": encoded.base64(image)}


async def _events(
    service: Service, plan: DrawRequest, answers: Answers, encoded: ImageFormat, kind: str, look: dict[str, str]
) -> AsyncIterator[dict[str, Any]]:
    """Yield the previews and the images of a stream."""
    look = {**look, "quality": "auto"}
    while not isinstance(event := await answers.next(), Finished):
        if isinstance(event, Preview):
            (text,) = await service.encoded([event.image], encoded)
            yield {
                "type": f"{kind}.partial_image",
                "b64_json": text,
                "partial_image_index": event.number,
                "created_at": int(time.time()),
                **look,
            }
    usage = _usage(service, plan)
    for text in await service.encoded(event.results, encoded):
        created = {"b64_json": text, "created_at": int(time.time()), "seed": plan.seed}
        yield {"type": f"{kind}.completed", **created, **look, "usage": usage}


def _usage(service: Service, plan: DrawRequest) -> dict[str, Any]:
    usage = service.drawn_usage(plan)
    return {
        "input_tokens": usage.read,
        "input_tokens_details": {"text_tokens": usage.read, "image_tokens": 0},
        "output_tokens": usage.generated,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": usage.generated},
        "total_tokens": usage.read + usage.generated,
    }
