"""Fuzz the server: requests made from its OpenAPI description, valid and broken, none of which may be answered by 5xx.

    python eval/fuzz_serving.py --count 2000

The server runs in this process, over a random model of the smallest size, or is the one at `--url`. Prints the answers
by route and status; exit code 1 if one was 5xx or the server did not answer afterwards.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from unimm.errors import UserError, run_main
from unimm.mllm import attach
from unimm.serving.app import create_app
from unimm.serving.engine import Engine
from unimm.serving.run import serving
from unimm.serving.settings import ServingSettings
from unimm.testing.hosts import tiny_host, tiny_tokenizer

Counts = Counter[tuple[str, int]]
_SECONDS = 60
_GETS = 5


@contextmanager
def tiny_server() -> Iterator[str]:
    """Serve a random model of the smallest size on a free port; yield its address."""
    torch.set_num_threads(1)
    host, text_tokenizer = tiny_host("qwen3")
    image_tokenizer, _ = tiny_tokenizer(host, "siglip_vision_model")
    engine = Engine(*attach(host, image_tokenizer, text_tokenizer))
    with serving(create_app(engine, ServingSettings(max_new_tokens=4, max_n=2))) as url:
        yield url


def fuzz(url: str, count: int, number: int) -> tuple[Counts, list[str]]:
    """Send `count` requests, nearly all of them posts, half of them valid.

    Args:
        number: seed of the requests.

    Returns:
        The number of answers by (operation, status), and the requests that were answered with 5xx.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: Any = list(schema.get_all_operations())
    operations = [result.ok() for result in found]
    counts: Counts = Counter()
    failures: list[str] = []
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    gets = [operation for operation in operations if operation not in posts]
    for operation in gets:  # they have hardly anything that could be broken
        _send(url, operation, GenerationMode.POSITIVE, _GETS, number, counts, failures)
    each = -(-(count - counts.total()) // (2 * len(posts)))
    for operation in posts:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _send(url, operation, mode, each, number, counts, failures)
    return counts, failures


def _send(url: str, operation: Any, mode: Any, count: int, number: int, counts: Counts, failures: list[str]) -> None:
    """Send `count` requests to one operation."""
    try:
        cases = operation.as_strategy(generation_mode=mode)

        @seed(number)
        @settings(
            max_examples=count,
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def send(case: Any) -> None:
            answer = case.call(base_url=url, timeout=_SECONDS)
            counts[operation.label, answer.status_code] += 1
            if answer.status_code >= 500:
                failures.append(f"{answer.status_code}: {case.as_curl_command()[:2000]}")

        send()
    except (schemathesis.errors.LoaderError, schemathesis.errors.InvalidSchema) as error:
        raise UserError(f"The OpenAPI description of {operation.label} is broken: {error}") from error


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Fuzz the server's OpenAPI description.")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="requests (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--url", help="a running server (default: one over a tiny model)")
    arguments = parser.parse_args()
    if arguments.url:
        counts, failures = fuzz(arguments.url, arguments.count, arguments.seed)
    else:
        with tiny_server() as url:
            counts, failures = fuzz(url, arguments.count, arguments.seed)
    for (operation, status), times in sorted(counts.items()):
        print(f"{operation:32} {status}  {times}")
    print(f"{counts.total()} requests, {len(failures)} answered with 5xx")
    print("\n".join(failures[:10]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_main(main, name="fuzz_serving"))
