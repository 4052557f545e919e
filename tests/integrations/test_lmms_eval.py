"""The model class that lmms-eval talks to: order, batches, settings, refusals, the cache, the plug-in."""

# ruff: noqa: E402
from tests.integrations.needs import require_lmms_eval

require_lmms_eval()

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

import unimm
from tests.mllm import host_templates
from unimm import cli
from unimm.errors import UserError
from unimm.evaluation.understanding import lmms_model as plugin
from unimm.evaluation.understanding import lmms_plugin
from unimm.evaluation.understanding.lmms_model import (
    ChatModel,
    UnimmChat,
    conversation,
    cut_at_first,
    generation_settings,
    short_fingerprint,
)
from unimm.mllm import attach
from unimm.mllm.answering import Answer
from unimm.testing.hosts import tiny_host, tiny_tokenizer

GREEDY = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.mark.parametrize(
    ("given", "settings", "until"),
    [
        (GREEDY, {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}, ()),
        ({"until": ["ASSISTANT:"], "image_aspect_ratio": "original"}, {"max_new_tokens": 64, "do_sample": False}, 1),
        ({"until": "\n\n", "temperature": 0.7}, {"max_new_tokens": 64, "temperature": 0.7, "do_sample": True}, 1),
        ({"do_sample": True}, {"max_new_tokens": 64, "do_sample": True}, ()),
        ({"do_sample": True, "temperature": 0, "top_k": 5}, {"max_new_tokens": 64, "do_sample": False}, ()),
        ({"do_sample": True, "temperature": None}, {"max_new_tokens": 64, "do_sample": False}, ()),
        ({"do_sample": False, "temperature": 0.7}, {"max_new_tokens": 64, "do_sample": False}, ()),
    ],
)
def test_settings_are_whitelisted_and_greedy_drops_sampling(given: Any, settings: Any, until: Any) -> None:
    found, ends = generation_settings(given, 64)
    assert found == settings and len(ends) == (until or 0)


def test_until_cuts_at_the_first_of_its_strings() -> None:
    assert cut_at_first("yes ASSISTANT: no\n\nmore", ("\n\n", "ASSISTANT:")) == "yes"
    assert cut_at_first("whole", ("", "\n\n")) == "whole"
    assert cut_at_first("whole", ()) == "whole"


def request(number: int, task: str, gen_kwargs: dict[str, Any], messages: Callable[[Any], Any]) -> Instance:
    arguments = (f"prompt {number}", messages, gen_kwargs, number, task, "test")
    metadata = {"task": task, "doc_id": number, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


def say(document: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": document["question"]}]}]


class Scripted:
    """In place of `answer_all`: says the question back, and remembers what it was asked together."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(self, model: Any, processor: Any, conversations: Sequence[Any], **settings: Any) -> list[Answer]:
        texts = [turns[-1]["content"][-1]["text"] for turns in conversations]
        self.batches.append((texts, settings))
        return [Answer(f"{text}\n\nand more", 7, 3) for text in texts]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted()
    monkeypatch.setattr(plugin, "answer_all", script)
    return script


def chat(**options: Any) -> ChatModel:
    model = ChatModel(SimpleNamespace(device=torch.device("cpu")), None, **options)
    model.task_dict = {task: {"test": [{"question": f"{task} {n}"} for n in range(5)]} for task in ("first", "second")}
    return model


def test_answers_come_in_the_order_of_the_requests_and_equal_settings_share_batches(scripted: Scripted) -> None:
    free = {"until": ["\n\n"]}
    asked = [request(n // 2, ("first", "second")[n % 2], free if n % 3 else GREEDY, say) for n in range(10)]
    answers = chat(batch_size=4).generate_until(asked)
    whole = [f"{('first', 'second')[n % 2]} {n // 2}" for n in range(10)]
    assert [answer.text for answer in answers] == [
        text if n % 3 else f"{text}\n\nand more" for n, text in enumerate(whole)
    ]
    assert {(answer.token_counts.input_tokens, answer.token_counts.output_tokens) for answer in answers} == {(7, 3)}
    assert sorted(len(texts) for texts, _ in scripted.batches) == [2, 4, 4]
    for texts, settings in scripted.batches:
        assert settings["max_new_tokens"] == (16 if texts[0] in whole[::3] else 64)


class Notes:
    """A memory that knows one answer."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, int, str, str]] = []
        self.began: list[str] = []

    def begin(self, documents: Any) -> None:
        self.began = sorted(documents)

    def recall(self, task: str, doc_id: int) -> Answer | None:
        return Answer("known", 1, 1) if doc_id in (1, *(number for _, number, *_ in self.kept)) else None

    def keep(self, task: str, doc_id: int, document: Any, prompt: str, answer: Answer) -> None:
        self.kept.append((document["question"], doc_id, prompt, answer.text))


def test_what_is_known_is_not_asked_again_and_what_is_new_is_kept_at_once(scripted: Scripted) -> None:
    notes = Notes()
    padding = 2  # lmms-eval repeats the last request of a rank that has fewer than the others
    asked = [request(number, "first", {**GREEDY, "until": ["\n\n"]}, say) for number in (0, 1, 2, padding)]
    answers = chat(batch_size=8, memory=notes).generate_until(asked)
    assert [answer.text for answer in answers] == ["first 0", "known", "first 2", "first 2"]
    assert scripted.batches[0][0] == ["first 0", "first 2", "first 2"] and notes.began == ["first", "second"]
    assert notes.kept == [("first 0", 0, "prompt 0", "first 0"), ("first 2", 2, "prompt 2", "first 2")]


def test_sampled_answers_are_not_remembered(scripted: Scripted) -> None:
    notes = Notes()
    asked = [request(1, "first", {"do_sample": True, "temperature": 1.0}, say)]
    assert chat(memory=notes).generate_until(asked)[0].text.startswith("first 1") and notes.kept == []


def test_conversations_of_texts_and_images() -> None:
    shown = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "image", "url": shown}, {"type": "text", "text": "and"}] * 2},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": [{"type": "text", "text": "why?"}]},
    ]
    turns = conversation(messages, "mmmu")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in turns[1]["content"]] == ["image", "text", "image", "text"]
    assert turns[1]["content"][0]["image"].mode == "RGB" and turns[3]["content"][0]["text"] == "why?"
    with pytest.raises(UserError, match="The task clips shows video"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "clips")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("batchsize=3", "--model_args has no batchsize; it has pretrained, dtype"),
        ("dtype=half", "dtype=half is none of float32, bfloat16, float16"),
        ("batch_size=0", "batch_size is 0; give a whole number from 1"),
        ("batch_size=auto", "batch_size is 'auto'"),
        ("pretrained=/nowhere/at/all", "There is no model folder /nowhere/at/all"),
        ("fingerprint=w0123456789abcdef", "--model_args names w0123456789abcdef"),
    ],
)
def test_wrong_model_args_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UnimmChat.create_from_arg_string(arguments)


def test_other_kinds_of_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="not loglikelihood"):
        chat().loglikelihood([])
    with pytest.raises(UserError, match="not multi_round"):
        chat().generate_until_multi_round([])


def test_the_cache_is_refused_without_the_weights_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = unimm.load(device="cpu")
    found = short_fingerprint(model)
    assert simple_parse_args_string(f"fingerprint={found}") == {"fingerprint": found}  # and not a number
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--use_cache", "here"])
    with pytest.raises(UserError, match=f"add fingerprint={found} to --model_args"):
        UnimmChat.create_from_arg_string("device=cpu")
    assert UnimmChat.create_from_arg_string(f"device=cpu,fingerprint={found}").device == torch.device("cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    assert short_fingerprint(model) != found


def test_lmms_eval_finds_the_class_by_its_entry_point() -> None:
    from lmms_eval.models import get_model

    assert get_model("unimm") is UnimmChat and get_model("unimm_chat") is UnimmChat


def test_the_doctor_loads_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = lmms_plugin.lmms_finding(11)
    assert finding is not None and finding.ok and finding.number == 11
    assert finding.found == "--model unimm is unimm.evaluation.understanding.lmms_model.UnimmChat"
    monkeypatch.setattr(lmms_plugin, "entry_points", lambda **_: [])
    finding = lmms_plugin.lmms_finding(11)
    assert finding is not None and not finding.ok and "no entry point unimm in lmms_eval.models" in finding.line()
    broken = SimpleNamespace(load=lambda: lambda: SimpleNamespace(chat_class_path="unimm.nowhere.Chat"))
    monkeypatch.setattr(lmms_plugin, "entry_points", lambda **_: [broken])
    finding = lmms_plugin.lmms_finding(11)
    assert finding is not None and not finding.ok and "ModuleNotFoundError" in finding.line()


def test_the_command_doctor_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("unimm.mllm.loading.load_unchecked", lambda path: (None, None))
    monkeypatch.setattr("unimm.mllm.doctor.examine", lambda model, processor: iter(()))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith(" 1 ok   lmms-eval: --model unimm")
    monkeypatch.setattr(lmms_plugin, "entry_points", lambda **_: [])
    assert cli.main(["doctor"]) == 1


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_5_vl"])
def test_questions_are_asked_in_the_hosts_own_template(family: str) -> None:
    host, texts = tiny_host(family)
    texts.bos_token = texts.eos_token
    texts.chat_template = host_templates.OF_FAMILY[family]
    model = ChatModel(*attach(host, tiny_tokenizer(host, "siglip_vision_model")[0], texts), batch_size=2)
    model.task_dict = {"first": {"test": [{"question": "what?"}, {"question": "two  spaces"}]}}
    answers = model.generate_until([request(n, "first", {"max_new_tokens": 8}, say) for n in range(2)])
    for document, answer in zip(model.task_dict["first"]["test"], answers, strict=True):
        asked = [{"role": "user", "content": document["question"]}]
        ids = texts.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        written = host.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer.text == texts.decode(written, skip_special_tokens=True).strip()
        assert answer.token_counts.input_tokens == ids["input_ids"].shape[1]
