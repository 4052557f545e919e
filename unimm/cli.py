"""The command `unimm`: its arguments; what the commands do stands in `unimm.commands`.

Those that load a model take `--model PATH` (default: the embedded one); all take `--json FILE` (`-` = standard output): one
JSON object with what was done and the seconds it took. What a person got wrong is one line on standard error and exit
code 2, found before the model is loaded where that is possible; nothing is left half-written.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from unimm import __version__
from unimm.commands import (
    attach,
    chat,
    demo,
    detach,
    doctor,
    encoders,
    evaluate,
    export,
    generate,
    merge,
    reconstruct,
)
from unimm.errors import UserError, one_line, run_main
from unimm.report import Report

INTERRUPTED_EXIT_CODE = 130
MAX_IMAGES = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 `doctor` found a fault, 2 wrong use, 130 interrupted."""
    try:
        return run_main(lambda: _run(argv))
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE


def _run(argv: Sequence[str] | None) -> int | None:
    arguments = build_parser().parse_args(argv)
    report = Report(arguments.json)
    code: int | None = arguments.command(arguments, report)
    report.write()
    return code


class _Parser(argparse.ArgumentParser):
    """Wrong use is a `UserError` like any other: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(ValueError(message))} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; `parse_args` gives the chosen function as `command`."""
    from unimm.benchmarks.suites import ALL, SUITES

    parser = _Parser(prog="unimm", description="One model that understands pictures and draws them.")
    parser.add_argument("--version", action="version", version=f"unimm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    page = _command(commands, demo)
    page.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="where the page goes (default: %(default)s)"
    )
    page.add_argument("--seed", type=_whole_number, default=0, metavar="S", help="another seed, other scenes")

    talk = _command(commands, chat)
    talk.add_argument("prompt", nargs="?", metavar="PROMPT", help="answered once; without it a conversation starts")
    talk.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture to talk about; repeatable"
    )

    draw = _command(commands, generate)
    draw.add_argument("prompt", metavar="PROMPT")
    draw.add_argument("--output", default="picture.png", metavar="FILE", help="N > 1 pictures: FILE-1, FILE-2, ...")
    draw.add_argument("--num-images", type=_image_count, default=1, metavar="N")
    draw.add_argument("--seed", type=_whole_number, metavar="S", help="picture k depends on (S, k) only")
    draw.add_argument("--guidance-scale", type=_scale, metavar="G", help="how closely to follow the prompt; 1 = off")
    draw.add_argument("--temperature", type=_scale, metavar="T", help="how freely to draw; 0 = always the likeliest id")

    copy = _command(commands, reconstruct)
    copy.add_argument("image", metavar="IMAGE")
    copy.add_argument("--output", default="reconstruction.png", metavar="FILE")

    _command(commands, encoders, model=False)

    join = _command(commands, attach, model=False)
    join.add_argument("host", metavar="HOST", help="a model folder or hub id")
    join.add_argument("--image-tokenizer", required=True, metavar="PATH", help="a tokenizer folder or hub id")
    join.add_argument("--output", required=True, metavar="FOLDER", help="an empty or new folder")
    join.add_argument("--row-init", choices=("random", "mean", "codebook"), default="random", help="of the new rows")
    join.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the host's own")
    join.add_argument(
        "--image-position-mode", choices=("1d", "2d"), default="1d", help="of drawn pictures; 2d is for Qwen-VL hosts"
    )
    join.add_argument("--seed", type=_whole_number, default=0, metavar="S", help="of everything that is new")

    part = _command(commands, detach)
    part.add_argument("--output", required=True, metavar="FOLDER", help="an empty or new folder")

    whole = _command(commands, merge, model=False)
    whole.add_argument("adapter", metavar="ADAPTER", help="the output folder of a recipe that ran with lora")
    whole.add_argument("--output", required=True, metavar="FOLDER", help="an empty or new folder")
    whole.add_argument("--base", metavar="PATH", help="its base, where it has moved since")
    whole.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the base's own"
    )

    out = _command(commands, export)
    kind = out.add_mutually_exclusive_group(required=True)
    kind.add_argument("--understanding", action="store_true", help="a stock LLaVA or InternVL with the plain encoder")
    kind.add_argument("--generation", action="store_true", help="the language model with image ids, and the decoder")
    out.add_argument("--output", required=True, metavar="FOLDER", help="an empty or new folder")

    sick = _command(commands, doctor)
    for each in (part, out, sick):
        each.add_argument(
            "model", nargs="?", metavar="PATH", default=argparse.SUPPRESS, help="the same as --model PATH"
        )

    measure = commands.add_parser("eval", help=_summary(evaluate), description=_summary(evaluate))
    measure.add_argument("suite", choices=[*SUITES, ALL], metavar="SUITE", help=", ".join([*SUITES, ALL]))
    measure.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="unimm eval SUITE --help lists them")
    measure.set_defaults(command=evaluate, json=None)
    return parser


def _command(
    commands: Any, function: Callable[[argparse.Namespace, Report], int | None], model: bool = True
) -> argparse.ArgumentParser:
    """A sub-command named after its function, with what all of them take; `model`: those that load one."""
    summary = _summary(function)
    parser: argparse.ArgumentParser = commands.add_parser(function.__name__, help=summary, description=summary)
    if model:
        parser.add_argument("--model", metavar="PATH", help="a model folder or name (default: the embedded model)")
    parser.add_argument("--json", metavar="FILE", help="report as one JSON object; - for standard output")
    parser.set_defaults(command=function)
    return parser


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _image_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pictures from 1 to {MAX_IMAGES}")
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
