"""Two replicas under Ray Serve, one killed under load: every request is answered, and rightly.

Runs in an environment with the extra `ray`; without it this file is skipped.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

import openai
import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions

import unimm
from tests.serving.clients import about, image_of
from unimm.chat import ChatSession
from unimm.data.shapes import render
from unimm.data.shapes.world import sample_scene
from unimm.errors import UserError
from unimm.serving.ray_app import Options, app

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS, DISTINCT = 200, 8, 20
PORT = 18_432
PROMPTS = ("a red circle", "a blue square", "a green triangle", "two circles", "a yellow square")


def replica_processes() -> list[psutil.Process]:
    """The processes of the model's replicas that this process has started, by way of Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:default:Replica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=PORT))
    serve.run(app(Options(replicas=2)))
    yield f"http://127.0.0.1:{PORT}/v1"
    serve.shutdown()
    ray.shutdown()


def scene(number: int) -> Any:
    return render(sample_scene(np.random.default_rng(number)))


def ask(client: openai.OpenAI, number: int) -> bytes | str:
    """Send request `number`: the even ones draw, the odd ones ask about an image."""
    if number % 2 == 0:
        prompt = PROMPTS[number // 2 % len(PROMPTS)]
        drawn = client.images.generate(prompt=prompt, extra_body={"seed": number})
        return image_of(drawn.data[0].b64_json).tobytes()
    messages: Any = [about(scene(number), "Describe this picture.")]
    answer = client.chat.completions.create(model="unimm", messages=messages)
    return answer.choices[0].message.content or ""


def alone(parts: tuple[Any, Any], number: int) -> bytes | str:
    """The right answer to request `number`, from the Python API."""
    session = ChatSession(*parts)
    if number % 2 == 0:
        return session.draw(PROMPTS[number // 2 % len(PROMPTS)], seed=number)[0].tobytes()
    return session.ask("Describe this picture.", scene(number))


def test_a_killed_replica_loses_no_request(url: str) -> None:
    parts = unimm.load()
    expected = [alone(parts, number) for number in range(DISTINCT)]
    assert len(set(expected)) > DISTINCT // 2
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    before = replica_processes()
    assert len(before) == 2
    answers: dict[int, bytes | str] = {}

    def one(number: int) -> None:
        answers[number] = ask(client, number % DISTINCT)

    start = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        pending = [pool.submit(one, number) for number in range(REQUESTS)]
        while len(answers) < REQUESTS // 4:
            time.sleep(0.01)
            assert not any(each.done() and each.exception() for each in pending)
        before[0].kill()
        killed_at = len(answers)
        failures = [error for each in pending if (error := each.exception()) is not None]
    seconds = time.monotonic() - start
    assert killed_at < REQUESTS // 2
    assert failures == []
    wrong = [number for number, answer in answers.items() if answer != expected[number % DISTINCT]]
    assert (len(answers), wrong) == (REQUESTS, [])
    print(f"{REQUESTS} requests in {seconds:.1f} s, killed after {killed_at}")
    deadline = time.monotonic() + 120
    while len(alive := [each.pid for each in replica_processes()]) < 2:
        assert time.monotonic() < deadline, "the killed replica has not been replaced"
        time.sleep(0.5)
    assert before[0].pid not in alive


def test_streams_errors_and_hosts_are_the_apps(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    events = list(client.images.generate(prompt="a red circle", stream=True, partial_images=2, extra_body={"seed": 3}))
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert Counter(event.type for event in events) == {partial: 2, completed: 1}
    expected = ChatSession(*unimm.load()).draw("a red circle", seed=3)[0]
    assert image_of(events[-1].b64_json).tobytes() == expected.tobytes()
    with pytest.raises(openai.BadRequestError, match="The prompt is empty"):
        client.images.generate(prompt=" ")
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(default_headers={"Host": "elsewhere.example"}).models.list()


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="max_replicas is 1 and replicas is 2"):
        app(Options(replicas=2, max_replicas=1))
    with pytest.raises(UserError, match="kept_images is 3"):
        app(Options.model_validate({"serving": {"kept_images": 3}}))
