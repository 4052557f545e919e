"""Compare the results on a GPU in bfloat16 with those of the CPU in float32: ids, drawings, packing, compilation.

    python eval/gpu_correctness.py --json correctness.json
    python eval/gpu_correctness.py --size debug        # on a CPU: every comparison once, on few images

Four comparisons, each on the embedded model: image ids of shapes (also of a random VQRAE-SigLIP2-256 at size "paper"),
the logits and the greedy choices of drawings, packed rows with flex attention against single rows with SDPA, and
compiled steps (a CUDA graph on a GPU) against eager ones. One that fails is recorded with its reason, and the others
run.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.bench_real_size import tokenizer_config
from eval.generation_rivals import random_model
from unimm.data.conversations import message
from unimm.data.shapes.datasets import ShapesImages
from unimm.data.text.collators import FlowCollator
from unimm.errors import run_main
from unimm.mllm import load
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.tokenizer import VQRAE
from unimm.tokenizer.published import PUBLISHED

PROMPTS = ("a red circle", "a blue square above a green triangle", "two yellow circles", "a black triangle")


@dataclass(frozen=True)
class Plan:
    """What is compared: on `device`, `images` shapes, `prompts` drawings, the paper's tokenizer or not."""

    device: torch.device
    images: int
    prompts: int
    paper: bool


def agreement(ours: Tensor, reference: Tensor) -> float:
    """Return the share of equal elements of two tensors of one shape."""
    return float((ours.cpu() == reference.cpu()).double().mean())


def largest_difference(ours: Tensor, reference: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    return float((ours.float().cpu() - reference.float().cpu()).abs().max())


@torch.no_grad()
def compare_ids(plan: Plan) -> dict[str, Any]:
    """Compare ids and pixels of the embedded tokenizer, and of a random full-size one, in float32 and in bfloat16."""
    model, processor = load(device="cpu")
    images = [ShapesImages(plan.images, 1)[index]["image"] for index in range(plan.images)]
    pixel_values = processor.image_processor(images=images, return_tensors="pt").pixel_values
    found = {"embedded": _tokenizer_agreement(model.image_tokenizer, pixel_values, plan.device)}
    if plan.paper:
        torch.manual_seed(0)
        tokenizer = VQRAE(tokenizer_config(PUBLISHED["siglip2-so400m-p16-256"])).eval()
        noise = torch.rand(4, 3, 256, 256).mul(2).sub(1)
        found["random siglip2-so400m-p16-256"] = _tokenizer_agreement(tokenizer, noise, plan.device)
    return found


def _tokenizer_agreement(tokenizer: VQRAE, pixel_values: Tensor, device: torch.device) -> dict[str, Any]:
    reference = tokenizer.float().encode(pixel_values).ids
    pixels, found = tokenizer.decode(reference), dict[str, Any]()
    for dtype in (torch.float32, torch.bfloat16):
        tokenizer.to(device, dtype)
        ids = tokenizer.encode(pixel_values.to(device, dtype)).ids
        found[f"{dtype}".removeprefix("torch.")] = {
            "equal_ids": agreement(ids, reference),
            "largest_pixel_difference": largest_difference(tokenizer.decode(reference.to(device)), pixels),
        }
    return found | {"ids": reference.numel()}


@torch.no_grad()
def compare_drawings(plan: Plan) -> dict[str, Any]:
    """Compare greedy drawings, and the logits along the CPU's drawing, in float32 and in bfloat16."""
    model, processor = load(device="cpu")
    rows = [_greedy(model, processor, prompt) for prompt in PROMPTS[: plan.prompts]]
    logits, found = [_logits(model, *row) for row in rows], dict[str, Any]()
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = load(device=plan.device, dtype=dtype)
        drawn = [_greedy(model, processor, prompt)[1] for prompt in PROMPTS[: plan.prompts]]
        along = [_logits(model, *row) for row in rows]
        found[f"{dtype}".removeprefix("torch.")] = {
            "equal_token_ids": agreement(torch.cat(drawn), torch.cat([row[1] for row in rows])),
            "equal_choices_along": agreement(torch.cat(along).argmax(-1), torch.cat(logits).argmax(-1)),
            "largest_logit_difference": largest_difference(torch.cat(along), torch.cat(logits)),
        }
    return found | {"largest_logit": float(torch.cat(logits).abs().max())}


def _greedy(model: Any, processor: Any, prompt: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the prompt's token ids [1, L], and those of its greedy drawing [1, M]."""
    ids = processor(text=processor.drawing_prompt(prompt), return_tensors="pt").input_ids.to(model.device)
    drawn = model.generate(ids, generation_mode="image", do_sample=False, guidance_scale=1.0, **options)
    return ids, drawn[:, -model.num_image_tokens :]


def _logits(model: Any, prompt: Tensor, drawn: Tensor) -> Tensor:
    """Return the image logits [1, M, K] of a drawing, in one forward pass."""
    ids = torch.cat([prompt, drawn], dim=1).to(model.device)
    logits = model(input_ids=ids, vocabulary="image", use_cache=False).logits
    return logits[:, -drawn.shape[1] - 1 : -1].float().cpu()


@torch.no_grad()
def compare_packing(plan: Plan) -> dict[str, Any]:
    """Compare the logits of drawings packed into rows, by flex attention and by SDPA, with those of single rows by
    SDPA, in float32."""
    found = dict[str, Any]()
    reference = _packed_logits(*load(device=plan.device, dtype=torch.float32, attn_implementation="sdpa"), packed=False)
    for attention in ("sdpa", "flex_attention"):
        model, processor = load(device=plan.device, dtype=torch.float32, attn_implementation="sdpa")
        model.model.language_model.set_attn_implementation(attention)
        assert model.config.get_text_config()._attn_implementation == attention
        found[attention] = {"largest_logit_difference": largest_difference(_packed_logits(model, processor), reference)}
    return found | {"largest_logit": float(reference.abs().max())}


def _packed_logits(model: Any, processor: Any, *, packed: bool = True) -> Tensor:
    """Return the logits [n, V] at the labels of four drawings' batch, sorted by sample."""
    ids = torch.arange(model.num_image_tokens * len(PROMPTS)).view(len(PROMPTS), -1) % model.config.codebook_size
    samples = []
    for index, prompt in enumerate(PROMPTS):
        asked = message("user", prompt)
        drawn = {"role": "assistant", "content": [{"type": "image", "ids": ids[index].numpy()}]}
        samples.append({"flow": "drawing", "kind": "drawing", "index": index, "messages": [asked, drawn]})
    capacity = 2 * (model.num_image_tokens + 40)
    batch = FlowCollator(processor, pack_length=capacity if packed else None)(samples)["drawing"]
    batch = {name: value.to(model.device) for name, value in batch.items()}
    token_ids = model.visual_vocabulary.token_ids(batch.pop("drawn_ids"))
    input_ids = batch["input_ids"].masked_scatter(batch["drawn"], token_ids)
    inputs = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    logits = model(input_ids=input_ids, vocabulary="image", use_cache=False, **inputs).logits
    return _in_order(logits, input_ids, token_ids, batch["drawn"]).float().cpu()


def _in_order(logits: Tensor, input_ids: Tensor, token_ids: Tensor, drawn: Tensor) -> Tensor:
    """Return the logits at the drawn tokens, [samples, M, K], with the samples ordered by their first token id."""
    at = logits[drawn].view(*token_ids.shape, -1)
    return at[input_ids[drawn].view(token_ids.shape)[:, 0].argsort()]


@torch.no_grad()
def compare_compiled(plan: Plan) -> dict[str, Any]:
    """Compare compiled drawings with eager ones, in float32; on a small random model at size "debug", because a CPU
    compiles slowly. Greedy ones, twice; and sampled ones of which some tokens are guided, twice with another between.

    In bfloat16 a compiler that fuses operations rounds less often, and choices differ.
    """
    if plan.paper:
        model, processor = load(device=plan.device, dtype=torch.float32)
    else:
        model, processor = random_model(128, 1, 64, 16, torch.float32)
        model.to(plan.device)
    eager = _greedy(model, processor, PROMPTS[0])[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Drawing goes on in a slower way")  # else eager would be compared with eager
        found = [_greedy(model, processor, PROMPTS[0], compile=True)[1] for _ in range(2)]
        guided = [_sampled(model, processor, seed, compile=True) for seed in (0, 1, 0)]
    compiled, again = (agreement(each, eager) for each in found)
    expected = [_sampled(model, processor, seed) for seed in (0, 1, 0)]
    return {
        "equal_token_ids": compiled,
        "equal_token_ids_of_the_second_drawing": again,
        "equal_sampled_token_ids": agreement(torch.cat(guided), torch.cat(expected)),
    }


def _sampled(model: Any, processor: Any, seed: int, **options: Any) -> Tensor:
    """Return the token ids [2, M] of two drawings whose tokens 3 to 8 are guided."""
    ids = processor(text=processor.drawing_prompt(PROMPTS[seed]), return_tensors="pt").input_ids.to(model.device)
    drawn: Tensor = model.generate(
        ids,
        generation_mode="image",
        num_return_sequences=2,
        seed=seed,
        guidance_scale=2.0,
        guidance_interval=(3, 9),
        **options,
    )
    return drawn


CHECKS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "ids": compare_ids,
    "drawings": compare_drawings,
    "packing": compare_packing,
    "compiled": compare_compiled,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("debug", "paper"), default="paper", help="default %(default)s")
    parser.add_argument("--only", default="", help="the comparisons whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report, failed = Report(arguments.json), list[str]()
    torch.backends.cudnn.allow_tf32 = False  # the default lets convolutions in float32 round to TF32
    gpu, paper = torch.cuda.is_available(), arguments.size == "paper"
    plan = Plan(torch.device("cuda" if gpu else "cpu"), 64 if paper else 4, 4 if paper else 1, paper)
    report.add(device=str(plan.device), commit=git_commit())
    for name, check in ((name, check) for name, check in CHECKS.items() if arguments.only in name):
        try:
            with report.timed(name):
                found = check(plan)
        except Exception as error:  # the others still run
            failed.append(name)
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        report.add(**{name: found})
        report.say(f"{name}: {found}")
        report.write()
    if failed:
        print(f"{', '.join(failed)} failed: {report.content[failed[0]]['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main, name="gpu_correctness"))
