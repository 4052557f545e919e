"""A few requests made from the OpenAPI description, valid and broken; `eval/fuzz_serving.py` sends thousands."""

from eval.fuzz_serving import fuzz
from tests.serving.conftest import Served


def test_no_request_made_from_the_description_fails_the_server(tiny_served: Served) -> None:
    counts, failures = fuzz(tiny_served.url, 60, 0)
    assert failures == [] and counts.total() >= 40
    statuses = {status for _, status in counts}
    assert 200 in statuses and 400 in statuses and statuses <= {200, 400, 403, 404, 405, 413, 429}, counts
