"""A chat in the terminal: lines of standard input are questions, or commands that begin with a slash."""

import io
import sys
from collections.abc import Sequence

from unimm.chat.session import ChatSession
from unimm.chat.turns import ImageLike
from unimm.data.image_files import save_numbered
from unimm.data.images import load_image
from unimm.errors import UserError, one_line

HELP = (
    "/image FILE shows an image, /draw PROMPT draws one, /edit PROMPT changes the last one, /reset forgets, /quit ends."
)


def converse(session: ChatSession, images: Sequence[ImageLike] = ()) -> None:
    """Read lines from standard input until it ends or `/quit`. A `UserError` is printed and the chat continues."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # a line that is not UTF-8 becomes a UserError instead of ending the chat
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    pending = list(images)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        word, _, rest = line.strip().partition(" ")
        if not line or word == "/quit":
            return
        try:
            if word == "/image":
                pending.append(load_image(rest.strip()))
            elif word == "/draw":
                (path,) = save_numbered(session.draw(rest.strip()), "picture.png")
                print(path)
            elif word == "/edit":
                (path,) = save_numbered(session.edit(rest.strip(), pending[-1] if pending else None), "picture.png")
                print(path)
                pending = pending[:-1]
            elif word == "/reset":
                session.reset()
                pending = []
            elif word.startswith("/"):
                raise UserError(f"There is no command {word}: {HELP}")
            elif word:
                for piece in session.ask(line.strip(), pending, stream=True):
                    print(piece, end="", flush=True)
                print()
                pending = []
        except UserError as error:
            print(f"unimm: {one_line(error)}", file=sys.stderr)
