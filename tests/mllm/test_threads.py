"""Eight threads with one processor and one model: every call gets what it gets alone."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import AutoProcessor

from tests.mllm import tiny
from unimm.chat import ChatSession
from unimm.mllm import attach
from unimm.testing.hosts import tiny_host


def in_threads(calls: list[Any], times: int) -> None:
    """Hold what 8 threads get from `calls`, each `times` times over, to what each gives alone."""
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: calls[n % len(calls)](), range(len(calls) * times)))
    wrong = [n % len(calls) for n, got in enumerate(found) if got != expected[n % len(calls)]]
    assert not wrong, f"{len(wrong)} of {len(found)} calls"


def test_a_processor_keeps_nothing_between_calls(tmp_path: Any) -> None:
    _, processor = tiny.unified()
    red, blue, image = tiny.image("red"), tiny.image("blue"), processor.image_token
    texts = ["one", "a photo of a red circle"]
    in_threads(
        [
            lambda: processor(text=f"one{image} two{image}", images=[red, blue], drawn=[True, False]).input_ids,
            lambda: processor(text=[f"one{image}", texts[1]], images=[red], padding=True).input_ids,
            lambda: processor(text=texts, generation_mode="image", padding="max_length", max_length=40).input_ids,
            lambda: [processor(text=texts).input_ids, processor.null_prompt_ids()],
        ],
        times=100,
    )
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_conversations_on_one_model_do_not_meet(family: str) -> None:
    host, texts = tiny_host(family)
    parts = attach(host, tiny.image_tokenizer(), texts)
    red, blue = tiny.image("red"), tiny.image("blue")

    def talk(question: str, *images: Any) -> list[Any]:
        session = ChatSession(*parts, max_new_tokens=4)
        answers = [session.ask(question, list(images)), "".join(session.ask("and now?", stream=True))]
        drawn = session.draw(question, num_images=2, seed=5, guidance_scale=2.0)
        (edited,) = session.edit("make it red", strength=0.5, seed=6)
        *_, last = session.draw_stream("two", seed=7, parallel_tokens=4, history=True)
        written = session.respond("and now?", seed=8, max_new_tokens=24)
        images = [*drawn, edited, *last.images, *(part for part in written if not isinstance(part, str))]
        return [*answers, *(part for part in written if isinstance(part, str)), *(image.tobytes() for image in images)]

    questions: list[tuple[Any, ...]] = [("what is there?", red, blue), ("two",), ("is it blue? yes or no", blue)]
    in_threads([lambda question=question: talk(*question) for question in questions], times=4)
