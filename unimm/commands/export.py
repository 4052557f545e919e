"""`unimm export`: checkpoints and files that load without unimm."""

import argparse
import importlib.util
from pathlib import Path

from unimm.commands.options import add_json, add_model, add_new_folder, add_positional_model
from unimm.commands.shared import load_model, new_folder, quiet_libraries
from unimm.errors import UserError
from unimm.runs.report import Report

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "gguf": ("gguf", "onnx", "onnxscript", "onnxruntime")}
"""Extra of pyproject.toml, and the kind of export that needs it -> the packages that it installs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser)
    add_json(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--understanding", action="store_true", help="a stock LLaVA or InternVL with the plain encoder")
    kind.add_argument("--generation", action="store_true", help="the language model with image ids, and the decoder")
    kind.add_argument("--onnx", action="store_true", help="the image tokenizer as ONNX; PATH may be one alone")
    kind.add_argument("--gguf", action="store_true", help="the language model with image ids as GGUF, the rest as ONNX")
    parser.add_argument(
        "--weight-type", choices=("f32", "f16", "bf16", "q8_0"), help="of the matrices in the GGUF file (default: f32)"
    )
    add_new_folder(parser)
    add_positional_model(parser)


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Export what loads without unimm: a checkpoint that understands images or generates their ids, ONNX, or GGUF."""
    output = new_folder(arguments.output)
    if arguments.weight_type and not arguments.gguf:
        raise UserError(
            f"--weight-type {arguments.weight_type} belongs to --gguf: leave it out, or export with --gguf."
        )
    if arguments.onnx:
        kind = _export_onnx(arguments.model, output, report)
    else:
        kind = _export_model(arguments, output, report)
    report.add(output=str(output), model_type=kind)
    report.say(f"{output}  ({kind})")


def _export_onnx(path: str | None, output: Path, report: Report) -> str:
    """Write the image tokenizer of a model, or one alone, as ONNX; return its model type."""
    _require("onnx")
    quiet_libraries()
    from unimm.evaluation.runs.evaluated_model import load_evaluated_model
    from unimm.export.onnx_files import save_onnx

    with report.timed("load"):
        loaded = load_evaluated_model(path, device="cpu")
    report.add(model=path or "default")
    with report.timed("save"):
        save_onnx(loaded.tokenizer, loaded.image_processor, output)
    return str(loaded.tokenizer.config.model_type)


def _export_model(arguments: argparse.Namespace, output: Path, report: Report) -> str:
    """Write a stock model or the language model of a unified model; return its model type."""
    if arguments.gguf:
        _require("gguf")
    from unimm.mllm.export import save_generation, stock_understanding
    from unimm.saving import save_whole

    model, processor = load_model(arguments.model, report)
    with report.timed("save"):
        if arguments.understanding:
            stock, reader = stock_understanding(model, processor)
            save_whole(output, stock, reader)
        elif arguments.generation:
            stock = save_generation(model, processor, output)
        else:
            from unimm.export.gguf_file import save_gguf

            stock = save_gguf(model, processor, output, arguments.weight_type or "f32")
    return str(stock.config.model_type)


def _require(extra: str) -> None:
    """Raise UserError if a package of the extra is not installed."""
    if missing := [name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: pip install 'unimm[{extra}]'.")
