"""Every argument of `generate`, in both modes: as the host, or one sentence, as docs/attach.md has it in its table."""

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, WatermarkingConfig
from transformers.generation import CompileConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.arguments import IMAGE_MODE_IGNORES, IMAGE_MODE_REFUSES, TEXT_MODE_REFUSES
from unimm.testing.hosts import tiny_host

DOCS = Path(__file__).resolve().parents[2] / "docs/attach.md"
INPUTS = ("attention_mask", "past_key_values", "position_ids", "inputs_embeds", "mm_encoder_outputs", "image_sizes")
"""Arguments of the models that callers of `generate` give, beside its own and the fields of the config."""
OURS = (
    "seed",
    "guidance_interval",
    "guidance_schedule",
    "compile",
    "tokenizer",
    "assistant_tokenizer",
    "trust_remote_code",
)
LATER = ("continuous_batching_config", "transformers_version")  # no settings of one call


def documented() -> dict[str, tuple[str, str]]:
    """Argument -> (text mode, image mode), from the table of the page."""
    section = DOCS.read_text().partition("## `generate`, argument by argument")[2].partition("\n## ")[0]
    found: dict[str, tuple[str, str]] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, text, image = (cell.strip() for cell in line.strip("|\n").split("|"))
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), (text, image))
    return found


TABLE = documented()


class Ban(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(150), -torch.inf)


class Stop(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 20)


class Streamed(BaseStreamer):
    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@cache
def parts(family: str) -> tuple[Any, Any, Any]:
    """A host, the model that it became, and its processor; both with the same special tokens."""
    host, texts = (tiny.language_model(rows=304), tiny.text_tokenizer()) if family == "qwen3" else tiny_host(family)
    model, processor = attach(host, tiny.image_tokenizer(), texts)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(host.generation_config, name, getattr(model.generation_config, name))
    return host, model, processor


def prompts(processor: Any) -> dict[str, Tensor]:
    batch = processor.tokenizer(["a photo of a red circle", "two", "an image"], return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def samples(name: str, model: Any, processor: Any) -> list[dict[str, Any]]:
    """Arguments that try `name` out, with what it needs beside it; `one`: for a single prompt."""
    batch = prompts(processor)
    assistant = {"assistant_model": tiny.language_model(rows=model.config.text_vocab_size), "one": True}
    sampled: dict[str, Any] = {"do_sample": True}
    tries: dict[str, Any] = {
        "do_sample": [sampled],
        **{k: [{**sampled, k: v}] for k, v in {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1}.items()},
        **{k: [{**sampled, k: v}] for k, v in {"top_h": 0.4, "typical_p": 0.5}.items()},
        **{k: [{**sampled, k: 0.01}] for k in ("epsilon_cutoff", "eta_cutoff")},
        "guidance_scale": [{"guidance_scale": 2.0}, {"guidance_scale": 2.0, "num_beams": 2}],
        "num_return_sequences": [{**sampled, "num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}],
        **{k: [{k: True, "return_dict_in_generate": True}] for k in ("output_scores", "output_logits")},
        **{k: [{k: True, "return_dict_in_generate": True}] for k in ("output_attentions", "output_hidden_states")},
        "inputs": [{"inputs": batch["input_ids"], "input_ids": None}],
        "generation_config": [{"generation_config": GenerationConfig(max_new_tokens=4), "max_new_tokens": None}],
        "streamer": [{"streamer": Streamed()}],
        "attention_mask": [{"attention_mask": None}, {"attention_mask": batch["attention_mask"].bool()}],
        **dict.fromkeys(("negative_prompt_ids", "negative_prompt_attention_mask"), [negative(batch)]),
        "max_length": [{"max_length": 20, "max_new_tokens": None}],
        "min_length": [{"min_length": 20, "eos_token_id": 5}],
        "min_new_tokens": [{"min_new_tokens": 4, "eos_token_id": 5}],
        "eos_token_id": [{"eos_token_id": [5, 6, 7]}],
        "tokenizer": [{"tokenizer": processor.tokenizer}],
        "stop_strings": [{"stop_strings": ["e"], "tokenizer": processor.tokenizer}],
        "num_beams": [{"num_beams": 3}, {**sampled, "num_beams": 3}],
        "early_stopping": [{"num_beams": 3, "early_stopping": True}],
        "length_penalty": [{"num_beams": 3, "length_penalty": 0.5}],
        "num_beam_groups": [{"num_beam_groups": 2, "num_beams": 2}],
        "force_words_ids": [{"force_words_ids": [[5]], "num_beams": 2}],
        "constraints": [{"constraints": [object()], "num_beams": 2}],
        "penalty_alpha": [{"penalty_alpha": 0.5, "top_k": 4}],
        "dola_layers": [{"dola_layers": "low"}],
        "bad_words_ids": [{"bad_words_ids": [[5], [7, 8]]}],
        **{k: [{k: list(range(150))}] for k in ("suppress_tokens", "begin_suppress_tokens")},
        "sequence_bias": [{"sequence_bias": [[[200], 4.0]]}],
        "token_healing": [{"token_healing": True, "tokenizer": processor.tokenizer}],
        "watermarking_config": [{"watermarking_config": WatermarkingConfig(bias=2.5)}],
        "logits_processor": [{"logits_processor": LogitsProcessorList([Ban()])}],
        "prefix_allowed_tokens_fn": [{"prefix_allowed_tokens_fn": lambda row, ids: [1, 3, 4]}],
        "stopping_criteria": [{"stopping_criteria": StoppingCriteriaList([Stop()])}],
        "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5}],
        "assistant_model": [assistant, {**assistant, **sampled}, {**assistant, "one": False}],
        "assistant_ensemble_weight": [{**assistant, **sampled, "assistant_ensemble_weight": 0.5}],
        "assistant_tokenizer": [{"assistant_tokenizer": processor.tokenizer}],
        **{
            k: [{**assistant, k: v}]
            for k, v in {
                "num_assistant_tokens": 3,
                "num_assistant_tokens_schedule": "heuristic",
                "assistant_confidence_threshold": 0.1,
                "assistant_lookbehind": 5,
                "target_lookbehind": 5,
                "speculation_type": "dflash",
            }.items()
        },
        "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3, "one": True}],
        "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 3, "one": True}],
        "cache_implementation": [{"cache_implementation": kind} for kind in ("quantized", "offloaded")],
        "cache_config": [{"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}}],
        "max_cache_len": [{"cache_implementation": "static", "max_cache_len": 100}],
        "past_key_values": [{"past_key_values": DynamicCache()}],
        "compile_config": [{"compile_config": CompileConfig()}],
        "inputs_embeds": [{"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}],
        "position_ids": [{"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}],
        "mm_encoder_outputs": [{"mm_encoder_outputs": {"image": object()}}],
        "image_sizes": [{"image_sizes": torch.tensor([[16, 16]])}],
        "custom_generate": [{"custom_generate": lambda model, input_ids, **kwargs: input_ids + 1}],
        "trust_remote_code": [{"trust_remote_code": True}],
        "seed": [{"seed": 1}],
        "guidance_interval": [{"guidance_interval": (2, 9), "guidance_scale": 2.0}],
        "guidance_schedule": [{"guidance_schedule": "linear", "guidance_scale": 2.0}],
        "compile": [],  # tried out in test_decoding.py
        "synced_gpus": [{"synced_gpus": False}],
    }
    numbers = {"max_new_tokens": 5, "bos_token_id": 3, "pad_token_id": 3, "max_time": 100.0, "diversity_penalty": 0.5}
    numbers |= {"repetition_penalty": 1.5, "encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 1}
    numbers |= {"encoder_no_repeat_ngram_size": 2, "forced_bos_token_id": 9, "forced_eos_token_id": 9}
    numbers |= {"prefill_chunk_size": 4, "decoder_start_token_id": 3, "assistant_early_exit": 1}
    tries |= {k: [{k: v}] for k, v in numbers.items()}
    return tries.get(name, [{name: True}])


def negative(batch: dict[str, Tensor]) -> dict[str, Any]:
    flipped = {
        f"negative_prompt_{k}": v.flip(0) for k, v in zip(("ids", "attention_mask"), batch.values(), strict=True)
    }
    return {"guidance_scale": 2.0, **flipped}


def outcome(model: Any, processor: Any, options: dict[str, Any], **mode: Any) -> Any:
    """What `generate` gives, or the error that it raises as (type, message)."""
    options = dict(options)
    batch = {name: value[:1] for name, value in prompts(processor).items()} if options.pop("one", False) else None
    torch.manual_seed(0)
    arguments = {**(batch or prompts(processor)), "max_new_tokens": 8, **options, **mode}
    try:
        return model.generate(**{name: value for name, value in arguments.items() if value is not None})
    except UserError as error:
        return error
    except Exception as error:
        return type(error), str(error)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple | UserError):
        assert found == expected
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found.keys() == expected.keys() and torch.equal(found.sequences, expected.sequences)
        for name in {"scores", "logits"} & expected.keys():
            assert all(torch.equal(a, b) for a, b in zip(found[name], expected[name], strict=True))


def test_the_table_holds_every_argument_and_the_code_the_same_sentences() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - set(LATER)
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert set(TABLE) == fields | parameters | set(INPUTS) | set(OURS)
    for name, (text, image) in TABLE.items():
        assert image.startswith(
            f"refused: {IMAGE_MODE_REFUSES[name]}" if name in IMAGE_MODE_REFUSES else ("works", "no")
        )
        assert (image == "no effect") == (name in IMAGE_MODE_IGNORES)
        assert text == "as the host" or name in (*TEXT_MODE_REFUSES, "seed")


@pytest.mark.parametrize("name", [name for name, (text, _) in TABLE.items() if text == "as the host"])
def test_text_mode_is_the_host(name: str) -> None:
    host, model, processor = parts("qwen3")
    if name in ("mm_encoder_outputs", "image_sizes"):  # a text-only host has none
        return
    for options in samples(name, model, processor):
        theirs = dict(options)
        if "inputs_embeds" in theirs:
            theirs["inputs_embeds"] = host.get_input_embeddings()(prompts(processor)["input_ids"])
        if "past_key_values" in theirs:
            theirs["past_key_values"] = DynamicCache()
        assert_same(outcome(model, processor, options), outcome(host, processor, theirs))


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_text_mode_of_multimodal_hosts_is_the_host(family: str) -> None:
    host, model, processor = parts(family)
    names = ["do_sample", "num_beams", "watermarking_config", "min_length"]
    if "qwen" not in family:  # the stock Qwen-VLs fail on guidance in text with an error of shapes
        names += ["guidance_scale", "negative_prompt_ids"]
    for name in names:
        for options in samples(name, model, processor):
            assert_same(outcome(model, processor, options), outcome(host, processor, options))


@pytest.mark.parametrize("name", TABLE)
def test_image_mode_is_what_the_table_says(name: str) -> None:
    _, model, processor = parts("qwen3")
    text, image = TABLE[name]
    plain = outcome(model, processor, {}, generation_mode="image", seed=3)
    for options in samples(name, model, processor):
        drawn = outcome(model, processor, {"seed": 3} | options, generation_mode="image")
        if image.startswith("refused: "):
            refused = sorted(key for key in options if key in IMAGE_MODE_REFUSES)
            sentences = {f"image mode does not take {key}: {IMAGE_MODE_REFUSES[key]}" for key in refused}
            assert isinstance(drawn, UserError) and str(drawn) in sentences
        elif "num_beams" not in options:
            ids = drawn if isinstance(drawn, Tensor) else drawn.sequences
            assert ids.shape[1] == 16 and model.visual_vocabulary.contains(ids).all()
            assert image == "works" or torch.equal(ids, plain)


def test_text_mode_refuses_in_one_sentence() -> None:
    _, model, processor = parts("qwen3")
    for options, sentence in (
        ({"assistant_early_exit": 1}, TEXT_MODE_REFUSES["assistant_early_exit"]),
        ({"guidance_interval": (2, 9)}, TEXT_MODE_REFUSES["guidance_interval"]),
        ({"compile": True}, TEXT_MODE_REFUSES["compile"]),
        ({"cache_implementation": "paged"}, TEXT_MODE_REFUSES["cache_implementation"]),
        ({"assistant_model": tiny.language_model(rows=100)}, "has 100 text tokens and this model 304"),
    ):
        error = outcome(model, processor, options)
        assert isinstance(error, UserError) and sentence in str(error)
    assert outcome(model, processor, {"seed": 1}) == (ValueError, TABLE["seed"][0].removeprefix("refused: "))
    with pytest.raises(UserError, match="rows of the vocabulary that stand for no text"):
        model.generate_batch([[1, 2]])


def test_fields_of_a_config_count_like_arguments_in_image_mode() -> None:
    _, model, processor = parts("qwen3")
    greedy = outcome(model, processor, {"do_sample": False}, generation_mode="image")
    own = model.generation_config.to_dict()
    for fields in ({"do_sample": False}, {**own, "do_sample": False}):
        drawn = outcome(model, processor, {"generation_config": GenerationConfig(**fields)}, generation_mode="image")
        assert torch.equal(drawn, greedy)
    beams = outcome(model, processor, {"generation_config": GenerationConfig(num_beams=2)}, generation_mode="image")
    assert "does not take num_beams" in str(beams)
    two = GenerationConfig(do_sample=True, num_return_sequences=2)
    assert outcome(model, processor, {"generation_config": two}, generation_mode="image").shape == (6, 16)


def test_transition_scores_are_the_hosts() -> None:
    host, model, processor = parts("qwen3")
    options = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    for normalize in (False, True):
        found, expected = (
            each.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=normalize)
            for each, out in ((each, outcome(each, processor, options)) for each in (model, host))
        )
        torch.testing.assert_close(found, expected)


def test_padding_without_a_mask_in_image_mode() -> None:
    _, model, processor = parts("qwen3")
    batch = prompts(processor)
    draw: dict[str, Any] = {"generation_mode": "image", "do_sample": False}
    assert torch.equal(model.generate(batch["input_ids"], **draw), model.generate(**batch, **draw))
    with pytest.raises(UserError, match="padded on the right"):
        model.generate(batch["input_ids"].flip(1), **draw)
    with pytest.raises(UserError, match=r"attention_mask has the shape \[3, 1, \d+\] and input_ids \[3, \d+\]"):
        model.generate(batch["input_ids"], attention_mask=batch["attention_mask"][:, None], **draw)
    for wrong in (batch["input_ids"][0], batch["input_ids"][:, :0], batch["input_ids"].float()):
        with pytest.raises(UserError, match="input_ids has the shape"):
            model.generate(wrong, **draw)
    config, begin = model.generation_config, int(batch["input_ids"][0, 1])
    config.bos_token_id = config.pad_token_id
    try:
        with pytest.raises(UserError, match="also begins prompts"):
            model.generate(batch["input_ids"], **draw)
        begun = torch.tensor([[config.pad_token_id, begin]])
        expected = model.generate(begun, attention_mask=torch.ones_like(begun), **draw)
        assert torch.equal(model.generate(begun, **draw), expected)
    finally:
        config.bos_token_id = None
