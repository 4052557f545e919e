"""The command line `unimm`: demo, chat, generate, reconstruct; encoders, attach, detach, merge, export, doctor; eval.

The first four take `--model PATH` (default: the embedded model). All but `eval` take `--json FILE` (`-` = standard
output), which receives one JSON object with the results and the seconds they took. A user error is one line on standard
error and exit code 2, raised before the model is loaded and torch is imported if possible: commands import what they
need after checking their arguments. No output is left half-written.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from unimm import __version__
from unimm.data.images import check_image_output, load_image, save_images, save_numbered
from unimm.errors import UserError, one_line, run_main
from unimm.runs.provenance import check_output
from unimm.runs.report import Report

FAILED_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130
MAX_IMAGES = 256
DRAWING, RECONSTRUCTION = "picture.png", "reconstruction.png"
"""Default output names; an existing file is never replaced, the next free number is used instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 `doctor` failure, 2 user error, 130 interrupted."""
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


# ---- commands --------------------------------------------------------------------------------------------------------


def demo(arguments: argparse.Namespace, report: Report) -> None:
    """Write an HTML page with reconstructions, answers and generated images; its path is printed last."""
    folder = Path(arguments.output)
    check_output(folder / "index.html", "page")
    from unimm.demo import DemoPlan, run_demo, write_page

    plan = DemoPlan.sample(arguments.seed)
    model, processor = _load(arguments.model, report)
    result = run_demo(model, processor, plan)
    page = write_page(result, folder, title="unimm, first light", seed=plan.seed)
    report.seconds |= result.seconds
    report.add(page=str(page), seed=plan.seed, answers=result.score())
    report.say(str(page))


def chat(arguments: argparse.Namespace, report: Report) -> None:
    """Answer one prompt, or start a chat without one."""
    images = [load_image(path) for path in arguments.image]
    if arguments.prompt is None and arguments.json is not None:
        raise UserError("--json reports one answer: give a PROMPT with it.")
    from unimm.chat import ChatSession, converse

    if arguments.prompt is None:
        converse(ChatSession(*_load(arguments.model, report)), images)
        return
    session = ChatSession(*_load(arguments.model, report))
    with report.timed("answer"):
        answer = session.ask(arguments.prompt, images=images or None)
    report.add(prompt=arguments.prompt, images=[str(path) for path in arguments.image], answer=answer)
    report.say(answer)


def generate(arguments: argparse.Namespace, report: Report) -> None:
    """Generate images from a prompt."""
    check_image_output(arguments.output or DRAWING)
    from unimm.chat import ChatSession

    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    session = ChatSession(*_load(arguments.model, report))
    options = {
        "guidance_scale": arguments.guidance_scale,
        "temperature": arguments.temperature,
        "parallel_tokens": arguments.parallel_tokens,
    }
    with _Progress("drawing") as progress, report.timed("per_image", share=arguments.num_images):
        images = session.draw(
            arguments.prompt, num_images=arguments.num_images, seed=seed, on_token=progress, **options
        )
    paths = _saved(images, arguments.output, DRAWING)
    report.add(prompt=arguments.prompt, images=[str(path) for path in paths], seed=seed, **options)
    report.say("\n".join(str(path) for path in paths))


def reconstruct(arguments: argparse.Namespace, report: Report) -> None:
    """Encode an image to ids and decode it again."""
    image = load_image(arguments.image)
    check_image_output(arguments.output or RECONSTRUCTION)
    import torch

    from unimm.evaluation.metrics.image_metrics import capped_psnr
    from unimm.evaluation.runs.evaluated_model import load_evaluated_model

    _quiet_libraries()
    with report.timed("load"):
        evaluated = load_evaluated_model(arguments.model)
    tokenizer, image_processor = evaluated.tokenizer, evaluated.image_processor
    with torch.inference_mode(), report.timed("per_image"):
        pixel_values = image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device)
        ids = tokenizer.encode(pixel_values).ids
        pixels = tokenizer.decode(ids).float()
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    quality = round(capped_psnr(pixels.cpu(), pixel_values.float().cpu() * std + mean).item(), 3)
    (output,) = _saved(image_processor.postprocess(pixels), arguments.output, RECONSTRUCTION)
    report.add(
        model=arguments.model or "default",
        image=str(arguments.image),
        output=str(output),
        ids=ids.numel(),
        psnr=quality,
    )
    report.say(f"{output}  ({ids.numel()} ids, {quality:.1f} dB)")


def encoders(arguments: argparse.Namespace, report: Report) -> None:
    """List the vision encoders that an image tokenizer can be built on."""
    from dataclasses import asdict

    from unimm.tokenizer.published import PUBLISHED, encoder_table

    report.add(encoders={name: asdict(encoder) for name, encoder in PUBLISHED.items()})
    report.say(encoder_table())


def attach(arguments: argparse.Namespace, report: Report) -> None:
    """Attach an image tokenizer to a language or multimodal model, so that it takes and generates images."""
    output = _new_folder(arguments.output)
    import torch

    from unimm.mllm import attach as attach_to
    from unimm.saving import save_whole

    _quiet_libraries()
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with report.timed("attach"):
        model, processor = attach_to(
            arguments.host,
            arguments.image_tokenizer,
            row_init=arguments.row_init,
            dtype=dtype,
            image_position_mode=arguments.image_position_mode,
            seed=arguments.seed,
        )
    with report.timed("save"):
        save_whole(output, model, processor)
    untrained = model.attachment.untrained
    report.add(
        host=arguments.host,
        image_tokenizer=arguments.image_tokenizer,
        output=str(output),
        model_type=model.config.model_type,
        kept=model.attachment.kept,
        untrained=untrained,
    )
    report.say(model.attachment.sentence() + f"\n{output}")


def detach(arguments: argparse.Namespace, report: Report) -> None:
    """Restore the host model that an image tokenizer was attached to."""
    output = _new_folder(arguments.output)
    from unimm.mllm.export import detach as detached
    from unimm.saving import save_whole

    model, processor = _load(arguments.model, report)
    with report.timed("save"):
        host = detached(model)
        save_whole(output, host, processor.tokenizer)
    report.add(output=str(output), model_type=host.config.model_type)
    report.say(f"{output}  ({host.config.model_type})")


def merge(arguments: argparse.Namespace, report: Report) -> None:
    """Merge a LoRA adapter into its base model and save the result."""
    output = _new_folder(arguments.output)
    from transformers import AutoProcessor

    from unimm.errors import reading
    from unimm.mllm import load
    from unimm.saving import save_whole
    from unimm.training.language_model.adapters import about_base, read_adapter

    _quiet_libraries()
    base = arguments.base or about_base(arguments.adapter)["base"]
    with report.timed("load"):
        model, _ = load(base, device="cpu", dtype=arguments.dtype)
        with reading("The processor of the adapter", arguments.adapter):
            processor = AutoProcessor.from_pretrained(arguments.adapter)
    with report.timed("merge"):
        merged = read_adapter(model, arguments.adapter, base).merged()
    with report.timed("save"):
        save_whole(output, merged, processor)
    report.add(adapter=arguments.adapter, base=base, output=str(output), model_type=merged.config.model_type)
    report.say(f"{output}  ({merged.config.model_type}: {arguments.adapter} on {base})")


def export(arguments: argparse.Namespace, report: Report) -> None:
    """Export a checkpoint that loads without unimm: one that understands images, or one that generates image ids."""
    output = _new_folder(arguments.output)
    from unimm.mllm.export import save_generation, stock_understanding
    from unimm.saving import save_whole

    model, processor = _load(arguments.model, report)
    with report.timed("save"):
        if arguments.understanding:
            stock, reader = stock_understanding(model, processor)
            save_whole(output, stock, reader)
        else:
            stock = save_generation(model, processor, output)
    report.add(output=str(output), model_type=stock.config.model_type)
    report.say(f"{output}  ({stock.config.model_type})")


def doctor(arguments: argparse.Namespace, report: Report) -> int:
    """Check a model: vision tower, matching parts, one answer, one generated image; exit code 1 if a check fails."""
    from dataclasses import asdict

    from unimm.evaluation.understanding.lmms_plugin import lmms_finding
    from unimm.mllm.doctor import examine
    from unimm.mllm.loading import load_unchecked

    findings = []
    _quiet_libraries()
    with report.timed("load"):
        model, processor = load_unchecked(arguments.model)
    report.add(model=arguments.model or "default")
    with report.timed("examine"):
        for finding in examine(model, processor):
            report.say(finding.line())
            findings.append(asdict(finding))
        plugin = lmms_finding(len(findings) + 1)
        if plugin is not None:  # lmms-eval is installed
            report.say(plugin.line())
            findings.append(asdict(plugin))
    sound = all(finding["ok"] for finding in findings)
    report.add(findings=findings, ok=sound)
    return 0 if sound else FAILED_EXIT_CODE


def evaluate(arguments: argparse.Namespace, report: Report) -> None:
    """Run an evaluation suite on a model, or write the report of a finished run."""
    from unimm.evaluation.suites import REPORT, run_suite

    if arguments.suite != REPORT:  # a report needs no model: skip the slow import of transformers
        _quiet_libraries()
    run_suite(arguments.suite, arguments.rest)


def _saved(images: Sequence[Any], output: str | None, default: str) -> list[Path]:
    """Write the images to `output`, or to free names based on `default`; return their paths."""
    if output is not None:
        return save_images(images, output)
    return save_numbered(images, default, first=0 if len(images) == 1 else 1)


def _new_folder(path: str) -> Path:
    output = Path(path)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not an empty folder: choose another, nothing is overwritten.")
    check_output(output / "config.json", "model")
    return output


class _Progress:
    """A progress bar on standard error that appears with the first step, once all arguments have been accepted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.name, unit="token", leave=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- loading ---------------------------------------------------------------------------------------------------------


def _load(path: str | None, report: Report) -> tuple[Any, Any]:
    """Load the unified model and its processor; report the seconds as `load`."""
    _quiet_libraries()
    from unimm.mllm import load

    with report.timed("load"):
        loaded = load(path)
    report.add(model=path or "default")
    return loaded


def _quiet_libraries() -> None:
    """Silence the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ---- the command line ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` (one line, no usage text) instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(ValueError(message))} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; `parse_args` returns the function to run as `command`."""
    from unimm.evaluation.suites import ALL, SUITES

    parser = _Parser(prog="unimm", description="One model that understands images and draws them.")
    parser.add_argument("--version", action="version", version=f"unimm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    page = _command(commands, demo)
    page.add_argument(
        "--output", default="runs/demo", metavar="FOLDER", help="where the page goes (default: %(default)s)"
    )
    page.add_argument("--seed", type=_whole_number, default=0, metavar="S", help="another seed, other scenes")

    talk = _command(commands, chat)
    talk.add_argument("prompt", nargs="?", metavar="PROMPT", help="answered once; without it a conversation starts")
    talk.add_argument("--image", action="append", default=[], metavar="FILE", help="an image to talk about; repeatable")

    draw = _command(commands, generate)
    draw.add_argument("prompt", metavar="PROMPT")
    draw.add_argument(
        "--output", metavar="FILE", help=f"N > 1 images: FILE-1, FILE-2, ... (default: {DRAWING}, or a free number)"
    )
    draw.add_argument("--num-images", type=_image_count, default=1, metavar="N")
    draw.add_argument("--seed", type=_whole_number, metavar="S", help="image k depends on (S, k) only")
    draw.add_argument("--guidance-scale", type=_scale, metavar="G", help="how closely to follow the prompt; 1 = off")
    draw.add_argument(
        "--parallel-tokens",
        type=lambda text: text if text == "auto" else _whole_number(text),
        default=1,
        metavar="W",
        help="guess W image tokens ahead, or auto: faster for few images, the same images",
    )
    draw.add_argument("--temperature", type=_scale, metavar="T", help="how freely to draw; 0 = always the likeliest id")

    copy = _command(commands, reconstruct)
    copy.add_argument("image", metavar="IMAGE")
    copy.add_argument("--output", metavar="FILE", help=f"default: {RECONSTRUCTION}, or a free number of it")

    _command(commands, encoders, model=False)

    join = _command(commands, attach, model=False)
    join.add_argument("host", metavar="HOST", help="a model folder or hub id")
    join.add_argument("--image-tokenizer", required=True, metavar="PATH", help="a tokenizer folder or hub id")
    join.add_argument("--output", required=True, metavar="FOLDER", help="an empty or new folder")
    join.add_argument("--row-init", choices=("random", "mean", "codebook"), default="random", help="of the new rows")
    join.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the host's own")
    join.add_argument(
        "--image-position-mode", choices=("1d", "2d"), default="1d", help="of drawn images; 2d is for Qwen-VL hosts"
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

    broken_tower = _command(commands, doctor)
    for each in (part, out, broken_tower):
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
    """Add a subcommand named after its function, with the common options; `model` adds `--model`."""
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images from 1 to {MAX_IMAGES}")
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
