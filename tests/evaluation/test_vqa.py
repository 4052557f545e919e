"""VQA models against bare forwards of their own networks, one image and question at a time."""

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    BlipForQuestionAnswering,
    LlavaForConditionalGeneration,
    ViltForQuestionAnswering,
)

from tests.evaluation.tiny_vqa import ANSWERS, save_blip, save_llava, save_qwen_vl, save_vilt
from unimm.errors import UserError
from unimm.evaluation.vqa import MPLUG_ID, load_vqa_model
from unimm.runs.provenance import model_fingerprint

QUESTIONS = ["is there a red circle?", "red?", "is a blue circle there?", "a?", "is there a circle?", "blue?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    return {"blip": save_blip(root / "blip"), "vilt": save_vilt(root / "vilt"), "chat": save_llava(root / "llava")}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(16, 16), (24, 16), (16, 16), (16, 40), (24, 16), (16, 16)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def plain_blip(folder, image, question):
    model, processor = BlipForQuestionAnswering.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    token_ids = model.generate(**processor(image, question, return_tensors="pt"), max_new_tokens=16)
    return processor.decode(token_ids[0], skip_special_tokens=True).strip()


def plain_vilt(folder, image, question):
    model, processor = ViltForQuestionAnswering.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        return ANSWERS[int(model(**processor(image, question, return_tensors="pt")).logits.argmax())].strip()


def plain_chat(folder, image, question):
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    text = (
        f"<|im_start|>user\n<image>{question} Answer with a single word or phrase.<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=image, text=text, return_tensors="pt")
    token_ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["blip", "vilt", "chat"])
def test_answers_are_those_of_one_request_at_a_time(folders, images, kind):
    vqa_model = load_vqa_model(folders[kind], batch_size=2)
    plain = {"blip": plain_blip, "vilt": plain_vilt, "chat": plain_chat}[kind]
    expected = [plain(folders[kind], image, question) for image, question in zip(images, QUESTIONS, strict=True)]
    found = vqa_model.answer(images, QUESTIONS)
    assert found == expected
    assert len(set(found)) > 1  # random models that always say the same would show nothing
    assert [yes_no.answer for yes_no in vqa_model.answer_yes_no(images, QUESTIONS)] == expected or kind == "chat"
    described = vqa_model.describe()
    assert (described["name"], described["kind"]) == (folders[kind].name, kind)
    assert (described["dtype"], described["device"]) == ("float32", "cpu")
    assert described["sha256"] == model_fingerprint(vqa_model.model) and len(described["sha256"]) == 64


def test_requests_of_one_shape_share_a_forward(folders, images, monkeypatch):
    vqa_model, sizes = load_vqa_model(folders["vilt"], batch_size=2), []
    run = vqa_model._answer
    monkeypatch.setattr(vqa_model, "_answer", lambda inputs: (sizes.append(len(inputs["input_ids"])), run(inputs))[1])
    vqa_model.answer([images[0]] * 5, ["red?"] * 5)
    assert sizes == [2, 2, 1]


def test_vilt_leaves_the_global_random_state_alone(folders, images):
    vqa_model = load_vqa_model(folders["vilt"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = vqa_model.answer(images[:1], QUESTIONS[:1])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert vqa_model.answer(images[:1], QUESTIONS[:1]) == first


def test_a_chat_model_gives_the_probability_of_yes(folders, images):
    vqa_model = load_vqa_model(folders["chat"])
    model, processor = vqa_model.model, vqa_model.processor
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "No"])
    for image, question, found in zip(images, QUESTIONS, vqa_model.answer_yes_no(images, QUESTIONS), strict=True):
        text = f"<|im_start|>user\n<image>{question} Answer yes or no.<|im_end|>\n<|im_start|>assistant\n"
        with torch.no_grad():
            logits = model(**processor(images=image, text=text, return_tensors="pt")).logits[0, -1].double()
        p = torch.softmax(logits, dim=0)
        assert found.probability == pytest.approx(float(p[yes] / (p[yes] + p[no])), abs=1e-5)
        assert found.answer == ("yes" if p[yes] >= p[no] else "no")
        assert found.guessed == (int(p.argmax()) not in (yes, no))


def test_a_yes_that_the_judge_would_not_have_written_is_a_guess(folders, images, monkeypatch):
    """The same logits with the scores of yes and no raised above all others, and lowered below them."""
    vqa_model = load_vqa_model(folders["chat"])
    yes, no = vqa_model.processor.tokenizer.convert_tokens_to_ids(["yes", "No"])
    forward = type(vqa_model.model).forward
    for change, guessed in ((100.0, False), (-100.0, True)):

        def shifted(self, *args, change=change, **options):
            output = forward(self, *args, **options)
            output.logits[..., [yes, no]] += change
            return output

        monkeypatch.setattr(type(vqa_model.model), "forward", shifted)
        assert [found.guessed for found in vqa_model.answer_yes_no(images, QUESTIONS)] == [guessed] * len(images)

    def broken(self, *args, **options):
        output = forward(self, *args, **options)
        output.logits.fill_(float("nan"))
        return output

    monkeypatch.setattr(type(vqa_model.model), "forward", broken)
    with pytest.raises(UserError, match="scores that are not finite"):
        vqa_model.answer_yes_no(images, QUESTIONS)


def test_qwen_vl_judges_images_of_any_size(images, tmp_path):
    pytest.importorskip("torchvision", reason="Qwen-VL's processor needs torchvision")
    vqa_model = load_vqa_model(save_qwen_vl(tmp_path), batch_size=3)
    alone = [vqa_model.answer([image], [question])[0] for image, question in zip(images, QUESTIONS, strict=True)]
    assert vqa_model.answer(images, QUESTIONS) == alone and len(set(alone)) > 1
    model, processor = vqa_model.model, vqa_model.processor
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "No"])
    for image, question, found in zip(images, QUESTIONS, vqa_model.answer_yes_no(images, QUESTIONS), strict=True):
        text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question} Answer yes or no.<|im_end|>\n"
        inputs = processor(images=[image], text=[text + "<|im_start|>assistant\n"], return_tensors="pt")
        with torch.no_grad():
            p = torch.softmax(model(**inputs).logits[0, -1].double(), dim=0)
        assert found.probability == pytest.approx(float(p[yes] / (p[yes] + p[no])), abs=1e-4)


def test_the_model_that_comes_with_the_library_can_judge():
    from unimm.mllm.loading import default_model_path

    vqa_model = load_vqa_model(default_model_path())
    red = Image.new("RGB", (64, 64), "white")
    red.paste("red", (16, 16, 48, 48))
    answers = vqa_model.answer([red, red], ["Is there a red square?", "Is there a blue circle?"])
    assert vqa_model.kind == "chat" and len(answers) == 2


def test_bad_judges(folders, images, tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load_vqa_model(tmp_path / "absent")
    with pytest.raises(UserError, match="No kind of VQA model 'blip2'; there are blip, vilt, chat, mplug"):
        load_vqa_model(folders["blip"], kind="blip2")
    with pytest.raises(UserError, match="a VQA model of the kind vilt, not blip"):
        load_vqa_model(folders["vilt"], kind="blip")
    holes = shutil.copytree(folders["vilt"], tmp_path / "holes")
    weights = load_file(holes / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), holes / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="holes is broken: loaded .* missing 1"):
        load_vqa_model(holes)
    with pytest.raises(UserError, match="2 images and 1 questions"):
        load_vqa_model(folders["blip"]).answer(images[:2], QUESTIONS[:1])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="a bert model, which answers no questions about images"):
        load_vqa_model(tmp_path)


def test_mplug_asks_modelscopes_pipeline(monkeypatch, images):
    with pytest.raises(UserError, match="mPLUG needs the package modelscope"):
        load_vqa_model("mplug")
    asked = []

    def pipeline(task: str, model: str, device: str):
        asked.append((task, model, device))
        network = torch.nn.Linear(2, 2)

        class Pipeline:
            def __init__(self) -> None:
                self.model = network

            def __call__(self, request):
                return {"text": f" {request['question']} {request['image'].size[0]}"}

        return Pipeline()

    tasks = SimpleNamespace(visual_question_answering="visual-question-answering")
    for name, content in {
        "modelscope": {},
        "modelscope.pipelines": {"pipeline": pipeline},
        "modelscope.utils": {},
        "modelscope.utils.constant": {"Tasks": tasks},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"modelscope": "1.0"}.get(name, "0"))
    vqa_model = load_vqa_model("mplug", device="cpu")
    assert asked == [("visual-question-answering", MPLUG_ID, "cpu")]
    assert vqa_model.answer(images[:2], ["red?", "blue?"]) == ["red? 16", "blue? 24"]
    assert vqa_model.describe()["kind"] == "mplug" and vqa_model.describe()["version"] == "modelscope 1.0"
