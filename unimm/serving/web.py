"""The web page, made with gradio: chat, draw, edit and reconstruct, in the server's own app and on its engine.

It loads nothing from other hosts: system fonts, no analytics, no share link. gradio comes with the extra `web`.
"""

from collections.abc import Callable
from importlib import resources
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.responses import RedirectResponse

from unimm.sampling import per_prompt_scale
from unimm.serving.security import PAGE
from unimm.serving.service import Service
from unimm.serving.web_actions import DESCRIBE, INSTRUCT, Actions, Talk, text_box
from unimm.serving.web_files import as_bytes, as_painted, own_folder, without_urls, write_examples

ABOUT = "Ask about an image, draw a new one, or change one."
SHAPES_LIMITS = (
    "This small model knows six shapes in eight colors on four plain backgrounds, at 64\u00a0×\u00a064\u00a0pixels. "
    "It cannot do photos, faces, writing or anything else."
)
OTHER_LIMITS = "The model knows what it was trained on and can be wrong: check what matters."
_SMALL = 128  # pixels: images up to here are shown with sharp pixels
_PROMPTS = ["two green squares", "a red circle on a black background", "a blue square left of a yellow ring"]
_SYSTEM = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
_ICON = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect width='9' height='9' rx='2' fill='%236366f1'/%3E"
    "%3Ccircle cx='11' cy='11' r='5' fill='%23f43f5e'/%3E%3C/svg%3E"
)
_HEAD = f'<link rel="icon" href="data:image/svg+xml,{_ICON}">'
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_EDIT_EXAMPLES = {
    INSTRUCT: "Make the yellow circle red.",
    DESCRIBE: "a blue square and a red ring on a white background",
}
_SIZES = ["1", "2", "4"]


def mount_page(app: FastAPI, *, knows_shapes: bool) -> None:
    """Put the page into the server's app at `PAGE`, and lead `/` to it.

    Args:
        app: from `create_app`.
        knows_shapes: whether the model is one of the shapes data set, which the examples and the line about its limits
            are made for.
    """
    service: Service = app.state.service
    blocks = build_page(service, knows_shapes=knows_shapes)
    settings = service.engine.settings
    blocks.queue(default_concurrency_limit=settings.queue_size, max_size=settings.queue_size)
    gr.mount_gradio_app(
        app,
        blocks,
        PAGE,
        footer_links=[],
        run_history=False,
        show_error=False,  # what is not our sentence is logged, not shown
        max_file_size=service.settings.max_body,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        theme=_theme(),
        css=resources.files("unimm.serving").joinpath("web.css").read_text(encoding="utf-8"),
        head=_HEAD,
    )
    app.state.end_streams = app.routes[-1].app.stop_event.set  # type: ignore[attr-defined]
    blocks.has_launched = True  # else gradio opens any path that a request names, not only those of uploads

    @app.get("/", include_in_schema=False)
    async def lead() -> RedirectResponse:
        return RedirectResponse(f"{PAGE}/")


def build_page(service: Service, *, knows_shapes: bool) -> gr.Blocks:
    """Build the page; tabs that the model cannot fill are left out."""
    own_folder()
    examples = write_examples() if knows_shapes else {}
    actions = Actions(service)
    with gr.Blocks(title="unimm", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=False) as page:
        sharp = "sharp" if service.image_size <= _SMALL else ""
        with gr.Column(elem_id="page", elem_classes=[sharp]):
            limits = SHAPES_LIMITS if knows_shapes else OTHER_LIMITS
            gr.HTML(f'<header><h1>unimm</h1><p>{ABOUT}</p><p class="limits">{limits}</p></header>', padding=False)
            with gr.Tabs():
                with gr.Tab("Chat", id="chat"):
                    _chat(actions, examples)
                if service.engine.can_draw:
                    with gr.Tab("Draw", id="draw"):
                        _draw(actions, _PROMPTS if knows_shapes else [])
                    with gr.Tab("Edit", id="edit"):
                        _edit(actions, examples)
                with gr.Tab("Reconstruct", id="reconstruct"):
                    _reconstruct(actions, examples)
    return page


def _chat(actions: Actions, examples: dict[str, str]) -> None:
    starts: list[Any] | None = None
    if examples:
        starts = [
            {"text": "What do you see?", "files": [examples["two.png"]]},
            {"text": "What color is the triangle?", "files": [examples["three.png"]]},
            {"text": "Draw two green squares"},
        ]
    talk = gr.State(Talk(), time_to_live=3600)
    shown = without_urls(
        gr.Chatbot(
            show_label=False,
            height="min(56vh, 34rem)",
            placeholder="Add an image and ask about it, or write **Draw** and what you would like to see.",
            examples=starts,
            buttons=[],
            group_consecutive_messages=False,
            elem_id="talk",
            render_markdown=False,
        )
    )
    box = without_urls(
        gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask, or: Draw a red circle",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            elem_id="message",
        )
    )
    clear = gr.Button("New conversation", variant="secondary", size="sm", elem_classes=["quiet"])
    outputs = [box, shown, talk]
    asked = box.submit(actions.chat, [box, talk], outputs, api_name="chat", show_progress="hidden")

    async def start(event: gr.SelectData, talk: Talk) -> Any:
        message = {"text": event.value["text"], "files": [each["path"] for each in event.value.get("files") or []]}
        async for step in actions.chat(message, talk):
            yield step

    begun = shown.example_select(start, [talk], outputs, **_QUIET)
    box.stop(lambda: text_box(None), None, box, cancels=[asked, begun], api_visibility="private")
    clear.click(lambda: (text_box(None), [], Talk()), None, outputs, cancels=[asked, begun], api_visibility="private")


def _draw(actions: Actions, prompts: list[str]) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            prompt = gr.Textbox(
                label="What to draw", placeholder="a red circle on a white background", lines=2, elem_id="draw-prompt"
            )
            if prompts:
                chosen = gr.Dataset(
                    label="Try one",
                    components=[gr.Textbox(render=False)],
                    samples=[[text] for text in prompts],
                    elem_classes=["examples"],
                )
            number = gr.Radio(_SIZES, value="1", label="Images", elem_id="draw-number")
            settings = _settings(actions)
            go, stop = _buttons("Draw")
        with gr.Column(min_width=300):
            outputs = _result("draw")
    inputs = [prompt, number, *settings]
    starts = [go.click, prompt.submit]
    if prompts:
        starts.append(chosen.click(lambda row: row[0], chosen, prompt, **_QUIET).then)
    _run(actions.draw, inputs, outputs, starts, stop, "draw")


def _edit(actions: Actions, examples: dict[str, str]) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            painted = as_painted(
                gr.ImageEditor(
                    value=next(iter(examples.values()), None),
                    label="Image",
                    show_label=False,
                    sources=["upload", "clipboard"],
                    type="filepath",
                    brush=gr.Brush(default_size=40, colors=["#f43f5e"], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=40),
                    layers=False,
                    transforms=(),
                    canvas_size=(512, 512),
                    format="png",
                    buttons=[],
                    placeholder="Drop an image",
                    elem_id="edit-image",
                )
            )
            gr.HTML("<p class='lead'>Say what to change, or paint over the part to draw anew.</p>", padding=False)
            if examples:
                chosen = _images("Or another image", examples)
            first = INSTRUCT if examples else DESCRIBE  # another model may not have learned to edit
            meaning = gr.Radio(list(_EDIT_EXAMPLES), value=first, show_label=False, elem_id="edit-meaning")
            prompt = gr.Textbox(label="In words", placeholder=_EDIT_EXAMPLES[first], lines=2, elem_id="edit-prompt")
            settings = _settings(actions, editing=first == INSTRUCT)
            go, stop = _buttons("Edit")
        with gr.Column(min_width=300):
            outputs = _result("edit")

    def other_meaning(each: str) -> tuple[Any, float, float]:
        return gr.update(placeholder=_EDIT_EXAMPLES[each]), *_own_values(actions, editing=each == INSTRUCT)

    meaning.change(other_meaning, meaning, [prompt, *settings[1:]], **_QUIET)
    if examples:
        chosen.click(lambda row: row[0], chosen, painted, **_QUIET)
    inputs = [painted, prompt, meaning, *settings]
    _run(actions.edit, inputs, outputs, [go.click, prompt.submit], stop, "edit")


def _reconstruct(actions: Actions, examples: dict[str, str]) -> None:
    gr.HTML(
        "<p class='lead'>The model stores an image as a few codes. See what is left when it paints them again.</p>",
        padding=False,
    )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            image = as_bytes(
                gr.Image(
                    label="Image",
                    show_label=False,
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=320,
                    placeholder="Drop an image here",
                    elem_id="reconstruct-image",
                )
            )
            go = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct-go")
            if examples:
                chosen = _images("Try one", examples)
        with gr.Column(min_width=300):
            with gr.Row(elem_classes=["pair"]):
                original = _captioned("Original", "reconstruct-0")
                reconstruction = _captioned("Reconstruction", "reconstruct-1")
            with gr.Row(elem_classes=["pair"]):
                codes = _captioned("Code map", "reconstruct-2")
                with gr.Column(min_width=130):
                    line = gr.Markdown(elem_classes=["line"], elem_id="reconstruct-line")
    outputs = [original, reconstruction, codes, line]
    go.click(actions.reconstruct, image, outputs, api_name="reconstruct", show_progress="hidden")
    if examples:
        run = chosen.click(lambda row: row[0], chosen, image, **_QUIET)
        run.then(actions.reconstruct, image, outputs, api_visibility="private", show_progress="hidden")


def _captioned(caption: str, name: str) -> Any:
    with gr.Column(min_width=130):
        gr.HTML(f"<p class='caption'>{caption}</p>", padding=False)
        return gr.Image(
            label=caption, show_label=False, format="png", buttons=[], interactive=False, min_width=130, elem_id=name
        )


def _settings(actions: Actions, *, editing: bool = False) -> list[Any]:
    """Show the settings of sampling, closed at first, with the checkpoint's own values."""
    scale, own_temperature = _own_values(actions, editing=editing)
    with gr.Accordion("More settings", open=False):
        seed = gr.Textbox(label="Seed", placeholder="random", info="A whole number; the same one draws the same.")
        guidance = gr.Slider(1, 10, scale, step=0.5, label="Guidance", info="Higher follows the text more closely.")
        temperature = gr.Slider(
            0, 2, own_temperature, step=0.1, label="Temperature", info="Higher varies more; 0 never varies."
        )
    return [seed, guidance, temperature]


def _own_values(actions: Actions, *, editing: bool = False) -> tuple[float, float]:
    """Return the checkpoint's own guidance scale, 1 for none, and temperature."""
    own = actions.sampling(editing=editing)
    return max(float(per_prompt_scale(own.guidance_scale, 1)[0]), 1.0), own.temperature or 1


def _buttons(name: str) -> tuple[Any, Any]:
    with gr.Row():
        go = gr.Button(name, variant="primary", scale=3, min_width=120, elem_id=f"{name.lower()}-go")
        stop = gr.Button(
            "Stop", variant="secondary", scale=1, min_width=80, visible=False, elem_id=f"{name.lower()}-stop"
        )
    return go, stop


def _result(name: str) -> list[Any]:
    gallery = gr.Gallery(
        label="Result",
        show_label=False,
        columns=2,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=f"{name}-result",
        elem_classes=["result"],
    )
    return [gallery, gr.Markdown(elem_classes=["line"], elem_id=f"{name}-line")]


def _images(label: str, examples: dict[str, str]) -> Any:
    return gr.Dataset(
        label=label,
        components=[gr.Image(render=False)],
        samples=[[path] for path in examples.values()],
        elem_classes=["examples"],
    )


def _run(
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    starts: list[Callable[..., Any]],
    stop: Any,
    name: str,
) -> None:
    """Run a function at any of several events, and show the button that stops it meanwhile."""
    runs = []
    for number, start in enumerate(starts):
        options = {"api_visibility": "private"} if number else {"api_name": name}
        begun = start(lambda: gr.update(visible=True), None, stop, **_QUIET)
        runs.append(begun.then(function, inputs, outputs, show_progress="hidden", **options))
        runs[-1].then(lambda: gr.update(visible=False), None, stop, **_QUIET)
    stop.click(lambda: gr.update(visible=False), None, stop, cancels=runs, **_QUIET)


def _theme() -> gr.themes.Base:
    """Return the theme: system fonts, quiet grays, one accent, in light and dark."""
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="zinc", radius_size="lg", text_size="md", font=_SYSTEM, font_mono=_MONO
    ).set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
