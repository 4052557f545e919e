"""`python -m unimm.chat [--model PATH] [--image FILE ...]`: a chat in the terminal."""

import argparse
import sys
from pathlib import Path

from unimm.chat.session import ChatSession
from unimm.chat.terminal import converse
from unimm.data.images import load_image
from unimm.errors import run_main


def main() -> None:
    """Read the arguments and start the chat."""
    from unimm.mllm import load

    parser = argparse.ArgumentParser(prog="python -m unimm.chat", description="Talk with a unified model about images.")
    parser.add_argument("--model", help="a unified model; the default comes with the library")
    parser.add_argument("--image", action="append", default=[], type=Path, help="an image to begin with")
    arguments = parser.parse_args()
    images = [load_image(path) for path in arguments.image]
    converse(ChatSession(*load(arguments.model)), images)


if __name__ == "__main__":
    sys.exit(run_main(main, name="chat"))
