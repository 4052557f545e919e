"""200 awkward conversations in LLaVA's format are trained on, every token of the assistant and no other.

What should be learned is computed without the chat template, its spans and the tokenizer's offsets: the text is written
out by hand, the tokens' own bytes are laid end to end over it, and a token is learned if its bytes touch an answer's.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.language_model.tiny_host import LLM, tiny_image_tokenizer
from unimm.data.conversations import shapes_corpus
from unimm.data.mixture import FlowConfig, MixtureConfig, training_streams
from unimm.data.text.collators import IGNORED, FlowCollator
from unimm.mllm import attach
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import END_OF_TEXT, train_text_tokenizer
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments

COUNT, BATCH = 200, 10
PIECES = (
    [
        "",
        " ",
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u200d",
        "\ufeff",
        "yes",
        "no.",
        " a  b ",
        "red circle",
        "0" * 40,
    ]
    + ["ASSISTANT:", " ASSISTANT: no USER: yes", "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n", END_OF_TEXT]
    + ["{% generation %}", "{{ messages }}", "[/INST]", "</s>", "<image", "image>", "\\n", "'", '"', "<|im_", "end|>"]
    + [
        "é",
        "e\u0301",
        "漢字",
        "مرحبا",
        "\U0001f642",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\ud7ff",
        "\U0010ffff",
    ]
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"


def text(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.choice([0, 0, 1, 2, 5])))


def record(rng: random.Random, raw_images: list[str]) -> dict[str, Any]:
    questions = [text(rng) for _ in range(rng.randint(1, 4))]
    images = rng.choices(raw_images, k=rng.choice([0, 1, 1, 2, 3]))
    for _ in images:
        turn = rng.randrange(len(questions))
        cut = rng.randint(0, len(questions[turn]))
        questions[turn] = questions[turn][:cut] + "<image>" + questions[turn][cut:]
    turns = [{"from": who, "value": said} for q in questions for who, said in (("human", q), ("gpt", text(rng)))]
    if rng.random() < 0.1:
        turns.insert(0, {"from": "gpt", "value": "dropped"})
    if rng.random() < 0.1:
        turns.append({"from": "human", "value": "unanswered"})
    if sum(turn["value"].count("<image>") for turn in turns) != len(images):
        return record(rng, raw_images)  # pieces of two placeholders met and spelt a third
    return {"image": images[0] if len(images) == 1 else images, "conversations": turns}


def shown(question: str) -> str:
    """A question as LLaVA shows it: its only image in front, several where they stand."""
    if question.count("<image>") == 1:
        rest = question.replace("<image>", "").strip()
        return IMAGE + (f"\n{rest}" if rest else "")
    return question.replace("<image>", IMAGE)


def chatml(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Pieces of the text and whether they are learned."""
    pieces = []
    for who, said in turns:
        if who == "human":
            pieces.append((f"<|im_start|>user\n{shown(said)}<|im_end|>\n", False))
        else:
            pieces += [("<|im_start|>assistant\n", False), (f"{said}<|im_end|>", True), ("\n", False)]
    return pieces


def vicuna(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    pieces = [(VICUNA + " ", False)]
    for who, said in turns:
        if who == "human":
            pieces.append((f"USER: {shown(said)} ", False))
        else:
            pieces += [("ASSISTANT:", False), (f" {said}{END_OF_TEXT}", True)]
    return pieces


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's alphabet of visible symbols for the 256 bytes (https://github.com/openai/gpt-2, `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def expected_mask(tokens: list[str], special: set[str], pieces: list[tuple[str, bool]]) -> list[bool]:
    """Whether each token touches a learned piece, by bytes."""
    symbols = byte_of_symbol()
    written = [t.encode() if t in special else bytes(symbols[symbol] for symbol in t) for t in tokens]
    learned = [flag for piece, flag in pieces for _ in piece.encode()]
    whole = b"".join(piece.encode() for piece, _ in pieces)
    assert whole.startswith(b"".join(written))  # what follows the last learned token is cut off
    mask, place = [], 0
    for token in written:
        mask.append(any(learned[place : place + len(token)]))
        place += len(token)
    assert not any(learned[place:])
    return mask


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("llava")
    names = ["red.png", "wide.png"]
    Image.new("RGB", (40, 40), "red").save(folder / names[0])
    Image.new("RGB", (90, 20), "blue").save(folder / names[1])
    rng = random.Random(0)
    rows = [record(rng, names) for _ in range(COUNT)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, rows


@pytest.mark.parametrize(("name", "write"), [(None, chatml), ("vicuna_v1", vicuna)], ids=["chatml", "vicuna_v1"])
def test_every_answers_tokens_are_learned_and_no_other(
    tmp_path: Path, records: tuple[Path, list[dict[str, Any]]], name: str | None, write: Any
) -> None:
    folder, rows = records
    texts = train_text_tokenizer(shapes_corpus(50, 0), 400, CHAT_TOKENS)
    model, processor = attach(new_language_model(LLM, texts), tiny_image_tokenizer(), texts, chat_template=name)
    flow = FlowConfig("conversation", source=str(folder / "talk.jsonl"), image_folder=str(folder), max_bad_share=0.0)
    train, test = training_streams(MixtureConfig({"talk": flow}, num_eval_samples=0))
    assert len(train.sources[0]) == COUNT  # nothing was skipped
    special = {token.content for token in processor.tokenizer.added_tokens_decoder.values()}
    collate, learned = FlowCollator(processor), 0
    for start in range(0, COUNT, BATCH):
        samples = [
            {"flow": "talk", "kind": "conversation", "index": n, "messages": train.sources[0].messages(n)}
            for n in range(start, start + BATCH)
        ]
        batch = collate(samples)["talk"]
        for row, ids, labels, mask in zip(
            rows[start : start + BATCH], batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
            turns = turns[1:] if turns[0][0] == "gpt" else turns
            tokens = processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()])
            found = (labels[mask.bool()] != IGNORED).tolist()
            assert found == expected_mask(tokens, special, write(turns))
            assert (labels[~mask.bool()] == IGNORED).all()
            learned += sum(found)
    assert learned > 3 * COUNT
    trainer = HostTrainer(
        model,
        HostTrainingArguments(
            str(tmp_path),
            max_steps=COUNT // BATCH,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        processor=processor,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=test,
        flow_weights={"talk": 1.0},
    )
    trainer.train()  # one pass: every conversation once
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == COUNT // BATCH
    assert torch.tensor(losses).isfinite().all() and min(losses) > 0
