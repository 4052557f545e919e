"""Measure how much of its language a model keeps: perplexity on fixed sentences, and greedy answers to 20 prompts.

    python eval/text.py --model runs/smol/host --json before.json              # a plain language model
    python eval/text.py --model runs/smol/merged --reference runs/smol/host --json after.json

`--model` is a plain language model or a unified one. The sentences and prompts are none that a recipe trains on. With
`--reference`, the model before training, the report also says in how many prompts both answer the same, and what
perplexity the model has on the reference's answers. `--json FILE` writes {perplexity, answers: [{prompt, answer, ...}],
and with a reference: same_answers, perplexity_of_reference_answers}.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from unimm.checkpoint_files import read_settings
from unimm.errors import reading, run_main
from unimm.mllm import load
from unimm.mllm.hosts.registry import HOSTS
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report

SENTENCES = (
    "The museum opens at nine in the morning and closes when the last visitor has left.",
    "Water freezes at zero degrees Celsius and boils at one hundred.",
    "She put the letter into her pocket and walked quickly towards the station.",
    "Most of the houses in the village were built of stone from the nearby hills.",
    "A good recipe begins with fresh ingredients and a sharp knife.",
    "The committee will meet again next Thursday to discuss the budget.",
    "Photosynthesis is the process by which plants turn light into chemical energy.",
    "When the storm was over, the children ran down to the beach to look for shells.",
    "He had never seen so many books in one room.",
    "The price of oil fell sharply after the announcement.",
    "To solve the equation, subtract five from both sides and divide by two.",
    "Paris, the capital of France, lies on the river Seine.",
    "My grandmother used to tell us stories about the war.",
    "The engine made a strange noise, and then it stopped.",
    "Scientists have found traces of water on the surface of the moon.",
    "You should drink more water and get enough sleep.",
    "The first computers filled whole rooms and were slower than a modern phone.",
    "If it rains tomorrow, we will stay at home and play cards.",
    "The judge asked the witness to repeat what she had said.",
    "An apple a day keeps the doctor away.",
)
PROMPTS = (
    "What is the capital of France?",
    "What is 2 plus 2?",
    "Name three vegetables.",
    "What is the opposite of cold?",
    "Who wrote Hamlet?",
    "What is a triangle?",
    "Explain why the sky is blue in one sentence.",
    "How many legs does a spider have?",
    "Translate \"good night\" into French.",
    "Give me a synonym for happy.",
    "What do cats eat?",
    "Write one sentence about a lighthouse.",
    "What language is spoken in Brazil?",
    "Which planet is closest to the sun?",
    "How do I make toast?",
    "Correct this sentence: He don't like apples.",
    "What is a circle?",
    "Give me one tip for writing well.",
    "What season comes after winter?",
    "Tell me a fact about elephants.",
)  # fmt: skip
MAX_NEW_TOKENS = 64


class TextModel:
    """A language model, plain or unified, as text generation uses it."""

    def __init__(self, path: str) -> None:
        unified = False
        if (config := Path(path, "config.json")).is_file():
            unified = read_settings(config).get("model_type") in {
                family.config_class.model_type for family in HOSTS.values()
            }
        if unified or path == "default":
            self.model, processor = load(path)
            self.tokenizer = processor.tokenizer
        else:
            with reading("The language model", path):
                self.tokenizer = AutoTokenizer.from_pretrained(path)
                self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.how: dict[str, Any] = {"vocabulary": "answer"} if unified or path == "default" else {}

    @torch.inference_mode()
    def nats(self, ids: list[int], start: int) -> tuple[float, int]:
        """Return the negative log likelihood of ids[start:] in nats, and their number; `start` is at least 1."""
        inputs = torch.tensor([ids], device=self.model.device)
        logits = self.model(input_ids=inputs, **self.how).logits[0, start - 1 : -1].float()
        return float(F.cross_entropy(logits, inputs[0, start:], reduction="sum")), len(ids) - start

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt in the chat template."""
        chat = [{"role": "user", "content": prompt}]
        found = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(found)

    @torch.inference_mode()
    def answer_ids(self, prompt: str) -> list[int]:
        """Return the token ids of the greedy answer."""
        inputs = torch.tensor([self.prompt_ids(prompt)], device=self.model.device)
        mask = torch.ones_like(inputs)
        out = self.model.generate(inputs, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        return list(out[0, inputs.shape[1] :].tolist())

    def perplexity(self, rows: Sequence[tuple[list[int], int]]) -> float:
        """Return exp of the mean negative log likelihood over all tokens of rows (ids, start)."""
        found = [self.nats(ids, start) for ids, start in rows]
        total, count = sum(nats for nats, _ in found), sum(tokens for _, tokens in found)
        return float(torch.tensor(total / count, dtype=torch.float64).exp())


def measured(model: TextModel, reference: TextModel | None, prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Return the report, see the module."""
    begin = [model.tokenizer.bos_token_id or model.tokenizer.eos_token_id]
    sentences = [(begin + model.tokenizer(text, add_special_tokens=False)["input_ids"], 1) for text in SENTENCES]
    report: dict[str, Any] = {"perplexity": model.perplexity(sentences), "answers": []}
    theirs = []
    for prompt in tqdm(prompts, unit="prompt", leave=False):
        ids = model.answer_ids(prompt)
        row: dict[str, Any] = {"prompt": prompt, "answer": model.tokenizer.decode(ids, skip_special_tokens=True)}
        if reference is not None:
            expected, start = reference.answer_ids(prompt), model.prompt_ids(prompt)
            row |= {"reference": reference.tokenizer.decode(expected, skip_special_tokens=True)}
            row |= {"same": ids == expected}
            theirs.append((start + expected, len(start)))
        report["answers"].append(row)
    if reference is not None:
        report["same_answers"] = sum(row["same"] for row in report["answers"]) / len(prompts)
        report["perplexity_of_reference_answers"] = model.perplexity(theirs)
        report["reference_perplexity"] = reference.perplexity(sentences)
        report["reference_perplexity_of_its_answers"] = reference.perplexity(theirs)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a plain or unified language model")
    parser.add_argument("--reference", help="the language model before training")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="ask the first prompts only")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    with report.timed("all"):
        reference = None if arguments.reference is None else TextModel(arguments.reference)
        found = measured(TextModel(arguments.model), reference, PROMPTS[: arguments.prompts])
    for row in found["answers"]:
        report.say(f"{row['prompt']}\n  {' '.join(row['answer'].split())}")
    report.say("\n".join(f"{name:<36} {value:.3f}" for name, value in found.items() if isinstance(value, float)))
    report.add(**found, model=arguments.model, reference=arguments.reference, commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="text"))
