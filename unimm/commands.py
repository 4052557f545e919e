"""What the commands of `unimm` do; `unimm.cli` parses their arguments.

Each takes the parsed arguments and a report. Heavy modules are imported where they are needed, and what a person got
wrong is found before the model is loaded where that is possible.
"""

import argparse
import secrets
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unimm.data.images import check_image_output, load_image, save_image_atomically, save_images
from unimm.errors import UserError
from unimm.report import Report

FAILED_EXIT_CODE = 1


def demo(arguments: argparse.Namespace, report: Report) -> None:
    """Show reconstruction, chat and drawing on one page; its path is the last thing printed."""
    from unimm.benchmarks.demo import DemoPlan, run_demo, write_page

    folder = Path(arguments.output)
    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
        raise UserError(f"Cannot write the page into {folder}: a file stands in its way.")
    plan = DemoPlan.sample(arguments.seed)
    model, processor = _load(arguments.model, report)
    result = run_demo(model, processor, plan)
    page = write_page(result, folder, title="unimm, first light", seed=plan.seed)
    report.seconds |= result.seconds
    report.add(page=str(page), seed=plan.seed, answers=result.score())
    report.say(str(page))


def chat(arguments: argparse.Namespace, report: Report) -> None:
    """Answer one prompt, or converse when there is none."""
    from unimm.chat import ChatSession, converse

    images = [load_image(path) for path in arguments.image]
    if arguments.prompt is None:
        if arguments.json is not None:
            raise UserError("--json reports one answer: give a PROMPT with it.")
        converse(ChatSession(*_load(arguments.model, report)), images)
        return
    session = ChatSession(*_load(arguments.model, report))
    with report.timed("answer"):
        answer = session.ask(arguments.prompt, images=images or None)
    report.add(prompt=arguments.prompt, images=[str(path) for path in arguments.image], answer=answer)
    report.say(answer)


def generate(arguments: argparse.Namespace, report: Report) -> None:
    """Draw a prompt."""
    from unimm.chat import ChatSession

    check_image_output(arguments.output)
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    session = ChatSession(*_load(arguments.model, report))
    options = {"guidance_scale": arguments.guidance_scale, "temperature": arguments.temperature}
    with _Progress("drawing") as progress, report.timed("per_image", share=arguments.num_images):
        pictures = session.draw(
            arguments.prompt, num_images=arguments.num_images, seed=seed, on_token=progress, **options
        )
    paths = save_images(pictures, arguments.output)
    report.add(prompt=arguments.prompt, images=[str(path) for path in paths], seed=seed, **options)
    report.say("\n".join(str(path) for path in paths))


def reconstruct(arguments: argparse.Namespace, report: Report) -> None:
    """Send a picture through its ids and back."""
    import torch

    from unimm.benchmarks.subject import load_subject
    from unimm.evaluation.image_metrics import psnr

    image = load_image(arguments.image)
    check_image_output(arguments.output)
    _quiet_libraries()
    with report.timed("load"):
        subject = load_subject(arguments.model)
    tokenizer, image_processor = subject.tokenizer, subject.image_processor
    with torch.inference_mode(), report.timed("per_image"):
        pixel_values = image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device)
        ids = tokenizer.encode(pixel_values).ids
        pixels = tokenizer.decode(ids).float()
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    quality = round(psnr(pixels.cpu(), pixel_values.float().cpu() * std + mean).item(), 3)
    save_image_atomically(image_processor.postprocess(pixels)[0], arguments.output)
    report.add(
        model=arguments.model or "default",
        image=str(arguments.image),
        output=str(arguments.output),
        ids=ids.numel(),
        psnr=quality,
    )
    report.say(f"{arguments.output}  ({ids.numel()} ids, {quality:.1f} dB)")


def encoders(arguments: argparse.Namespace, report: Report) -> None:
    """List the vision models that can become an image tokenizer."""
    from dataclasses import asdict

    from unimm.tokenizer.published import PUBLISHED, encoder_table

    report.add(encoders={name: asdict(encoder) for name, encoder in PUBLISHED.items()})
    report.say(encoder_table())


def attach(arguments: argparse.Namespace, report: Report) -> None:
    """Give a language or multimodal model an image tokenizer: it then reads pictures and draws them."""
    import torch

    from unimm.mllm import attach as attach_to
    from unimm.saving import save_whole

    output = _new_folder(arguments.output)
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
    """Give back the host that a tokenizer was attached to."""
    from unimm.mllm.export import detach as detached
    from unimm.saving import save_whole

    output = _new_folder(arguments.output)
    model, processor = _load(arguments.model, report)
    with report.timed("save"):
        host = detached(model)
        save_whole(output, host, processor.tokenizer)
    report.add(output=str(output), model_type=host.config.model_type)
    report.say(f"{output}  ({host.config.model_type})")


def merge(arguments: argparse.Namespace, report: Report) -> None:
    """Lay a LoRA adapter into its base: a whole model, as any other."""
    from transformers import AutoProcessor

    from unimm.errors import reading
    from unimm.mllm import load
    from unimm.saving import save_whole
    from unimm.training.adapters import about_base, read_adapter

    output = _new_folder(arguments.output)
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
    """Write a checkpoint that loads without unimm: one that reads pictures, or one that writes ids."""
    from unimm.mllm.export import save_generation, stock_understanding
    from unimm.saving import save_whole

    output = _new_folder(arguments.output)
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
    """Try out ten points that the tower of a model must meet, and lmms-eval's plug-in; exit code 1 when one fails."""
    from dataclasses import asdict

    from unimm.integrations.lmms_plugin import lmms_finding
    from unimm.mllm.doctor import examine

    findings = []
    model, processor = _load(arguments.model, report)
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
    """Run a suite of measurements on a model, or write the page of a finished run."""
    from unimm.benchmarks.suites import REPORT, run_suite

    if arguments.suite != REPORT:  # a page needs no model, and not the seconds that importing transformers takes
        _quiet_libraries()
    run_suite(arguments.suite, arguments.rest)


def _new_folder(path: str) -> Path:
    output = Path(path)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not an empty folder: choose another, nothing is overwritten.")
    return output


class _Progress:
    """A bar on standard error that appears with the first step, after everything that may be refused."""

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
    """The unified model and its processor, the seconds under `load`."""
    _quiet_libraries()
    from unimm.mllm import load

    with report.timed("load"):
        loaded = load(path)
    report.add(model=path or "default")
    return loaded


def _quiet_libraries() -> None:
    """Their loading bars and notices are not what was asked for."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ---- the command line ------------------------------------------------------------------------------------------------
