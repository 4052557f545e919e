"""Generations with random settings, for the fuzzer: every one must parse and decode.

A case is a JSON file: the host, the mode, prompts of several lengths with and without images, and every setting of
sampling, guidance, parallel decoding and forced tokens. A UserError is a defect here, as all settings are valid.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.answering import chat_inputs
from unimm.testing.hosts import tiny_host, tiny_tokenizer

HOSTS = ("qwen3", "llama", "internvl", "llava_onevision", "qwen3_vl")
MODES = ("image", "image", "interleaved")
M, K = 16, 32
_WORDS = ("one", "two", "a red circle", "what?", "<|im_end|>", "", "<|image_pad|> in text", "green squares " * 8)


class Generations:
    """`generate` in image and interleaved mode, on tiny hosts of random weights."""

    def __init__(self, folder: Path) -> None:
        self.hosts: dict[str, tuple[Any, Any]] = {}

    def host(self, name: str) -> tuple[Any, Any]:
        """Return model and processor, built once."""
        if name not in self.hosts:
            host, tokenizer = tiny_host(name)
            options = {"image_position_mode": "2d"} if name == "qwen3_vl" else {}
            self.hosts[name] = attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], tokenizer, **options)
        return self.hosts[name]

    def damage(self, rng: random.Random, folder: Path) -> str:
        """Write a random case."""
        mode, prompts = rng.choice(MODES), [[rng.choice(_WORDS), rng.random() < 0.3] for _ in range(rng.randint(1, 4))]
        case: dict[str, Any] = {"host": rng.choice(HOSTS), "mode": mode, "prompts": prompts}
        case["parallel_tokens"] = rng.choice([1, 1, 2, 5, M + 3, "auto"])
        case["seed"] = rng.choice([None, rng.randrange(2**40), [rng.randrange(99) for _ in prompts]])
        case["images"] = _sampling(rng, len(prompts))
        if mode == "interleaved":
            case["max_new_tokens"] = rng.randint(M + 2, 3 * M)
            case["bias"] = rng.choice([0.0, 3.0, 6.0, 100.0])
            case["text"] = {"do_sample": True, "temperature": rng.choice([0.1, 1.0, 30.0]), "top_k": rng.choice([0, 5])}
            case["text"] |= rng.choice([{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
        else:
            greedy = not case["images"].get("do_sample", True) or case["images"].get("temperature") == 0
            case["repeats"] = 1 if greedy else rng.randint(1, 2)
            share, rows = rng.choice([0.0, 0.0, 0.1, 0.5, 0.9, 1.0]), len(prompts) * rng.choice([1, case["repeats"]])
            case["forced"] = [[rng.randrange(K) if rng.random() < share else -1 for _ in range(M)] for _ in range(rows)]
        (folder / "case.json").write_text(json.dumps(case))
        return json.dumps({name: value for name, value in case.items() if name not in ("prompts", "forced")})

    def use(self, folder: Path) -> None:
        """Generate, and hold the result against the case."""
        case = json.loads((folder / "case.json").read_text())
        model, processor = self.host(case["host"])
        chats = [[tiny.user(*([tiny.image()] if image else []), text)] for text, image in case["prompts"]]
        inputs = chat_inputs(model, processor, chats)
        torch.manual_seed(len(str(case)))
        run = _interleaved if case["mode"] == "interleaved" else _drawn
        try:
            token_ids = run(model, processor, inputs, case)
        except UserError as error:
            raise AssertionError(f"valid settings were refused: {error}") from error
        if len(token_ids):
            pixels = model.decode_image_tokens(token_ids)
            assert pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1
            assert [image.size for image in processor.postprocess(pixels)] == [(16, 16)] * len(token_ids)


def _sampling(rng: random.Random, prompts: int) -> dict[str, Any]:
    """Return settings of `ImageSampling`, each of them given in half of the cases."""
    scales = [None, 0, 1, 1.5, 7.5, [rng.choice([0, 1, 3.0]) for _ in range(prompts)]]
    start = rng.randrange(M)
    choices: dict[str, list[Any]] = {
        "do_sample": [True, True, False],
        "temperature": [0, 0.01, 0.7, 1, 50.0],
        "top_k": [0, 1, 5, K, 10 * K],
        "top_p": [1e-6, 0.3, 0.9, 1.0],
        "min_p": [0.0, 0.05, 0.99],
        "guidance_scale": scales,
        "guidance_interval": [None, [start, rng.randint(start, 2 * M)]],
        "guidance_schedule": ["constant", "linear"],
    }
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}


def _drawn(model: Any, processor: Any, inputs: Any, case: dict[str, Any]) -> Tensor:
    """Draw images; return their token ids [S, M]."""
    forced = torch.tensor(case["forced"])
    kept = torch.where(forced < 0, -1, forced + model.visual_vocabulary.base)
    token_ids = model.generate(
        **inputs,
        generation_mode="image",
        num_return_sequences=case["repeats"],
        forced_token_ids=kept if (kept >= 0).any() else None,
        seed=case["seed"],
        parallel_tokens=case["parallel_tokens"],
        **case["images"],
    )
    sequences = len(case["prompts"]) * case["repeats"]
    assert token_ids.shape == (sequences, M) and model.visual_vocabulary.contains(token_ids).all()
    kept = kept.repeat_interleave(sequences // len(kept), 0)
    assert torch.equal(token_ids[kept >= 0], kept[kept >= 0]), "forced token ids are kept"
    return token_ids


def _interleaved(model: Any, processor: Any, inputs: Any, case: dict[str, Any]) -> Tensor:
    """Generate interleaved answers; return the token ids [I, M] of their images."""
    config, vocabulary, length = model.config, model.visual_vocabulary, inputs["input_ids"].shape[1]
    written = model.generate(
        **inputs,
        generation_mode="interleaved",
        max_new_tokens=case["max_new_tokens"],
        sequence_bias=[[[config.boi_token_id], case["bias"]]] if case["bias"] else None,
        seed=case["seed"],
        parallel_tokens=case["parallel_tokens"],
        image_generation=case["images"],
        **case["text"],
    )
    assert torch.equal(written[:, :length], inputs["input_ids"]) and written.shape[1] - length <= case["max_new_tokens"]
    for row in written[:, length:].tolist():
        while row:  # a plain state machine: text, or a whole image with its markers
            token, drawn = row[0], row[1 : M + 1]
            if token == config.boi_token_id:
                assert len(drawn) == M and all(vocabulary.base <= each < vocabulary.end for each in drawn)
                assert row[M + 1] == config.eoi_token_id
            else:
                assert token < config.text_vocab_size and token not in (config.eoi_token_id, config.image_token_id)
            row = row[M + 2 if token == config.boi_token_id else 1 :]
    parts = [part for row in processor.split_parts(written[:, length:]) for part in row]
    ids = [part["ids"] for part in parts if part["type"] == "image"]
    assert len(ids) == int((written[:, length:] == config.boi_token_id).sum())
    return vocabulary.token_ids(torch.stack(ids)) if ids else torch.empty(0, M)
