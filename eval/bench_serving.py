"""Measure the server under load: many clients, text and images mixed, against the same requests one by one.

    python eval/bench_serving.py --clients 64 --requests 256

The embedded model is served in this process, and called over HTTP. First each request alone, one after the other, which
gives the answers that are right and the throughput without batches; then all of them from `--clients` threads at once.
Reports requests per second, p50 and p95 of the latency, resident memory, and how many answers were lost or differ.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil

import unimm
from unimm.data.shapes import render, sample_prompt, sample_scene
from unimm.errors import UserError, run_main
from unimm.evaluation.runs.html import data_uri
from unimm.runs.report import Report
from unimm.serving.app import create_app
from unimm.serving.engine import Engine
from unimm.serving.run import serving
from unimm.serving.settings import EngineSettings, ServingSettings

Plan = tuple[str, dict[str, Any]]
"""The path of a request and its body."""
_TRIES = 100


@contextmanager
def served(model: str | None, batch_tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Serve a model on a free port; yield its address, and a list that fills with the sizes of batches."""
    engine = Engine(*unimm.load(model), EngineSettings(batch_tokens=batch_tokens))
    app = create_app(engine, ServingSettings())
    sizes: list[int] = []
    report = engine.on_batch
    assert report is not None

    def on_batch(kind: str, size: int, seconds: float) -> None:
        sizes.append(size)
        report(kind, size, seconds)

    engine.on_batch = on_batch
    with serving(app) as url:
        yield url, sizes


def plans(count: int, seed: int) -> list[Plan]:
    """Return requests, half of them questions about an image, half of them prompts of images."""
    rng = np.random.default_rng(seed)
    found: list[Plan] = []
    for number in range(count):
        if number % 2:
            prompt = sample_prompt(rng, "two_object", split="test").prompt
            found.append(("images/generations", {"prompt": prompt, "seed": number}))
        else:
            url = data_uri(render(sample_scene(rng)))
            image = {"type": "image_url", "image_url": {"url": url}}
            parts = [image, {"type": "text", "text": "Describe this picture."}]
            found.append(("chat/completions", {"messages": [{"role": "user", "content": parts}]}))
    return found


def ask(url: str, plan: Plan) -> tuple[str, float]:
    """Send a request, again if the server is busy; return its answer and its seconds, the waiting included."""
    path, body = plan
    data, start = json.dumps(body).encode(), time.perf_counter()
    for _ in range(_TRIES):
        request = urllib.request.Request(f"{url}/v1/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            time.sleep(float(error.headers["Retry-After"]))
            continue
        seconds = time.perf_counter() - start
        text = found["choices"][0]["message"]["content"] if "choices" in found else found["data"][0]["b64_json"]
        return text, seconds
    raise UserError(f"The server was busy {_TRIES} times: ask with fewer clients.")


def figures(answers: Sequence[tuple[str, float]], seconds: float) -> dict[str, float]:
    """Return requests per second and the latency's p50 and p95 in seconds."""
    latency = np.array([each for _, each in answers])
    return {
        "requests_per_second": round(len(answers) / seconds, 3),
        "p50": round(float(np.percentile(latency, 50)), 3),
        "p95": round(float(np.percentile(latency, 95)), 3),
    }


def measured(run: Callable[[], list[tuple[str, float]]]) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """Run, and return the answers and their figures."""
    start = time.perf_counter()
    answers = run()
    return answers, figures(answers, time.perf_counter() - start)


def together(url: str, requests: Sequence[Plan], clients: int) -> list[tuple[str, float]]:
    """Send all requests from this number of threads; return the answers in the order of the requests."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(partial(ask, url), requests))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure the server under load.")
    parser.add_argument("--model", metavar="PATH", help="default: the embedded model")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], metavar="N")
    parser.add_argument("--requests", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-tokens", type=int, default=EngineSettings().batch_tokens, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--json", metavar="FILE", help="report as one JSON object; - for standard output")
    arguments = parser.parse_args()
    report = Report(arguments.json)
    requests = plans(arguments.requests, arguments.seed)
    with served(arguments.model, arguments.batch_tokens) as (url, sizes):
        for plan in requests[:2]:
            ask(url, plan)
        right, alone = measured(lambda: [ask(url, plan) for plan in requests])
        report.add(one_by_one=alone)
        report.say(f"one by one   {alone}")
        for clients in arguments.clients:
            sizes.clear()
            memory = psutil.Process().memory_info().rss
            answers, found = measured(partial(together, url, requests, clients))
            found["speedup"] = round(found["requests_per_second"] / alone["requests_per_second"], 2)
            found["memory_growth_mb"] = round((psutil.Process().memory_info().rss - memory) / 2**20, 1)
            found["mean_batch"] = round(float(np.mean(sizes)), 2)
            found["lost"] = len(requests) - len(answers)
            found["different"] = sum(one[0] != two[0] for one, two in zip(right, answers, strict=True))
            report.add(**{f"clients_{clients}": found})
            report.say(f"{clients:3} clients  {found}")
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_serving"))
