"""Compare vLLM's greedy tokens with transformers' on one exported checkpoint: ten images and ten answers.

    python eval/vllm_ids.py --vllm-python ENVIRONMENT/bin/python [--model FOLDER] [--json FILE]

vLLM and unimm want different versions of transformers, so vLLM runs as a process of an environment of its own, where
unimm is installed without its dependencies (docs/export.md). Exit code 1 if a token differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from unimm.errors import UserError, run_main
from unimm.runs.report import Report

COLORS, SHAPES = ("red", "blue", "green", "yellow", "purple"), ("circle", "square")
ANSWER_TOKENS = 8
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, asked = sys.argv[1], json.load(sys.stdin)
    # a share of all memory, which vLLM wants to find free: its default of 0.92 fails beside anything else
    few = {"max_model_len": 512, "gpu_memory_utilization": 0.3}
    llm = LLM(folder, dtype="float32", enforce_eager=True, **few)
    found = {}
    for kind, options in asked["options"].items():
        prompts = [{"prompt_token_ids": ids} for ids in asked[kind]]
        answers = llm.generate(prompts, SamplingParams(temperature=0, **options))
        found[kind] = [list(answer.outputs[0].token_ids) for answer in answers]
    print("FOUND" + json.dumps(found))
"""


def expected_tokens(folder: Path, asked: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Return the greedy tokens of transformers' plain `generate` for each prompt by kind, "images" and "answers"."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    about = json.loads((folder / "image_vocabulary.json").read_text(encoding="utf-8"))
    forbidden = {
        "images": list(range(about["image_vocab_start"])),
        "answers": list(range(about["text_vocab_size"], model.config.vocab_size)),
    }
    return {
        kind: [
            model.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=asked["options"][kind]["max_tokens"],
                suppress_tokens=forbidden[kind],
            )[0, len(ids) :].tolist()
            for ids in asked[kind]
        ]
        for kind in forbidden
    }


def compare(model_path: str | None, vllm_python: str, report: Report) -> int:
    """Export the model, ask both engines, and report how many token sequences are equal; return the exit code."""
    from unimm.mllm import load
    from unimm.mllm.export import save_generation

    model, processor = load(model_path, device="cpu")
    names = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    questions = [[{"role": "user", "content": f"is there {name}?"}] for name in names]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in questions]
    rows, columns = model.config.image_grid
    asked = {
        "images": processor.tokenizer([processor.drawing_prompt(name) for name in names])["input_ids"],
        "answers": processor.tokenizer(texts)["input_ids"],
        "options": {
            "images": {"max_tokens": rows * columns, "extra_args": {"draw": True}},
            "answers": {"max_tokens": ANSWER_TOKENS},
        },
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_generation(model, processor, folder)
        with report.timed("transformers"):
            expected = expected_tokens(folder, asked)
        with report.timed("vllm"):
            done = subprocess.run(
                [vllm_python, "-c", SERVE, place],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
            )
    lines = [line.removeprefix("FOUND") for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if not lines:
        raise UserError(
            f"vLLM did not run in {vllm_python}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    found = json.loads(lines[0])
    equal = {kind: sum(a == b for a, b in zip(expected[kind], found[kind], strict=True)) for kind in expected}
    report.add(equal=equal, asked={kind: len(expected[kind]) for kind in expected})
    report.say("\n".join(f"{kind}: {equal[kind]} of {len(expected[kind])} equal" for kind in expected))
    return 0 if all(equal[kind] == len(expected[kind]) for kind in expected) else 1


def main() -> int:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="a unified model (default: the embedded model)")
    parser.add_argument("--vllm-python", required=True, metavar="PATH", help="the interpreter of vLLM's environment")
    parser.add_argument("--json", metavar="FILE", help="report as one JSON object; - for standard output")
    arguments = parser.parse_args()
    report = Report(arguments.json)
    code = compare(arguments.model, arguments.vllm_python, report)
    report.write()
    return code


if __name__ == "__main__":
    sys.exit(run_main(main, name="vllm_ids"))
