"""`unimm chat`: questions about images, answered by the model."""

import argparse

from unimm.commands.options import add_json, add_model
from unimm.commands.shared import load_model
from unimm.data.images import load_image
from unimm.errors import UserError
from unimm.runs.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="answered once; without it a conversation starts")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image to talk about; repeatable"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Answer one prompt, or start a chat without one."""
    images = [load_image(path) for path in arguments.image]
    if arguments.prompt is None and arguments.json is not None:
        raise UserError("--json reports one answer: give a PROMPT with it.")
    from unimm.chat import ChatSession, converse

    if arguments.prompt is None:
        converse(ChatSession(*load_model(arguments.model, report)), images)
        return
    session = ChatSession(*load_model(arguments.model, report))
    with report.timed("answer"):
        answer = session.ask(arguments.prompt, images=images or None)
    report.add(prompt=arguments.prompt, images=[str(path) for path in arguments.image], answer=answer)
    report.say(answer)
