"""Let a language model answer a list of prompts greedily, and keep the answers as text conversations to train on.

    python recipes/own_answers.py --model runs/smol/host --prompts configs/smol/prompts.txt --output talk.jsonl

A model that goes on to learn images forgets less of its language if its own answers are among what it trains on. Only
answers that end by themselves within `--max-new-tokens` are kept. The file is in LLaVA's format, without images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from unimm.errors import UserError, reading, run_main
from unimm.runs.provenance import check_output, write_atomically


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str | None]:
    """Return the greedy answer to each prompt, None if it does not end within `max_new_tokens`."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new, ends = written[:, inputs["input_ids"].shape[1] :], model.generation_config.eos_token_id
    ended = torch.isin(new, torch.tensor(ends)).any(1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() if done and text.strip() else None for text, done in zip(texts, ended, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a language model with a chat template")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="answer the first prompts only")
    arguments = parser.parse_args(argv)
    if not arguments.prompts.is_file():
        raise UserError(f"There is no file {arguments.prompts}.")
    check_output(str(arguments.output), "answers")
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.limit]
    with reading("The language model", arguments.model):
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    rows = []
    for start in tqdm(range(0, len(prompts), arguments.batch_size), unit="batch"):
        batch = prompts[start : start + arguments.batch_size]
        for prompt, text in zip(batch, answers(model, tokenizer, batch, arguments.max_new_tokens), strict=True):
            if text is not None:
                turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": text}]
                rows.append(json.dumps({"conversations": turns}, ensure_ascii=False))
    if not rows:
        raise UserError(f"None of {len(prompts)} answers ended within {arguments.max_new_tokens} tokens: allow more.")
    write_atomically(str(arguments.output), "\n".join(rows) + "\n")
    print(f"{arguments.output}: {len(rows)} of {len(prompts)} answers ended within {arguments.max_new_tokens} tokens")


if __name__ == "__main__":
    sys.exit(run_main(main, name="own_answers"))
