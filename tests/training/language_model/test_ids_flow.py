"""Drawings from ids: the loss of the pixels to the bit, packed or not, and only of the model's own tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.language_model.tiny_host import tiny_host, tiny_image_tokenizer
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.text.collators import FlowCollator
from unimm.encoding import EncodeConfig, Encoder
from unimm.errors import UserError
from unimm.mllm import UnimmProcessor
from unimm.tokenizer import ImageTokenizer
from unimm.training.language_model.recipe import unigram_entropies
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments


@pytest.fixture(scope="module")
def host() -> tuple[Any, UnimmProcessor]:
    torch.manual_seed(0)
    return tiny_host()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes data set, written to a folder with captions."""
    from unimm.data.shapes.datasets import ShapesImages

    folder, world = tmp_path_factory.mktemp("pictures"), ShapesImages(12, 0)
    for n in range(12):
        world[n]["image"].save(folder / f"{n:02d}.png")
        (folder / f"{n:02d}.txt").write_text(world[n]["text"])
    return folder


def encode(tokenizer: ImageTokenizer, processor: Any, source: Path, folder: Path, rows_per_shard: int = 12) -> Path:
    Encoder(tokenizer, processor, EncodeConfig(str(source), rows_per_shard=rows_per_shard), folder).run()
    return folder


@pytest.fixture(scope="module")
def ids(host: tuple[Any, UnimmProcessor], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = host
    return encode(model.image_tokenizer, processor.image_processor, images, tmp_path_factory.mktemp("ids"))


def loss_of(
    host: tuple[Any, UnimmProcessor], folder: Path, samples: list[Any], pack_length: int | None
) -> torch.Tensor:
    model, processor = host
    collate = FlowCollator(processor, pack_length=pack_length)
    arguments = HostTrainingArguments(str(folder), max_steps=1, per_device_train_batch_size=6, disable_tqdm=True)
    trainer = HostTrainer(
        model, arguments, processor=processor, data_collator=collate, train_dataset=samples, flow_weights={"draw": 1.0}
    )
    loss = trainer.compute_loss(model.train(), collate(samples))
    model.zero_grad()
    loss.backward()
    return torch.stack([loss.detach(), model.get_input_embeddings().weight.grad.norm()])


def samples_of(source: Path, null: float = 0.3) -> list[dict[str, Any]]:
    flow = FlowConfig("drawing", source=str(source), null_prompt_prob=null)
    stream = Mixture(MixtureConfig({"draw": flow}, seed=4, eval_share=0))
    return sorted((stream[n] for n in range(12)), key=lambda sample: sample["messages"][0]["content"][0]["text"])


@pytest.mark.parametrize("pack_length", [None, 120])
def test_the_loss_from_ids_is_that_from_pixels(
    host: tuple[Any, UnimmProcessor], images: Path, ids: Path, tmp_path: Path, pack_length: int | None
) -> None:
    drawn, encoded = samples_of(images, 0.0), samples_of(ids, 0.0)
    texts = [[s["messages"][0]["content"][0]["text"] for s in samples] for samples in (drawn, encoded)]
    assert texts[0] == texts[1]
    from_pixels = loss_of(host, tmp_path, drawn, pack_length)
    assert torch.equal(loss_of(host, tmp_path, encoded, pack_length), from_pixels)
    encoded[0]["messages"][1]["content"][0]["ids"][3] ^= 1
    assert not torch.equal(loss_of(host, tmp_path, encoded, pack_length), from_pixels)


def test_the_order_is_a_function_of_the_position(ids: Path) -> None:
    flow = FlowConfig("drawing", source=str(ids), null_prompt_prob=0.3)
    stream, again = (Mixture(MixtureConfig({"draw": flow}, seed=4, eval_share=0)) for _ in range(2))
    texts = [stream[n]["messages"][0]["content"][0]["text"] for n in range(60)]
    assert [again[n]["messages"][0]["content"][0]["text"] for n in (59, 8)] == [texts[59], texts[8]]
    assert 5 < sum(text == "" for text in texts) < 35
    first = [stream[n]["messages"][1]["content"][0]["ids"].tolist() for n in range(24)]
    assert sorted(first[:12]) == sorted(first[12:]) and first[:12] != first[12:]


def test_ids_of_another_tokenizer_are_refused(
    host: tuple[Any, UnimmProcessor], images: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = host

    def entropies(folder: Path) -> dict[str, float]:
        return unigram_entropies(Mixture(MixtureConfig({"draw": FlowConfig("drawing", source=str(folder))})), model)

    assert 0 < entropies(ids)["draw"] <= 3.4658
    assert "draw: 12 sequences of ids; unigram entropy" in capsys.readouterr().out
    other = tiny_image_tokenizer()
    theirs = encode(other, processor.image_processor, images, tmp_path)
    names = f"tokenizer {other.fingerprint[:12]} .* names the tokenizer {model.image_tokenizer.fingerprint[:12]}"
    with pytest.raises(UserError, match=names):
        entropies(theirs)
